"""The progress bar of `maskopt prune`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from maskopt.cli.estimate import Estimate
from maskopt.cli.output import Bar
from maskopt.cli.words import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from maskopt.models import Calibration, Progress, Selection
    from maskopt.recovery import Recovery

__all__ = ["PruneProgress"]

# Guesses before any measurement: operations per second, and operations per rows x d x d of a layer.
_SPEED = 2e10
_SOLVE, _CERTIFY = 500.0, 400.0
_FIT = 30.0  # per parameter of a block and token
_RUNS = 6  # of every block on every batch


class PruneProgress:
    """Shows the fraction of a whole run that is done, and the time left, on one bar.

    Parameters
    ----------
    bar : Bar
    model : PreTrainedModel
    selection : Selection
        Layers to prune.
    calibration : Calibration
    certify : bool
        Whether bounds are proven, too.
    measurements : int
        Number of perplexities to measure, each on about as many windows as the calibration has.
    recovery : Recovery, optional
        What follows the pruning of blocks.
    held_out, further : Calibration, optional
        Windows that run along, and windows to fit blocks and the model to if not those of the calibration.
    """

    def __init__(
        self,
        bar: Bar,
        model: PreTrainedModel,
        selection: Selection,
        calibration: Calibration,
        certify: bool,
        measurements: int,
        recovery: Recovery | None = None,
        held_out: Calibration | None = None,
        further: Calibration | None = None,
    ) -> None:
        self._bar, self._measurements = bar, measurements
        self._costs = {layer.name: float(layer.shape[0]) * layer.shape[1] ** 2 for layer in selection.layers}
        self._short = dict(zip(self._costs, shortened(list(self._costs), 24), strict=True))
        self._proofs = {layer.name: float(layer.shape[0]) * layer.shape[1] ** 3 for layer in selection.layers}
        self._stages = sum(bool(layers) for layers in selection.blocks.values()) + bool(selection.outside)
        # A fit of the model is as much work as those of all blocks, and its head's.
        self._model = float(self._stages)
        fitted = further or calibration
        self._runs = self._windows = 0
        self._blocks: list[str] = []
        self._fits: dict[str, float] = {}
        self._solved = self._proven = 0.0
        self._names: tuple[str, ...] = ()
        size = float(sum(parameter.numel() for parameter in model.parameters()))
        batch = calibration.tokens / len(calibration)
        planned = {
            "perplexity": float(measurements * calibration.samples),
            "calibrate": float(self._stages * (len(calibration) + len(held_out or ()) + len(further or ())) * _RUNS),
            "solve": sum(self._costs.values()),
            "certify": sum(self._proofs.values()) if certify else 0.0,
            # In fits of a block.
            "recover": 0.0 if recovery is None else self._stages + (self._model if recovery.level == "model" else 0.0),
        }
        guess = {
            "perplexity": 2 * size * calibration.seqlen / _SPEED,
            "calibrate": 2 * size * batch / max(1, self._stages) / _SPEED,
            "solve": _SOLVE / _SPEED,
            "certify": _CERTIFY / _SPEED,
            "recover": _FIT * size / max(1, self._stages) * fitted.tokens / _SPEED,
        }
        self._estimate = Estimate(planned, guess)

    def perplexity(self, what: str) -> Callable[[int, int], None]:
        """Begin to measure a perplexity and return its progress callback, called with windows done and in all."""
        before = self._windows
        self._show(what, "perplexity", before)

        def tell(done: int, total: int) -> None:
            self._windows = before + done
            self._estimate.plan("perplexity", max(before + total, self._measurements * total))
            self._show(what, "perplexity", self._windows)

        return tell

    def prune(self, event: Progress) -> None:
        """Show a `Progress` of `maskopt.models.prune`."""
        if event.stage == "calibrate":
            self._finish()
            self._calibrate(event.name)
        elif event.stage == "recover":
            self._finish()
            self._fits[event.name] = event.fraction * (self._model if event.name == "model" else 1.0)
            self._show(f"recover {event.name}", "recover", sum(self._fits.values()))
        elif event.stage == "done":
            self._finish()
            # What was planned and not needed is no work that is left.
            self._estimate.plan("calibrate", self._runs)
            self._estimate.reach("calibrate", self._runs)
            self._estimate.reach("solve", self._solved)
            self._show("all layers pruned", "certify", self._proven)
        else:
            names = tuple(event.name.split(", "))
            if names != self._names:
                self._finish()
                self._names = names
            costs, before = (self._costs, self._solved) if event.stage == "solve" else (self._proofs, self._proven)
            self._show(f"{event.stage} {self._called()}", event.stage, before + event.fraction * self._sum(costs))

    def _calibrate(self, block: str) -> None:
        """Count a run of a block on a batch; the runs of the finished blocks predict those of the others."""
        if block not in self._blocks:
            self._blocks.append(block)
        finished = len(self._blocks) - 1
        if finished:
            self._estimate.plan("calibrate", self._runs / finished * max(self._stages, finished + 1))
        self._show(f"calibrate {block}", "calibrate", self._runs)
        self._runs += 1

    def _finish(self) -> None:
        """Count the current layers as done."""
        self._solved += self._sum(self._costs)
        self._proven += self._sum(self._proofs)
        self._names = ()

    def _sum(self, costs: dict[str, float]) -> float:
        return sum(costs.get(name, 0.0) for name in self._names)

    def _called(self) -> str:
        first, *others = (self._short.get(name, name) for name in self._names)
        return first + (f" and {len(others)} more" if others else "")

    def _show(self, what: str, kind: str, done: float) -> None:
        self._estimate.reach(kind, done)
        self._bar.tell(what, self._estimate.fraction, self._estimate.left)
