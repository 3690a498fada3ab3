"""Dropping whole experts of a model's blocks: those without which the outputs of all of them together change least."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from maskopt.checks import SEEDS, choice, real, shown, whole
from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch, prepare_batches, sequences
from maskopt.models.blocks import find_blocks
from maskopt.models.checks import check_model
from maskopt.models.experts import eager_experts, stacks
from maskopt.models.offload import offload_of
from maskopt.models.replay import Replay, evaluation_mode
from maskopt.models.states import first_tensor
from maskopt.shrinking.cut import Cut, cut_model
from maskopt.shrinking.dependence import BlockCall
from maskopt.shrinking.mixtures import Mixture, Mixtures

__all__ = ["DroppedExperts", "ExpertMethod", "ExpertsReport", "check_fraction", "drop_experts"]

ExpertMethod = Literal["best", "reap", "random"]

_TOKENS = 2048  # of the calibration data, on which choices are compared
_ALL = 64  # choices that are all tried
_TRIED = 8  # experts that are tried in the place of one that goes, those first that contribute least


@dataclass(frozen=True)
class DroppedExperts:
    """What became of the experts of a block.

    Attributes
    ----------
    name : str
        Of the module that has the router and the experts.
    before : int
        Experts that there were.
    dropped : tuple of int
        Their numbers among these.
    error : float
        ||y - y'||^2 / ||y||^2 of the module's outputs on calibration tokens, whose choices now fall on other experts.
    """

    name: str
    before: int
    dropped: tuple[int, ...]
    error: float


@dataclass
class ExpertsReport:
    """Which experts were dropped.

    Attributes
    ----------
    blocks : list of DroppedExperts
    parameters : (int, int)
        Of the whole model before and after.
    cut : Cut
        What the configuration says now.
    seconds : float
    """

    blocks: list[DroppedExperts]
    parameters: tuple[int, int]
    cut: Cut = field(default_factory=Cut)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary that `json.dump` takes."""
        return {
            "blocks": [asdict(each) for each in self.blocks],
            "parameters": self.parameters,
            "seconds": self.seconds,
        }


def drop_experts(
    model: PreTrainedModel,
    batches: Iterable[Any],
    fraction: float,
    *,
    method: ExpertMethod = "best",
    seed: int = 0,
    progress: Callable[[str, float], object] | None = None,
) -> ExpertsReport:
    """Drop whole experts of every block that has some, in place: the smaller model loads with transformers.

    Routers choose among the experts that stay. What goes is chosen block by block, on the inputs that the block has in
    the dense model; nothing is fitted. Which slices of which parameters belong to an expert, and which entry of the
    configuration counts them, is found by making the model with one expert less; that the block then computes what it
    does when the router never chooses the others is checked with random weights. Where routers choose groups of
    experts first, as many go of each group.

    Parameters
    ----------
    model : PreTrainedModel
        **It is modified**: its blocks and its configuration. After an error it is as it was.
    batches : iterable of dict or Tensor
        Calibration data as for `maskopt.prune`; the first 2048 tokens serve.
    fraction : float
        Of each block's experts to drop, in (0, 1), rounded to a whole number.
    method : {"best", "reap", "random"}
        "best": by the error of the module's outputs with the router's new choices: of all choices where they are few;
        otherwise those go that contribute least, and each is exchanged where that lowers the error. "reap": by the mean
        length of what an expert adds to the output, over the tokens that it is chosen for.
    seed : int
        Of "random".
    progress : callable, optional
        Called with what is done and a fraction.

    Returns
    -------
    ExpertsReport

    Raises
    ------
    MaskoptError
        If an argument is wrong, or no block has experts of which the configuration can say that there are fewer and
        the router can do with those that stay.

    References
    ----------
    X. Lu et al., "Not All Experts are Equal", ACL 2024, arXiv 2402.14800: all choices, by the error of the output.
    M. Lasby et al., "REAP the Experts", arXiv 2510.13999: the mean length.

    Examples
    --------
    >>> from maskopt.models import calibration_batches, load_model
    >>> from maskopt.shrinking import drop_experts
    >>> model, tokenizer = load_model("allenai/OLMoE-1B-7B-0924")  # doctest: +SKIP
    >>> batches = calibration_batches(tokenizer, "The calibration text ...", samples=8)  # doctest: +SKIP
    >>> drop_experts(model, batches, 0.25).parameters  # doctest: +SKIP
    """
    began = time.perf_counter()
    check_model(model)
    check_fraction(fraction)
    if not choice(get_args(ExpertMethod)).fits(method):
        raise MaskoptError(f"method must be one of {', '.join(get_args(ExpertMethod))}; got {shown(method)}.")
    if not whole(*SEEDS).fits(seed):
        raise MaskoptError(f"The seed must be an integer of at most 64 bits; got {shown(seed)}.")
    if offload_of(model) is not None:
        raise MaskoptError("Dropping experts needs the whole model in memory; load it without offload.")
    every = find_blocks(model)
    holders = [layer for block in every for stack in stacks(block.module, block.name) for layer in stack.layers()]
    prepared = _first(prepare_batches(model, batches))
    random = torch.Generator().manual_seed(seed)
    chosen: dict[Mixture, Tensor] = {}
    report = []

    def keep(number: int) -> int:
        return max(1, number - round(fraction * number))

    with evaluation_mode(model), eager_experts(model, holders):
        mixtures = Mixtures(model)
        replay = Replay(model, every, prepared)
        for position in range(len(replay.order)):
            found = mixtures.of(replay, position, keep)
            if found is None:
                replay.run(position, store=True)
                continue
            mixture, groups = found
            if keep(mixture.number) == mixture.number:
                raise MaskoptError(f"{fraction:g} of the {mixture.number} experts of {mixture.name} is less than one.")
            if progress is not None:
                progress(mixture.name, position / len(replay.order))
            calls = _Calls(mixture.module, prepared)
            with calls.watching():
                replay.run(position, store=True)
            dropped, error = _Choice(mixture, calls, keep(mixture.number), groups).by(method, random)
            chosen[mixture] = _kept(mixture, dropped)
            report.append(DroppedExperts(mixture.name, mixture.number, dropped, error))
    if not chosen:
        raise MaskoptError(
            f"{mixtures.unsaid}, or its routers cannot do with {1 - fraction:g} of them: they may choose more, or "
            "groups of experts of which as many have to stay."
            if holders
            else f"{type(model).__name__} has no experts to drop; its blocks can lose neurons and heads."
        )
    before = model.num_parameters()
    cut = cut_model(model, {mixture.site: kept for mixture, kept in chosen.items()})
    return ExpertsReport(report, (before, model.num_parameters()), cut, time.perf_counter() - began)


def check_fraction(fraction: object) -> None:
    """Raise MaskoptError if this is no fraction of experts to drop."""
    if not real(0, 1, below=True).fits(fraction) or not fraction:
        raise MaskoptError(f"The fraction of the experts must lie above 0 and below 1; got {shown(fraction)}.")


def _first(batches: Sequence[Batch]) -> list[Batch]:
    """Return the first sequences that have enough tokens together, one by one."""
    found, tokens = list[Batch](), 0
    for sequence in sequences(batches):
        found.append(sequence)
        tokens += sequence.tokens
        if tokens >= _TOKENS:
            break
    return found


class _Calls:
    """The arguments and the outputs of a module on calibration tokens."""

    def __init__(self, module: nn.Module, batches: Sequence[Batch]) -> None:
        self._module, self._batches = module, batches
        self._calls: list[BlockCall] = []
        self._outputs: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the module is called with inside the block."""

        def see(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            copied = tree_map(lambda each: each.detach().clone() if isinstance(each, Tensor) else each, (args, kwargs))
            self._calls.append(BlockCall(*copied))
            self._outputs.append(_rows(output).clone())

        hook = self._module.register_forward_hook(see, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def changes(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield by how much a module's outputs with other weights differ, shape (tokens, width), without padding."""
        for number, call in enumerate(self._calls):
            output = _rows(functional_call(module, dict(tensors), call.args, call.kwargs))
            yield self._real(number, output - self._outputs[number])

    @property
    def size(self) -> float:
        """||y||^2 of all tokens."""
        return sum(_square(self._real(number, output)) for number, output in enumerate(self._outputs))

    def _real(self, number: int, rows: Tensor) -> Tensor:
        real = self._batches[number].real if len(self._calls) == len(self._batches) else None
        return rows if real is None or real.numel() != len(rows) else rows[real.flatten().to(rows.device)]


def _rows(output: object) -> Tensor:
    """Return the first tensor of an output, shape (tokens, width)."""
    first = first_tensor(output).detach()
    return first.reshape(-1, first.shape[-1])


def _kept(mixture: Mixture, dropped: Iterable[int]) -> Tensor:
    """Return which experts stay, boolean."""
    kept = torch.ones(mixture.number, dtype=torch.bool)
    kept[list(dropped)] = False
    return kept


def _square(rows: Tensor) -> float:
    return float(rows.double().square().sum())


class _Choice:
    """Chooses experts of one block.

    Parameters
    ----------
    mixture : Mixture
    calls : _Calls
        Of its module.
    keep : int
        Experts that stay.
    groups : int
        Of experts beside each other, of which as many stay.
    """

    def __init__(self, mixture: Mixture, calls: _Calls, keep: int, groups: int) -> None:
        self._mixture, self._calls = mixture, calls
        self._size, self._gone = mixture.number // groups, (mixture.number - keep) // groups  # of a group
        self._groups = groups
        module = mixture.module
        self._tensors = {name: each.data for name, each in module.named_parameters()} | dict(module.named_buffers())
        twin = mixture.twin(keep)
        assert twin is not None, "`Mixtures.of` has made it"
        self._twin: nn.Module = twin

    def by(self, method: ExpertMethod, random: torch.Generator) -> tuple[tuple[int, ...], float]:
        """Return which experts go, and the relative error of the outputs without them."""
        if method == "random":
            dropped = self._least(torch.rand(self._mixture.number, generator=random))
        elif method == "reap":
            dropped = self._least(self._contributions(mean=True))
        elif math.comb(self._size, self._gone) ** self._groups <= _ALL:
            of_groups = [
                itertools.combinations(range(first, first + self._size), self._gone)
                for first in range(0, self._mixture.number, self._size)
            ]
            every = (tuple(itertools.chain(*parts)) for parts in itertools.product(*of_groups))
            dropped = min(every, key=self._error)
        else:
            dropped = self._exchanged()
        return dropped, self._error(dropped) / max(self._calls.size, torch.finfo(torch.float64).tiny)

    def _error(self, dropped: Iterable[int]) -> float:
        tensors = self._mixture.without(self._tensors, _kept(self._mixture, dropped))
        return sum(map(_square, self._calls.changes(self._twin, tensors)))

    def _least(self, scores: Tensor) -> tuple[int, ...]:
        """Return the experts of least score in each group."""
        places = torch.argsort(scores.view(self._groups, self._size), dim=1, stable=True)[:, : self._gone]
        offset = torch.arange(self._groups).unsqueeze(1) * self._size
        return tuple(sorted((places + offset).flatten().tolist()))

    def _exchanged(self) -> tuple[int, ...]:
        """Return those that contribute least, each exchanged for another expert of its group where that is better."""
        scores = self._contributions(mean=False)
        dropped = list(self._least(scores))
        least = self._error(dropped)
        for each in sorted(dropped, key=lambda expert: -float(scores[expert])):
            others = [expert for expert in dropped if expert != each]
            first = each // self._size * self._size
            free = (expert for expert in range(first, first + self._size) if expert not in dropped)
            for other in sorted(free, key=lambda expert: float(scores[expert]))[:_TRIED]:
                error = self._error([*others, other])
                if error < least:
                    least, dropped = error, [*others, other]
        return tuple(sorted(dropped))

    def _contributions(self, *, mean: bool) -> Tensor:
        """Return what each expert adds to the outputs: all squared lengths, or the mean length where it is chosen."""
        module, found = self._mixture.module, []
        for layer in self._mixture.stack.layers():
            before = layer.swap(torch.zeros_like(layer.weight))
            try:
                lengths = torch.cat([each.double().norm(dim=1) for each in self._calls.changes(module, {})])
            finally:
                layer.swap(before)
            seen = max(1, int((lengths > 0).sum()))
            found.append(float(lengths.sum()) / seen if mean else float(lengths.square().sum()))
        return torch.tensor(found, dtype=torch.float64)
