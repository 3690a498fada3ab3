"""Memory and time of one gradient of a whole model, with all activations kept and with those of one block.

    python benchmarks/checkpointing.py [MODEL ...] [--sequences 4] [--length 512] [--repeats 3]

The gradient is that of `maskopt prune --recover model`, without and with `--recover-checkpointing`, on random tokens.
Every measurement is a process of its own on one thread; bytes are what its memory grows by at most, seconds processor
time, medians. Models are folders; the shipped demo model comes first, and windows are no longer than contexts. Writes
benchmarks/results/checkpointing.{md,json}.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import report
import torch
from large_models import resident_bytes

from maskopt.demo.run import MODEL
from maskopt.models import load_model, select_layers
from maskopt.models.batches import prepare_batches
from maskopt.models.context import context_length
from maskopt.models.divergence import Divergence
from maskopt.models.objectives import Predictions
from maskopt.models.ranks import Ranks
from maskopt.models.replay import evaluation_mode
from maskopt.models.windows import Data


def measured(model: str, sequences: int, length: int, checkpoint: bool) -> dict[str, float]:
    """Return what one gradient takes, beyond what the process needs before."""
    torch.set_num_threads(1)
    network, _ = load_model(model)
    network.float()
    vocabulary = network.get_input_embeddings().num_embeddings
    length = min(length, context_length(network) or length)
    ids = torch.randint(3, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(0))
    batches = prepare_batches(network, [ids])
    blocks = [block.module for block in select_layers(network).blocks] if checkpoint else []
    with evaluation_mode(network):
        objective = Predictions(
            network, Divergence(network, batches), Data(batches, range(1), range(1)), Ranks(), blocks
        )
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        before, began = resident_bytes(resource.getrusage(resource.RUSAGE_SELF)), time.process_time()
        with torch.enable_grad():
            objective.loss(0).backward()  # type: ignore[no-untyped-call]
        seconds = time.process_time() - began
    return {"bytes": resident_bytes(resource.getrusage(resource.RUSAGE_SELF)) - before, "seconds": seconds}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=["keep", "again"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.models[0], options.sequences, options.length, options.one == "again")))
        return
    lines, rows = [], []
    for model in [str(MODEL), *options.models]:
        found: dict[str, list[dict[str, Any]]] = {"keep": [], "again": []}
        for _ in range(options.repeats):
            for how, runs in found.items():  # in turns, so that both see the same machine
                command = [sys.executable, __file__, model, "--one", how]
                command += ["--sequences", str(options.sequences), "--length", str(options.length)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
        usual = {how: {part: median(run[part] for run in runs) for part in runs[0]} for how, runs in found.items()}
        rows.append({"model": Path(model).name, **found})
        keep, again = usual["keep"], usual["again"]
        lines.append(
            [
                Path(model).name,
                *(f"{each['bytes'] / 1e6:.0f}" for each in (keep, again)),
                *(f"{each['seconds']:.2f}" for each in (keep, again)),
                f"{again['seconds'] / keep['seconds']:.2f}",
            ]
        )
        print(*lines[-1], flush=True)
    head = ["model", "MB, all kept", "MB, one block", "s, all kept", "s, one block", "ratio"]
    text = f"{options.sequences} sequences of {options.length} tokens; medians of {options.repeats} runs.\n\n"
    report.write(
        "checkpointing", "Activations computed a second time", text + report.table(head, lines), {"rows": rows}
    )


if __name__ == "__main__":
    main()
