"""What pages of results are made of: tiles, tables, plots, facts."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from maskopt.cli.figure import can_draw

__all__ = ["Page", "Section", "facts_sections", "number", "plot", "usage"]


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading; what is empty is left out.

    Parameters
    ----------
    title : str
    about : str
        A sentence under the heading.
    head : sequence of str
        Headings of the table's columns; without them its rows are names and values.
    rows : sequence of sequence of str
        Cells of the table.
    counted : str
        What the rows are; the table can then be folded away.
    open_up_to : int
        Rows with which it is still open at first.
    svg : str
        A plot.
    text : str
        Code.
    """

    title: str
    about: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    counted: str = ""
    open_up_to: int = 60
    svg: str = ""
    text: str = ""


@dataclass(frozen=True)
class Page:
    """A page.

    Parameters
    ----------
    title, summary : str
    tiles : sequence of (str, str)
        The main figures, each with what it is.
    sections : sequence of Section
    """

    title: str
    summary: str
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def number(value: float | None) -> str:
    """Return a figure with four digits; nothing for one that JSON has no number for."""
    return "" if value is None else f"{value:.4g}"


def plot(key: str, title: str, about: str, draw: Callable[[IO[str]], None]) -> list[Section]:
    """Return the section of a plot; none where there is no matplotlib.

    Parameters
    ----------
    key : str
        A word of which each plot of a page has its own.
    title, about : str
    draw : callable
        Writes the SVG to the text file that it is given.
    """
    if not can_draw():
        return []
    drawn = io.StringIO()
    draw(drawn)
    # Names of clip paths are the same in all figures, so that on one page they must be told apart.
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{key}-", drawn.getvalue())
    return [Section(title, about, svg=svg[svg.index("<svg") :])]


def facts_sections(parts: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """Return the tables of names and values, without what is empty.

    Parameters
    ----------
    parts : mapping
        Names and values by title.
    """
    found = []
    for title, values in parts.items():
        rows = [
            (name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value))
            for name, value in values.items()
            if value not in (None, [], {}, "")
        ]
        found += [Section(title, rows=rows)] if rows else []
    return found


_ZEROS = (
    "Zeros alone make no model faster on today's runtimes; they make it smaller (maskopt pack) and can be kept while "
    "it is fine-tuned."
)


def usage(folder: str, about: str = _ZEROS) -> Section:
    """Return how the model in a folder is loaded and measured, below a sentence about it."""
    return Section(
        "How to use it",
        about,
        text="from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})\n\n"
        "# Any server of transformers models takes the folder, such as vLLM:  vllm serve FOLDER\n"
        f"# maskopt evaluate {folder} --text TEXT",
    )
