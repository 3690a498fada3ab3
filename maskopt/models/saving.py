"""Saving a pruned model: a Hugging Face folder, its masks bit-packed beside the weights, and the report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
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

__all__ = ["check_output", "load_masks", "save_masks", "save_pruned", "write_model", "write_report"]

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
    """Write a folder that `from_pretrained` loads, with ``report.json``, and ``masks.safetensors`` if there are masks.

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
        write_model(folder, model, tokenizer, path)
        if report.masks:
            save_masks(folder / "masks.safetensors", report.masks)
        write_report(folder, {**report.to_json(), **(extra or {})}, page)
        if not packed:
            return None
        aside.mkdir()
        return write_packed(folder, aside, compress)


def write_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike[str]
) -> None:
    """Make a folder with a model and its tokenizer.

    Parameters
    ----------
    folder : Path
        Does not exist.
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    path : path-like
        What messages call it.

    Raises
    ------
    MaskoptError
        If the model cannot be saved.
    """
    try:
        folder.mkdir()
        offload = offload_of(model)
        if offload is None:
            with without_bars():
                model.save_pretrained(folder)
        else:
            save_blockwise(folder, model, offload)
        tokenizer.save_pretrained(folder)
    except (SafetensorError, ValueError) as error:
        # ValueError: transformers refuses generation settings that contradict each other.
        raise MaskoptError(f"The output {path} could not be written: {reason(error)}.") from error


def write_report(folder: Path, content: Mapping[str, Any], page: str | None = None) -> None:
    """Write ``report.json`` into a folder, and ``report.html`` where there is a page."""
    (folder / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if page is not None:
        (folder / "report.html").write_text(page, encoding="utf-8")
