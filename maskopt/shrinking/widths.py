"""How many units each block keeps, where blocks may differ: at equal parameters, by what the model loses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from maskopt.allocation import Plan
from maskopt.models.allocate import best_of
from maskopt.models.batches import Batch
from maskopt.models.selection import select_layers
from maskopt.models.trials import AllocationProgress, Trials
from maskopt.shrinking.units import Site
from maskopt.structured import Structured

__all__ = ["free_widths"]

# Sparsities around the mean at which consumers are solved. Widths differ more than sparsities of masks do: in a trained
# model of five blocks the first keeps a fifth of its neurons.
_OFFSETS = (-0.5, -0.3, -0.1, 0.1, 0.25, 0.37)
_FRACTIONS = (0.5, 0.75, 1.0, 1.3, 1.6)  # of the way from equal widths to those of least expected loss


def free_widths(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    counts: Mapping[Site, int],
    solver: Structured,
    *,
    memory: int,
    seed: int = 0,
    progress: Callable[[AllocationProgress], object] | None = None,
) -> Plan:
    """Choose how many units each site keeps, at as many parameters as counts that are given.

    Parameters
    ----------
    model : PreTrainedModel
        Dense, in evaluation mode; it is as it was afterwards.
    batches : sequence of Batch
    counts : mapping of Site to int
        Units that stay where all blocks are treated alike. Sites of several matrices (experts) keep theirs.
    solver : Structured
        Its draft chooses the units of the models that are compared.
    memory : int
        Bytes of working memory.
    seed : int
    progress : callable, optional
        Called with an `AllocationProgress`.

    Returns
    -------
    Plan
        A sparsity for each consumer, by name.

    Raises
    ------
    MaskoptError
        If there are fewer than three sequences, or the model predicts no tokens.
    """
    layers = {layer.name: site for site in counts for layer in site.layers}
    # Experts of a block have one width, and so has what an entry of the configuration widens together with others.
    shared = Counter((site.block.name, name) for site in counts for name in site.role.entries)
    fixed = {
        site.name
        for site in counts
        if site.role.experts or any(shared[site.block.name, name] > 1 for name in site.role.entries)
    }
    options: dict[str, Any] = {
        "propagate": "pruned",
        "correction": 0.0,
        "target": "layer",
        "include": list(layers),
        "exclude": (),
        "memory": memory,
    }
    work = Trials(
        model,
        select_layers(model, list(layers)),
        batches,
        {name: f"columns-{site.role.width}" for name, site in layers.items()},
        0.5,
        solver.draft,
        {name: 1 - counts[site] / site.role.number for name, site in layers.items() if site.name in fixed},
        options,
        progress,
        {name: counts[site] for name, site in layers.items()},
        {name: site.size // max(1, site.role.experts) for name, site in layers.items()},
    )
    if not work.prunes:
        return work.plan("auto", work.uniform, "uniform")
    work.predict()
    return best_of(work, seed, fractions=_FRACTIONS, offsets=_OFFSETS)
