"""`maskopt evaluate`: the perplexity of a language model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

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
from maskopt.cli.words import duration

__all__ = ["evaluate"]


def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option("--text", help="Text file, or JSON lines with a field `text`.")],
    seqlen: SeqlenOption = None,
    batch_size: BatchOption = 1,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Measure the perplexity of a language model on a text, by the fixed-window protocol of the pruning literature."""
    began = time.perf_counter()
    check_outputs(json)
    require_file("text", text)
    check_device(device)
    require_transformers()
    from maskopt import models

    with Bar(quiet, "loading the model") as bar:
        network, tokenizer = models.load_model(model, device=device)
        length = check_seqlen(network, tokenizer, seqlen)
        bar.stage("perplexity")

        def show(done: int, total: int) -> None:
            bar.tell("perplexity", done / total)

        result = models.perplexity(network, tokenizer, text, seqlen=length, batch_size=batch_size, progress=show)
    seconds = time.perf_counter() - began
    figures = {
        **result.to_json(),
        "seconds": seconds,
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
            "time": duration(seconds),
        }
        tables(json).print(facts(lines))
