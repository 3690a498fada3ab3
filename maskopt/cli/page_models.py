"""The pages of commands that write or measure models: prune, recover, evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from maskopt.cli.figure import by_kind, draw_lines
from maskopt.cli.page_parts import Page, Section, facts_sections, number, plot, usage
from maskopt.cli.words import duration

__all__ = ["evaluate_page", "prune_page", "recover_page"]

_HEAD = ("layer", "shape", "sparsity", "before update", "error", "held out", "proven", "seconds")
_RECOVERY_HEAD = ("fit", "held-out loss before", "after", "kept", "masks changed", "step", "seconds")
_TASKS_HEAD = ("task and metric", "shots", "examples")


def prune_page(report: Mapping[str, Any], folder: str) -> Page:
    """Return the page of report.json of `maskopt prune`, whose model is in `folder`."""
    layers: Sequence[Mapping[str, Any]] = report["layers"]
    settings, command = report["settings"], report.get("command") or {}
    name = command.get("model") or settings["model"]
    perplexities = {
        text: (both["dense"], both["pruned"]) for text, both in (report.get("perplexity") or {}).items() if both
    }
    sections = []
    if perplexities:
        rows = [_perplexity(text, *both) for text, both in perplexities.items()]
        sections.append(Section("Perplexity", head=("text", "dense", "pruned", "ratio", "tokens"), rows=rows))
    sections += _layer_plots(layers)
    sections.append(Section("Layers", head=_HEAD, rows=[_layer(layer) for layer in layers], counted="layers"))
    sections += _recovery(report.get("recovery") or ())
    dense = [(each["name"], each["reason"]) for each in report.get("left_dense") or ()]
    sections += [Section("Left dense", rows=dense, counted="weights", open_up_to=0)] if dense else []
    sections.append(usage(folder))
    sections += facts_sections(
        {
            "Settings": {**settings, **{key: value for key, value in command.items() if key not in settings}},
            "Calibration data": report.get("calibration") or {},
            "Packed folder": _packed(report),
            "Versions": report.get("versions") or {},
        }
    )
    about = [settings["masks"], f"by {settings['solver']}", f"{settings['calibration_tokens']} calibration tokens"]
    title = f"{Path(str(name)).name or name}, pruned"
    return Page(title, "; ".join(map(str, about)), _prune_tiles(report, perplexities), sections)


def _prune_tiles(report: Mapping[str, Any], perplexities: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [(f"{100 * report['sparsity']:.1f} %", f"of {report['weights'] / 1e6:.4g} million weights pruned")]
    for text, (dense, pruned) in perplexities.items():
        before, after = dense["perplexity"], pruned["perplexity"]
        if before is not None and after is not None:
            found.append((f"{before:.4g} → {after:.4g}", f"perplexity, {text} text"))
    found.append((f"{report['mean_relative_error']:.4g}", "mean relative error of the layers' outputs"))
    proven = [layer["lower_bound"] / layer["objective"] for layer in report["layers"] if _proven(layer)]
    if proven:
        found.append((f"{100 * sorted(proven)[len(proven) // 2]:.0f} %", "of the error is proven unavoidable, median"))
    if report.get("seconds") is not None:
        found.append((duration(report["seconds"]), "in all"))
    memory = (report.get("memory_bytes") or {}).get("peak")
    if memory:
        found.append((f"{memory / 1e9:.3g} GB", "of memory at most"))
    return found


def _packed(report: Mapping[str, Any]) -> dict[str, str]:
    """Return what packing did, which only the JSON of --json has."""
    found = report.get("packed") or {}
    names = {"dense_bytes": "bytes of the weights, dense", "packed_bytes": "packed", "ratio": "ratio"}
    return {name: number(found[key]) for key, name in names.items() if key in found}


def _proven(layer: Mapping[str, Any]) -> bool:
    return layer.get("lower_bound") is not None and layer.get("gap_kind") == "PROVEN" and layer["objective"] > 0


def _perplexity(text: str, dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> list[str]:
    before, after = dense["perplexity"], pruned["perplexity"]
    if before is None or after is None:
        return [text, number(before), number(after), "", str(dense["tokens"])]
    name = f"{text} ({dense['source']})"
    return [name, f"{before:.3f}", f"{after:.3f}", f"{after / before:.3f}", str(dense["tokens"])]


def _layer(layer: Mapping[str, Any]) -> list[str]:
    proven = f"{100 * layer['lower_bound'] / layer['objective']:.0f} %" if _proven(layer) else ""
    return [
        layer["name"],
        f"{layer['rows']} x {layer['columns']}",
        f"{layer['sparsity']:.3f}",
        number(layer.get("kept_error")),
        number(layer["relative_error"]),
        number(layer.get("held_out_error")),
        proven,
        f"{layer['seconds']:.2f}",
    ]


def _layer_plots(layers: Sequence[Mapping[str, Any]]) -> list[Section]:
    found = []
    for key, title, about in (
        ("relative_error", "Error by depth", "Each layer's squared output error over that of pruning all of it."),
        ("sparsity", "Sparsity by depth", "Fraction of each layer's weights that is zero."),
    ):
        lines = by_kind({layer["name"]: layer[key] for layer in layers})
        draw = partial(draw_lines, lines, label=key.replace("_", " "), logarithmic=key != "sparsity")
        found += plot(key, title, about, draw) if layers else []
    return found


def recover_page(report: Mapping[str, Any], folder: str) -> Page:
    """Return the page of report.json of `maskopt recover`, whose model is in `folder`."""
    command, records = report.get("command") or {}, report["recovery"]
    perplexities = report.get("perplexity") or {}
    tiles = (
        [(f"{100 * report['sparsity']:.1f} %", "of the pruned layers' weights are zero")] if report["sparsity"] else []
    )
    values = {when: each["perplexity"] for when, each in perplexities.items()}
    if values.get("before") and values.get("after"):
        tiles.append((f"{values['before']:.4g} → {values['after']:.4g}", "perplexity, before and after"))
    if values.get("dense"):
        tiles.append((f"{values['dense']:.4g}", "perplexity of the dense model"))
    tiles.append((f"{sum(record['accepted'] for record in records)} of {len(records)}", "fits kept"))
    if report.get("seconds") is not None:
        tiles.append((duration(report["seconds"]), "in all"))
    rows = [(when, number(each["perplexity"]), str(each["tokens"])) for when, each in perplexities.items()]
    sections = [Section("Perplexity", head=("model", "perplexity", "tokens"), rows=rows)] if rows else []
    sections += _recovery(records)
    sections.append(usage(folder))
    sections += facts_sections(
        {
            "Settings": {**report["settings"], **command},
            "Calibration data": report.get("calibration") or {},
            "Packed folder": _packed(report),
            "Versions": report.get("versions") or {},
        }
    )
    name = command.get("pruned") or report["settings"]["model"]
    return Page(f"{Path(str(name)).name or name}, recovered", str(report["settings"]["recover"]), tiles, sections)


def _recovery(records: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Return what recovery changed: held-out losses by block as a plot, and every fit."""
    if not records:
        return []
    rows = [
        [
            record["name"],
            number(record["before"]),
            number(record["after"]),
            "fit" if record["accepted"] else "before",
            f"{100 * record['changed']:.1f} %",
            number(record["step_size"]),
            f"{record['seconds']:.1f}",
        ]
        for record in records
    ]
    blocks = [record for record in records if record["level"] == "block"]
    lines = {when: list(enumerate(record[when] or 0.0 for record in blocks)) for when in ("before", "after")}
    draw = partial(draw_lines, lines, label="held-out relative error", logarithmic=True)
    about = "Squared error of each block's output, over the output's own size, on windows that were not fitted."
    drawn = plot("recovery", "Recovery by depth", about, draw) if blocks else []
    return [*drawn, Section("Recovery", head=_RECOVERY_HEAD, rows=rows, counted="fits")]


def evaluate_page(figures: Mapping[str, Any], _: str) -> Page:
    """Return the page of the JSON of `maskopt evaluate`."""
    settings, dense = figures["settings"], figures.get("against") or {}
    tiles, sections = [], []
    if figures.get("perplexity") is not None:
        value = number(figures["perplexity"])
        tiles.append((f"{number(dense['perplexity'])} → {value}" if dense else value, "perplexity"))
        if figures.get("perplexity_ratio") is not None:
            tiles.append((number(figures["perplexity_ratio"]), "times the dense model's perplexity"))
    if figures.get("tasks"):
        scores = [dense["tasks"], figures["tasks"]] if dense else [figures["tasks"]]
        head = (*_TASKS_HEAD, *(("dense", "pruned", "difference") if dense else ("value",)))
        rows = [_task(each) for each in zip(*scores, strict=True)]
        sections.append(Section("Tasks", "With standard errors over the examples.", head, rows))
    sections += facts_sections({"Settings": settings, "Versions": figures.get("versions") or {}})
    name = Path(str(settings["model"])).name or str(settings["model"])
    against = f"against {settings['against']}; " if dense else ""
    return Page(f"{name}, measured", f"{against}text: {settings['text']}", tiles, sections)


def _task(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    last = scores[-1]
    cells = [f"{last['task']} {last['metric']}", *(str(last[key] or 0) for key in ("shots", "examples"))]
    for score in scores:
        cells.append(number(score["value"]) + ("" if score["error"] is None else f" ± {score['error']:.2g}"))
    return cells if len(scores) == 1 else [*cells, f"{last['value'] - scores[0]['value']:+.4f}"]
