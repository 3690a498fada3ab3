"""Several processes that prune one model together, started by torchrun: all of torch.distributed is here.

Every process is a rank: it has the model, runs calibration batches of its own, solves a part of the layers, and applies
the edits of all. Rank 0 writes and prints. `current` is what the rest of the package asks; without torchrun it is a
`Ranks`, whose methods return what they are given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from maskopt.errors import MaskoptError, RankLostError
from maskopt.files import first_line
from maskopt.launch import first_rank, launched

__all__ = ["SECONDS", "Ranks", "current", "first_to_tell", "joined", "local_device"]

SECONDS = "MASKOPT_RANK_SECONDS"
"""Environment variable: seconds that a rank waits for another one, by default half an hour.

A rank that is killed is noticed at once where its connections close. The time is for one that hangs, or a machine that
is gone, and must be longer than the longest solve of a layer."""

_SECONDS = 1800.0

T = TypeVar("T")


class Ranks:
    """The processes that prune a model together; this one is alone.

    Attributes
    ----------
    number : int
        Of this process, from 0.
    count : int
    """

    number = 0
    count = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.number == 0

    def spread(self, costs: Sequence[float]) -> list[int]:
        """Return which rank does each of some jobs: the dearest first, each to the rank with the least to do.

        Parameters
        ----------
        costs : sequence of float
        """
        loads, found = [0.0] * self.count, [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
            found[job] = loads.index(min(loads))
            loads[found[job]] += costs[job]
        return found

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def end(self) -> None:
        """Wait until no rank needs another one any more: one that leaves earlier closes connections that are in use."""

    def gathered(self, value: T) -> list[T]:
        """Return what all ranks gave, in order; anything that can be pickled."""
        return [value]

    def told(self, value: T, source: int, place: int) -> T:
        """Hand one rank's value, which can be pickled, to another one; to others nothing happens."""
        return value

    def moved(self, tensor: Tensor | None, empty: Callable[[], Tensor], source: int, place: int) -> Tensor | None:
        """Move a tensor from one rank to another one; None everywhere else.

        Parameters
        ----------
        tensor : Tensor or None
            At the source.
        empty : callable
            Makes a contiguous tensor of the same shape and type to receive it.
        source, place : int
        """
        return tensor

    def shared(self, tensor: Tensor | None, empty: Callable[[], Tensor], source: int) -> Tensor:
        """Return one rank's tensor at all of them.

        Parameters
        ----------
        tensor : Tensor or None
            At the source.
        empty : callable
            As for `moved`.
        source : int
        """
        assert tensor is not None, "the only rank is the source"
        return tensor

    def averaged(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Return means of tensors over all ranks, the same bits everywhere; where there is one rank, the tensors.

        Parameters
        ----------
        tensors : sequence of Tensor or None
            Floating-point; may be changed in place. None counts as zeros, and where it is None at all ranks, so is the
            mean.
        like : sequence of Tensor
            Of the same shapes and on the same device.

        Returns
        -------
        list of Tensor or None
            Of several ranks in float32, or float64.
        """
        return list(tensors)

    def spoken(self, value: T, source: int) -> T:
        """Return one rank's value at all of them: tuples, lists and dicts of tensors and what can be pickled.

        Where there are several ranks, tensors come to the main memory.

        Parameters
        ----------
        value : object
            Ignored but at the source.
        source : int
        """
        return value


class _Joined(Ranks):
    """One of several processes, in torch's default process group."""

    def __init__(self) -> None:
        self.number, self.count = dist.get_rank(), dist.get_world_size()
        self._ends = 0

    def barrier(self) -> None:
        self.gathered(None)  # a barrier of its own would need to know the devices

    def end(self) -> None:
        # By the store: the last message of a collective may still be on its way when another rank has received its own.
        self._ends += 1
        key = f"maskopt: end {self._ends}"
        with _answering():
            if _store.add(f"{key}, ranks", 1) == self.count:
                _store.set(key, "reached")
            _store.wait([key], timedelta(seconds=_timeout()))

    def gathered(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.count
        with _answering():
            dist.all_gather_object(found, value)
        return found

    def told(self, value: T, source: int, place: int) -> T:
        if source == place or self.number not in (source, place):
            return value
        held: list[Any] = [value if self.number == source else None]
        with _answering():
            if self.number == source:
                dist.send_object_list(held, place, device=_CPU)
            else:
                dist.recv_object_list(held, source, device=_CPU)
        found: T = held[0]
        return found

    def moved(self, tensor: Tensor | None, empty: Callable[[], Tensor], source: int, place: int) -> Tensor | None:
        if source == place:
            return tensor
        with _answering():
            if self.number == source:
                assert tensor is not None, "the source has it"
                dist.send(tensor.contiguous(), place)
            if self.number == place:
                received = empty()
                dist.recv(received, source)
                return received
        return None

    def shared(self, tensor: Tensor | None, empty: Callable[[], Tensor], source: int) -> Tensor:
        value = empty() if self.number != source or tensor is None else tensor.contiguous()
        with _answering():
            dist.broadcast(value, source)
        return value

    def averaged(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        sums = []
        with _answering():
            present = torch.tensor([tensor is not None for tensor in tensors], dtype=torch.int32, device=like[0].device)
            dist.all_reduce(present)
            for tensor, each, count in zip(tensors, like, present.tolist(), strict=True):
                kind = torch.promote_types(each.dtype, torch.float32)
                total = torch.zeros_like(each, dtype=kind) if tensor is None else tensor.to(kind).contiguous()
                found.append(total if count else None)
                if count:
                    sums.append(dist.all_reduce(total, async_op=True))
            for one in sums:
                one.wait()
        return [None if total is None else total.div_(self.count) for total in found]

    def spoken(self, value: T, source: int) -> T:
        tensors: list[Tensor] = []
        held: list[Any] = [_taken(value, tensors) if self.number == source else None]
        with _answering():
            dist.broadcast_object_list(held, source, device=_CPU)

            def received(kind: _Kind) -> Tensor:
                # As bytes: not all backends know all types.
                if self.number == source:
                    data = tensors.pop(0).cpu().contiguous().view(-1).view(torch.uint8)
                else:
                    data = torch.empty(kind.size, dtype=torch.uint8)
                dist.broadcast(data, source)
                return data.view(kind.dtype).view(kind.shape)

            found: T = _mapped(held[0], _Kind, received)
        return found


_CPU = torch.device("cpu")


class _Kind:
    """Shape and type of a tensor that follows."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.size = tensor.numel() * tensor.element_size()


def _taken(value: Any, tensors: list[Tensor]) -> Any:
    """Return a value without its tensors, which are put into a list."""

    def take(tensor: Tensor) -> _Kind:
        tensors.append(tensor.detach())
        return _Kind(tensor)

    return _mapped(value, Tensor, take)


def _mapped(value: Any, kind: type[Any], change: Callable[[Any], Any]) -> Any:
    """Return tuples, lists and dicts with a change of all values of a type, in order."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(each, kind, change) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(each, kind, change) for each in value)
    return value


_current = Ranks()
_store: Any = None  # a Store; some versions of torch do not export the type


def current() -> Ranks:
    """Return the ranks of this process: those of `joined` inside its block, else itself alone."""
    return _current


@contextmanager
def joined(device: str = "cpu", check: Callable[[str], object] | None = None) -> Iterator[Ranks]:
    """Join the ranks that torchrun has started with this process, if there are several.

    Parameters
    ----------
    device : str
        Where this process's model is: gloo connects CPUs, nccl connects CUDA devices.
    check : callable, optional
        Called with the device; raises an error where it cannot be used. It may be missing on one rank only, which can
        then say so (`first_to_tell`).

    Yields
    ------
    Ranks

    Raises
    ------
    MaskoptError
        If they cannot be reached.
    """
    global _current, _store
    if launched() == 1:
        if check is not None:
            check(device)
        yield _current
        return
    wait = timedelta(seconds=_timeout())
    cuda = device.startswith("cuda")
    with _reaching():
        _store, number, count = next(rendezvous("env://", timeout=wait))
    if check is not None:
        check(device)
    backend = "cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo"
    with _reaching():
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=wait)
    _current = _Joined()
    try:
        yield _current
    finally:
        _current = Ranks()
    # After a failure the group stays until the process ends: taking it down might wait for those that are gone.
    dist.destroy_process_group()


def first_to_tell() -> bool:
    """Return whether this process tells of a failure: of all ranks, the one that first asks; alone, always."""
    if _store is None:
        return first_rank()
    try:
        _store.set_timeout(timedelta(seconds=10))
        return int(_store.add("maskopt: failures told", 1)) == 1
    except RuntimeError:  # it ended with rank 0, without torchrun
        return True


def local_device(name: str) -> str:
    """Return this process's device: of several accelerators of a machine, the one of its local rank.

    Parameters
    ----------
    name : str
        As the user gave it, such as "cuda".

    Raises
    ------
    MaskoptError
        If there are several ranks and this is one device for all.
    """
    if launched() == 1 or name.startswith("cpu"):
        return name
    kind, colon, _ = name.partition(":")
    if colon:
        raise MaskoptError(
            f"The device {name} is a single one, and each of several ranks takes one of its own; use {kind}."
        )
    return f"{kind}:{os.environ.get('LOCAL_RANK', '0')}"


def _timeout() -> float:
    text = os.environ.get(SECONDS, "")
    try:
        seconds = float(text) if text else _SECONDS
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e9:
        raise MaskoptError(f"{SECONDS} must be a number of seconds from 1; it is {text!r}.")
    return seconds


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(
            f"Another rank has ended, or has not answered for {_timeout():g} seconds ({SECONDS}): {first_line(error)}."
        ) from error


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise MaskoptError(f"The ranks cannot be joined: {first_line(error)}.") from error
