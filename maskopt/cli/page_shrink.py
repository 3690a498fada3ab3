"""The page of `maskopt shrink`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from maskopt.cli.figure import by_kind, draw_lines
from maskopt.cli.page_parts import Page, Section, facts_sections, number, plot, usage
from maskopt.cli.words import duration

__all__ = ["shrink_page"]

_HEAD = ("layer", "units", "before", "after", "parameters removed", "error", "proven")


def shrink_page(report: Mapping[str, Any], folder: str) -> Page:
    """Return the page of report.json of `maskopt shrink`, whose model is in `folder`."""
    widths: Sequence[Mapping[str, Any]] = report["widths"]
    command, pruning = report.get("command") or {}, report.get("pruning") or {}
    before, after = report["parameters"]["before"], report["parameters"]["after"]
    tiles = [
        (f"{100 * (1 - after / before):.1f} %", f"fewer parameters: {after / 1e6:.4g} of {before / 1e6:.4g} million")
    ]
    sections = []
    perplexities = report.get("perplexity") or {}
    for text, both in perplexities.items():
        old, new = both["before"]["perplexity"], both["after"]["perplexity"]
        tiles.append((f"{number(old)} → {number(new)}", f"perplexity, {Path(text).name}"))
    speeds = report.get("speed") or {}
    for batch, both in speeds.items():
        ratio = both["after"]["decode"] / both["before"]["decode"]
        tiles.append((f"{ratio:.2f}x", f"tokens per second written, {batch}"))
    if speeds:
        rows = [
            [
                batch,
                *(number(both[when][what]) for what in ("prefill", "decode") for when in ("before", "after")),
                str(both["after"]["threads"]),
            ]
            for batch, both in speeds.items()
        ]
        head = ("", "prefill before", "after", "decode before", "after", "threads")
        sections.append(Section("Tokens per second", head=head, rows=rows))
    sections += _plots(widths)
    if widths:
        rows = [_width(width) for width in widths]
        sections.append(Section("Layers that lost units", head=_HEAD, rows=rows, counted="layers"))
    if report.get("experts"):
        sections.append(_experts(report["experts"]["blocks"]))
    refused = [(each["name"], f"{each['kind']}: {each['reason']}") for each in report.get("refused") or ()]
    sections += [Section("Left as they were", rows=refused, counted="layers", open_up_to=0)] if refused else []
    sections.append(usage(folder, "Its matrices are smaller, which every runtime turns into speed."))
    cache = report.get("cache_bytes_per_token") or {}
    sections += facts_sections(
        {
            "Size": {
                "bytes of keys and values for a token, before": cache.get("before"),
                "after": cache.get("after"),
                "loads with": report["loads_with"],
            },
            "Settings": {**(pruning.get("settings") or {}), **command},
            "Calibration data": report.get("calibration") or {},
            "Versions": report.get("versions") or {},
        }
    )
    if report.get("total_seconds") is not None:
        tiles.append((duration(report["total_seconds"]), "in all"))
    name = command.get("model") or folder
    summary = f"{len(widths)} layers lost units; method {command.get('method') or 'of the caller'}"
    return Page(f"{Path(str(name)).name or name}, smaller", summary, tiles, sections)


def _experts(blocks: Sequence[Mapping[str, Any]]) -> Section:
    rows = [
        [each["name"], str(each["before"]), ", ".join(map(str, each["dropped"])), number(each["error"])]
        for each in blocks
    ]
    head = ("experts of", "before", "dropped", "error")
    return Section("Experts that were dropped", head=head, rows=rows, counted="blocks")


def _width(width: Mapping[str, Any]) -> list[str]:
    share = (width.get("proof") or {}).get("share")
    return [
        width["name"],
        width["kind"],
        str(width["before"]),
        str(width["after"]),
        str(width["parameters"]),
        number(width["error"]),
        "" if share is None else f"{100 * share:.0f} %",
    ]


def _plots(widths: Sequence[Mapping[str, Any]]) -> list[Section]:
    found = []
    for key, title, about, values in (
        (
            "removed",
            "Units removed by depth",
            "Fraction of each layer's units.",
            {each["name"]: 1 - each["after"] / each["before"] for each in widths},
        ),
        (
            "error",
            "Error by depth",
            "Each layer's squared output error over that of removing everything, before blocks are fitted.",
            {each["name"]: each["error"] for each in widths},
        ),
    ):
        draw = partial(draw_lines, by_kind(values), label=key, logarithmic=key == "error")
        found += plot(key, title, about, draw) if widths else []
    return found
