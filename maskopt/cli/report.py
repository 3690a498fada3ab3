"""`maskopt report`: results as a page."""

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
    results: Annotated[
        Path,
        typer.Argument(
            metavar="RESULTS",
            help="Folder that prune, recover or shrink has written, or the file that --json of one of these, compare, "
            "trace or evaluate has.",
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="New file of the page; by default report.html in the folder, or the JSON file's name with .html.",
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Write results as a page: what was done, errors by depth or case as plots, perplexities, settings, use."""
    single = results.is_file()
    source = results if single else results / "report.json"
    page = html or (results.with_suffix(".html") if single else results / "report.html")
    check_outputs(json, page)
    try:
        figures: Any = json_module.loads(source.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise MaskoptError(f"The report {source} cannot be read: {reason(error)}.") from error
    if not isinstance(figures, dict):
        raise MaskoptError(f"The report {source} is none of maskopt.")
    text = page_of(figures, _folder(figures, results) if single else str(results))
    with json_output(json, {"page": str(page), "bytes": len(text.encode()), "report": figures}):
        with atomic_path(page) as aside:
            aside.write_text(text, encoding="utf-8")
        tables(json).print(f"The page is in {page}.", highlight=False)


def _folder(figures: dict[str, Any], file: Path) -> str:
    """Return the folder of the model that a JSON file of prune or recover is about, else the file."""
    command = figures.get("command")
    return str(command["out"]) if isinstance(command, dict) and "out" in command else str(file)
