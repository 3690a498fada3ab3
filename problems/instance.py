"""Instances, that is, single layers with their Gram, and their files: safetensors with `weight` and `gram`."""

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
    """The data of a layer to prune.

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
        """Number of calibration tokens; None where the metadata has none."""
        tokens = self.metadata.get("tokens", "")
        return int(tokens) if re.fullmatch("[0-9]{1,18}", tokens) else None

    def problem(self, device: str = "cpu") -> LayerReconstruction:
        """Return the reconstruction problem on `device`; the data are checked.

        Parameters
        ----------
        device : str

        Raises
        ------
        MaskoptError
            As `LayerReconstruction` does.
        """
        return LayerReconstruction(self.weight.to(device), self.gram.to(device), self.tokens)


def load_instance(path: str | os.PathLike[str]) -> Instance:
    """Read an instance from a file.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    Instance
        On the CPU; its data are not checked before `problem` is called.

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
    """Write an instance to a file, completely or not at all.

    Parameters
    ----------
    path : path-like
        Must not exist.
    instance : Instance

    Raises
    ------
    MaskoptError
        If `path` exists or cannot be written, or the metadata are not strings.

    Examples
    --------
    >>> import tempfile
    >>> from maskopt.problems import load_instance, save_instance, synthetic
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_instance(f"{folder}/layer.safetensors", synthetic(rows=2, d=4))
    ...     load_instance(f"{folder}/layer.safetensors").metadata["origin"]
    'synthetic correlated, seed 0'
    """
    if not isinstance(instance, Instance):
        raise MaskoptError(f"save_instance needs an Instance; got {shown(instance)}.")
    weight, gram = matrix("weight", instance.weight), matrix("Gram", instance.gram)
    weight, gram = weight.cpu().contiguous(), gram.cpu().contiguous()
    if weight.data_ptr() == gram.data_ptr():
        gram = gram.clone()  # the format has no shared memory
    metadata = dict(instance.metadata)
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise MaskoptError(f"The metadata of an instance must be strings; got {metadata}.")
    with atomic_path(path) as aside:
        try:
            save_file({"weight": weight, "gram": gram}, aside, metadata=metadata)
        except SafetensorError as error:  # what safetensors raises when the disk is full
            raise MaskoptError(f"The instance {path} could not be written: {error}.") from error
