"""Trained models react to pruning as in the literature."""

import os
from copy import deepcopy
from pathlib import Path

import pytest

from maskopt.models import calibration_batches, default_seqlen, load_model, perplexity, prune, save_pruned
from maskopt.oracles import PerRow
from maskopt.solvers import ContinuationFrankWolfe, Magnitude, Wanda

SHARED = Path(os.environ.get("MASKOPT_SHARED", Path(__file__).parents[2].parent / "shared"))
MODELS = sorted(SHARED.glob("models/*"))
TEXT = SHARED / "text" / "tinystories" / "eval.txt"

pytestmark = pytest.mark.skipif(
    not MODELS or not TEXT.is_file(), reason=f"no trained models in {SHARED} (set MASKOPT_SHARED)"
)


@pytest.mark.slow
@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_better_masks_give_better_language_models(folder, tmp_path):
    text = TEXT.read_text().replace("\n<|endoftext|>\n", "\n")
    evaluation, calibration = text[:6_000], text[10_000:40_000]

    def measure(model, tokenizer):
        return perplexity(model, tokenizer, evaluation, batch_size=8).perplexity

    original, tokenizer = load_model(folder)
    batches = calibration_batches(tokenizer, calibration, samples=16, seqlen=default_seqlen(original, tokenizer))
    dense = measure(original, tokenizer)
    reached, errors = {}, {}
    for solver in (Magnitude(), Wanda(), ContinuationFrankWolfe(iterations=25)):
        model = deepcopy(original)
        report = prune(model, batches, PerRow(0.4), solver)
        name = type(solver).__name__
        reached[name], errors[name] = measure(model, tokenizer), report.mean_relative_error
        assert report.settings["block_by_block"]
    assert 1.2 * dense < reached["ContinuationFrankWolfe"] < 0.9 * reached["Wanda"] < 0.9 * reached["Magnitude"]
    assert errors["ContinuationFrankWolfe"] < errors["Wanda"] < errors["Magnitude"]

    save_pruned(tmp_path / "out", model, tokenizer, report)
    assert measure(*load_model(tmp_path / "out")) == reached["ContinuationFrankWolfe"]
