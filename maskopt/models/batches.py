"""Calibration batches: checked, on the model's device, with explicit padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskopt.checks import shown
from maskopt.errors import MaskoptError
from maskopt.models.context import context_length
from maskopt.models.sums import PARTS

Purpose = Literal["layers", "recovery", "held out"]

__all__ = [
    "Batch",
    "Purpose",
    "check_token_ids",
    "data_settings",
    "gathered",
    "in_parts",
    "opening",
    "prepare_all",
    "prepare_batches",
    "sequences",
    "share",
    "vocabulary_size",
]


@dataclass(frozen=True, eq=False)
class Batch:
    """One calibration batch.

    Parameters
    ----------
    inputs : dict
        What the model is called with.
    shape : tuple of int
        (sequences, positions); (images, 1) and the like where the model reads no token ids.
    real : Tensor or None
        True at the positions that are not padding, of shape `shape`; None where nothing is padded.
    purpose : {"layers", "recovery", "held out"}
        What it is for: layers are solved on it, blocks and the model are fitted to it, or errors are only measured.
    part : int
        Of the ordered sum to which it adds (`OrderedSum`); parts are consecutive batches.
    """

    inputs: dict[str, Any]
    shape: tuple[int, int]
    real: Tensor | None = None
    purpose: Purpose = "layers"
    part: int = 0

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return self.shape[0] * self.shape[1] if self.real is None else int(self.real.sum())

    @property
    def held_out(self) -> bool:
        """Whether errors are only measured on it."""
        return self.purpose == "held out"


def prepare_batches(model: PreTrainedModel, batches: Iterable[Any], kind: str = "calibration") -> list[Batch]:
    """Check calibration batches and move them to the model's device.

    Parameters
    ----------
    model : PreTrainedModel
        The model they will be fed to.
    batches : iterable of dict or Tensor
        Keyword arguments of the model's forward, with its main input (``input_ids``, or ``pixel_values`` for vision
        models), or the tensor of the main input alone.
    kind : {"calibration", "held-out", "further"}
        What messages call them.

    Returns
    -------
    list of Batch

    Raises
    ------
    MaskoptError
        If there is no batch or no token, or a batch is not what the model can be fed with.
    """
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise MaskoptError(
            f"The {kind} batches must be an iterable of batches, such as a list of tensors of token ids; got "
            f"{shown(batches)}."
        )
    prepared = [_prepare(model, f"{kind} batch {index}", item) for index, item in enumerate(batches)]
    if not prepared:
        raise MaskoptError(f"There are no {kind} batches; at least one is needed.")
    if sum(batch.tokens for batch in prepared) == 0:
        raise MaskoptError(f"The {kind} batches hold padding only (attention_mask is 0 everywhere).")
    return prepared


def prepare_all(
    model: PreTrainedModel,
    batches: Iterable[Any],
    held_out: Iterable[Any] | None = None,
    further: Iterable[Any] | None = None,
) -> list[Batch]:
    """Check the batches of all purposes, see `prepare_batches`, and mark those that are not for layers.

    Parameters
    ----------
    model : PreTrainedModel
    batches : iterable of dict or Tensor
        For layers.
    held_out, further : iterable of dict or Tensor, optional
        To measure errors on, and to fit a recovery to.
    """
    others: list[tuple[Iterable[Any] | None, str, Purpose]] = [
        (held_out, "held-out", "held out"),
        (further, "further", "recovery"),
    ]
    prepared = prepare_batches(model, batches)
    for each, kind, purpose in others:
        if each is not None:
            prepared += [replace(batch, purpose=purpose) for batch in prepare_batches(model, each, kind)]
    return prepared


def in_parts(batches: Sequence[Batch]) -> list[Batch]:
    """Return batches with their parts: as many batches in each, up to one, and at most `PARTS` parts.

    Batches of each purpose have parts of their own, so that sums over the others do not depend on them.

    Parameters
    ----------
    batches : sequence of Batch
    """
    counts = Counter(batch.purpose for batch in batches)
    seen: Counter[Purpose] = Counter()
    found = []
    for batch in batches:
        number, count = min(PARTS, counts[batch.purpose]), counts[batch.purpose]
        found.append(replace(batch, part=seen[batch.purpose] * number // count))
        seen[batch.purpose] += 1
    return found


def share(batches: Sequence[Batch], rank: int, ranks: int) -> list[int]:
    """Return the indices of the batches that one of several processes runs: those of consecutive whole parts.

    Batches to fit a recovery to are shared apart from the others, with which no sum has them.

    Parameters
    ----------
    batches : sequence of Batch
        With their parts.
    rank, ranks : int
    """
    parts: dict[bool, int] = {}
    for batch in batches:
        fitted = batch.purpose == "recovery"
        parts[fitted] = max(parts.get(fitted, 0), batch.part + 1)

    def own(batch: Batch) -> bool:
        first, last = (parts[batch.purpose == "recovery"] * edge // ranks for edge in (rank, rank + 1))
        return first <= batch.part < last

    return [index for index, batch in enumerate(batches) if own(batch)]


def _prepare(model: PreTrainedModel, where: str, item: Any) -> Batch:
    if isinstance(item, Tensor):
        item = {model.main_input_name: item}
    if not isinstance(item, Mapping) or not isinstance(item.get(model.main_input_name), Tensor):
        raise MaskoptError(
            f"The {where} must be a tensor of token ids or a dict with the tensor {model.main_input_name!r}; it is a "
            f"{type(item).__name__}{f' with {sorted(item)}' if isinstance(item, Mapping) else ''}."
        )
    for name, value in item.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise MaskoptError(f"The {where} holds no data: {name} is on the meta device.")
    inputs = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in item.items()
        if name != "labels"
    }
    if "input_ids" not in inputs:
        return Batch(inputs, (len(inputs[model.main_input_name]), 1))
    ids = inputs["input_ids"]
    check_token_ids(model, where, ids)
    mask = inputs.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise MaskoptError(f"The {where} needs a tensor as attention_mask; got {shown(mask)}.")
    if mask is not None and mask.shape != ids.shape:
        raise MaskoptError(
            f"The {where} has input_ids of shape {tuple(ids.shape)} but an attention_mask of shape "
            f"{tuple(mask.shape)}; they must be equal."
        )
    real = None if mask is None or bool(mask.bool().all()) else mask.bool()
    if model.config.is_encoder_decoder and real is not None:
        raise MaskoptError(
            f"The {where} is padded, and padding cannot be told apart in an encoder-decoder model; "
            f"use sequences of one length."
        )
    return Batch(inputs, (ids.shape[0], ids.shape[1]), real)


def sequences(batches: Sequence[Batch]) -> list[Batch]:
    """Cut batches into batches of one sequence."""
    found: list[Batch] = []
    for batch in batches:
        number = batch.shape[0]
        for index in range(number):
            part = slice(index, index + 1)
            inputs = {
                name: value[part] if isinstance(value, Tensor) and value.ndim and len(value) == number else value
                for name, value in batch.inputs.items()
            }
            real = None if batch.real is None else batch.real[part]
            found.append(Batch(inputs, (1, batch.shape[1]), real, batch.purpose))
    return found


def opening(batch: Batch) -> Batch:
    """Return two sequences of a batch that holds nothing but token ids and their mask; others as they are.

    Parameters
    ----------
    batch : Batch
    """
    if not set(batch.inputs) <= {"input_ids", "attention_mask"}:
        return batch
    tokens = torch.full((batch.shape[0],), batch.shape[1]) if batch.real is None else batch.real.sum(1).cpu()
    chosen = tokens.argsort(descending=True, stable=True)[:2].sort().values
    real = None if batch.real is None else batch.real[chosen]
    inputs = {name: value[chosen] for name, value in batch.inputs.items()}
    return Batch(inputs, (len(chosen), batch.shape[1]), real, batch.purpose)


def gathered(parts: Sequence[Batch], size: int) -> list[Batch]:
    """Put sequences of equal length without padding together, `size` in a batch; others stay as they are.

    All have one purpose.
    """
    plain = {batch.shape[1] for batch in parts if batch.real is None and len(batch.inputs) == 1}
    if len(plain) != 1 or any(batch.real is not None or len(batch.inputs) != 1 for batch in parts):
        return list(parts)
    found = []
    for first in range(0, len(parts), size):
        group = parts[first : first + size]
        inputs = {name: torch.cat([batch.inputs[name] for batch in group]) for name in group[0].inputs}
        found.append(Batch(inputs, (len(group), group[0].shape[1]), purpose=group[0].purpose))
    return found


def check_token_ids(model: PreTrainedModel, where: str, ids: Tensor) -> None:
    """Check that a model has an embedding and a position for all token ids.

    Parameters
    ----------
    model : PreTrainedModel
    where : str
        What messages call the ids.
    ids : Tensor
        Integer, shape (sequences, positions).

    Raises
    ------
    MaskoptError
        If they are of another type or shape, an id is unknown to the model, or sequences are too long.
    """
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or ids.numel() == 0:
        raise MaskoptError(
            f"The {where} must hold integer token ids of shape (sequences, positions); it has {ids.dtype} of shape "
            f"{tuple(ids.shape)}."
        )
    vocabulary, low, high = vocabulary_size(model), int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise MaskoptError(
            f"The {where} holds token id {low if low < 0 else high}, but the model knows ids "
            f"{'from 0' if vocabulary is None else f'0 to {vocabulary - 1}'}; was it made with another tokenizer?"
        )
    longest = context_length(model)
    if longest is not None and ids.shape[1] > longest:
        raise MaskoptError(
            f"The {where} has sequences of {ids.shape[1]} tokens, but the model takes at most {longest}."
        )


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """Return the number of tokens in the vocabulary, None where the model does not say."""
    try:
        size = model.get_input_embeddings().num_embeddings
    except (NotImplementedError, AttributeError):  # several embeddings, or none that is a table
        size = getattr(model.config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def data_settings(batches: Sequence[Batch]) -> dict[str, int]:
    """Return what a report says of the data: numbers of batches, sequences and tokens, and the longest sequence.

    Parameters
    ----------
    batches : sequence of Batch
    """
    used = [batch for batch in batches if batch.purpose == "layers"]
    others = sum(batch.shape[0] for batch in batches if batch.held_out)
    return {
        "batches": len(used),
        "sequences": sum(batch.shape[0] for batch in used),
        "longest_sequence": max(batch.shape[1] for batch in used),
        "calibration_tokens": sum(batch.tokens for batch in used),
        **({"held_out_sequences": others} if others else {}),
    }
