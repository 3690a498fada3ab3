"""Proven lower bounds on the error of every mask of a set."""

from maskopt.bounds.columns import ColumnBound, ColumnBoundKind, column_bound
from maskopt.bounds.interior import FormBounds, bound_forms
from maskopt.bounds.masks import BoundKind, MaskBounds, check_bound, mask_bound, mask_bounds
from maskopt.bounds.pairs import pair_multipliers
from maskopt.bounds.sdp import RowBounds, convex_part, sdp_bound
from maskopt.bounds.shift import layer_shift, shifted_bound, smallest_eigenvalue
from maskopt.bounds.work import stop_after

__all__ = [
    "BoundKind",
    "ColumnBound",
    "ColumnBoundKind",
    "FormBounds",
    "MaskBounds",
    "RowBounds",
    "bound_forms",
    "check_bound",
    "column_bound",
    "convex_part",
    "layer_shift",
    "mask_bound",
    "mask_bounds",
    "pair_multipliers",
    "sdp_bound",
    "shifted_bound",
    "smallest_eigenvalue",
    "stop_after",
]
