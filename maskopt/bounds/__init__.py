"""How good a mask can be at most: proven lower bounds on the error of every mask."""

from maskopt.bounds.interior import FormBounds, bound_forms
from maskopt.bounds.masks import BoundKind, MaskBounds, check_bound, mask_bound, mask_bounds
from maskopt.bounds.pairs import pair_multipliers
from maskopt.bounds.sdp import RowBounds, convex_part, sdp_bound
from maskopt.bounds.shift import layer_shift, least_eigenvalue, shifted_bound

__all__ = [
    "BoundKind",
    "FormBounds",
    "MaskBounds",
    "RowBounds",
    "bound_forms",
    "check_bound",
    "convex_part",
    "layer_shift",
    "least_eigenvalue",
    "mask_bound",
    "mask_bounds",
    "pair_multipliers",
    "sdp_bound",
    "shifted_bound",
]
