"""A device for tests without a GPU: the CPU computes, but tensors do not mix with the CPU's, and waits are counted.

A `PretendTensor` says that it lies on a PrivateUse1 device and holds an ordinary tensor, which every operation is
applied to. So results have the bits of the CPU, whereas what CUDA refuses or waits for is refused or counted here too:

- an operation on tensors of both devices raises, except for scalars (tensors without dimensions) of the CPU in
  elementwise operations, indices on the CPU, and copies;
- the host waits for the device where it reads a value or where the size of a result depends on values
  (`Waits.reads`), and where data is copied to the device (`Waits.uploads`).

Outside of `pretend_device` torch is as it was: whatever asks for devices does not find this one. Gradients are the
exception: torch computes them on registered devices only, and a registration cannot be undone, so they need a process
of their own that calls `register_for_gradients` first.
"""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import set_multithreading_enabled
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["DEVICE", "PretendTensor", "Waits", "pretend_device", "register_for_gradients"]

DEVICE = torch.device("privateuseone", 0)

_MODULE = f"torch.{DEVICE.type}"
_PACKAGE = "maskopt"

# Operations that CUDA waits for: they return a number to the host, or a tensor whose size depends on values, or look
# whether a factorisation failed.
_READS = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "cholesky_inverse",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
}
_INDEXING = {"_index_put_impl_", "index", "index_put", "index_put_"}
_COPIES = {"_to_copy", "copy", "copy_"}
_FILLS = {"fill", "fill_", "masked_fill", "masked_fill_"}  # take scalars of the CPU, like elementwise operations


@dataclass
class Waits:
    """How often the host waited for the device, by operation and line of the package.

    Attributes
    ----------
    reads : Counter of str
        Values that the host read, results whose size depends on values, and copies to the CPU.
    uploads : Counter of str
        Blocking copies to the device.
    """

    reads: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """All of them."""
        return self.reads.total() + self.uploads.total()


_active: list[Waits] = []
"""Where waits are counted: what the innermost `pretend_device` yields."""


class PretendTensor(Tensor):
    """A tensor of the pretend device; `own` holds its values."""

    own: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, own: Tensor) -> PretendTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls, own.shape, strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype, device=DEVICE
        )
        tensor.own = own
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _applied(operation, args, kwargs or {})

    def __repr__(self) -> str:
        return f"PretendTensor({self.own!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.own.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.own.untyped_storage()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, PretendTensor), "the pretend device gives no parameter a tensor of the CPU"
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.own = value.own


@cache
def _written(operation: Any) -> tuple[tuple[int, str], ...]:
    """Return position and name of the arguments that an operation writes to."""
    arguments = enumerate(operation._schema.arguments)
    return tuple(
        (place, one.name) for place, one in arguments if one.alias_info is not None and one.alias_info.is_write
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an argument or a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return an argument or a result with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_changed(one, change) for one in value)
    return value


def _own(tensor: Tensor) -> Tensor:
    return tensor.own if isinstance(tensor, PretendTensor) else tensor


def _applied(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Apply an operation of torch to the tensors that pretend tensors hold."""
    tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    target = kwargs.get("device")
    here = bool(ours) if target is None else torch.device(target).type == DEVICE.type
    if not ours and not here:
        return operation(*args, **kwargs)
    if 0 < len(ours) < len(tensors):
        _refuse_mixture(operation, args, kwargs, tensors)
    _count(operation, args, kwargs, here)
    named = {name: _changed(value, _own) for name, value in kwargs.items()}
    if here and target is not None:
        named["device"] = torch.device("cpu")
    result = operation(*_changed(tuple(args), _own), **named)
    if not here:
        return result
    known = {id(tensor.own): tensor for tensor in ours}  # operations in place return what they were given

    def placed(tensor: Tensor) -> Tensor:
        found = known.get(id(tensor))
        if found is None:
            return PretendTensor(tensor)
        if found.shape != tensor.shape or found.stride() != tensor.stride():
            raise NotImplementedError(f"The pretend device cannot change a tensor's shape in place ({operation}).")
        return found

    return _changed(result, placed)


def _refuse_mixture(operation: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError where CUDA would, for tensors of both devices."""
    name = operation.overloadpacket.__name__
    if name in _COPIES:
        return
    theirs = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
    scalars = name in _FILLS or torch.Tag.pointwise in operation.tags
    if name in _INDEXING and isinstance(args[0], PretendTensor):  # the values that are written, not the indices
        theirs = [tensor for tensor in _tensors(tuple(args[2:])) if not isinstance(tensor, PretendTensor)]
        scalars = True
    written = [args[place] if place < len(args) else kwargs.get(word) for place, word in _written(operation)]
    if any(not isinstance(tensor, PretendTensor) for tensor in _tensors(written)) or not all(
        scalars and tensor.ndim == 0 for tensor in theirs
    ):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! "
            f"({operation})"
        )


def _count(operation: Any, args: Sequence[Any], kwargs: dict[str, Any], here: bool) -> None:
    """Count the wait that an operation means, if any."""
    name = operation.overloadpacket.__name__
    if name in _COPIES:
        source, to_us = (args[1], isinstance(args[0], PretendTensor)) if name == "copy_" else (args[0], here)
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if isinstance(source, PretendTensor) and not to_us:
            _wait("reads", name)  # also where it need not: the host would find nothing there yet
        elif to_us and not isinstance(source, PretendTensor) and waits:
            _wait("uploads", name)
    elif name in _INDEXING:
        index = [one for one in args[1] if one is not None]
        flags = [one for one in index if one.dtype in (torch.bool, torch.uint8)]
        # One value wherever one tensor of flags is true is a masked fill, which needs no number of entries.
        fills = name != "index" and len(index) == len(flags) == 1 and args[2].numel() == 1
        if flags and not fills:
            _wait("reads", name)
        elif not all(isinstance(one, PretendTensor) for one in index):
            _wait("uploads", name)
    elif name in _READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _wait("reads", name)


def _wait(kind: str, name: str) -> None:
    """Count a wait, with the innermost line of the package that led to it."""
    if not _active:
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] != _PACKAGE:
        frame = frame.f_back
    getattr(_active[-1], kind)[f"{name} at {frame.f_globals.get('__name__')}:{frame.f_lineno}"] += 1


class _Operations(TorchDispatchMode):
    """Sees operations that make tensors on the pretend device, or copy to it."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _applied(operation, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees functions that torch hides from dispatch modes, or computes in another way where there is such a mode.

    Tensors of Python numbers are made on the CPU first. Eigenvalues are computed without eigenvectors, as they are
    without a mode: their last digits differ.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.new_tensor and isinstance(args[0], PretendTensor):
            kwargs = {"dtype": args[0].dtype, "device": DEVICE} | kwargs
            function, args = torch.tensor, args[1:]
        if function is torch.linalg.eigvalsh and not args[0].requires_grad:
            with _disable_current_modes():
                values = function(*_changed(tuple(args), _own), **kwargs)
            if not isinstance(args[0], PretendTensor):
                return values
            _wait("reads", "linalg_eigvalsh")
            return PretendTensor(values)
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            if device.type == DEVICE.type:
                return function(*args, **kwargs, device="cpu").to(device)
            kwargs["device"] = device
        return function(*args, **kwargs)


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


@cache
def _register_guard() -> None:
    """Let torch switch to the device, which it does before operations; nothing else knows of the device by that."""
    torch._C._acc.register_python_privateuseone_device_guard(_Guard())


def register_for_gradients() -> None:
    """Make the device an accelerator of this process, for good: only then does torch compute gradients on it."""
    _setup_privateuseone_for_python_backend(DEVICE.type)


@contextmanager
def pretend_device() -> Iterator[Waits]:
    """Let tensors be made on `DEVICE`, and count the waits for it, inside the block.

    Yields
    ------
    Waits
        Of this block, without those of blocks inside it.

    Examples
    --------
    >>> with pretend_device() as waits:
    ...     total = torch.ones(3).to(DEVICE).sum()
    ...     before = waits.reads.total()
    ...     value = float(total)
    >>> value, before, waits.reads.total(), waits.uploads.total()
    (3.0, 0, 1, 1)
    """
    _register_guard()
    waits, outer = Waits(), sys.modules.get(_MODULE)
    if outer is None:
        sys.modules[_MODULE] = types.ModuleType(_MODULE)  # torch imports it before it makes a tensor on the device
    _active.append(waits)
    try:
        # On this thread: others compute gradients only of devices that torch knew when it computed the first one.
        with set_multithreading_enabled(False), _Functions(), _Operations():
            yield waits
    finally:
        _active.pop()
        if outer is None:
            del sys.modules[_MODULE]
