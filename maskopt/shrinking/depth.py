"""Dropping whole blocks of a model, one after the other, each time the one whose absence changes predictions least."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from maskopt.checks import shown, whole
from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch, prepare_batches
from maskopt.models.blocks import Block, find_blocks
from maskopt.models.checks import check_model
from maskopt.models.divergence import Divergence
from maskopt.models.offload import offload_of
from maskopt.models.replay import evaluation_mode
from maskopt.packed.shrunk import take_buffers
from maskopt.shrinking.configuration import Skeletons
from maskopt.shrinking.cut import share_configuration, take_over

__all__ = ["DepthReport", "drop_blocks"]

_TOLERANCE = 1e-3  # relative, of logits without blocks in two ways of computing them
_PLAIN = (bool, int, float, str, list, tuple, type(None))  # attributes that a class computes from its configuration


@dataclass
class DepthReport:
    """Which blocks were dropped.

    Attributes
    ----------
    dropped : list of str
        Names in the dense model, in the order in which they were dropped.
    divergence : list of float
        Kullback-Leibler divergence per token from the dense model's predictions after each.
    parameters : (int, int)
        Of the whole model before and after.
    entries : dict
        Changed entries of the configuration.
    seconds : float
    """

    dropped: list[str]
    divergence: list[float]
    parameters: tuple[int, int]
    entries: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary that `json.dump` takes."""
        return asdict(self)


def drop_blocks(
    model: PreTrainedModel,
    batches: Iterable[Any],
    number: int,
    *,
    sequences: int = 16,
    progress: Callable[[str, float], object] | None = None,
) -> DepthReport:
    """Drop whole blocks of a decoder, in place: the smaller model loads with transformers alone.

    In turn, every remaining block is passed over, and the one for which the predictions on the batches stay closest to
    the dense model's, by their divergence, goes. Nothing is fitted. It is what removal of neurons and heads can be
    compared to.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model with one stack of blocks. **It is modified**: its blocks and its configuration. After
        an error it is as it was.
    batches : iterable of dict or Tensor
        Calibration data as for `maskopt.prune`.
    number : int
        How many blocks to drop; at least one stays.
    sequences : int
        On how many the divergence is measured: batches are taken from the first until they have so many.
    progress : callable, optional
        Called with what is done and a fraction.

    Returns
    -------
    DepthReport

    Raises
    ------
    MaskoptError
        If an argument is wrong, or the configuration cannot say that the model has fewer blocks.

    References
    ----------
    J. Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
    ICML 2024, arXiv 2402.09025; by similarity of states instead: X. Men et al., "ShortGPT", arXiv 2403.03853.

    Examples
    --------
    >>> from maskopt.models import calibration_batches, load_model
    >>> from maskopt.shrinking import drop_blocks
    >>> model, tokenizer = load_model("Qwen/Qwen3-0.6B")  # doctest: +SKIP
    >>> batches = calibration_batches(tokenizer, "The calibration text ...", samples=8)  # doctest: +SKIP
    >>> drop_blocks(model, batches, 4).dropped  # doctest: +SKIP
    """
    began = time.perf_counter()
    check_model(model)
    blocks = find_blocks(model)
    if len({block.stack for block in blocks}) != 1:
        raise MaskoptError(f"{type(model).__name__} has several stacks of blocks; blocks of one stack can be dropped.")
    if not whole(1, len(blocks) - 1).fits(number):
        raise MaskoptError(
            f"The number of blocks to drop must lie in 1 ... {len(blocks) - 1}, so that one of {len(blocks)} stays; "
            f"got {shown(number)}."
        )
    if offload_of(model) is not None:
        raise MaskoptError("Dropping blocks needs the whole model in memory; load it without offload.")
    if not whole(1).fits(sequences):
        raise MaskoptError(f"sequences must be a whole number of at least 1; got {shown(sequences)}.")
    prepared = _first(prepare_batches(model, batches), sequences)
    with evaluation_mode(model):
        shorter = _Shorter(model, blocks)
        shorter.skeleton(list(range(len(blocks) - number)))  # before any work
        gone, divergence, logits = _chosen(model, blocks, prepared, number, progress)
        before = model.num_parameters()
        kept = [index for index in range(len(blocks)) if index not in gone]
        entries = shorter.cut(kept, lambda: _agrees(model, prepared[0], logits))
    names = [blocks[index].name for index in gone]
    return DepthReport(names, divergence, (before, model.num_parameters()), entries, time.perf_counter() - began)


def _first(batches: Sequence[Batch], sequences: int) -> list[Batch]:
    """Return the first batches that have so many sequences."""
    found = list[Batch]()
    for batch in batches:
        if sum(each.shape[0] for each in found) >= sequences:
            break
        found.append(batch)
    return found


def _chosen(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    number: int,
    progress: Callable[[str, float], object] | None,
) -> tuple[list[int], list[float], Tensor]:
    """Return which blocks go, the divergence after each, and the logits of the first batch without them."""
    measure = Divergence(model, batches)
    gone, divergence = list[int](), list[float]()
    total, done = sum(len(blocks) - step for step in range(number)), 0
    for _ in range(number):
        found: dict[int, float] = {}
        for index, block in enumerate(blocks):
            if index in gone:
                continue
            if progress is not None:
                progress(f"without {block.name}", done / total)
            with _passed_over(blocks[each].module for each in (*gone, index)):
                found[index] = float(measure.each(model).mean())
            done += 1
        best = min(found, key=lambda index: found[index])
        gone.append(best)
        divergence.append(found[best])
    with _passed_over(blocks[each].module for each in gone):
        return gone, divergence, measure.logits(model, 0)


@contextmanager
def _passed_over(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let blocks return the states that they are given."""

    def passed(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        states = args[0] if args else options["hidden_states"]
        return states if isinstance(output, Tensor) else (states, *output[1:])

    hooks = [module.register_forward_hook(passed, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _agrees(model: PreTrainedModel, batch: Batch, logits: Tensor) -> bool:
    """Whether a model computes logits where no position is padding."""
    found = Divergence.scores(model, model(**batch.inputs))
    if batch.real is not None:
        found, logits = found[batch.real], logits[batch.real]
    return found.shape == logits.shape and bool((found - logits).norm() <= _TOLERANCE * logits.norm())


class _Shorter:
    """What a model's configuration has to say so that its class makes fewer blocks, and the model of them."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block]) -> None:
        self._model, self._blocks, self._stack = model, blocks, blocks[0].stack
        self._skeletons = Skeletons(model)

    def skeleton(self, kept: Sequence[int]) -> tuple[nn.Module, dict[str, Any]]:
        """Return a model without data that has only some of the blocks, and the entries of its configuration."""
        number = len(self._blocks)
        values = self._skeletons.text.to_dict()
        lists = {
            name: [value[index] for index in kept]
            for name, value in values.items()
            if isinstance(value, (list, tuple)) and len(value) == number
        }
        # The entry that counts blocks first: it may be checked against those that list them.
        for name, value in values.items():
            if type(value) is not int or value != number:
                continue
            for entries in ({name: len(kept), **lists}, {**lists, name: len(kept)}, {name: len(kept)}):
                made = self._skeletons.make(entries)
                if made is not None and self._fits(made, kept):
                    return made, entries
        raise MaskoptError(f"{self._skeletons.unsaid.removesuffix(' that a block has')} that there are fewer blocks.")

    def _fits(self, made: nn.Module, kept: Sequence[int]) -> bool:
        """Whether another model has the blocks' parameters."""
        wanted = {name: each.shape for name, each in self._outside(self._model)}
        if wanted != {name: each.shape for name, each in self._outside(made)}:
            return False
        blocks = find_blocks(made)
        return len(blocks) == len(kept) and all(
            {name: each.shape for name, each in twin.module.named_parameters()}
            == {name: each.shape for name, each in self._blocks[index].module.named_parameters()}
            for twin, index in zip(blocks, kept, strict=True)
        )

    def _outside(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return (pair for pair in model.named_parameters() if not pair[0].startswith(f"{self._stack}."))

    def cut(self, kept: Sequence[int], agrees: Callable[[], bool]) -> dict[str, Any]:
        """Leave only some blocks in the model; return the changed entries of its configuration.

        Raises
        ------
        MaskoptError
            If the model then does not compute what it does when the others are passed over; it is as it was.
        """
        model, (made, entries) = self._model, self.skeleton(kept)
        text: Any = model.config.get_text_config()
        twins = find_blocks(made)
        for twin, index in zip(twins, kept, strict=True):
            old = self._blocks[index].module
            if take_buffers(twin.module, dict(old.named_buffers())) is not None:
                raise MaskoptError(f"{self._blocks[index].name} has buffers that depend on the number of blocks.")
            take_over(twin.module, old, {name: parameter.data for name, parameter in old.named_parameters()})
            share_configuration(model, twin.module)
        owner, _, key = self._stack.rpartition(".")
        parent, before = model.get_submodule(owner), model.get_submodule(self._stack)
        settings = {name: getattr(text, name) for name in entries}
        attributes = self._attributes(made)
        own = [(module, name, getattr(module, name)) for module, name, _ in attributes]
        setattr(parent, key, nn.ModuleList([twin.module for twin in twins]))
        for module, name, value in attributes:
            setattr(module, name, value)
        for name, value in entries.items():
            setattr(text, name, value)
        if not agrees():
            setattr(parent, key, before)
            for module, name, value in own:
                setattr(module, name, value)
            for name, value in settings.items():
                setattr(text, name, value)
            raise MaskoptError(f"{type(model).__name__} computes something else with fewer blocks; none was dropped.")
        return entries

    def _attributes(self, made: nn.Module) -> list[tuple[nn.Module, str, Any]]:
        """Return attributes outside the blocks that differ: module, name, and value with fewer blocks."""
        others = dict(made.named_modules())
        found = []
        for path, module in self._model.named_modules():
            if path not in others or path == self._stack or path.startswith(f"{self._stack}."):
                continue
            for name, value in vars(module).items():
                new = vars(others[path]).get(name, value)
                both = isinstance(value, _PLAIN) and isinstance(new, _PLAIN)
                if not name.startswith("_") and name != "training" and both and new != value:
                    found.append((module, name, new))
        return found
