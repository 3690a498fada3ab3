"""The GPU that tests use where there is one."""

import pytest
import torch

__all__ = ["CUDA", "needs_gpu"]

CUDA = torch.device("cuda", 0)

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
"""Marks, for `pytestmark`."""
