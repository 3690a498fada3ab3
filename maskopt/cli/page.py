"""A report.json as one page for people: HTML without scripts, and without anything from elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskopt.cli.figure import by_kind, can_draw, draw_lines
from maskopt.cli.words import duration
from maskopt.errors import MaskoptError

__all__ = ["page_beside", "page_of"]

_TEMPLATE = Path(__file__).with_name("page.html")
_HEAD = ("layer", "shape", "sparsity", "before update", "error", "held out", "proven", "seconds")


def page_of(report: Mapping[str, Any], folder: str) -> str:
    """Return the page of a pruned model.

    Parameters
    ----------
    report : mapping
        What report.json of `maskopt prune` holds.
    folder : str
        Where the model is, for the examples of its use.

    Raises
    ------
    MaskoptError
        If the report is not of that command.
    """
    import jinja2

    try:
        content = _content(report, folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MaskoptError(
            f"The report of {folder} is none of this version's maskopt prune: {error} is missing or differs."
        ) from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(content)


def page_beside(report: Mapping[str, Any], folder: str) -> str | None:
    """Return the page to write beside a model that has just been made; None where it cannot be made.

    A model that took hours must not be lost for its page; `maskopt report` says what is wrong.
    """
    try:
        return page_of(report, folder)
    except Exception:
        return None


def _content(report: Mapping[str, Any], folder: str) -> dict[str, Any]:
    layers: Sequence[Mapping[str, Any]] = report["layers"]
    settings, command = report["settings"], report.get("command") or {}
    name = command.get("model") or settings["model"]
    perplexities = {
        text: (both["dense"], both["pruned"]) for text, both in (report.get("perplexity") or {}).items() if both
    }
    seconds = report.get("seconds")
    about = [settings["masks"], f"by {settings['solver']}", f"{settings['calibration_tokens']} calibration tokens"]
    facts = [
        ("Settings", _facts({**settings, **{key: value for key, value in command.items() if key not in settings}})),
        ("Calibration data", _facts(report.get("calibration") or {})),
        ("Versions", _facts(report.get("versions") or {})),
    ]
    return {
        "title": f"{Path(str(name)).name or name}, pruned",
        "summary": "; ".join(map(str, about)),
        "tiles": _tiles(report, perplexities, seconds),
        "perplexities": [_perplexity(text, *both) for text, both in perplexities.items()],
        "plots": _plots(layers),
        "head": _HEAD,
        "layers": [_row(layer) for layer in layers],
        "dense": [(each["name"], each["reason"]) for each in report.get("left_dense") or ()],
        "usage": _usage(folder),
        "settings": [(title, lines) for title, lines in facts if lines],
    }


def _tiles(report: Mapping[str, Any], perplexities: Mapping[str, Any], seconds: float | None) -> list[dict[str, str]]:
    found = [(f"{100 * report['sparsity']:.1f} %", f"of {report['weights'] / 1e6:.4g} million weights pruned")]
    for text, (dense, pruned) in perplexities.items():
        before, after = dense["perplexity"], pruned["perplexity"]
        if before is not None and after is not None:
            found.append((f"{before:.4g} → {after:.4g}", f"perplexity, {text} text"))
    found.append((f"{report['mean_relative_error']:.4g}", "mean relative error of the layers' outputs"))
    proven = [layer["lower_bound"] / layer["objective"] for layer in report["layers"] if _proven(layer)]
    if proven:
        found.append((f"{100 * sorted(proven)[len(proven) // 2]:.0f} %", "of the error is proven unavoidable, median"))
    if seconds is not None:
        found.append((duration(seconds), "in all"))
    memory = (report.get("memory_bytes") or {}).get("peak")
    if memory:
        found.append((f"{memory / 1e9:.3g} GB", "of memory at most"))
    return [{"value": value, "label": label} for value, label in found]


def _proven(layer: Mapping[str, Any]) -> bool:
    return layer.get("lower_bound") is not None and layer.get("gap_kind") == "PROVEN" and layer["objective"] > 0


def _perplexity(text: str, dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> list[str]:
    before, after = dense["perplexity"], pruned["perplexity"]
    if before is None or after is None:
        return [text, _number(before), _number(after), "", str(dense["tokens"])]
    return [
        f"{text} ({dense['source']})",
        f"{before:.3f}",
        f"{after:.3f}",
        f"{after / before:.3f}",
        str(dense["tokens"]),
    ]


def _row(layer: Mapping[str, Any]) -> list[str]:
    proven = f"{100 * layer['lower_bound'] / layer['objective']:.0f} %" if _proven(layer) else ""
    return [
        layer["name"],
        f"{layer['rows']} x {layer['columns']}",
        f"{layer['sparsity']:.3f}",
        _number(layer.get("kept_error")),
        _number(layer["relative_error"]),
        _number(layer.get("held_out_error")),
        proven,
        f"{layer['seconds']:.2f}",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _plots(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the plots, none where there is no matplotlib."""
    if not can_draw() or not layers:
        return []
    found = []
    for key, title, about in (
        ("relative_error", "Error by depth", "Each layer's squared output error over that of pruning all of it."),
        ("sparsity", "Sparsity by depth", "Fraction of each layer's weights that is zero."),
    ):
        lines = by_kind({layer["name"]: layer[key] for layer in layers})
        drawn = io.StringIO()
        draw_lines(lines, drawn, key.replace("_", " "), logarithmic=key != "sparsity")
        # Names of clip paths are the same in all figures, so that on one page they must be told apart.
        svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{key}-", drawn.getvalue())
        found.append({"title": title, "about": about, "svg": svg[svg.index("<svg") :]})
    return found


def _usage(folder: str) -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})\n\n"
        "# Any server of transformers models takes the folder, such as vLLM:  vllm serve FOLDER\n"
        f"# maskopt evaluate {folder} --text TEXT"
    )


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in values.items()
        if value not in (None, [], {}, "")
    ]
