"""The one exception users see."""

__all__ = ["MaskoptError"]


class MaskoptError(ValueError):
    """Something the user can put right: one sentence saying what is wrong, where, and what would be right."""
