"""Reading the layers that commands work on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from maskopt.problems import Instance, LayerReconstruction

__all__ = ["load_layer"]


def load_layer(path: Path, device: str) -> tuple[Instance, LayerReconstruction]:
    """Return the instance in a file and its checked problem.

    Parameters
    ----------
    path : Path
    device : str
        Where the problem computes.

    Raises
    ------
    MaskoptError
        If the file cannot be read or its data are no valid problem, with the name of the file.
    """
    from maskopt.problems import load_instance

    instance = load_instance(path)
    try:
        return instance, instance.problem(device)
    except MaskoptError as error:
        raise MaskoptError(f"The instance {path} cannot be used. {error}") from error
