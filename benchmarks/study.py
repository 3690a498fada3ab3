"""Common to studies of whole models: cells that are run one by one, written after each, and resumed."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from perplexity import Job, jobs_of, loaded
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskopt.models import perplexity

__all__ = ["Opened", "Record", "carry_out", "fractions", "numbers", "parse", "split_pattern", "words"]

Record = dict[str, Any]


def words(text: str) -> list[str]:
    """Return the parts of a list with commas."""
    return text.split(",")


def numbers(text: str) -> list[int]:
    """Return the whole numbers of a list with commas."""
    return [int(part) for part in text.split(",")]


def fractions(text: str) -> list[float]:
    """Return the numbers of a list with commas."""
    return [float(part) for part in text.split(",")]


def parse(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Add the options that all studies have, and parse the command line.

    Parameters
    ----------
    parser : ArgumentParser
        With the study's own options.
    name : str
        Of the results by default.
    """
    parser.add_argument("models", nargs="*", metavar="MODEL,CALIBRATION,TEXT")
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--characters", type=int, help="length of each evaluation text; all by default")
    parser.add_argument("--name", default=name)
    parser.add_argument("--only-models", action="store_true", help="leave the demo model out")
    parser.add_argument("--resume", action="store_true", help="keep what results/NAME.json has, and run the rest")
    return parser.parse_args()


@dataclass(frozen=True, eq=False)
class Opened:
    """A dense model in float32 on one thread, and the text on which perplexity is measured.

    Parameters
    ----------
    model, tokenizer
    seqlen : int
        Tokens of a window, at most 512.
    text : str
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seqlen: int
    text: str

    @classmethod
    def of(cls, job: Job, characters: int | None) -> "Opened":
        """Load a model, and the first characters of its text."""
        return cls(*loaded(job, characters))

    def texts(self, foreign: Path | None, characters: int | None) -> dict[str, str]:
        """Return the text, as "perplexity", and the beginning of another one, as "foreign", where there is one."""
        others = {} if foreign is None else {"foreign": foreign.read_text()[:characters]}
        return {"perplexity": self.text, **others}

    def perplexity(self, model: PreTrainedModel, text: str | None = None) -> float:
        """Return a model's perplexity on the text, or on another."""
        part = self.text if text is None else text
        return perplexity(model, self.tokenizer, part, seqlen=self.seqlen).perplexity


def split_pattern(pattern: str) -> tuple[str, float | None]:
    """Return the arguments of `parse_masks` for a pattern such as per-row:0.6 or 2:4."""
    name, _, sparsity = pattern.partition(":")
    return (pattern, None) if name.isdigit() else (name, float(sparsity))


def carry_out(
    what: str,
    options: argparse.Namespace,
    cells: Callable[[Job, argparse.Namespace], Sequence[Any]],
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
        Returns the cells of a model.
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
    todo = [(job, [cell for cell in cells(job, options) if cell not in done]) for job in jobs_of(options)]
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
