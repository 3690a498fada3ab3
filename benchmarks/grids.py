"""The settings that baselines are tried with, so that every table shows them at their best."""

from argparse import ArgumentTypeError

__all__ = ["GRIDS", "parse_tuned", "specs"]

GRIDS = {
    "ria": ("power=0.5", "power=1"),
    "sparsefw": ("alpha=0", "alpha=0.25", "alpha=0.5", "alpha=0.75", "alpha=0.9"),
    "sparsegpt": ("ridge=0.01", "ridge=0.001", "ridge=0.1"),
    "admm": ("ridge=0.1", "ridge=0.01", "ridge=0.3"),
    "alps": ("ridge=0.01", "ridge=0.1"),
    "fista": ("threshold=0.3", "threshold=0.1"),
}
"""By method, the published default first. Our own methods are not here: they run with their defaults."""


def parse_tuned(text: str) -> list[str]:
    """Read "sparsefw,ria".

    Raises
    ------
    ArgumentTypeError
        If a method has no grid.
    """
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in GRIDS:
            raise ArgumentTypeError(f"{name!r} has no grid; {', '.join(GRIDS)} have one")
    return names


def specs(method: str, tuned: list[str]) -> dict[str, str]:
    """Return what the command line calls a method with each setting of its grid, or as it is if it is not tuned."""
    return {setting: f"{method}:{setting}" for setting in GRIDS[method]} if method in tuned else {"": method}
