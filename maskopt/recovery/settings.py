"""The settings of a recovery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maskopt.checks import SEEDS, check_settings, choice, instance_of, real, truth, whole
from maskopt.recovery.base import MaskRule
from maskopt.recovery.continuation import Continuation
from maskopt.recovery.fixed import FixedMasks

__all__ = ["Level", "Recovery"]

Level = Literal["block", "model"]


@dataclass(frozen=True)
class Recovery:
    """How a pruned model is fitted to the dense one, beyond the single layer.

    Parameters
    ----------
    level : {"block", "model"}
        "block": each block in turn, to the dense block's output on the dense model's states, while its inputs are those
        behind the blocks recovered before. "model": the blocks first, then all of them together, to the dense model's
        predictions.
    epochs : float, optional
        Passes over the windows to fit, for each block and for the model. By default 4 for each block and 2 for
        the model; the two take about the same time over the same windows.
    tokens : int, optional
        Tokens to fit each block on, and the model, in place of `epochs`.
    parameters : {"all", "pruned", "vectors", "lora"}
        What is fitted: all parameters of the blocks and all vectors (norms, biases) outside, the pruned weights alone,
        the vectors alone, or the vectors and masked products of low rank that are added to the pruned weights (PERP,
        arXiv 2312.15230). Embeddings and the head stay.
    rule : MaskRule, optional
        How masks move, at both levels. By default `Continuation` for blocks and `FixedMasks` for the model; always the
        latter with "vectors" and "lora".
    step_size : float, optional
        Of the optimizer, relative to each tensor, see `fit`; by default short trials choose it.
    seed : int
        Of the order of the windows, and of factors.
    rank : int
        Of the products of "lora".
    checkpoint : bool
        Whether the fit of the model keeps the inputs of its blocks only and computes what is inside a second time, when
        gradients are needed: up to a third more time, and the memory of one block's activations instead of all.

    Examples
    --------
    >>> from maskopt.recovery import Recovery
    >>> Recovery("block").rule_for("block")
    Continuation(until=0.6, power=2.0)
    """

    level: Level = "block"
    epochs: float | None = None
    tokens: int | None = None
    parameters: Literal["all", "pruned", "vectors", "lora"] = "all"
    rule: MaskRule | None = None
    step_size: float | None = None
    seed: int = 0
    rank: int = 16
    checkpoint: bool = False

    def __post_init__(self) -> None:
        check_settings(
            self,
            level=choice(("block", "model")),
            epochs=real(0, above=True, optional=True),
            tokens=whole(1, optional=True),
            parameters=choice(("all", "pruned", "vectors", "lora")),
            rule=instance_of(MaskRule, example="Continuation()", optional=True),
            step_size=real(0, above=True, optional=True),
            seed=whole(*SEEDS),
            rank=whole(1),
            checkpoint=truth(),
        )

    def rule_for(self, level: Level) -> MaskRule:
        """Return how masks move at a level."""
        if self.parameters in ("vectors", "lora"):
            return FixedMasks()
        return self.rule or (Continuation() if level == "block" else FixedMasks())

    def rank_of(self, weight: bool) -> int | None:
        """Return the rank of a parameter's change; None where all of it is fitted.

        Parameters
        ----------
        weight : bool
            Whether it is a pruned weight.
        """
        return self.rank if weight and self.parameters == "lora" else None

    def passes(self, level: Level, tokens: int) -> float:
        """Return how often a fit at a level sees its windows.

        Parameters
        ----------
        level : {"block", "model"}
        tokens : int
            In all of them together.
        """
        if self.tokens is not None:
            return self.tokens / max(1, tokens)
        return (4.0 if level == "block" else 2.0) if self.epochs is None else self.epochs

    def steps(self, level: Level, batches: int, tokens: int) -> int:
        """Return the number of optimizer steps of a fit at a level.

        Parameters
        ----------
        level : {"block", "model"}
        batches : int
            Micro-batches to fit.
        tokens : int
            In all of them together.
        """
        return max(1, round(self.passes(level, tokens) * batches))
