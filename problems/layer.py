"""The reconstruction error of one linear layer: the problem maskopt exists for."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.exact import WIDEST, ExactMatrix, condition, exact_difference, rounded
from maskopt.problems.base import Direction, Point, Quadratic, shift_convexity_error
from maskopt.problems.checks import (
    check_finite,
    check_positive_semidefinite,
    check_symmetric,
    ridged_factor,
    symmetrised,
)
from maskopt.problems.convexity import diagonal_floor, eigenvalue_floor, entry_sizes

__all__ = ["LayerReconstruction"]

_BLOCK = 1024  # columns converted to float64 at a time, so that no float64 copy of a large Gram exists


class LayerReconstruction(Quadratic):
    """Layer output error ||W X - (M * W) X||_F^2 as a function of the keep mask M, one term per row.

    With p = 1 - m the pruned indicator, a row's error is (w*p)^T G (w*p) where G = X X^T. A new point costs one
    matrix product; points and gradients are affine, so line searches cost none; nothing of size rows x d x d exists.

    Parameters
    ----------
    weight : Tensor
        Layer weight, shape (rows, d) = (out features, in features). Half precision is widened to float32.
    gram : Tensor
        Sum of x x^T over the calibration tokens, shape (d, d), positive semidefinite, symmetric up to rounding: where
        it differs from its transpose the mean of both is used, everywhere, and is what `gram` is.
    tokens : int, optional
        How many tokens were summed; a record only.
    target : Tensor, optional
        Weights T whose output is aimed at, shape (rows, d); by default `weight`. With others the objective is
        ||T X - (M * W) X||_F^2: see `towards`.
    check : bool
        Validate the data; finding an indefinite Gram costs one Cholesky factorisation.

    Raises
    ------
    MaskoptError
        If shapes disagree, an entry is NaN or infinite, or `gram` is asymmetric or indefinite beyond rounding.
    """

    lowest = 0.0

    def __init__(
        self,
        weight: Tensor,
        gram: Tensor,
        tokens: int | None = None,
        *,
        target: Tensor | None = None,
        check: bool = True,
    ) -> None:
        if weight.ndim != 2 or gram.ndim != 2 or 0 in weight.shape:
            raise MaskoptError(
                f"A layer needs a non-empty weight (rows, d) and a Gram (d, d); got shapes {tuple(weight.shape)} "
                f"and {tuple(gram.shape)}."
            )
        if gram.shape != (weight.shape[1], weight.shape[1]):
            raise MaskoptError(
                f"The weight has {weight.shape[1]} input features but the Gram has shape {tuple(gram.shape)}; "
                f"it must be ({weight.shape[1]}, {weight.shape[1]})."
            )
        if not weight.is_floating_point() or not gram.is_floating_point():
            raise MaskoptError(f"Weight and Gram must be floating point; got {weight.dtype} and {gram.dtype}.")
        if weight.device != gram.device:
            raise MaskoptError(f"Weight lies on {weight.device} and Gram on {gram.device}; put both on one device.")
        if target is not None and (target.shape != weight.shape or target.device != weight.device):
            raise MaskoptError(
                f"The target must have the weight's shape {tuple(weight.shape)} and device {weight.device}; got "
                f"{tuple(target.shape)} on {target.device}."
            )
        dtype = torch.promote_types(torch.promote_types(weight.dtype, gram.dtype), torch.float32)
        self.weight = weight.detach().to(dtype)
        self.gram = gram.detach().to(dtype)
        self.tokens = tokens
        if check:
            for name, matrix in (("weight", self.weight), ("target", target), ("Gram", self.gram)):
                if matrix is not None:
                    check_finite(name, matrix)
            check_symmetric(self.gram)
        self.gram = symmetrised(self.gram)
        if check:
            check_positive_semidefinite(self.gram)
        # Powers of two change no digit; they keep squares and sums of extreme data inside the float range.
        largest = self.weight.abs().max()
        self._weight_unit = _power_of_two(largest if target is None else torch.maximum(largest, target.abs().max()))
        self._gram_unit = _power_of_two(self.gram.diagonal().max())
        power = round(2 * math.log2(self._weight_unit) + math.log2(self._gram_unit))
        # The unit of errors must not underflow, though errors themselves may.
        self._weight_unit *= 2.0 ** max(0, (-1000 - power + 1) // 2)
        if power > 1000:
            raise MaskoptError(
                "Weight and Gram are so large that the error of the layer exceeds float64; scale them down."
            )
        self.unit = self._weight_unit**2 * self._gram_unit
        self._w = _divided(self.weight, self._weight_unit)
        self._g = _divided(self.gram, self._gram_unit)
        # What the aim lies beyond the weight, in the units of both; its product is a part of every gradient.
        self._target = None if target is None else target.detach().to(dtype)
        self._residual = None if self._target is None else _divided(self._target, self._weight_unit) - self._w
        self._residual_product = None if self._residual is None else self._residual @ self._g
        self._scale: Tensor | None = None  # filled on demand
        self._known = _Known()

    @classmethod
    def towards(
        cls, weight: Tensor, gram: Tensor, cross: Tensor, tokens: int | None = None, *, ridge: float = 0.01
    ) -> "LayerReconstruction":
        """Return the problem of a layer whose inputs Y come from pruned layers, while the dense one's were X.

        ||W X - V Y||^2 is, up to what no weights on Y can reach, ||(T - V) Y||^2 with T = W C G^-1, C = X Y^T and
        G = Y Y^T: the best weights without a mask. Where Y says little, T is drawn towards W.

        Parameters
        ----------
        weight : Tensor
            W, shape (rows, d).
        gram : Tensor
            G, the sum of y y^T, shape (d, d).
        cross : Tensor
            C, the sum of x y^T over the same tokens, shape (d, d).
        tokens : int, optional
        ridge : float
            Added to the diagonal of G, as a fraction of its mean.
        """
        for name, matrix in (("weight", weight), ("Gram", gram), ("cross Gram", cross)):
            check_finite(name, matrix)
        wide = gram.double()
        wide = wide / 2 + wide.T / 2
        diagonal = wide.diagonal()
        diagonal.add_(ridge * float(diagonal.mean()))
        # About unit diagonal: outlier channels would spoil the factorisation.
        size = entry_sizes(wide)
        size = torch.where(size > 0, size, 1.0)
        scaled = wide / size / size.unsqueeze(1)
        factor = ridged_factor(scaled)
        drift = (cross.double() - gram.double()) / size
        step = torch.cholesky_solve((weight.double() @ drift).T, factor).T / size
        dtype = torch.promote_types(weight.dtype, torch.float32)
        target = (weight.double() + step).to(dtype)
        check_finite("target", target)
        return cls(weight, gram, tokens, target=target, check=False)

    @property
    def scaled_weight(self) -> Tensor:
        """Weight in the units of `gradient`, shape (rows, d)."""
        return self._w

    @property
    def scaled_target(self) -> Tensor:
        """What is aimed at, in the units of `scaled_weight`, shape (rows, d)."""
        return self._w if self._target is None else _divided(self._target, self._weight_unit)

    @property
    def target(self) -> Tensor:
        """What is aimed at, shape (rows, d): `weight` by default."""
        return self.weight if self._target is None else self._target

    @property
    def aims_elsewhere(self) -> bool:
        """Whether another output than the weight's own is aimed at."""
        return self._residual is not None

    @property
    def scaled_gram(self) -> Tensor:
        """Gram in the units of `gradient`, shape (d, d)."""
        return self._g

    @property
    def weight_unit(self) -> float:
        """`weight` over `scaled_weight`: a power of two."""
        return self._weight_unit

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def evaluate(self, x: Tensor) -> Point:
        return Point(x, self.product(x).mul_(self._w).mul_(-2.0))

    def hvp(self, x: Tensor) -> Direction:
        return Direction(x, ((self._w * x) @ self._g).mul_(self._w).mul_(2.0))

    def product(self, x: Tensor) -> Tensor:
        """Return (T - W * x) G in scaled units, shape (rows, d): the one expensive operation."""
        product = torch.addcmul(self._w, self._w, x, value=-1.0) @ self._g
        return product if self._residual_product is None else product.add_(self._residual_product)

    def sampled(self, x: Tensor, fraction: float, random: torch.Generator) -> Tensor:
        # Of the sum over inputs, a sample without replacement, scaled up.
        columns = self.shape[1]
        size = max(1, round(fraction * columns))
        chosen = torch.randperm(columns, generator=random)[:size].to(self.device)
        pruned = torch.addcmul(self._w, self._w, x, value=-1.0)[:, chosen]
        estimate = (pruned @ self._g[chosen]).mul_(columns / size)
        if self._residual_product is not None:
            estimate.add_(self._residual_product)
        return estimate.mul_(self._w).mul_(-2.0)

    def value(self, point: Point) -> Tensor:
        # f = p^T Q p and gradient = -2 Q p with p = 1 - x; and with b = T - W, c = W * (b G):
        # f = p^T Q p + 2 c^T p + b^T G b and gradient = -2 Q p - 2 c.
        value = (point.gradient * (point.x - 1)).sum(1, dtype=torch.float64).mul_(0.5)
        if self._residual is not None and self._residual_product is not None:
            value += ((self._w * (1 - point.x)).add_(self._residual) * self._residual_product).sum(
                1, dtype=torch.float64
            )
        return value

    def diagonal(self) -> Tensor:
        return self._w.square() * self._g.diagonal()

    def rows(self, index: slice | Tensor) -> "LayerReconstruction":
        part = object.__new__(LayerReconstruction)
        part.weight, part.gram, part.tokens = self.weight[index], self.gram, self.tokens
        part._weight_unit, part._gram_unit, part.unit = self._weight_unit, self._gram_unit, self.unit
        part._w, part._g, part._known = self._w[index], self._g, self._known
        part._scale = None if self._scale is None else self._scale[index]
        part._target = None if self._target is None else self._target[index]
        part._residual = None if self._residual is None else self._residual[index]
        part._residual_product = None if self._residual_product is None else self._residual_product[index]
        return part

    def double(self) -> "LayerReconstruction":
        """Return the same problem in float64, for figures that have to be proven."""
        wide = self.rows(slice(None))
        wide.weight, wide.gram = self.weight.double(), self.gram.double()
        # Where no unit was divided out the two are one tensor, and stay so.
        wide._w = wide.weight if self._w is self.weight else self._wide_weight()
        wide._g = wide.gram if self._g is self.gram else wide.gram / self._gram_unit
        if self._target is not None:
            wide._target = self._target.double()
            wide._residual = wide._target / self._weight_unit - wide._w
            wide._residual_product = wide._residual @ wide._g
        return wide

    def _wide_weight(self) -> Tensor:
        """Return the scaled weight in float64: exact, where float32 may lack the range for it."""
        wide = self.weight.double()
        return wide if self._weight_unit == 1.0 else wide / self._weight_unit

    def symmetric_gram(self) -> Tensor:
        """Return a float64 copy of the scaled Gram, shape (d, d)."""
        return self.gram.double() / self._gram_unit

    def eigenvalue_floor(self) -> float:
        """Return a number <= 0 that no eigenvalue of the scaled Gram lies below, proven by a Cholesky factorisation.

        A Gram summed in float32 may be indefinite by rounding; bounds that rely on convexity subtract this.
        """
        if self._known.floor is None:
            gram = self.symmetric_gram()
            floor = eigenvalue_floor(gram)
            if floor is None:  # only unchecked data gets here
                floor = min(0.0, float(torch.linalg.eigvalsh(gram)[0])) - 1e-12 * float(torch.linalg.matrix_norm(gram))
            self._known.floor = floor
        return self._known.floor

    def entry_sizes(self) -> Tensor:
        """Return r with |G_ij| <= r_i r_j, the norms of the inputs, in the units of `scaled_gram`, float64, (d,)."""
        if self._known.sizes is None:
            # Scaled afterwards, by the root of the unit, which need not be a power of two itself.
            unit = math.sqrt(self._gram_unit) * (1 - 2.0**-50)
            self._known.sizes = entry_sizes(self.gram) / unit
        return self._known.sizes

    def indefiniteness(self) -> float:
        """Return t >= 0 with G + t Diag(r)^2 positive semidefinite, proven; r are the `entry_sizes`."""
        if self._known.indefinite is None:
            self._known.indefinite = diagonal_floor(self.symmetric_gram(), self.entry_sizes())
        return self._known.indefinite

    def smoothness(self) -> Tensor:
        # The Hessian is 2 Diag(w) G Diag(w); no eigenvalue exceeds the largest absolute row sum (Gershgorin).
        size = self._w.abs()
        return ((size @ self._g.abs()) * size).amax(1).mul_(2.0)

    def convexity_error(self, point: Point, shift: Tensor | None = None) -> Tensor:
        x, sizes = point.x.double(), self.entry_sizes()
        weight = self._wide_weight().abs()
        farthest = torch.maximum(x, 1.0 - x)
        reach = weight * sizes * farthest
        convexity_error = reach.square().sum(1).mul_(self.indefiniteness())
        # Rounding of sums of products |z_i G_ij z_j|: the gradient's, the value's and the tangent's.
        off = weight * (1.0 - x).abs()
        if self._residual is not None:
            beyond = self._residual.double().abs()
            off, reach = off + beyond, reach + beyond * sizes
        rounding = (off * sizes).sum(1) * reach.sum(1)
        if shift is not None:
            rise = shift.double().clamp_min(0.0)
            rounding += shift.double().abs().sum(1)
            convexity_error += shift_convexity_error(point, shift)
            # Diag(w) (G - Diag(l)) Diag(w) lies below the shifted Hessian if l is at least shift / w^2 in every row.
            dead = weight == 0
            lift = torch.where(dead, 0.0, rise / weight.square()).amax(0).mul_(1 + 2.0**-50)
            if bool(torch.isfinite(lift).all()):
                gram = self.symmetric_gram()
                gram.diagonal().sub_(lift)
                sizes = torch.maximum(sizes, lift.sqrt())
                convex = (weight * sizes * farthest).square().sum(1).mul_(diagonal_floor(gram, sizes))
                convexity_error = torch.minimum(convexity_error, convex + (rise * farthest.square() * dead).sum(1))
        return convexity_error + (self.shape[1] + 8) * 2.0**-50 * rounding + self.shape[1] ** 2 * 2.0**-1070

    def objective(self, mask: Tensor) -> Tensor:
        off = self._distance_to_target(self._wide_weight().masked_fill(~mask, 0.0))
        errors = self._quadratic_form(off)
        if self.shape[1] > WIDEST:
            return errors
        # Where terms cancel, or are too small for their products, the sum is repeated without rounding.
        size = off.abs_() @ self.entry_sizes()
        doubtful = (size > 0) & (errors / self.unit < (size.square() / condition(self.shape[1])).clamp_min(1e-290))
        index = doubtful.nonzero().flatten()
        if len(index):
            exact = self.rows(index).exact_objective(mask[index])
            errors[index] = torch.tensor([rounded(value) for value in exact], dtype=errors.dtype, device=errors.device)
        return errors

    def exact_objective(self, mask: Tensor) -> list[Fraction]:
        off, exponent = exact_difference(self.target, self.weight.masked_fill(~mask, 0.0))
        gram = self.exact_gram()
        return [max(Fraction(0), gram.form(row, exponent)) for row in off]

    def exact_gram(self) -> ExactMatrix:
        """Return the Gram, in full, as integers; kept for all row blocks."""
        if self._known.exact is None:
            self._known.exact = ExactMatrix(self.gram)
        return self._known.exact

    def error(self, weight: Tensor) -> Tensor:
        """Return each row's output error ||(T - V) X||^2 of other weights V, float64, shape (rows,).

        Parameters
        ----------
        weight : Tensor
            V, shape (rows, d).
        """
        return self._quadratic_form(self._distance_to_target(weight.double() / self._weight_unit))

    def _distance_to_target(self, weight: Tensor) -> Tensor:
        """Return how far scaled weights, float64, are from what is aimed at."""
        aim = self._wide_weight() if self._target is None else self._target.double() / self._weight_unit
        return aim - weight

    def scale(self) -> Tensor:
        if self._scale is None:
            self._scale = self.objective(torch.zeros_like(self.weight, dtype=torch.bool))
        return self._scale

    def _quadratic_form(self, rows: Tensor) -> Tensor:
        """Return z^T G z for each row z of a float64 tensor, without a float64 copy of the whole Gram."""
        total = rows.new_zeros(rows.shape[0])
        for start in range(0, rows.shape[1], _BLOCK):
            block = slice(start, start + _BLOCK)
            gram = self.gram[:, block].double()
            if self._gram_unit != 1.0:
                gram = gram / self._gram_unit
            total += torch.linalg.vecdot(rows @ gram, rows[:, block])
        # Rounding may leave a zero slightly negative; an error is a sum of squares.
        return total.clamp_min_(0.0) * self.unit


class _Known:
    """What is worked out of a Gram on demand, shared by all row blocks."""

    def __init__(self) -> None:
        self.floor: float | None = None
        self.sizes: Tensor | None = None
        self.indefinite: float | None = None
        self.exact: ExactMatrix | None = None


def _power_of_two(largest: Tensor) -> float:
    """Return 1 for data of ordinary size, else the power of two that brings `largest` near one."""
    size = float(largest)
    if size == 0.0 or 2.0**-24 <= size <= 2.0**24:
        return 1.0
    return 2.0 ** round(math.log2(size))


def _divided(matrix: Tensor, unit: float) -> Tensor:
    # Through float64: the unit of subnormal float32 data is itself no float32 number.
    return matrix if unit == 1.0 else (matrix.double() / unit).to(matrix.dtype)
