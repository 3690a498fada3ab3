"""Pruning transformers models: blocks, Gram matrices, masks, calibration, evaluation, loading and saving."""

from maskopt.models.allocate import RULES, AllocationProgress, allocate
from maskopt.models.blocks import Block, find_blocks
from maskopt.models.calibration import Calibration, calibration_batches
from maskopt.models.context import context_length, default_seqlen
from maskopt.models.cost import Cost, product_speed, pruning_cost
from maskopt.models.heap import peak_bytes
from maskopt.models.loading import load_model, model_class
from maskopt.models.memory import pruning_bytes, recovery_bytes
from maskopt.models.offload import resident
from maskopt.models.perplexity import Perplexity, perplexity
from maskopt.models.prune import CORRECTION, Progress, PruningError, prune
from maskopt.models.recover import recognised, recover
from maskopt.models.report import Generalisation, LayerRecord, PruneReport, RecoveryRecord, RecoveryReport
from maskopt.models.saving import check_output, load_masks, save_masks, save_pruned
from maskopt.models.selection import LeftDense, Selection, select_layers
from maskopt.models.tasks import Tasks, TaskScore, require_lm_eval
from maskopt.models.text import Text, TokenStream, read_text, tokenize
from maskopt.packed.classes import load_packed
from maskopt.packed.folder import PackReport, is_packed, pack, unpack

__all__ = [
    "CORRECTION",
    "RULES",
    "AllocationProgress",
    "Block",
    "Calibration",
    "Cost",
    "Generalisation",
    "LayerRecord",
    "LeftDense",
    "PackReport",
    "Perplexity",
    "Progress",
    "PruneReport",
    "PruningError",
    "RecoveryRecord",
    "RecoveryReport",
    "Selection",
    "TaskScore",
    "Tasks",
    "Text",
    "TokenStream",
    "allocate",
    "calibration_batches",
    "check_output",
    "context_length",
    "default_seqlen",
    "find_blocks",
    "is_packed",
    "load_masks",
    "load_model",
    "load_packed",
    "model_class",
    "pack",
    "peak_bytes",
    "perplexity",
    "product_speed",
    "prune",
    "pruning_bytes",
    "pruning_cost",
    "read_text",
    "recognised",
    "recover",
    "recovery_bytes",
    "require_lm_eval",
    "resident",
    "save_masks",
    "save_pruned",
    "select_layers",
    "tokenize",
    "unpack",
]
