"""Solved instances: single rows with their best known masks and what is proven about them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.problems.instance import Instance
from maskopt.problems.layer import LayerReconstruction

__all__ = ["LIBRARY", "SolvedInstance", "library"]

LIBRARY = Path(__file__).with_name("library.safetensors")


@dataclass(frozen=True)
class SolvedInstance:
    """One row of a layer, a set of masks, and what is known.

    Attributes
    ----------
    name : str
    instance : Instance
        Weight (1, d) and Gram (d, d); `metadata["origin"]` says where they come from.
    pattern : str
        As `maskopt.oracles.parse_masks` reads it.
    sparsity : float or None
        For patterns that need one.
    mask : Tensor
        The best known mask, boolean, shape (1, d).
    error : float
        Its error.
    bound : float
        No mask of the set has a smaller error.
    prover : str
        Who proved the bound.
    """

    name: str
    instance: Instance
    pattern: str
    sparsity: float | None
    mask: Tensor
    error: float
    bound: float
    prover: str

    @property
    def solved(self) -> bool:
        """Whether the mask is proven optimal, to a relative 1e-6."""
        return self.bound >= self.error * (1.0 - 1e-6)

    def problem(self) -> LayerReconstruction:
        """Return the checked reconstruction problem."""
        return self.instance.problem()


def library(path: Path = LIBRARY) -> list[SolvedInstance]:
    """Return the library of solved instances, `benchmarks/make_library.py` made it.

    Raises
    ------
    MaskoptError
        If the file is missing.
    """
    if not path.is_file():
        raise MaskoptError(f"The library of solved instances {path} is missing; benchmarks/make_library.py makes it.")
    with safe_open(str(path), framework="pt") as file:
        facts = json.loads(file.metadata()["instances"])
        return [
            SolvedInstance(
                name=name,
                instance=Instance(
                    file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.gram"), {"origin": fact["origin"]}
                ),
                pattern=fact["pattern"],
                sparsity=fact["sparsity"],
                mask=file.get_tensor(f"{name}.mask"),
                error=fact["error"],
                bound=fact["bound"],
                prover=fact["prover"],
            )
            for name, fact in facts.items()
        ]
