"""The precision that torch computes in, whatever the caller has set."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

__all__ = ["full_precision", "ordinary_torch", "without_autocast"]


@contextmanager
def ordinary_torch(device: torch.device) -> Iterator[None]:
    """Compute in the precision that the code says, whatever the caller has set: defaults, autocast, TF32, gradients.

    Proofs depend on it: under autocast, and where float32 matrices may be multiplied in fewer digits, a product has
    three digits.

    Parameters
    ----------
    device : torch.device
        Where the work is done.
    """
    default_type, default_device = torch.get_default_dtype(), torch.get_default_device()
    with ExitStack() as settings:
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.no_grad())
        settings.enter_context(without_autocast((device.type, "cpu")))
        settings.enter_context(full_precision())
        if default_device.type != "cpu":
            settings.enter_context(torch.device("cpu"))
        if default_type != torch.float32:
            torch.set_default_dtype(torch.float32)
            settings.callback(torch.set_default_dtype, default_type)
        yield


@contextmanager
def without_autocast(kinds: Iterable[str]) -> Iterator[None]:
    """Compute without the caller's autocast inside the block.

    Parameters
    ----------
    kinds : iterable of str
        Types of devices; those that have no autocast, which torch refuses to switch off, may be among them.
    """
    with ExitStack() as settings:
        for kind in set(kinds):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                settings.enter_context(torch.autocast(kind, enabled=False))
        yield


_LOCK = threading.Lock()
_inside = 0
"""Blocks of `full_precision` that are open: the settings belong to the process, and threads may solve side by side."""
_undo = ExitStack()


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32 and add in float32, even where the caller has allowed TF32, bf16 or fp16."""
    global _inside
    with _LOCK:
        if _inside == 0:
            _undo.callback(_set_matmul, _matmul())
            _set_matmul(("highest", "ieee", "ieee", False))
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                _undo.close()


_Settings = tuple[str | None, str, str, bool]
"""`torch.get_float32_matmul_precision`, what CUDA and oneDNN have beside it, and whether sums may be in float16."""


def _matmul() -> _Settings:
    cuda: Any = torch.backends.cuda.matmul
    onednn: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch >= 2.9
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:  # a caller who has set only what is beside it; torch then refuses to tell
        common = None
    return common, cuda.fp32_precision, onednn.fp32_precision, cuda.allow_fp16_accumulation


def _set_matmul(settings: _Settings) -> None:
    common, on_cuda, on_cpu, half = settings
    # First what sets the others as well: where they disagree with it, torch refuses products on CUDA.
    if common is not None:
        torch.set_float32_matmul_precision(common)
    cuda: Any = torch.backends.cuda.matmul
    onednn: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    cuda.fp32_precision, onednn.fp32_precision, cuda.allow_fp16_accumulation = on_cuda, on_cpu, half
