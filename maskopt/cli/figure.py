"""Figures of trajectories."""

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from maskopt.errors import MaskoptError
from maskopt.files import atomic_path

__all__ = ["by_kind", "can_draw", "check_figure", "draw_lines", "draw_plan", "draw_traces"]

_KINDS = (".png", ".svg", ".pdf")
_LINES: dict[str, tuple[Literal["-", "--", ":"], str]] = {
    "rounded": ("-", "rounded mask"),
    "value": ("--", "relaxed value"),
    "bound": (":", "proven bound"),
}
# Okabe and Ito's palette, which people with any colour vision can tell apart.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
    "#7A7A7A",
    "#7B3294",
)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_figure(path: Path) -> None:
    """Check, before any work, that a figure can be drawn.

    Parameters
    ----------
    path : Path
        Its suffix is the format.

    Raises
    ------
    MaskoptError
        If the suffix is unknown or matplotlib is missing.
    """
    if path.suffix not in _KINDS:
        raise MaskoptError(f"A figure is a {', '.join(_KINDS[:-1])} or {_KINDS[-1]} file; got {path}.")
    if not can_draw():
        raise MaskoptError('Figures need matplotlib, which is missing: pip install "maskopt[report]".')


def _on_a_page(title: str | None) -> Any:
    """Return matplotlib's settings of a figure; without a title it is for a page, light or dark."""
    if title is not None:
        return {}
    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    clear = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    return {**dict.fromkeys(grey, "#808080"), **dict.fromkeys(clear, "none"), "svg.fonttype": "none"} | {
        "svg.hashsalt": "maskopt"  # the same figure twice has the same bytes
    }


def _colour(number: int, title: str | None) -> str:
    colour = _COLOURS[number % len(_COLOURS)]
    # Black cannot be seen on a dark page.
    return "#808080" if title is None and colour == "#000000" else colour


def _save(figure: Any, target: Path | IO[str], kind: str, title: str | None) -> None:
    if title is not None:
        figure.suptitle(title, fontsize=10)
    figure.savefig(target, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


def draw_traces(
    traces: Mapping[str, Mapping[str, Sequence[float]]],
    target: Path | IO[str],
    kind: str = "svg",
    title: str | None = None,
) -> None:
    """Draw rounded errors, relaxed values and bounds against iterations and against seconds.

    Parameters
    ----------
    traces : dict
        Histories (columns as in `maskopt.solvers.COLUMNS`) by solver.
    target : Path or text file
    kind : str
        "png", "svg" or "pdf".
    title : str, optional
        Without one, the figure is for a page, as with `draw_lines`.
    """
    from matplotlib import rc_context

    with rc_context(_on_a_page(title)):
        _save(_traces(traces, title), target, kind, title)


def _traces(traces: Mapping[str, Mapping[str, Sequence[float]]], title: str | None) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for number, history in enumerate(traces.values()):
        colour = _colour(number, title)
        for axis, panel in zip(("iteration", "seconds"), panels, strict=True):
            for name, (style, _) in _LINES.items():
                at = [i for i, y in enumerate(history[name]) if y > 0 and math.isfinite(y)]
                if not at:
                    continue
                # A logarithmic axis has no zero.
                x = [max(history[axis][i], 1e-3 if axis == "seconds" else 0.0) for i in at]
                marker = "o" if len(at) == 1 else ""
                panel.plot(x, [history[name][i] for i in at], style, color=colour, marker=marker, linewidth=1.4)
    for axis, panel in zip(("iterations", "seconds"), panels, strict=True):
        panel.set_xscale("symlog", linthresh=1.0) if axis == "iterations" else panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
    panels[0].set_xlim(left=0)
    panels[0].set_ylabel("error relative to pruning all")
    # Early bounds may be arbitrarily close to zero, so the last values set the range.
    ends = [history[name][-1] for history in traces.values() for name in ("incumbent", "bound")]
    lowest = min((end for end in ends if end > 1e-6), default=1e-6)
    panels[0].set_ylim(bottom=lowest / 5)
    handles = [Line2D([], [], color=_colour(i, title)) for i in range(len(traces))]
    handles += [Line2D([], [], color="grey", linestyle=style) for style, _ in _LINES.values()]
    labels = [*traces, *(label for _, label in _LINES.values())]
    figure.legend(handles, labels, fontsize=8, loc="outside right upper")
    return figure


def draw_plan(sparsities: dict[str, float], path: Path, title: str) -> None:
    """Draw the sparsity of layers by depth, a line for each kind of layer.

    Parameters
    ----------
    sparsities : dict of str to float
        By full layer name; the first number in a name is the block's.
    path : Path
        New file; its suffix is the format.
    title : str
    """
    with atomic_path(path) as aside:
        draw_lines(by_kind(sparsities), aside, "sparsity", kind=path.suffix[1:], title=title)


def by_kind(values: Mapping[str, float]) -> dict[str, list[tuple[int, float]]]:
    """Return values of layers by kind of layer, each as (block, value), by block.

    Parameters
    ----------
    values : mapping of str to float
        By full layer name; the first number in a name is the block's.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, value in values.items():
        found = re.search(r"\.(\d+)\.(.*)", name)
        depth, what = (int(found[1]), found[2]) if found else (0, name)
        lines.setdefault(re.sub(r"\d+", "*", what), []).append((depth, value))
    return {what: sorted(points) for what, points in lines.items()}


def draw_lines(
    lines: Mapping[str, Sequence[tuple[int, float]]],
    target: Path | IO[str],
    label: str,
    *,
    kind: str = "svg",
    title: str | None = None,
    logarithmic: bool = False,
    across: str = "block",
) -> None:
    """Draw values by depth or case, a line for each kind of layer or solver.

    Parameters
    ----------
    lines : mapping
        Points by label, such as of `by_kind`.
    target : Path or text file
    label : str
        Of the values.
    kind : str
        Format.
    title : str, optional
        Without one, the figure is for a page, light or dark: what is not a line is grey, and there is no background.
    logarithmic : bool
        Whether the values' axis is; zeros are then left out. Otherwise it goes from 0 to 1.
    across : str
        What points are numbered by.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(_on_a_page(title)):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        panel = figure.subplots()
        for number, points in enumerate(lines.values()):
            shown = [point for point in points if not logarithmic or point[1] > 0] or [(0, math.nan)]
            style = ("-", "--", ":")[number // len(_COLOURS) % 3]
            colour = _colour(number, title)
            panel.plot(*zip(*shown, strict=True), style, color=colour, marker="o", markersize=3.5, linewidth=1.4)
        panel.set_xlabel(across)
        panel.set_ylabel(label)
        if logarithmic:
            panel.set_yscale("log")
        else:
            panel.set_ylim(0, 1)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3, linewidth=0.5)
        figure.legend(panel.get_lines(), list(lines), fontsize=8, loc="outside right upper")
        _save(figure, target, kind, title)
