"""Results as one page for people: HTML without scripts, and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maskopt.cli.page_layers import compare_page, trace_page
from maskopt.cli.page_models import evaluate_page, prune_page, recover_page
from maskopt.cli.page_parts import Page
from maskopt.cli.page_shrink import shrink_page
from maskopt.errors import MaskoptError

__all__ = ["page_beside", "page_of"]

_TEMPLATE = Path(__file__).with_name("page.html")
_PAGES: dict[str, tuple[frozenset[str], Callable[[Mapping[str, Any], str], Page]]] = {
    "prune": (frozenset({"layers", "settings", "sparsity"}), prune_page),
    "recover": (frozenset({"recovery", "settings", "sparsity"}), recover_page),
    "shrink": (frozenset({"widths", "parameters", "loads_with"}), shrink_page),
    "compare": (frozenset({"rows", "summary", "settings"}), compare_page),
    "trace": (frozenset({"traces", "settings"}), trace_page),
    "evaluate": (frozenset({"seqlen", "settings", "perplexity"}), evaluate_page),
    "evaluate --tasks": (frozenset({"tasks", "settings"}), evaluate_page),
}
"""By command: the names that its results have, and what makes their page; the first that fits decides."""


def page_of(figures: Mapping[str, Any], source: str) -> str:
    """Return the page of a command's results.

    Parameters
    ----------
    figures : mapping
        What report.json of `maskopt prune`, `recover` or `shrink` holds, or the JSON of `compare`, `trace` or
        `evaluate`.
    source : str
        The model's folder or the file of the figures.

    Raises
    ------
    MaskoptError
        If the figures are of none of these commands.
    """
    import jinja2

    command = next((name for name, (keys, _) in _PAGES.items() if keys <= figures.keys()), None)
    if command is None:
        raise MaskoptError(
            f"The report of {source} is none of maskopt prune, recover, shrink, compare, trace or evaluate, which have "
            "pages."
        )
    try:
        page = _PAGES[command][1](figures, source)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise MaskoptError(
            f"The report of {source} is none of this version's maskopt {command}: {error} is missing or differs."
        ) from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(page=page)


def page_beside(report: Mapping[str, Any], folder: str) -> str | None:
    """Return the page to write beside a model that has just been made; None where it cannot be made.

    A model that took hours must not be lost for its page; `maskopt report` says what is wrong.
    """
    try:
        return page_of(report, folder)
    except Exception:
        return None
