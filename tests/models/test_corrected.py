"""Pruning on the inputs that pruned layers make, with the dense model's outputs as the target."""

import pytest
import torch

from maskopt.errors import MaskoptError
from maskopt.models import prune
from maskopt.models.replay import Replay
from maskopt.oracles import PerRow, Unstructured
from maskopt.problems import LayerReconstruction
from maskopt.solvers import ContinuationFrankWolfe, Wanda
from maskopt.weights import ALPS, ConditionalADMM, FISTAPruner, LeastSquares

STREAMS = {
    "self_attn.o_proj": "input_layernorm",
    "mlp.down_proj": "post_attention_layernorm",
    "attn.c_proj": "ln_1",
    "mlp.c_proj": "ln_2",
}
"""Layers that add to the residual stream, and the module that reads the stream before they do."""


def stream_of(layer: str) -> str | None:
    """The name of the module that reads the residual stream to which a layer adds."""
    return next((layer.replace(end, reader) for end, reader in STREAMS.items() if layer.endswith(end)), None)


@pytest.mark.parametrize("options", [{}, {"correction": 1.0}])
@pytest.mark.parametrize("padded", [False, True])
def test_inputs_are_those_of_the_pruned_model_and_targets_those_of_the_dense(
    build, make_batches, inputs_of, recorder, padded, options
):
    """Every layer is calibrated on its final inputs: all layers before it have their final weights.

    What adds to the residual stream makes up for what that has lost, too.
    """
    for name in ("llama", "gpt2"):
        recorder.problems.clear()
        model, dense, batches = build(name), build(name), make_batches(padded)
        # Whole matrices are solved one by one, so that problems and records are in the same order.
        report = prune(model, batches, Unstructured(0.5), recorder, propagate="corrected", **options)
        strength = options.get("correction", 0.7)
        assert report.settings["correction"] == strength
        names = [record.name for record in report.layers]
        read = [*names, *filter(None, map(stream_of, names))]
        now, before = inputs_of(model, batches, read), inputs_of(dense, batches, read)
        for layer, problem in zip(names, recorder.problems, strict=True):
            y, x = now[layer], before[layer]
            gram, cross = y.T @ y, x.T @ y
            size = float(gram.abs().max())
            torch.testing.assert_close(problem.gram.double() / size, gram / size, rtol=0, atol=5e-6)
            weight = dense.get_submodule(layer).weight.detach()
            weight = weight.T if name == "gpt2" else weight
            torch.testing.assert_close(problem.weight, weight.float())
            stream = stream_of(layer)
            lost = None if stream is None else (before[stream] - now[stream]).T @ y
            aim = LayerReconstruction.towards(weight.double(), gram, cross, strength=strength, lost=lost).scaled_target
            torch.testing.assert_close(problem.scaled_target.double(), aim, rtol=0, atol=2e-3 * float(aim.abs().max()))


def test_without_strength_layers_aim_at_their_own_outputs(build, make_batches, recorder):
    prune(build("llama"), make_batches(), Unstructured(0.5), recorder, propagate="corrected", correction=0.0)
    for problem in recorder.problems:
        torch.testing.assert_close(problem.scaled_target, problem.scaled_weight, rtol=0, atol=0)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "0.5", None, True])
def test_a_strength_is_a_number_between_0_and_1(build, make_batches, strength):
    with pytest.raises(MaskoptError, match="correction must be a number between 0 and 1; got"):
        prune(build("llama"), make_batches(), PerRow(0.5), Wanda(), correction=strength)


def test_the_first_layers_have_nothing_to_make_up_for(build, make_batches, recorder):
    prune(build("llama"), make_batches(), Unstructured(0.5), recorder, propagate="corrected")
    first, last = recorder.problems[0], recorder.problems[-1]
    torch.testing.assert_close(first.scaled_target, first.weight, rtol=0, atol=1e-5)
    assert float((last.scaled_target - last.weight).norm()) > 0.01 * float(last.weight.norm())


def test_outputs_come_nearer_to_the_dense_model(build, make_batches):
    batches = make_batches()

    def distance(propagate):
        model, dense = build("llama"), build("llama")
        prune(model, batches, PerRow(0.5), ConditionalADMM(), propagate=propagate)
        with torch.no_grad():
            return sum(
                float((model.eval()(**batch).logits - dense.eval()(**batch).logits).square().sum()) for batch in batches
            )

    assert distance("corrected") < distance("pruned")


def test_the_order_within_a_block_is_that_of_execution(build, make_batches):
    report = prune(build("llama"), make_batches(), PerRow(0.5), Wanda(), propagate="corrected")
    first = [record.name.split(".")[-1] for record in report.layers][:7]
    assert [set(first[:3]), first[3], set(first[4:6]), first[6]] == [
        {"q_proj", "k_proj", "v_proj"},
        "o_proj",
        {"gate_proj", "up_proj"},
        "down_proj",
    ]


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (Wanda(), "pruned"),
        (ALPS(iterations=3), "pruned"),
        (ContinuationFrankWolfe(iterations=5), "corrected"),
        (LeastSquares(solver=Wanda()), "corrected"),
        (FISTAPruner(rounds=2), "corrected"),
        (ConditionalADMM(), "corrected"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_default_is_what_a_method_was_made_for(build, make_batches, solver, expected):
    report = prune(build("llama"), make_batches(), PerRow(0.5), solver)
    assert report.settings["propagate"] == expected


def test_models_that_do_not_run_block_by_block_fall_back_or_say_so(build, make_batches, monkeypatch):
    monkeypatch.setattr(Replay, "_reproduces", lambda self, finals: False)
    report = prune(build("llama"), make_batches(), PerRow(0.5), ConditionalADMM())
    assert report.settings["propagate"] == "pruned"
    with pytest.raises(MaskoptError, match="cannot be run one at a time"):
        prune(build("llama"), make_batches(), PerRow(0.5), ConditionalADMM(), propagate="corrected")


def test_dense_weights_come_back_for_their_turn_only(build, make_batches):
    """The dense model's states are made with dense weights, and what stays in the model is the pruned ones."""
    model, dense = build("llama"), build("llama")
    report = prune(model, make_batches(), PerRow(0.5), Wanda(), propagate="corrected")
    for name, mask in report.masks.items():
        before = dense.get_submodule(name).weight
        assert torch.equal(model.get_submodule(name).weight, before * mask)
