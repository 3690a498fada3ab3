"""Callers who allow products in fewer digits, for tests that this changes nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

__all__ = ["allowed", "matmul_settings"]

CUDA: Any = torch.backends.cuda.matmul
CPU: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _allow(backend: Any, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(backend, name, value)


WAYS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": _allow(CUDA, "allow_tf32", True),
    "cuda": _allow(CUDA, "fp32_precision", "tf32"),
    "cpu": _allow(CPU, "fp32_precision", "bf16"),
    "float16 sums": _allow(CUDA, "allow_fp16_accumulation", True),
}


def matmul_settings() -> list[object]:
    """Return what torch says of products now."""
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:
        common = "refused"
    return [common, CUDA.fp32_precision, CPU.fp32_precision, CUDA.allow_fp16_accumulation]


@pytest.fixture(params=WAYS)
def allowed(request: pytest.FixtureRequest) -> Iterator[list[object]]:
    """Allow products in fewer digits in one of the ways that torch has, and return the settings then."""
    WAYS[request.param]()
    yield matmul_settings()
    torch.set_float32_matmul_precision("highest")
    CUDA.fp32_precision = CPU.fp32_precision = "none"
    CUDA.allow_fp16_accumulation = False
