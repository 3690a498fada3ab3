"""The pages of commands that solve layers: compare, trace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from maskopt.cli.figure import draw_lines, draw_traces
from maskopt.cli.page_parts import Page, Section, facts_sections, number, plot
from maskopt.cli.trace import last_values

__all__ = ["compare_page", "trace_page"]


def compare_page(figures: Mapping[str, Any], _: str) -> Page:
    """Return the page of the JSON of `maskopt compare`."""
    rows, summary, settings = figures["rows"], figures["summary"], figures["settings"]
    specs = list(summary)
    first = specs[0]
    ratios = {spec: summary[spec][first] for spec in specs}
    best = min(specs, key=lambda spec: _or_infinite(ratios[spec]["median_error_ratio"]))
    tiles = [
        (str(len(rows)), "cases: layers and sets of masks"),
        (best, "has the smallest median error"),
        (number(ratios[best]["median_error_ratio"]), f"times the error of {first}, median"),
        (number(ratios[best]["median_seconds_ratio"]), "times its seconds, median"),
    ]
    lines = {
        spec: [(case, _or_infinite(row["results"][spec]["error_ratio"])) for case, row in enumerate(rows, 1)]
        for spec in specs
    }
    shown = {spec: [point for point in points if math.isfinite(point[1])] for spec, points in lines.items()}
    draw = partial(draw_lines, shown, label=f"error relative to {first}", logarithmic=True, across="case")
    about = f"Error of each solver over that of {first}, case by case as numbered below; lower is better."
    sections = plot("ratios", "Errors by case", about, draw) if len(specs) > 1 else []
    cases = [
        [f"{case}. {Path(row['instance']).stem}, {row['label']}", number(row["results"][first]["relative_error"])]
        + [f"{number(each['error_ratio'])} ({each['seconds']:.2f} s)" for each in (row["results"][s] for s in specs)]
        for case, row in enumerate(rows, 1)
    ]
    about = f"Relative error of {first}; then of each solver its error over that, and its seconds."
    sections.append(Section("Cases", about, ("case", f"{first}: error", *specs), cases, counted="cases"))
    head = ("solver", "median error", "largest error", "median seconds")
    keys = ("median_error_ratio", "largest_error_ratio", "median_seconds_ratio")
    overall = [[spec, *(number(ratios[spec][key]) for key in keys)] for spec in specs]
    sections.append(Section("Solvers", f"Relative to {first}, over all cases.", head, overall))
    solvers = settings["solvers"]
    others = {name: value for name, value in settings.items() if name != "solvers"}
    sections += facts_sections(
        {"Settings": others, "Settings of solvers": solvers, "Versions": figures.get("versions") or {}}
    )
    return Page("Solvers compared", ", ".join(specs), tiles, sections)


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def trace_page(figures: Mapping[str, Any], _: str) -> Page:
    """Return the page of the JSON of `maskopt trace`."""
    settings = figures["settings"]
    traces = {
        spec: {name: [math.nan if value is None else value for value in column] for name, column in history.items()}
        for spec, history in figures["traces"].items()
    }
    ends = {spec: history["incumbent"][-1] for spec, history in traces.items()}
    best = min(ends, key=ends.__getitem__)
    tiles = [(best, "has the best mask"), (number(ends[best]), "its error relative to pruning all")]
    bounds = [history["bound"][-1] for history in traces.values()]
    proven = max((bound for bound in bounds if bound > 0), default=None)
    if proven is not None:
        tiles.append((number(proven), "proven: no mask of the set has a smaller error"))
    about = "Rounded masks, relaxed values and proven bounds, relative to pruning all weights."
    sections = plot("traces", "Trajectories", about, partial(draw_traces, traces))
    columns = last_values(traces)
    rows = [[spec, *(column[at] for column in columns.values())] for at, spec in enumerate(traces)]
    sections.append(Section("Last values", head=("solver", *columns), rows=rows))
    others = {name: value for name, value in settings.items() if name != "solvers"}
    sections += facts_sections(
        {"Settings": others, "Settings of solvers": settings["solvers"], "Versions": figures.get("versions") or {}}
    )
    title = f"{Path(settings['instance']).stem}: trajectories of solvers"
    return Page(title, f"{settings['masks']}; rows {settings['rows']}", tiles, sections)
