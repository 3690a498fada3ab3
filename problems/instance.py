"""Single-layer instances on disk: safetensors with `weight`, `gram` and string metadata."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from maskopt.checks import matrix, shown
from maskopt.errors import MaskoptError
from maskopt.files import atomic_path, open_tensors
from maskopt.problems.layer import LayerReconstruction

__all__ = ["Instance", "load_instance", "save_instance"]


@dataclass(frozen=True)
class Instance:
    """A layer to prune.

    Parameters
    ----------
    weight : Tensor
        Shape (rows, d).
    gram : Tensor
        Shape (d, d), sum of x x^T over the calibration tokens.
    metadata : mapping of str to str
        `tokens` (count) and `origin` by convention.
    """

    weight: Tensor
    gram: Tensor
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int | None:
        """Calibration tokens, None where the file does not say."""
        tokens = self.metadata.get("tokens", "")
        return int(tokens) if re.fullmatch("[0-9]{1,18}", tokens) else None

    def problem(self, device: str = "cpu") -> LayerReconstruction:
        """Return the checked reconstruction problem on `device`."""
        return LayerReconstruction(self.weight.to(device), self.gram.to(device), self.tokens)


def load_instance(path: str | os.PathLike[str]) -> Instance:
    """Read an instance file.

    Raises
    ------
    MaskoptError
        If the file is missing, no safetensors file, or lacks `weight` or `gram`.
    """
    with open_tensors("instance", path) as file:
        missing = {"weight", "gram"} - set(file.keys())
        if missing:
            raise MaskoptError(
                f"The instance {path} has no tensor named {' nor '.join(sorted(missing))}; it must hold "
                "`weight` (rows, d) and `gram` (d, d)."
            )
        return Instance(file.get_tensor("weight"), file.get_tensor("gram"), dict(file.metadata() or {}))


def save_instance(path: str | os.PathLike[str], instance: Instance) -> None:
    """Write an instance file, whole or not at all.

    Raises
    ------
    MaskoptError
        If `path` exists or cannot be written, or the metadata is no text.
    """
    if not isinstance(instance, Instance):
        raise MaskoptError(f"save_instance needs an Instance; got {shown(instance)}.")
    weight, gram = matrix("weight", instance.weight), matrix("Gram", instance.gram)
    weight, gram = weight.cpu().contiguous(), gram.cpu().contiguous()
    if weight.data_ptr() == gram.data_ptr():
        gram = gram.clone()  # the format knows no shared memory
    metadata = dict(instance.metadata)
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise MaskoptError(f"The metadata of an instance must be strings; got {metadata}.")
    with atomic_path(path) as aside:
        try:
            save_file({"weight": weight, "gram": gram}, aside, metadata=metadata)
        except SafetensorError as error:  # what the format's library makes of a full disk
            raise MaskoptError(f"The instance {path} could not be written: {error}.") from error
