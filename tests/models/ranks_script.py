"""What several processes prune in tests of ranks, and one process to compare them with."""

import sys

import torch

from maskopt import NM, PerRow, Recovery, Unstructured, Wanda
from maskopt.models import jobs
from maskopt.models.prune import prune
from maskopt.models.ranks import joined
from maskopt.weights import ConditionalADMM
from tests.models.conftest import ARCHITECTURES, MIXTURES, VOCABULARY
from tests.processes import forked_ranks

RUNS = {
    "corrected": ("llama", PerRow(0.5), ConditionalADMM(), "corrected", 5),
    "pruned": ("llama", NM(keep=2, group=4), ConditionalADMM(), "pruned", 2),
    "dense, masks only": ("gpt2", Unstructured(0.5), Wanda(), "dense", 5),
    "experts": ("mixtral", PerRow(0.5), ConditionalADMM(), "corrected", 5),
    "experts with few tokens": ("qwen3_moe", NM(keep=2, group=4), ConditionalADMM(), "pruned", 1),
}
"""By name: model, masks, solver, propagation and number of batches."""


def batches(count):
    """Return padded batches, two sequences in each."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        real = (torch.arange(12) < torch.tensor([[12 - index % 3], [8]])).long()
        ids = torch.randint(1, VOCABULARY, (2, 12), generator=generator)
        found.append({"input_ids": ids * real, "attention_mask": real})
    return found


def outcomes():
    """Prune all models and return masks, weights and records by name."""
    found = {}
    jobs._LEAST = 1  # so that tiny layers are cut into several jobs
    for name, (kind, masks, solver, propagate, count) in RUNS.items():
        model = {**ARCHITECTURES, **MIXTURES}[kind].build(**{"n_layer" if kind == "gpt2" else "num_hidden_layers": 2})
        data = batches(count + 2)
        report = prune(model, data[:count], masks, solver, propagate=propagate, held_out=data[count:])
        records = [vars(record) | {"seconds": 0} for record in report.layers]
        found[name] = {"masks": dict(report.masks), "weights": model.state_dict(), "records": records}
    return found


RECOVERIES = {
    "blocks": ("llama", NM(keep=2, group=4), Recovery("block", epochs=3)),
    "model": ("llama", PerRow(0.4), Recovery("model", epochs=2)),
    "experts": ("mixtral", PerRow(0.5), Recovery("block", epochs=1)),
}
"""By name: model, masks and recovery."""
FITTED = 64


def windows(count, seed):
    """Return batches of a window each."""
    ids = torch.randint(1, VOCABULARY, (count, 10), generator=torch.Generator().manual_seed(seed))
    return list(ids.split(1))


def recovered(between=1):
    """Prune models, recover them, and return weights, masks and records by name.

    Two ranks have the first and the second half of the windows to fit. With `between` = 2 one process has them in an
    order in which its micro-batches, of two windows, are those that two ranks have at a time.
    """
    found = {}
    for name, (kind, masks, recovery) in RECOVERIES.items():
        model = {**ARCHITECTURES, **MIXTURES}[kind].build(num_hidden_layers=2)
        fitted = windows(FITTED, 1)
        half = len(fitted) // between
        fitted = [fitted[index + part * half] for index in range(half) for part in range(between)]
        report = prune(model, windows(4, 2), masks, Wanda(), recover=recovery, further=fitted, held_out=windows(5, 3))
        records = [vars(record) | {"seconds": 0} for record in report.recovery]
        found[name] = {"masks": dict(report.masks), "weights": model.state_dict(), "records": records}
    return found


def save(what, place):
    """Save what one of several processes finds."""
    with joined() as ranks:
        torch.save(what(), f"{place}-{what.__name__}-{ranks.count}-{ranks.number}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for task in sys.argv[2:]:
        name, number = task.split(":")
        what = {"outcomes": outcomes, "recovered": recovered}[name]
        if any(forked_ranks(int(number), lambda what=what: save(what, sys.argv[1]))):
            sys.exit(1)
