"""`maskopt report`: the page of a pruned model."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from maskopt.cli.options import JsonOption
from maskopt.cli.output import check_outputs, json_output, tables
from maskopt.cli.page import page_of
from maskopt.errors import MaskoptError
from maskopt.files import atomic_path, reason

__all__ = ["report"]


def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that maskopt prune has written.")],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="New file of the page; by default OUT/report.html.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Write a page on a pruned model: what was done, errors and sparsities by depth, perplexities, settings, use."""
    page = out / "report.html" if html is None else html
    check_outputs(json, page)
    source = out / "report.json"
    try:
        figures: Any = json_module.loads(source.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise MaskoptError(f"The report {source} cannot be read: {reason(error)}.") from error
    if not isinstance(figures, dict):
        raise MaskoptError(f"The report {source} is none of maskopt prune.")
    text = page_of(figures, str(out))
    with json_output(json, {"page": str(page), "bytes": len(text.encode()), "report": figures}):
        with atomic_path(page) as aside:
            aside.write_text(text, encoding="utf-8")
        tables(json).print(f"The page is in {page}.", highlight=False)
