"""How good a mask can be at most: proven lower bounds on the error of every mask."""

from maskopt.bounds.interior import FormBounds, bound_forms
from maskopt.bounds.sdp import RowBounds, convex_part, sdp_bound

__all__ = ["FormBounds", "RowBounds", "bound_forms", "convex_part", "sdp_bound"]
