"""Second moments of layers' inputs, of the batches of one process or of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.models.experts import Stack, StackedLayer
from maskopt.models.layers import Layer
from maskopt.models.ranks import Ranks
from maskopt.models.sums import OrderedSum, mirror

__all__ = ["Gram", "Moments", "Sums", "inseparable", "not_finite"]

_KINDS = ("matrix", "held_out", "total", "cross", "lost")  # the last two may be dropped on the way


@dataclass(eq=False)
class Gram:
    """A second-moment matrix.

    Attributes
    ----------
    matrix : Tensor
        Sum of y y^T over the inputs y, float32, shape (d, d).
    leader : Layer
        The layer whose calls add to it; other layers with the same input tensors use it, too.
    tokens : int
        Terms of the sum.
    cross : Tensor, optional
        Sum of x y^T, shape (d, d), where x is the input of the dense model; None where not asked for, or where x and y
        belong to different tokens (experts that a router chose differently).
    held_out : Tensor, optional
        Sum of y y^T over the inputs in held-out batches, which are not among those of `matrix`; None without any.
    pooled : bool
        Whether the matrix contains tokens of other experts, in place of missing ones (`GramCollector`).
    total : Tensor, optional
        Sum of the inputs, float32, shape (d,); None where not asked for.
    lost : Tensor, optional
        Sum of e y^T, where e is what the leader would have to add to make up for all that the residual stream has lost
        before it, float32, shape (rows, d); None for layers that do not add to the stream.
    """

    matrix: Tensor
    leader: Layer
    tokens: int = 0
    cross: Tensor | None = None
    held_out: Tensor | None = None
    pooled: bool = False
    total: Tensor | None = None
    lost: Tensor | None = None

    @property
    def mean(self) -> Tensor | None:
        """Mean of the inputs, shape (d,); None where not asked for, or where the matrix has tokens of others."""
        return None if self.total is None or self.pooled or self.tokens == 0 else self.total / self.tokens


class Sums:
    """What the batches of this process add to one Gram matrix.

    Parameters
    ----------
    leader : Layer
        See `Gram`.
    first : int
        This process's first part of the batches.
    cross, total, lost : bool
        Whether there are cross terms, sums of the inputs, and sums with what is lost.

    Attributes
    ----------
    kinds : dict of str to OrderedSum
        By attribute of `Gram`; "cross" and "lost" are missing where there are none, or no longer.
    tokens : int
    """

    def __init__(self, leader: Layer, first: int, *, cross: bool, total: bool, lost: bool) -> None:
        self.leader, self.tokens = leader, 0
        optional = {"cross": cross, "total": total, "lost": lost}
        self.kinds = {kind: OrderedSum(first) for kind in _KINDS if optional.get(kind, True)}


@dataclass
class _Account:
    """What one process has of a Gram matrix: the pieces of its sums, and which of them hold a matrix."""

    tokens: int
    pieces: dict[str, list[tuple[int, int, bool]]]


@dataclass
class _Accounts:
    """What one process knows of a turn; layers and stacks by number."""

    leaders: dict[int, int]
    calls: list[int]
    sums: dict[int, _Account]


@dataclass(eq=False)
class _Pool:
    """Of a stack that has matrices with too few tokens: what is pooled, and for which."""

    everything: list[Layer | Stack]
    tokens: int
    short: list[Layer]
    unseen: list[Layer]


@dataclass(eq=False)
class Moments:
    """The Gram matrices of some layers, while they are summed and when they are complete.

    All processes hold the same layers in the same order, and call `agree` and `gather` once, in this order.

    Parameters
    ----------
    layers : sequence of Layer
    stacked : mapping of Stack to mapping of int to StackedLayer
        Those of them that are matrices of stacks, by index.
    parts : range
        The parts of the batches that this process runs.
    total : bool
        Whether the inputs are summed, too.

    Attributes
    ----------
    sums : dict of Layer or Stack to Sums
        By leader; of a stack, of the tokens of matrices that are not among the layers.
    leaders : dict of Layer to Layer
        The leader of each layer that was called.
    calls : dict of Layer to int
    """

    layers: Sequence[Layer]
    stacked: Mapping[Stack, Mapping[int, StackedLayer]]
    parts: range
    total: bool = False
    sums: dict[Layer | Stack, Sums] = field(default_factory=dict)
    leaders: dict[Layer, Layer] = field(default_factory=dict)
    calls: dict[Layer, int] = field(default_factory=dict)
    _accounts: list[_Accounts] | None = field(default=None, init=False)
    _tokens: dict[Layer | Stack, int] = field(default_factory=dict, init=False)
    _pools: list[_Pool] = field(default_factory=list, init=False)
    _pooled: set[Layer] = field(default_factory=set, init=False)
    _complete: dict[Layer | Stack, Gram] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.calls = dict.fromkeys(self.layers, 0)
        self._keys: list[Layer | Stack] = [*self.layers, *self.stacked]

    def begun(self, key: Layer | Stack, leader: Layer, *, cross: bool = False, lost: bool = False) -> Sums:
        """Return the sums of a leader or a stack, which begin with the first call.

        Parameters
        ----------
        key : Layer or Stack
        leader : Layer
            What messages call them.
        cross, lost : bool
            Whether there are cross terms, and sums with what is lost.
        """
        if key not in self.sums:
            self.sums[key] = Sums(leader, self.parts.start, cross=cross, total=self.total, lost=lost)
        return self.sums[key]

    @property
    def agreed(self) -> bool:
        """Whether `agree` was called."""
        return self._accounts is not None

    def agree(self, ranks: Ranks) -> None:
        """Let all processes know which layers have a Gram matrix in common, and how many tokens there are.

        Parameters
        ----------
        ranks : Ranks

        Raises
        ------
        MaskoptError
            If layers have the same input in some batches only.
        """
        numbers = {key: number for number, key in enumerate(self._keys)}
        for sums in self.sums.values():
            for each in sums.kinds.values():
                each.close(self.parts.stop)
        own = _Accounts(
            {numbers[layer]: numbers[leader] for layer, leader in self.leaders.items()},
            [self.calls[layer] for layer in self.layers],
            {numbers[key]: _account(sums) for key, sums in self.sums.items()},
        )
        self._accounts = ranks.gathered(own)
        for known in self._accounts:
            for number, leader in known.leaders.items():
                layer = self.layers[number]
                if self.leaders.setdefault(layer, self.layers[leader]) is not self.layers[leader]:
                    raise inseparable(layer, self.layers[leader])
            for number, account in known.sums.items():
                key = self._keys[number]
                self._tokens[key] = self._tokens.get(key, 0) + account.tokens
        self.calls = {
            layer: sum(known.calls[number] for known in self._accounts) for number, layer in enumerate(self.layers)
        }
        for stack in self.stacked:
            self._pool(stack)

    def _pool(self, stack: Stack) -> None:
        """Find the matrices of a stack that saw fewer tokens than they have inputs."""
        layers: list[Layer] = list(self.stacked[stack].values())
        seen = [layer for layer in layers if layer in self._tokens]
        everything: list[Layer | Stack] = [*seen, *([stack] if stack in self._tokens else [])]
        tokens = sum(self._tokens[key] for key in everything)
        short = [layer for layer in seen if self._tokens[layer] < layer.shape[1]]
        unseen = [layer for layer in layers if layer not in self._tokens]
        if tokens and (short or unseen):
            self._pools.append(_Pool(everything, tokens, short, unseen))
            self._pooled.update(short, unseen)
            self.leaders.update((layer, unseen[0]) for layer in unseen)

    def leader(self, layer: Layer) -> Layer:
        """Return the layer whose Gram matrix is a layer's own, too.

        Parameters
        ----------
        layer : Layer

        Raises
        ------
        MaskoptError
            If the layer was never called, or has another layer's input in some batches only.
        """
        leader = self.leaders.get(layer)
        if leader is None or not (self._tokens.get(leader, 0) or leader in self._pooled):
            raise MaskoptError(
                f"The layer {layer.name} saw no token of the calibration data (experts may need more of it, and some "
                f"modules are never called); exclude it to leave it dense."
            )
        if self.calls[layer] != self.calls[leader]:
            raise inseparable(layer, leader)
        return leader

    def gather(self, ranks: Ranks, wanted: Mapping[Layer, Sequence[int]]) -> None:
        """Complete Gram matrices where they are wanted.

        Parameters
        ----------
        ranks : Ranks
        wanted : mapping of Layer to sequence of int
            The processes that want the matrix of a leader, by number; the same mapping everywhere.
        """
        for key in self._keys:
            if key in self._tokens:
                self._gather(key, _place(key, wanted), ranks)
        for pool in self._pools:
            self._fill(pool, ranks, wanted)
        for leader, places in wanted.items():
            for place in places[1:]:
                self._copy(leader, places[0], place, ranks)
        self.sums.clear()

    def __getitem__(self, leader: Layer) -> Gram:
        """Return a complete Gram matrix that was wanted here."""
        return self._complete[leader]

    def _gather(self, key: Layer | Stack, place: int, ranks: Ranks) -> None:
        """Sum the parts of all processes in one of them."""
        number, leader = self._keys.index(key), self._leader_of(key)
        assert self._accounts is not None, "agree() comes first"
        accounts = [known.sums.get(number) for known in self._accounts]
        kinds = [kind for kind in _KINDS if all(account is None or kind in account.pieces for account in accounts)]
        totals: dict[str, Tensor | None] = {}
        sums = self.sums.pop(key, None)
        for kind in kinds:
            total = OrderedSum()
            for source, account in enumerate(accounts):
                own = iter([] if sums is None else sums.kinds[kind].pieces)
                for start, stop, exists in [] if account is None else account.pieces[kind]:
                    matrix = next(own)[2] if source == ranks.number else None
                    if exists and source != place:
                        matrix = ranks.moved(matrix, partial(self._empty, leader, kind), source, place)
                    total.add(start, stop, matrix)
            totals[kind] = total.total()
        if ranks.number != place:
            return
        matrix, held_out = totals["matrix"], totals["held_out"]
        for each in (matrix, held_out):
            if each is not None:
                mirror(each)
                if not bool(torch.isfinite(each.diagonal()).all()):
                    raise not_finite(leader)
        cross = totals.get("cross")
        self._complete[key] = Gram(
            self._empty(leader).zero_() if matrix is None else matrix,
            leader,
            self._tokens[key],
            self._empty(leader).zero_() if cross is None and "cross" in kinds else cross,
            held_out,
            total=totals.get("total"),
            lost=totals.get("lost"),
        )

    def _fill(self, pool: _Pool, ranks: Ranks, wanted: Mapping[Layer, Sequence[int]]) -> None:
        """Give matrices of a stack that saw fewer tokens than they have inputs the missing ones of all."""
        mean: Tensor | None = None
        for key in pool.everything:
            place = _place(key, wanted)
            gram = self._complete.get(key)
            empty = partial(self._empty, self._leader_of(key))
            matrix = ranks.shared(None if gram is None else gram.matrix, empty, place)
            if mean is None:
                mean = matrix / pool.tokens
            else:
                mean.add_(matrix, alpha=1.0 / pool.tokens)
        assert mean is not None, "there are tokens"
        for layer in pool.short:
            if layer in self._complete:
                gram = self._complete[layer]
                gram.matrix.add_(mean, alpha=float(len(mean) - gram.tokens))
                gram.pooled = True
        if pool.unseen and ranks.number == _place(pool.unseen[0], wanted):
            self._complete[pool.unseen[0]] = Gram(mean.mul_(len(mean)), pool.unseen[0], pooled=True)

    def _copy(self, leader: Layer, source: int, place: int, ranks: Ranks) -> None:
        """Copy a complete Gram matrix to another process."""
        gram = self._complete.get(leader) if ranks.number == source else None
        kinds = [(kind, getattr(gram, kind) is not None) for kind in _KINDS] if gram is not None else None
        kinds, pooled = ranks.told((kinds, None if gram is None else gram.pooled), source, place)
        matrices: dict[str, Tensor | None] = {}
        for kind, exists in kinds or ():
            own = None if gram is None else getattr(gram, kind)
            matrices[kind] = ranks.moved(own, partial(self._empty, leader, kind), source, place) if exists else None
        matrix = matrices.get("matrix")
        if ranks.number == place and matrix is not None:
            self._complete[leader] = Gram(
                matrix,
                leader,
                self._tokens.get(leader, 0),
                matrices["cross"],
                matrices["held_out"],
                bool(pooled),
                matrices["total"],
                matrices["lost"],
            )

    def _leader_of(self, key: Layer | Stack) -> Layer:
        return key if isinstance(key, Layer) else next(iter(self.stacked[key].values()))

    def _empty(self, leader: Layer, kind: str = "matrix") -> Tensor:
        size = leader.shape[1]
        shape = {"total": (size,), "lost": leader.shape}.get(kind, (size, size))
        return torch.empty(shape, device=leader.parameter.device, dtype=torch.float32)


def _place(key: Layer | Stack, wanted: Mapping[Layer, Sequence[int]]) -> int:
    """Return the process in which a matrix is summed: the first one that wants it."""
    return next(iter(wanted.get(key, ())), 0) if isinstance(key, Layer) else 0


def _account(sums: Sums) -> _Account:
    pieces = {
        kind: [(start, stop, matrix is not None) for start, stop, matrix in each.pieces]
        for kind, each in sums.kinds.items()
    }
    return _Account(sums.tokens, pieces)


def not_finite(layer: Layer) -> MaskoptError:
    """Return the error for a layer's inputs.

    Parameters
    ----------
    layer : Layer
    """
    return MaskoptError(
        f"The inputs of {layer.name} hold NaN or infinite values (or their squares exceed float32) on the calibration "
        f"data; the model already fails there before any pruning of this layer."
    )


def inseparable(layer: Layer, leader: Layer) -> MaskoptError:
    """Return the error for two layers whose inputs are the same in some calls.

    Parameters
    ----------
    layer, leader : Layer
    """
    return MaskoptError(
        f"The layers {leader.name} and {layer.name} have the same input in one calibration batch and different ones in "
        f"another; exclude one of them."
    )
