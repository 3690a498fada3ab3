"""Saving a pruned model: a Hugging Face folder, its masks bit-packed beside the weights, and the report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskopt.errors import MaskoptError
from maskopt.files import atomic_path, reason, require_absent
from maskopt.models.masks import load_masks, save_masks
from maskopt.models.offload import offload_of
from maskopt.models.quiet import without_bars
from maskopt.models.report import PruneReport, RecoveryReport
from maskopt.models.shards import save_blockwise
from maskopt.packed.folder import PackReport, write_packed

__all__ = ["check_output", "load_masks", "save_masks", "save_pruned"]

check_output = require_absent


def save_pruned(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: PruneReport | RecoveryReport,
    extra: Mapping[str, Any] | None = None,
    page: str | None = None,
    *,
    packed: bool = False,
    compress: bool = False,
) -> PackReport | None:
    """Write a folder that `from_pretrained` loads, with ``masks.safetensors`` and ``report.json``.

    The folder is written under a temporary name and renamed at the end, so that a full disk or an interrupt leaves no
    partial output.

    Parameters
    ----------
    path : path-like
        The folder to make; must not exist (`check_output` checks that before the work starts).
    model : PreTrainedModel
        The pruned model.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    report : PruneReport or RecoveryReport
        What `prune` or `recover` returned.
    extra : mapping, optional
        More entries for ``report.json``, such as perplexities.
    page : str, optional
        Content of ``report.html``, the report for people.
    packed : bool
        Write a packed folder (`maskopt.packed`); the dense one is written first and removed.
    compress : bool
        Compress what becomes smaller by it; for packed folders.

    Returns
    -------
    PackReport or None
        What packing did, if `packed`.

    Raises
    ------
    MaskoptError
        If `path` exists or cannot be written.
    """
    with atomic_path(path) as aside:
        folder = aside.parent.with_name("dense") if packed else aside  # both are removed with what contains them
        try:
            folder.mkdir()
            offload = offload_of(model)
            if offload is None:
                with without_bars():
                    model.save_pretrained(folder)
            else:
                save_blockwise(folder, model, offload)
            tokenizer.save_pretrained(folder)
            save_masks(folder / "masks.safetensors", report.masks)
            text = json.dumps({**report.to_json(), **(extra or {})}, indent=2)
            (folder / "report.json").write_text(text + "\n", encoding="utf-8")
            if page is not None:
                (folder / "report.html").write_text(page, encoding="utf-8")
        except (SafetensorError, ValueError) as error:
            # ValueError: transformers refuses generation settings that contradict each other.
            raise MaskoptError(f"The output {path} could not be written: {reason(error)}.") from error
        if not packed:
            return None
        aside.mkdir()
        return write_packed(folder, aside, compress)
