"""`maskopt evaluate`: the perplexity of a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from maskopt.models import Perplexity, Text

__all__ = ["evaluate", "measure"]


def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option("--text", help="Text, or JSONL with a field `text`.")],
    seqlen: SeqlenOption = None,
    batch_size: BatchOption = 1,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Measure perplexity by the fixed-window protocol of the literature."""
    check_outputs(json)
    require_file("text", text)
    check_device(device)
    require_transformers()
    from maskopt import models

    with Bar(quiet, "loading the model") as bar:
        network, tokenizer = models.load_model(model, device=device)
        length = check_seqlen(network, tokenizer, seqlen)
        result = measure(bar, "perplexity", network, tokenizer, text, length, batch_size)
    figures = {
        **result.to_json(),
        "settings": {
            "model": model,
            "text": str(text),
            "seqlen": length,
            "batch_size": batch_size,
            "dtype": str(network.dtype),
            "device": device,
        },
        "versions": environment(),
    }
    with json_output(json, figures):
        lines = {
            "model": model,
            "text": f"{text}, sha256 {result.sha256[:12]}",
            "perplexity": f"{result.perplexity:.4f}",
            "tokens": f"{result.tokens} in {result.windows} windows of {result.seqlen}",
        }
        tables(json).print(facts(lines))


def measure(
    bar: Bar,
    what: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Path | Text,
    seqlen: int,
    batch_size: int = 1,
) -> Perplexity:
    """Return the perplexity on a text, as a stage called `what` of a progress bar."""
    from maskopt.models import perplexity

    bar.stage(what)

    def show(done: int, total: int) -> None:
        bar.tell(what, done / total)

    return perplexity(model, tokenizer, text, seqlen=seqlen, batch_size=batch_size, progress=show)
