"""The reconstruction error of one linear layer, the problem that maskopt is made for."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from maskopt.checks import matrix
from maskopt.errors import MaskoptError
from maskopt.exact import WIDEST, ExactMatrix, condition, exact_difference, nearest_float
from maskopt.problems.base import Direction, Point, Quadratic, shift_convexity_error
from maskopt.problems.checks import (
    check_finite,
    check_layer,
    check_positive_semidefinite,
    check_symmetric,
    symmetrised,
)
from maskopt.problems.convexity import diagonal_floor, eigenvalue_floor, entry_sizes
from maskopt.problems.drift import drift_step
from maskopt.problems.units import divided, layer_units

__all__ = ["LayerReconstruction"]

_NARROW = 256  # columns of a product that is not cut further
_BLOCK = 1024  # columns converted to float64 at a time, so that no float64 copy of a large Gram exists


class LayerReconstruction(Quadratic):
    """The output error ||W X - (M * W) X||_F^2 of a layer as a function of the keep mask M, one term per row.

    With p = 1 - m, the indicator of pruned entries, the error of a row is (w * p)^T G (w * p), where G = X X^T. A new
    point costs one matrix product; as the gradient is affine, line searches cost none. Nothing of size rows x d x d is
    stored.

    Parameters
    ----------
    weight : Tensor
        W, shape (rows, d) = (out features, in features). Half precision is widened to float32.
    gram : Tensor
        G, the sum of x x^T over the calibration tokens, shape (d, d), positive semidefinite, symmetric up to rounding:
        the attribute `gram` is the mean of G and its transpose.
    tokens : int, optional
        Number of tokens in the sum; for the record only.
    target : Tensor, optional
        T, weights whose output is to be reconstructed, shape (rows, d); W by default. The objective is
        ||T X - (M * W) X||_F^2: see `towards`.
    mean : Tensor, optional
        Means of the inputs over the tokens, shape (d,); for methods that change biases.
    check : bool
        Whether to check the data, which costs one Cholesky factorisation of G.

    Raises
    ------
    MaskoptError
        If shapes disagree, an entry is NaN or infinite, or `gram` is asymmetric or indefinite beyond rounding.

    Examples
    --------
    One row, two inputs, two tokens. Pruning the second entry, -1, loses its outputs, -1 and -1:

    >>> import torch
    >>> from maskopt.problems import LayerReconstruction
    >>> inputs = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # inputs x tokens
    >>> layer = LayerReconstruction(torch.tensor([[2.0, -1.0]]), inputs @ inputs.T, tokens=2)
    >>> layer.objective(torch.tensor([[True, False]]))
    tensor([2.], dtype=torch.float64)
    >>> point = layer.evaluate(torch.tensor([[0.5, 1.0]]))
    >>> layer.value(point), point.gradient
    (tensor([1.], dtype=torch.float64), tensor([[-4.,  2.]]))
    """

    lowest = 0.0

    def __init__(
        self,
        weight: Tensor,
        gram: Tensor,
        tokens: int | None = None,
        *,
        target: Tensor | None = None,
        mean: Tensor | None = None,
        check: bool = True,
    ) -> None:
        weight, gram = matrix("weight", weight), matrix("Gram", gram)
        target = None if target is None else matrix("target", target)
        check_layer(weight, gram, target, mean)
        dtype = torch.promote_types(torch.promote_types(weight.dtype, gram.dtype), torch.float32)
        self.weight = weight.detach().to(dtype)
        self.gram = gram.detach().to(dtype)
        self.tokens, self.mean = tokens, None if mean is None else mean.detach()
        if check:
            for name, data in (("weight", self.weight), ("target", target), ("Gram", self.gram), ("mean", mean)):
                check_finite(name, data)
            check_symmetric(self.gram)
        self.gram = symmetrised(self.gram)
        if check:
            check_positive_semidefinite(self.gram)
        self._weight_unit, self._gram_unit = layer_units(self.weight, self.gram, target)
        # In this order neither product leaves the range of float64.
        self.unit = self._weight_unit * self._gram_unit * self._weight_unit
        self._w = divided(self.weight, self._weight_unit)
        self._g = divided(self.gram, self._gram_unit)
        # T - W, in scaled units; None where T = W.
        self._target = None if target is None else target.detach().to(dtype)
        self._offset = None if self._target is None else divided(self._target, self._weight_unit) - self._w
        self._product: Tensor | None = None  # filled on demand
        self._scale: Tensor | None = None  # filled on demand
        self._cache = _GramCache()

    @classmethod
    def towards(
        cls,
        weight: Tensor,
        gram: Tensor,
        cross: Tensor,
        tokens: int | None = None,
        *,
        ridge: float = 0.01,
        strength: float = 1.0,
        mean: Tensor | None = None,
        lost: Tensor | None = None,
    ) -> "LayerReconstruction":
        """Return the problem of a layer whose inputs Y come from pruned layers, where the dense model's were X.

        Up to a constant, ||W X - V Y||^2 is ||(T - V) Y||^2, where T = W + W (C - G) G^-1, C = X Y^T and G = Y Y^T: the
        best weights without a mask. A ridge on the inverse draws T towards W, and so does a strength below one.

        A layer whose output is added to the residual stream can make up for what that stream has lost before, too. With
        E the dense model's stream minus the pruned model's, ||E + W X - V Y||^2 has T = W + (W (C - G) + R) G^-1, where
        R = E Y^T.

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
            Relative to the mean of the diagonal of G.
        strength : float
            T = W + strength * (W (C - G) + R) G^-1. Layer by layer 1 leaves the smallest error, also on other tokens; a
            model whose layers all correct in full predicts worse than one whose layers correct in part, see `prune`.
        mean : Tensor, optional
            Means of Y, shape (d,).
        lost : Tensor, optional
            R, the sum of e y^T over the same tokens, shape (rows, d); zero by default.

        Notes
        -----
        Beside matrices of W's shape, the memory is that of six float32 arrays of d x d: G, C and two float64 arrays.
        """
        weight, gram, cross = matrix("weight", weight), matrix("Gram", gram), matrix("cross term", cross)
        for name, data in (("weight", weight), ("Gram", gram), ("cross term", cross)):
            check_finite(name, data)
        if lost is not None:
            lost = matrix("lost", lost)
            check_finite("lost", lost)
            if lost.shape != weight.shape:
                raise MaskoptError(
                    f"lost needs the shape of the weight, {tuple(weight.shape)}; got {tuple(lost.shape)}."
                )
        step = drift_step(weight, gram, cross, ridge, lost)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        target = (weight.double() + strength * step).to(dtype)
        check_finite("target", target)
        return cls(weight, gram, tokens, target=target, mean=mean, check=False)

    @property
    def scaled_weight(self) -> Tensor:
        """Weight in the units of `gradient`, shape (rows, d)."""
        return self._w

    @property
    def scaled_target(self) -> Tensor:
        """Target weights T in the units of `scaled_weight`, shape (rows, d)."""
        return self._w if self._target is None else divided(self._target, self._weight_unit)

    @property
    def target(self) -> Tensor:
        """Target weights T, shape (rows, d): `weight` by default."""
        return self.weight if self._target is None else self._target

    @property
    def aims_elsewhere(self) -> bool:
        """Whether the target is not the weight itself."""
        return self._offset is not None

    @property
    def scaled_gram(self) -> Tensor:
        """Gram in the units of `gradient`, shape (d, d)."""
        return self._g

    @property
    def weight_unit(self) -> float:
        """The power of two by which `scaled_weight` is multiplied to give `weight`."""
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

    @property
    def _offset_product(self) -> Tensor | None:
        """(T - W) G in scaled units; None where T = W. What updates the weights has no use for it."""
        if self._product is None and self._offset is not None:
            self._product = self._offset @ self._g
        return self._product

    def evaluate(self, x: Tensor) -> Point:
        return Point(x, self.product(x).mul_(self._w).mul_(-2.0))

    def hvp(self, x: Tensor) -> Direction:
        return Direction(x, ((self._w * x) @ self._g).mul_(self._w).mul_(2.0))

    def product(self, x: Tensor) -> Tensor:
        """Return (T - W * x) G in scaled units, shape (rows, d): the one expensive operation."""
        product = torch.addcmul(self._w, self._w, x, value=-1.0) @ self._g
        return product if self._offset_product is None else product.add_(self._offset_product)

    def sampled(self, x: Tensor, fraction: float, random: torch.Generator) -> Tensor:
        # A sample, without replacement, of the terms of the sum over inputs, scaled up.
        columns = self.shape[1]
        size = max(1, round(fraction * columns))
        chosen = torch.randperm(columns, generator=random)[:size].to(self.device)
        pruned = torch.addcmul(self._w, self._w, x, value=-1.0)[:, chosen]
        estimate = (pruned @ self._g[chosen]).mul_(columns / size)
        if self._offset_product is not None:
            estimate.add_(self._offset_product)
        return estimate.mul_(self._w).mul_(-2.0)

    def value(self, point: Point) -> Tensor:
        # f = p^T Q p and gradient = -2 Q p with p = 1 - x; and with b = T - W, c = W * (b G):
        # f = p^T Q p + 2 c^T p + b^T G b and gradient = -2 Q p - 2 c.
        value = (point.gradient * (point.x - 1)).sum(1, dtype=torch.float64).mul_(0.5)
        if self._offset is not None and self._offset_product is not None:
            value += ((self._w * (1 - point.x)).add_(self._offset) * self._offset_product).sum(1, dtype=torch.float64)
        return value

    def diagonal(self) -> Tensor:
        return self._w.square() * self._g.diagonal()

    def rows(self, index: slice | Tensor) -> "LayerReconstruction":
        part = object.__new__(LayerReconstruction)
        part.weight, part.gram, part.tokens, part.mean = self.weight[index], self.gram, self.tokens, self.mean
        part._weight_unit, part._gram_unit, part.unit = self._weight_unit, self._gram_unit, self.unit
        part._w, part._g, part._cache = self._w[index], self._g, self._cache
        part._scale = None if self._scale is None else self._scale[index]
        part._target = None if self._target is None else self._target[index]
        part._offset = None if self._offset is None else self._offset[index]
        part._product = None if self._product is None else self._product[index]
        return part

    def double(self) -> "LayerReconstruction":
        wide = self.rows(slice(None))
        wide.weight, wide.gram = self.weight.double(), self.gram.double()
        # Where the unit is one, the scaled and the original data are one tensor.
        wide._w = wide.weight if self._w is self.weight else self._wide_weight()
        wide._g = wide.gram if self._g is self.gram else wide.gram / self._gram_unit
        if self._target is not None:
            wide._target = self._target.double()
            wide._offset = wide._target / self._weight_unit - wide._w
            wide._product = None
        return wide

    def _wide_weight(self) -> Tensor:
        """Return the scaled weight in float64: exact, where float32 may lack the range for it."""
        wide = self.weight.double()
        return wide if self._weight_unit == 1.0 else wide / self._weight_unit

    def symmetric_gram(self) -> Tensor:
        """Return a float64 copy of the scaled Gram, shape (d, d)."""
        return self.gram.double() / self._gram_unit

    def eigenvalue_floor(self) -> float:
        """Return a proven lower bound, at most 0, on the eigenvalues of the scaled Gram.

        A Gram summed in float32 may be indefinite by rounding.
        """
        if self._cache.floor is None:
            gram = self.symmetric_gram()
            floor = eigenvalue_floor(gram)
            if floor is None:  # only for unchecked data
                floor = min(0.0, float(torch.linalg.eigvalsh(gram)[0])) - 1e-12 * float(torch.linalg.matrix_norm(gram))
            self._cache.floor = floor
        return self._cache.floor

    def entry_sizes(self) -> Tensor:
        """Return r with |G_ij| <= r_i r_j for the scaled Gram, the norms of the inputs, float64, shape (d,)."""
        if self._cache.sizes is None:
            # The square root of the unit need not be a power of two.
            unit = math.sqrt(self._gram_unit) * (1 - 2.0**-50)
            self._cache.sizes = entry_sizes(self.gram) / unit
        return self._cache.sizes

    def indefiniteness(self) -> float:
        """Return a proven t >= 0 for which G + t Diag(r)^2 is positive semidefinite, with r the `entry_sizes`."""
        if self._cache.indefinite is None:
            self._cache.indefinite = diagonal_floor(self.symmetric_gram(), self.entry_sizes())
        return self._cache.indefinite

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
        # Rounding of sums of products |z_i G_ij z_j|: the gradient's, the value's and the linear model's.
        residual = weight * (1.0 - x).abs()
        if self._offset is not None:
            offset = self._offset.double().abs()
            residual, reach = residual + offset, reach + offset * sizes
        rounding = (residual * sizes).sum(1) * reach.sum(1)
        if shift is not None:
            rise = shift.double().clamp_min(0.0)
            rounding += shift.double().abs().sum(1)
            convexity_error += shift_convexity_error(point, shift)
            # If l >= shift / w^2 in every row, Diag(w) (G - Diag(l)) Diag(w) is a lower bound of half the shifted
            # Hessian.
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
        return self.error(self.weight.masked_fill(~mask, 0.0))

    def exact_objective(self, mask: Tensor) -> list[Fraction]:
        return self._exact_error(self.weight.masked_fill(~mask, 0.0))

    def _exact_error(self, weight: Tensor) -> list[Fraction]:
        residual, exponent = exact_difference(self.target, weight)
        return [max(Fraction(0), value) for value in self.exact_gram().forms(residual, exponent)]

    def exact_gram(self) -> ExactMatrix:
        """Return the Gram, unscaled, as integers times a power of two; computed once."""
        if self._cache.exact is None:
            self._cache.exact = ExactMatrix(self.gram)
        return self._cache.exact

    def error(self, weight: Tensor) -> Tensor:
        """Return each row's output error ||(T - V) X||^2 for any weights V, float64, shape (rows,).

        Parameters
        ----------
        weight : Tensor
            V, shape (rows, d).
        """
        target = self._wide_weight() if self._target is None else self._target.double() / self._weight_unit
        residual = target - (weight.double() if self._weight_unit == 1.0 else weight.double() / self._weight_unit)
        errors = self._quadratic_form(residual)
        if self.shape[1] > WIDEST:
            return errors
        # Where terms cancel or their products underflow, the sum is repeated in exact arithmetic.
        size = residual.abs_() @ self.entry_sizes()
        doubtful = (size > 0) & (errors / self.unit < (size.square() / condition(self.shape[1])).clamp_min(1e-290))
        index = doubtful.nonzero().flatten()
        if len(index):
            exact = [nearest_float(value) for value in self.rows(index)._exact_error(weight[index])]
            errors[index] = torch.tensor(exact, dtype=errors.dtype, device=errors.device)
        return errors

    def scale(self) -> Tensor:
        if self._scale is None:
            self._scale = self.objective(torch.zeros_like(self.weight, dtype=torch.bool))
        return self._scale

    def _quadratic_form(self, rows: Tensor) -> Tensor:
        """Return z^T G z for each row z of a float64 tensor, without a float64 copy of the whole Gram."""
        total = rows.new_zeros(rows.shape[0])
        step = min(_BLOCK, max(_NARROW, -(-rows.shape[1] // 4)))
        for start in range(0, rows.shape[1], step):
            block = slice(start, start + step)
            gram = self.gram[block, start:].to(torch.float64, copy=True)  # changed in place below
            if self._gram_unit != 1.0:
                gram = gram / self._gram_unit
            # G is symmetric: what is right of a diagonal block counts twice.
            gram[:, step:] *= 2.0
            total += torch.linalg.vecdot(rows[:, block] @ gram, rows[:, start:])
        # Rounding may leave a zero slightly negative; an error is a sum of squares.
        return total.clamp_min_(0.0) * self.unit


class _GramCache:
    """Numbers computed from a Gram on demand, shared by all problems made by `rows`."""

    def __init__(self) -> None:
        self.floor: float | None = None
        self.sizes: Tensor | None = None
        self.indefinite: float | None = None
        self.exact: ExactMatrix | None = None
