"""`maskopt evaluate`: perplexity and tasks of a language model, alone or beside the dense one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.options import (
    BatchOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    SeqlenOption,
    check_device,
    check_seqlen,
    require_file,
    require_transformers,
)
from maskopt.cli.output import Bar, check_outputs, environment, facts, json_output, tables
from maskopt.cli.words import duration, named_table
from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from maskopt.models import Perplexity, Tasks, TaskScore

__all__ = ["evaluate"]


@dataclass
class _Measured:
    """What was measured of one model."""

    dtype: str
    seqlen: int | None = None
    perplexity: Perplexity | None = None
    scores: list[TaskScore] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        found = {} if self.perplexity is None else self.perplexity.to_json()
        return found | ({"tasks": [score.to_json() for score in self.scores]} if self.scores else {})


@dataclass(frozen=True)
class _Work:
    """What to measure of every model."""

    text: Path | None
    tasks: Tasks | None
    limit: int | None
    seqlen: int | None
    batch_size: int
    device: str
    quiet: bool

    def measure(self, model: str) -> _Measured:
        """Load a model and measure it."""
        from maskopt import models

        with Bar(self.quiet, f"loading {model}") as bar:
            network, tokenizer = models.load_model(model, device=self.device)
            found = _Measured(str(network.dtype))
            if self.text is not None:
                found.seqlen = check_seqlen(network, tokenizer, self.seqlen)
                bar.stage("perplexity")

                def show(done: int, total: int) -> None:
                    bar.tell("perplexity", done / total)

                found.perplexity = models.perplexity(
                    network, tokenizer, self.text, seqlen=found.seqlen, batch_size=self.batch_size, progress=show
                )
        if self.tasks is not None:  # after the bar, because lm-eval draws its own
            found.scores = self.tasks.evaluate(network, tokenizer, limit=self.limit, batch_size=self.batch_size)
        return found


def evaluate(
    model: ModelArgument,
    text: Annotated[
        Path | None, typer.Option("--text", help="Text file, or JSON lines with a field `text`, for perplexity.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Comma-separated tasks or groups of lm-eval, patterns of names, or YAML files of tasks.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", metavar="FOLDER", help="Further task files, to be named by --tasks."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Examples at most of each task, for trials.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="DENSE", help="Measure this model too, and print both side by side."),
    ] = None,
    seqlen: SeqlenOption = None,
    batch_size: BatchOption = 1,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Measure a language model: perplexity by the fixed windows of the pruning literature, and tasks of lm-eval."""
    began = time.perf_counter()
    check_outputs(json)
    _check(text, tasks, include_path, limit, seqlen)
    check_device(device)
    require_transformers()
    from maskopt import models

    loaded = None
    if tasks is not None:
        names = [name for name in map(str.strip, tasks.split(",")) if name]
        loaded = models.Tasks(names, include_path, show=Bar(quiet).visible)
    work = _Work(text, loaded, limit, seqlen, batch_size, device, quiet)
    # The dense model first: if it cannot be loaded, nothing was waited for.
    dense = None if against is None else work.measure(against)
    found = work.measure(model)
    seconds = time.perf_counter() - began
    figures: dict[str, Any] = {
        **found.to_json(),
        **({} if dense is None else {"against": dense.to_json()}),
        "seconds": seconds,
        "settings": {
            "model": model,
            "against": against,
            "text": None if text is None else str(text),
            "tasks": None if loaded is None else list(loaded.names),
            "limit": limit,
            "seqlen": found.seqlen,
            "batch_size": batch_size,
            "dtype": found.dtype,
            "device": device,
        },
        "versions": {**environment(), **({} if loaded is None else {"lm_eval": loaded.version})},
    }
    if _comparable(dense, found):
        figures["perplexity_ratio"] = figures["perplexity"] / figures["against"]["perplexity"]
    with json_output(json, figures):
        console = tables(json)
        console.print(facts(_lines(model, against, text, found, dense, seconds)))
        if found.scores:
            console.print(_table(found.scores, None if dense is None else dense.scores, console.width))


def _check(
    text: Path | None, tasks: str | None, include_path: Path | None, limit: int | None, seqlen: int | None
) -> None:
    """Check, before any work, that there is something to measure and that every option applies to it."""
    if text is None and tasks is None:
        raise MaskoptError("There is nothing to measure: give --text for perplexity, --tasks for tasks, or both.")
    if text is not None:
        require_file("text", text)
    unused = {"--include-path": include_path, "--limit": limit} if tasks is None else {}
    for option, value in unused.items():
        if value is not None:
            raise MaskoptError(f"{option} applies to tasks; give --tasks as well, or leave it out.")
    if text is None and seqlen is not None:
        raise MaskoptError("--seqlen applies to perplexity; give --text as well, or leave it out.")


def _comparable(dense: _Measured | None, found: _Measured) -> bool:
    """Whether two perplexities are of the same windows; other tokenizers and contexts give others."""
    if dense is None or dense.perplexity is None or found.perplexity is None:
        return False
    one, other = dense.perplexity, found.perplexity
    return (one.tokens, one.seqlen) == (other.tokens, other.seqlen)


def _lines(
    model: str, against: str | None, text: Path | None, found: _Measured, dense: _Measured | None, seconds: float
) -> dict[str, str]:
    """Return the table of facts: what was measured, and the perplexity."""
    lines = {"model": model, **({} if against is None else {"against": against})}
    result = found.perplexity
    if result is not None:
        lines |= {"text": f"{text}, sha256 {result.sha256[:12]}", "perplexity": f"{result.perplexity:.4f}"}
        if dense is not None and dense.perplexity is not None:
            before = dense.perplexity
            lines["perplexity"] = f"{before.perplexity:.4f} dense, {result.perplexity:.4f} pruned"
            if _comparable(dense, found):
                lines["perplexity"] += f": {result.perplexity / before.perplexity:.4f}"
            else:
                lines["note"] = (
                    f"the dense model read {before.tokens} tokens in windows of {before.seqlen}, so that its "
                    "perplexity cannot be compared"
                )
        lines["tokens"] = f"{result.tokens} in {result.windows} windows of {result.seqlen}"
    return lines | {"time": duration(seconds)}


def _table(scores: Sequence[TaskScore], dense: Sequence[TaskScore] | None, width: int) -> Table:
    """Return the table of tasks: the model's scores, or both models' and their difference."""
    columns = {
        "shots": ["" if score.shots is None else str(score.shots) for score in scores],
        "examples": ["" if score.examples is None else str(score.examples) for score in scores],
    }
    if dense is None:
        columns["value"] = list(map(_value, scores))
    else:
        columns |= {"dense": list(map(_value, dense)), "pruned": list(map(_value, scores))}
        columns["difference"] = [
            f"{after.value - before.value:+.4f}" for before, after in zip(dense, scores, strict=True)
        ]
    return named_table("Tasks", "task and metric", list(map(_name, scores)), columns, width)


def _value(score: TaskScore) -> str:
    return f"{score.value:.4f}" + ("" if score.error is None else f" ± {score.error:.4f}")


def _name(score: TaskScore) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
    extracted = "" if score.filter == "none" else f", {score.filter}"
    return f"{score.task} {score.metric}{extracted}{arrow}"
