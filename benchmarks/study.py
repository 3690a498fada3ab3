"""Common to studies of whole models: cells that are run one by one, written after each, and resumed."""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import report
from perplexity import Job, jobs_of
from rich.progress import Progress

__all__ = ["Record", "carry_out", "numbers", "split_pattern", "words"]

Record = dict[str, Any]


def words(text: str) -> list[str]:
    """Return the parts of a list with commas."""
    return text.split(",")


def numbers(text: str) -> list[int]:
    """Return the whole numbers of a list with commas."""
    return [int(part) for part in text.split(",")]


def split_pattern(pattern: str) -> tuple[str, float | None]:
    """Return the arguments of `parse_masks` for a pattern such as per-row:0.6 or 2:4."""
    name, _, sparsity = pattern.partition(":")
    return (pattern, None) if name.isdigit() else (name, float(sparsity))


def carry_out(
    what: str,
    options: argparse.Namespace,
    cells: Callable[[Job, argparse.Namespace, set[Any]], Sequence[Any]],
    run: Callable[[Job, Sequence[Any], argparse.Namespace, Callable[[Record], None]], None],
    write: Callable[[Sequence[Record], argparse.Namespace, int], None],
    key: Callable[[Record], Any],
) -> None:
    """Run the cells of all models that are still to be run.

    Parameters
    ----------
    what : str
        Stands before the progress bar.
    options : Namespace
        With `models` and `only_models`, `name` and `resume`.
    cells : callable
        Returns the cells of a model that are not among those done.
    run : callable
        Runs cells of a model and calls a function with the record of each.
    write : callable
        Writes all records, and how many cells are left.
    key : callable
        Returns the cell of a record.
    """
    earlier = report.RESULTS / f"{options.name}.json"
    records: list[Record] = json.loads(earlier.read_text())["records"] if options.resume and earlier.exists() else []
    done = {key(record) for record in records}
    todo = [(job, cells(job, options, done)) for job in jobs_of(options)]
    left = sum(len(found) for _, found in todo)
    with Progress() as bar:
        shown = bar.add_task(what, total=left)

        def finished(record: Record) -> None:
            nonlocal left
            left -= 1
            records.append(record)
            write(records, options, left)
            bar.update(shown, advance=1)

        for job, found in todo:
            if found:
                run(job, found, options, finished)
    if not any(found for _, found in todo):
        write(records, options, 0)
