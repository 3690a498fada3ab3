"""What an interrupted pruning needs to go on: the finished blocks, and what they depend on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.files import open_tensors, reason
from maskopt.models.batches import Batch
from maskopt.models.masks import load_masks, save_masks
from maskopt.models.report import LayerRecord, RecoveryRecord
from maskopt.models.store import first_difference, replaced

__all__ = ["Finished", "Journal", "data_hash", "tensors_hash"]

_SETTINGS, _RECORD, _WEIGHTS, _MASKS = "settings.json", "record.json", "weights.safetensors", "masks.safetensors"


@dataclass
class Finished:
    """One stage of `prune` that is done: a block, or the layers outside the blocks.

    Parameters
    ----------
    name : str
    layers : list of LayerRecord
    masks : mapping of str to Tensor
        Of these layers, boolean, True = kept.
    recovery : list of RecoveryRecord
    seconds : dict of str to float
        Of the whole run up to the end of this stage, by kind of work.
    """

    name: str
    layers: list[LayerRecord]
    masks: Mapping[str, Tensor]
    recovery: list[RecoveryRecord]
    seconds: dict[str, float]


class Journal:
    """The finished stages of one run, in a folder of their own.

    A stage is there whole or not at all, whenever the process is killed.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def inside(cls, work: Path) -> Journal:
        """Return the journal of an offloaded model.

        Parameters
        ----------
        work : Path
            What `load_model` was given as `offload`.
        """
        return cls(work / "blocks")

    @property
    def stages(self) -> int:
        """Number of finished stages."""
        return sum(1 for _ in self.folder.glob(f"[0-9]*/{_RECORD}"))

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin a run or go on with one.

        Parameters
        ----------
        settings : mapping
            All that masks and weights depend on, by what messages call it; anything that `json.dump` takes.

        Raises
        ------
        MaskoptError
            If the folder's run has other settings, or cannot be written.
        """
        wanted = json.loads(json.dumps(settings))
        file = self.folder / _SETTINGS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (OSError, ValueError) as error:
            raise MaskoptError(f"The interrupted run in {self.folder} cannot be read: {reason(error)}.") from error
        if known is None or not self.stages:
            with replaced(file) as aside:
                aside.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        elif known != wanted:
            name = first_difference(known, wanted)
            before, now = (_shortened(values.get(name)) for values in (known, wanted))
            said = name.replace("_", " ")
            raise MaskoptError(
                f"The interrupted run in {self.folder} had another {said} ({before} instead of {now}); repeat its "
                f"command to go on, or remove the folder to start anew."
            )

    def read(self, number: int) -> Finished | None:
        """Return a stage; None if it is not finished.

        Parameters
        ----------
        number : int

        Raises
        ------
        MaskoptError
            If its files are damaged.
        """
        folder = self._folder(number)
        file = folder / _RECORD
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            layers = [LayerRecord(**entry) for entry in record["layers"]]
            recovery = [RecoveryRecord(**entry) for entry in record["recovery"]]
            masks = load_masks(folder / _MASKS) if layers else {}
            return Finished(record["name"], layers, masks, recovery, record["seconds"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise MaskoptError(f"The interrupted run in {folder} cannot be read: {reason(error)}.") from error

    def write(self, number: int, finished: Finished, tensors: Mapping[str, Tensor]) -> None:
        """Write a finished stage.

        Parameters
        ----------
        number : int
        finished : Finished
        tensors : mapping of str to Tensor
            All parameters of the stage, by full name.
        """
        folder = self._folder(number)
        aside = folder.with_name(f".{folder.name}.tmp")
        record = {
            "name": finished.name,
            "layers": [asdict(layer) for layer in finished.layers],
            "recovery": [asdict(entry) for entry in finished.recovery],
            "seconds": finished.seconds,
        }
        try:
            for old in (folder, aside):
                shutil.rmtree(old, ignore_errors=True)
            aside.mkdir()
            save_file(_apart(tensors), aside / _WEIGHTS)
            if finished.masks:
                save_masks(aside / _MASKS, finished.masks)
            (aside / _RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
            aside.rename(folder)
        except (OSError, SafetensorError) as error:
            raise MaskoptError(f"The folder {folder} could not be written: {reason(error)}.") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def weights(self, number: int) -> Path:
        """Return the file of a finished stage's parameters, by full name.

        Parameters
        ----------
        number : int
        """
        return self._folder(number) / _WEIGHTS

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Return a finished stage's parameters by full name.

        Parameters
        ----------
        number : int
        """
        with open_tensors("weight file", self.weights(number)) as content:
            names = content.keys()
            return {name: content.get_tensor(name).clone() for name in names}

    def _folder(self, number: int) -> Path:
        return self.folder / f"{number:05}"


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors none of which has memory in common with another, as files need them."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        where = tensor.untyped_storage().data_ptr()
        found[name] = tensor.contiguous().clone() if where in seen else tensor.contiguous()
        seen.add(where)
    return found


def data_hash(batches: Sequence[Batch]) -> str:
    """Return a hash of all that batches hold.

    Parameters
    ----------
    batches : sequence of Batch
    """
    return _hash(tensors_hash({**batch.inputs, "purpose": batch.purpose}) for batch in batches)


def tensors_hash(values: Mapping[str, Any]) -> str:
    """Return a hash of tensors and other values by name.

    Parameters
    ----------
    values : mapping of str to object
    """

    def parts() -> Iterator[str | bytes]:
        for name, value in sorted(values.items()):
            yield name
            if isinstance(value, Tensor):
                yield repr((value.dtype, value.shape))
                yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            else:
                yield repr(value)

    return _hash(parts())


def _hash(parts: Iterable[str | bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()


def _shortened(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
