"""How sparse each layer of a model should be: plans, the separable problem behind them, and published rules."""

from maskopt.allocation.plan import Plan, load_plan, overridden
from maskopt.allocation.separable import Choice, Levels, allocate_levels, joined

__all__ = ["Choice", "Levels", "Plan", "allocate_levels", "joined", "load_plan", "overridden"]
