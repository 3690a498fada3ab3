"""`maskopt scale`: what pruning a model would cost, counted from its configuration."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from maskopt.cli.options import (
    DeviceOption,
    JsonOption,
    MemoryOption,
    SamplesOption,
    SeqlenOption,
    check_device,
    parse_memory,
    require_transformers,
)
from maskopt.cli.output import check_outputs, environment, facts, json_output, tables
from maskopt.cli.recover_options import parse_recovery
from maskopt.cli.words import duration
from maskopt.errors import MaskoptError

__all__ = ["scale"]


def scale(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder, a config.json, or the id of a model on the hub.")
    ],
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = None,
    memory: MemoryOption = "1G",
    recover: Annotated[
        str, typer.Option("--recover", metavar="none|block|model", help="Count a recovery that follows, too.")
    ] = "none",
    speed: Annotated[
        float | None,
        typer.Option(
            "--speed", help="Float32 multiplications and additions a second; by default measured on --device."
        ),
    ] = None,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Count the operations and bytes of pruning a model by the default method, from its configuration alone."""
    began = time.perf_counter()
    check_outputs(json)
    working = parse_memory(memory)
    if speed is not None and not 0 < speed < float("inf"):
        raise MaskoptError(f"--speed must be a positive number of operations a second; got {speed}.")
    recovery = parse_recovery(recover)
    check_device(device)
    require_transformers()
    from maskopt import models
    from maskopt.models.states import SHARE

    kind, config = models.model_class(model)
    cost = models.pruning_cost(kind, config, samples, seqlen, recovery)
    rate = models.product_speed(device) if speed is None else speed
    seconds = {
        "running": cost.running / rate,
        "grams": cost.grams / rate,
        "targets": cost.targets / rate,
        "solving": cost.solving / rate,
        **({} if recovery is None else {"fitting": cost.fitting / rate}),
    }
    figures = {
        **cost.to_json(),
        "device_bytes": cost.device_bytes(working),
        "speed": rate,
        "seconds_at_speed": seconds,
        "settings": {
            "model": model,
            "samples": samples,
            "seqlen": seqlen,
            "memory": working,
            "recover": recover,
            "device": device,
        },
        "versions": environment(),
        "seconds": time.perf_counter() - began,
    }
    held = (
        "are all of them"
        if cost.whole
        else f"are one block ({_size(cost.block_bytes)}) and what lies outside the blocks ({_size(cost.rest_bytes)})"
    )
    with json_output(json, figures):
        lines = {
            "model": f"{kind.__name__}, {cost.parameters / 1e9:.3g} billion parameters, "
            f"{cost.pruned / 1e9:.3g} billion of them in layers to prune",
            "calibration": f"{cost.tokens} tokens",
            "running blocks": _work(cost.running, seconds["running"]),
            "Gram matrices": _work(cost.grams, seconds["grams"]),
            "targets": _work(cost.targets, seconds["targets"]),
            "masks and weights": _work(cost.solving, seconds["solving"]),
            **({} if recovery is None else {"recovery": f"{_work(cost.fitting, seconds['fitting'])}; {_OWN_TYPE}"}),
            "in all": _work(cost.operations, sum(seconds.values())),
            "speed": f"{rate / 1e9:.4g} GFLOP/s {'measured on ' + device if speed is None else 'as given'}",
            "weights": f"{_size(cost.model_bytes)}; in memory {held}",
            "waiting": f"{_size(cost.states_bytes)} of states, up to {_size(cost.inside_bytes)} inside a block; where "
            f"this exceeds {_size(working // SHARE)}, not on the device",
            "Gram matrices at a time": _size(cost.gram_bytes),
            "layers at a time": f"{_size(cost.layer_bytes)}, and {_size(working)} of the solver",
            **({} if recovery is None else {"a fit": f"{_size(cost.fit_bytes)}, beside activations"}),
            "device memory": f"about {_size(cost.device_bytes(working))}, beside libraries and activations of a batch",
        }
        tables(json).print(facts(lines))


_OWN_TYPE = "in the model's own type, which is faster than float32 where that is bfloat16 on a GPU"


def _work(operations: float, seconds: float) -> str:
    return f"{operations / 1e12:.4g} TFLOP, {duration(seconds)}"


def _size(number: int) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 10**8 else f"{number / 1e6:.3g} MB"
