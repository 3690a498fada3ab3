"""Time of feed-forward parts with fewer neurons, and speed of whole models before and after `maskopt.shrinking`.

    python benchmarks/speed.py [MODEL ...] [--threads 1]

Feed-forward parts are those of Llama-type blocks on stock torch, with random weights: structure alone decides their
time. Dense and narrow ones take turns, so that both see the same machine; the best of many runs is given, because
other work only adds to it. Of each model (a folder), a copy without some units is timed in turns with the model
itself. Writes benchmarks/results/speed.{md,json}.
"""

import argparse
import copy
import time
from typing import Any

import report
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from maskopt.models import load_model
from maskopt.shrinking import Speed, cache_bytes, cut_model, find_units, measure_speed

SIZES = ((576, 1536), (2048, 5632), (4096, 11008))
TOKENS = (1, 16, 128)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FRACTIONS = (0.3, 0.5)
LOSSES = ((0.3, 0.0), (0.5, 0.0), (0.3, 0.25))
_SECONDS = 1.5  # for each pair of parts
_TURNS = 2  # of whole models


def feed_forward(hidden: int, inner: int, dtype: torch.dtype) -> nn.Module:
    """Return the feed-forward part of a Llama-type block."""
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner)
    layer: nn.Module = LlamaMLP(config).to(dtype).eval()
    return layer


def in_turns(parts: list[nn.Module], inputs: Tensor) -> list[float]:
    """Return the least seconds of a call of each of some modules."""
    best = [float("inf")] * len(parts)
    began = time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        for number, part in enumerate(parts):
            start = time.perf_counter()
            part(inputs)
            best[number] = min(best[number], time.perf_counter() - start)
    return best


@torch.no_grad()
def parts() -> list[dict[str, Any]]:
    """Time feed-forward parts."""
    records = []
    for hidden, inner in SIZES:
        for name, dtype in TYPES.items():
            modules = [feed_forward(hidden, round(inner * (1 - gone)), dtype) for gone in (0.0, *FRACTIONS)]
            for tokens in TOKENS:
                times = in_turns(modules, torch.randn(tokens, hidden, dtype=dtype))
                records += [
                    {"hidden": hidden, "neurons": inner, "type": name, "tokens": tokens, "removed": gone}
                    | {"milliseconds": 1000 * seconds, "times_faster": times[0] / seconds}
                    for gone, seconds in zip((0.0, *FRACTIONS), times, strict=True)
                ]
    return records


def smaller(model: PreTrainedModel, neurons: float, heads: float) -> PreTrainedModel:
    """Return a copy of a model without the last units of each block."""
    found = copy.deepcopy(model)
    structure = find_units(found, {"input_ids": torch.arange(16).view(1, -1)})
    kept = {}
    for site in structure.sites:
        fraction = neurons if site.role.kind == "neurons" else heads
        count = max(1, round((1 - fraction) * site.role.number))
        units = torch.arange(site.role.number) < count
        kept[site] = units.expand(site.role.experts, -1) if site.role.experts else units
    cut_model(found, kept)
    return found


def models(names: list[str]) -> list[dict[str, Any]]:
    """Time whole models."""
    records = []
    for name in names:
        dense, _ = load_model(name)
        for neurons, heads in LOSSES:
            narrow = smaller(dense, neurons, heads)
            for batch in (1, 16):
                speeds: list[list[Speed]] = [[], []]
                for _ in range(_TURNS):
                    for number, model in enumerate((dense, narrow)):
                        speeds[number].append(measure_speed(model, batch))
                best = [
                    {what: max(getattr(each, what) for each in found) for what in ("prefill", "decode")}
                    for found in speeds
                ]
                records.append(
                    {
                        "model": name.rstrip("/").rpartition("/")[2],
                        "type": str(dense.dtype).removeprefix("torch."),
                        "neurons": neurons,
                        "heads": heads,
                        "batch": batch,
                        "parameters": [dense.num_parameters(), narrow.num_parameters()],
                        "cache_bytes": [cache_bytes(dense), cache_bytes(narrow)],
                        "before": best[0],
                        "after": best[1],
                    }
                )
    return records


def write(layers: list[dict[str, Any]], whole: list[dict[str, Any]], threads: int) -> None:
    """Write the results."""
    kinds = [(size, kind) for size in SIZES for kind in TYPES]
    rows = [
        [
            f"{hidden} x {inner}, {kind}",
            *(
                f"{record['milliseconds']:.3f}" + ("" if not record["removed"] else f" ({record['times_faster']:.2f}x)")
                for record in layers
                if (record["hidden"], record["type"]) == (hidden, kind)
            ),
        ]
        for (hidden, inner), kind in kinds
    ]
    head = [f"{tokens} tokens, {100 * gone:.0f} % removed" for tokens in TOKENS for gone in (0.0, *FRACTIONS)]
    parts = [
        f"Milliseconds of a feed-forward part (gate, up, down) on {threads} threads of stock torch, before and after "
        "neurons are removed, and how many times faster.",
        report.table(["hidden x neurons", *head], rows),
    ]
    if whole:
        parts += [
            "Tokens a second of whole models: reading a prompt, and writing with the cache of keys and values.",
            report.table(
                ["model", "neurons/heads", "batch", "parameters", "cache bytes a token", "reading", "writing"],
                [
                    [
                        f"{record['model']}, {record['type']}",
                        f"{record['neurons']:g}/{record['heads']:g}",
                        str(record["batch"]),
                        f"{record['parameters'][1] / record['parameters'][0]:.3f}",
                        f"{record['cache_bytes'][0]:g} -> {record['cache_bytes'][1]:g}",
                        *(_speed(record, what) for what in ("prefill", "decode")),
                    ]
                    for record in whole
                ],
            ),
        ]
    report.write("speed", "Speed of smaller models", "\n\n".join(parts), {"parts": layers, "models": whole})


def _speed(record: dict[str, Any], what: str) -> str:
    before, after = record["before"][what], record["after"][what]
    return f"{before:.1f} -> {after:.1f} ({after / before:.2f}x)"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders of models")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers = parts()
    write(layers, [], options.threads)
    write(layers, models(options.models), options.threads)


if __name__ == "__main__":
    main()
