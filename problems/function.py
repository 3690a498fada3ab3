"""An objective given as a torch callable: any differentiable function of the relaxed mask."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.problems.base import GradientOnly, Point, shift_convexity_error

__all__ = ["Function"]


class Function(GradientOnly):
    """A function that torch differentiates.

    Parameters
    ----------
    call : callable
        Takes a relaxed mask in [0, 1], shape (rows, d), of this `dtype` and on this `device`. Returns one number, or
        one per row, shape (rows,), if entry i depends on row i of the mask alone.
    shape : (int, int)
        (rows, d).
    convex : bool
        Whether the function is known to be convex. If so, lower bounds are computed and reported as proven; they allow
        a rounding error of 1e-12 of the function's size. If not, there are no lower bounds.
    dtype : torch.dtype
        Of the masks that `call` gets.
    device : torch.device or str
        Of the masks that `call` gets.

    Raises
    ------
    MaskoptError
        If the function returns another shape, or a value that does not depend on the mask through differentiable
        operations; later, if a value or a gradient is not finite.

    Examples
    --------
    >>> import torch
    >>> from maskopt.problems import Function
    >>> target = torch.tensor([[1.0, 0.0, 0.25]], dtype=torch.float64)
    >>> problem = Function(lambda x: (x - target).square().sum(1), shape=(1, 3), convex=True)
    >>> problem.objective(torch.tensor([[True, False, False]]))
    tensor([0.0625], dtype=torch.float64)
    >>> problem.evaluate(torch.full((1, 3), 0.5, dtype=torch.float64)).gradient
    tensor([[-1.0000,  1.0000,  0.5000]], dtype=torch.float64)
    """

    def __init__(
        self,
        call: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        *,
        convex: bool = False,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.call, self.convex = call, convex
        self._shape, self._dtype, self._device = shape, dtype, torch.device(device)
        self._index: Tensor | None = None  # the rows of the callable's mask that this object stands for
        self.coupled = self._check()

    def _check(self) -> bool:
        """Call once with the mask that keeps everything; return whether the result is one number."""
        probe = torch.ones(self._shape, dtype=self._dtype, device=self._device, requires_grad=True)
        answer = self.call(probe)
        if answer.shape not in ((), (self._shape[0],)):
            raise MaskoptError(
                f"The function must return one number or one for each of the {self._shape[0]} rows; it returned "
                f"shape {tuple(answer.shape)}."
            )
        if not answer.requires_grad:
            raise MaskoptError("The function must depend on the relaxed mask through torch operations with gradients.")
        if not bool(torch.isfinite(answer).all()):
            raise MaskoptError(f"The function must be finite on the unit cube; keeping all gives {answer.detach()}.")
        return answer.ndim == 0

    def _finite(self, what: str, found: Tensor) -> Tensor:
        if not bool(torch.isfinite(found).all()):
            first = found.flatten()[(~torch.isfinite(found)).flatten().int().argmax()].item()
            raise MaskoptError(f"The function must be finite on the unit cube; a solver met a {what} of {first}.")
        return found

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape if self._index is None else (len(self._index), self._shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    def _values(self, x: Tensor) -> Tensor:
        """Call with the rows of this object; the other rows, on which its values do not depend, are ones."""
        if self._index is not None:
            x = torch.ones(self._shape, dtype=x.dtype, device=x.device).index_copy(0, self._index, x)
        values = self.call(x)
        return values if self._index is None else values[self._index]

    def evaluate(self, x: Tensor) -> Point:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self._values(leaf).sum(), leaf)
        return Point(x, self._finite("slope", gradient))

    def value(self, point: Point) -> Tensor:
        return self._evaluated(point.x)

    def _evaluated(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            values = self._finite("value", self._values(x)).double()
        rows = self.shape[0]
        return values.expand(rows) / rows if self.coupled else values

    def rows(self, index: slice | Tensor) -> "Function":
        if self.coupled:
            raise ValueError("A function that returns one number has no rows to solve apart.")
        every = torch.arange(self._shape[0], device=self._device) if self._index is None else self._index
        part = object.__new__(Function)
        part.__dict__.update(self.__dict__)
        part._index = every[index]
        return part

    def objective(self, mask: Tensor) -> Tensor:
        return self._evaluated(mask.to(self._dtype))

    def scale(self) -> Tensor:
        return self._evaluated(torch.zeros(self.shape, dtype=self._dtype, device=self._device))

    def double(self) -> "Function":
        # The tensors that the callable holds keep their type.
        return self

    def convexity_error(self, point: Point, shift: Tensor | None = None) -> Tensor | None:
        if not self.convex or self._dtype != torch.float64:
            return None
        reach = (point.gradient * torch.maximum(point.x, 1.0 - point.x)).abs().sum(1)
        return shift_convexity_error(point, shift) + 1e-12 * (self.value(point).abs() + reach)
