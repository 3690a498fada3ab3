"""Pruning whole models."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel, CLIPConfig, CLIPModel, ViTConfig, ViTModel

from maskopt.errors import MaskoptError
from maskopt.models import prune, select_layers
from maskopt.models.replay import Replay
from maskopt.oracles import NM, PerRow, Unstructured
from maskopt.solvers import ContinuationFrankWolfe, Magnitude, OneSwap, Solver, Wanda
from maskopt.weights import ALPS, ConditionalADMM, LeastSquares
from tests.models.conftest import weights_of

SETS = [PerRow(0.4), NM(keep=2, group=4), Unstructured(0.5)]


@pytest.mark.parametrize("masks", SETS, ids=repr)
def test_every_linear_layer_gets_exactly_the_pattern(architecture, make_batches, masks):
    model = architecture.build()
    before = weights_of(model)
    report = prune(model, make_batches(padded=True), masks, Wanda())
    after = weights_of(model)
    layers = select_layers(model).layers
    assert [record.name for record in report.layers] == [layer.name for layer in layers]
    assert list(report.masks) == [layer.name for layer in layers]
    for layer in layers:
        mask = report.masks[layer.name]
        kept = before[f"{layer.name}.weight"] * mask
        assert torch.equal(after[f"{layer.name}.weight"], kept)
        assert not torch.signbit(after[f"{layer.name}.weight"][~mask]).any()
        assert mask.shape == layer.module.weight.shape
        assert masks.contains(layer.oriented(mask))
    others = before.keys() - {f"{layer.name}.weight" for layer in layers}
    assert others
    assert all(torch.equal(after[name], before[name]) for name in others)


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("padded", [False, True])
def test_grams_are_those_of_the_model_they_claim(architecture, make_batches, inputs_of, recorder, propagate, padded):
    """In "pruned" mode the inputs of a layer come from the pruned blocks before its own, else from the dense model."""
    model, dense, batches = architecture.build(), architecture.build(), make_batches(padded)
    report = prune(model, batches, PerRow(0.5), recorder, propagate=propagate)
    names = [record.name for record in report.layers]
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(name.removeprefix(f"{architecture.stack}.").split(".")[0], []).append(name)
    problems = dict(zip(names, recorder.problems, strict=True))
    records = {record.name: record for record in report.layers}
    for inside in grouped.values():
        for name, x in inputs_of(dense, batches, inside).items():
            scale = float(problems[name].gram.abs().max())
            torch.testing.assert_close(problems[name].gram.double() / scale, x.T @ x / scale, rtol=0, atol=2e-6)
            assert problems[name].tokens == records[name].tokens == len(x)
        if propagate == "pruned":
            for name in inside:  # `dense` follows: its earlier blocks are pruned as in the report
                weight = dense.get_submodule(name).weight
                weight.data *= report.masks[name]


def test_the_report_holds_errors_recomputed_from_outputs(architecture, make_batches, inputs_of):
    model, dense, batches = architecture.build(), architecture.build(), make_batches(padded=True)
    report = prune(model, batches, PerRow(0.5), Wanda(), propagate="dense")
    inputs = inputs_of(dense, batches, [record.name for record in report.layers])
    layers = {layer.name: layer for layer in select_layers(dense).layers}
    for record in report.layers:
        weight = layers[record.name].oriented(layers[record.name].weight.detach()).double()
        mask = layers[record.name].oriented(report.masks[record.name])
        outputs = inputs[record.name] @ weight.T
        error = (outputs - inputs[record.name] @ (weight * mask).T).square().sum()
        assert record.objective == pytest.approx(float(error), rel=1e-4)
        assert record.relative_error == pytest.approx(float(error / outputs.square().sum()), rel=1e-4)
        assert (record.rows, record.columns) == tuple(weight.shape)
        assert record.nonzeros == int(mask.sum())
        assert record.sparsity == 1 - record.nonzeros / mask.numel()
        assert record.status == "GREEDY"
        assert record.lower_bound is None


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("solver", [ConditionalADMM(), LeastSquares(solver=Wanda())], ids=["joint", "lsq"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_updated_weights_are_applied_where_the_mask_keeps(build, make_batches, inputs_of, name, solver, propagate):
    model, follower, batches = build(name), build(name), make_batches(padded=True)
    before = weights_of(model)
    report = prune(model, batches, PerRow(0.5), solver, propagate=propagate)
    after = weights_of(model)
    layers = {layer.name: layer for layer in select_layers(follower).layers}
    grouped: dict[str, list[str]] = {}
    for record in report.layers:
        block = next(part for part in record.name.split(".") if part.isdigit())
        grouped.setdefault(block, []).append(record.name)
    records = {record.name: record for record in report.layers}
    for inside in grouped.values():
        for inner, x in inputs_of(follower, batches, inside).items():
            record, mask, layer = records[inner], report.masks[inner], layers[inner]
            new = after[f"{inner}.weight"]
            assert torch.equal(new != 0, mask)
            assert not torch.signbit(new[~mask]).any()
            dense = layer.oriented(before[f"{inner}.weight"]).double()
            outputs = x @ dense.T
            for weight, figure in ((new, record.relative_error), (before[f"{inner}.weight"] * mask, record.kept_error)):
                error = (outputs - x @ layer.oriented(weight).double().T).square().sum()
                assert figure == pytest.approx(float(error / outputs.square().sum()), rel=2e-3, abs=1e-6)
            assert record.relative_error < record.kept_error
        if propagate == "pruned":  # the inputs of later blocks are outputs of the new weights
            for inner in inside:
                layers[inner].weight.data.copy_(after[f"{inner}.weight"])
    others = before.keys() - {f"{inner}.weight" for inner in layers}
    assert all(torch.equal(after[inner], before[inner]) for inner in others)
    assert report.to_json()["layers"][0]["kept_error"] == report.layers[0].kept_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_new_weights(build, make_batches, dtype):
    model = build("llama").to(dtype)
    before = weights_of(model)
    report = prune(model, make_batches(), NM(keep=2, group=4), ConditionalADMM())
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    for name, mask in report.masks.items():
        weight = model.get_submodule(name).weight
        assert weight.isfinite().all()
        assert not weight[~mask].any()
        assert not torch.equal(weight, before[f"{name}.weight"] * mask)
    assert report.sparsity == 0.5
    assert report.mean_relative_error < np.mean([record.kept_error for record in report.layers])


def test_weights_change_once_nothing_needs_the_dense_ones(build, make_batches):
    before = weights_of(build("llama"))
    # Block by block, or turn by turn.
    steps = [(0, 7, 14, 21), (0, 7, 14, 21), (0, 3, 4, 6, 7, 10, 11, 13, 14, 17, 18, 20, 21)]
    for propagate, expected in zip(("dense", "pruned", "corrected"), steps, strict=True):
        model, changed = build("llama"), set()

        def count(event, model=model, changed=changed):
            changed.add(sum(not torch.equal(now, before[name]) for name, now in model.named_parameters()))

        prune(model, make_batches(), PerRow(0.5), ConditionalADMM(), propagate=propagate, progress=count)
        assert sorted(changed) == list(expected)


def test_layers_with_one_input_get_the_weights_of_their_own_rows(build, make_batches, monkeypatch):
    reports, weights = [], []
    for together in (True, False):
        monkeypatch.setattr(Solver, "solves_rows_apart", lambda self, masks, together=together: together)
        model = build("llama")
        reports.append(prune(model, make_batches(), PerRow(0.5), ConditionalADMM()))
        weights.append(weights_of(model))
    # Rounding differs, and the layers after it.
    first = [record.name for record in reports[0].layers if ".0." in record.name][:3]
    for name in first:
        torch.testing.assert_close(weights[0][f"{name}.weight"], weights[1][f"{name}.weight"], rtol=1e-4, atol=1e-4)
    for one, two in zip(reports[0].layers, reports[1].layers, strict=True):
        assert one.relative_error == pytest.approx(two.relative_error, rel=0.05)
        assert one.kept_error > one.relative_error


@pytest.mark.parametrize("solver", [ConditionalADMM(), ALPS(), LeastSquares()], ids=["ours", "alps", "lsq"])
def test_bounds_on_masks_are_not_reported_for_updated_weights(llama, make_batches, solver):
    before = weights_of(llama)
    with pytest.raises(MaskoptError, match=r"^certify proves bounds on masks whose weights stay; choose a solver that"):
        prune(llama, make_batches(), PerRow(0.5), solver, certify="shift")
    assert all(torch.equal(parameter, before[name]) for name, parameter in llama.named_parameters())


def test_totals_and_settings_of_the_report(llama, make_batches):
    report = prune(llama, make_batches(padded=True), PerRow(0.5), Wanda(), exclude=["*.o_proj"])
    assert report.weights == sum(mask.numel() for mask in report.masks.values())
    assert report.sparsity == pytest.approx(0.5)
    errors = [record.relative_error for record in report.layers]
    assert report.median_relative_error == pytest.approx(np.median(errors))
    assert report.mean_relative_error == pytest.approx(np.mean(errors))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in make_batches(padded=True))
    assert report.settings["calibration_tokens"] == tokens
    assert report.settings["sequences"] == 6
    assert report.settings["masks"] == "PerRow(keep=0.5)"
    assert report.settings["exclude"] == ["*.o_proj"]
    assert report.settings["block_by_block"] is True
    assert report.calibration_seconds > 0
    assert report.solve_seconds > 0
    assert {weight.name for weight in report.left_dense} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(f"model.layers.{index}.self_attn.o_proj.weight" for index in range(3)),
    }
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert content["sparsity"] == report.sparsity
    assert "masks" not in content


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_extra_padding_changes_nothing(build, make_batches, recorder, name):
    model, batches = build(name), make_batches(padded=True)
    prune(model, batches, PerRow(0.5), recorder)
    wider = [
        {key: torch.cat((value, torch.zeros(2, 7, dtype=torch.int64)), 1) for key, value in batch.items()}
        for batch in batches
    ]
    again, other = build(name), type(recorder)()
    prune(again, wider, PerRow(0.5), other)
    for one, two in zip(recorder.problems, other.problems, strict=True):
        assert one.tokens == two.tokens
        torch.testing.assert_close(one.gram, two.gram, rtol=1e-4, atol=1e-4 * float(one.gram.abs().max()))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))


def test_full_attention_masks_and_bare_tensors_are_the_same_batch(build, make_batches):
    bare = [batch["input_ids"] for batch in make_batches()]
    masked = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in bare]
    one, two = build("llama"), build("llama")
    prune(one, bare, PerRow(0.5), Wanda())
    prune(two, iter(masked), PerRow(0.5), Wanda())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_batches_may_be_cut_anyhow(build, make_batches, recorder):
    ids = torch.cat([batch["input_ids"] for batch in make_batches()])
    other = type(recorder)()
    prune(build("qwen3"), [ids], PerRow(0.5), recorder)
    prune(build("qwen3"), ids.split(1), PerRow(0.5), other)
    for one, two in zip(recorder.problems, other.problems, strict=True):
        torch.testing.assert_close(one.gram, two.gram, rtol=1e-4, atol=1e-4 * float(one.gram.abs().max()))


def test_both_stacks_of_an_encoder_decoder_are_pruned(encoder_decoder, make_batches):
    model = encoder_decoder.build()
    batches = [{**batch, "decoder_input_ids": batch["input_ids"][:, :7]} for batch in make_batches()]
    report = prune(model, batches, PerRow(0.5), Wanda())
    tokens = {record.name.split(".")[-2] + record.name[:3]: record.tokens for record in report.layers}
    assert set(tokens.values()) == {3 * 2 * 12, 3 * 2 * 7}  # cross-attention keys read the encoder's states
    assert len(report.layers) == 2 * 6 + 2 * 10


@pytest.mark.parametrize("bare", [False, True])
def test_images_calibrate_vision_models(bare, recorder):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4
    )
    pixels = torch.randn(3, 3, 8, 8)
    report = prune(ViTModel(config), [pixels if bare else {"pixel_values": pixels}] * 2, PerRow(0.5), recorder)
    assert len(report.layers) == 12
    assert {record.tokens for record in report.layers} == {2 * 3 * 5}  # four patches and a class token


def test_both_towers_of_a_dual_encoder_are_pruned():
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 61, "max_position_embeddings": 16},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    model, ids = CLIPModel(config), torch.randint(3, 60, (2, 9))
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
    report = prune(model, [batch], PerRow(0.5), ContinuationFrankWolfe(iterations=4))
    tokens = {record.name.split(".")[0]: record.tokens for record in report.layers}
    assert len(report.layers) == 2 * 2 * 6
    assert tokens == {"text_model": 2 * 9, "vision_model": 2 * 5}
    with pytest.raises(MaskoptError, match=r"^The CLIPModel cannot be run on calibration batch 0: [^\n]*\.$"):
        prune(model, [ids], PerRow(0.5), Wanda())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_does_not_change(build, make_batches, dtype):
    model = build("llama").to(dtype)
    report = prune(model, make_batches(), NM(keep=2, group=4), Wanda())
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert report.settings["dtype"] == str(dtype)
    assert report.sparsity == 0.5


def test_mode_and_gradients_do_not_change(llama, make_batches):
    llama.train()
    llama.model.layers[0].eval()
    frozen = llama.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    with torch.inference_mode():  # the weights must be changeable all the same
        prune(llama, make_batches(), PerRow(0.5), Wanda())
    assert llama.training
    assert not llama.model.layers[0].training
    assert not frozen.requires_grad
    assert llama.model.layers[0].mlp.up_proj.weight.requires_grad
    llama(**make_batches()[0], labels=make_batches()[0]["input_ids"]).loss.backward()
    assert llama.model.layers[0].mlp.up_proj.weight.grad.isfinite().all()


def test_a_head_is_pruned_when_asked_for(llama, make_batches, inputs_of, recorder):
    batches = make_batches(padded=True)
    report = prune(llama, batches, PerRow(0.5), recorder, include=["lm_head", "*.mlp.*"])
    assert report.layers[-1].name == "lm_head"
    x = inputs_of(llama, batches, ["lm_head"])["lm_head"]
    gram = recorder.problems[-1].gram.double()
    torch.testing.assert_close(gram, x.T @ x, rtol=1e-5, atol=1e-5 * float(gram.max()))
    assert int((llama.lm_head.weight == 0).sum()) == llama.lm_head.weight.numel() // 2


def test_a_tied_head_is_pruned_together_with_the_embedding(build, make_batches):
    model = build("llama", tie_word_embeddings=True)
    before = model.model.embed_tokens.weight.detach().clone()
    prune(model, make_batches(), PerRow(0.5), Wanda())
    assert torch.equal(model.model.embed_tokens.weight, before)
    report = prune(model, make_batches(), PerRow(0.5), Wanda(), include=["lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, before * report.masks["lm_head"])


def test_only_what_is_needed_is_run(llama, make_batches):
    calls = []
    for index, layer in enumerate(llama.model.layers):
        layer.self_attn.register_forward_hook(lambda module, args, output, index=index: calls.append(index))
    prune(llama, make_batches(count=1), PerRow(0.5), Wanda(), include=["model.layers.1.*"])
    # One forward finds the order, one pass verifies it; then block 0 runs, block 1 is calibrated, block 2 not needed.
    assert calls == [0, 1, 2, 0, 1, 2, 0, 1]


def test_starting_masks_reach_the_solver(build, make_batches):
    for name in ("llama", "gpt2"):
        given = prune(build(name), make_batches(), PerRow(0.5), Magnitude())
        report = prune(build(name), make_batches(), PerRow(0.5), OneSwap(max_steps=0), start=given.masks)
        assert all(torch.equal(report.masks[layer], mask) for layer, mask in given.masks.items())
        assert report.settings["warm_started_layers"] == sorted(given.masks)


def test_progress_knows_the_total_from_the_start(llama, make_batches):
    events = []
    prune(llama, make_batches(), PerRow(0.5), ContinuationFrankWolfe(iterations=5), progress=events.append)
    assert {event.total for event in events} == {21}
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert events[0].stage == "calibrate"
    assert events[0].name == "model.layers.0"
    assert (events[-1].stage, events[-1].done) == ("done", 21)
    assert {name for event in events if event.stage == "solve" for name in event.name.split(", ")} == {
        layer.name for layer in select_layers(llama).layers
    }
    assert any(0 < event.fraction <= 1 for event in events)


def test_layers_with_one_input_are_solved_together_and_alike(build, make_batches, monkeypatch):
    reports = []
    for together in (True, False):
        monkeypatch.setattr(Solver, "solves_rows_apart", lambda self, masks, together=together: together)
        reports.append(prune(build("llama"), make_batches(), PerRow(0.5), Wanda()))
    assert reports[0].masks.keys() == reports[1].masks.keys()
    assert all(torch.equal(reports[1].masks[name], mask) for name, mask in reports[0].masks.items())
    for one, two in zip(reports[0].layers, reports[1].layers, strict=True):
        assert (one.name, one.nonzeros) == (two.name, two.nonzeros)
        assert one.objective == pytest.approx(two.objective, rel=1e-9)
        assert one.relative_error == pytest.approx(two.relative_error, rel=1e-9)


def test_the_model_is_put_on_the_device_asked_for(llama, make_batches):
    report = prune(llama, make_batches(), PerRow(0.5), Magnitude(), device="cpu")
    assert report.settings["device"] == "cpu"


def test_the_default_solver_is_continuation(llama, make_batches):
    report = prune(llama, make_batches(), PerRow(0.5), include=["*.0.*.q_proj"])
    assert report.settings["solver"].startswith("ContinuationFrankWolfe")


def test_blocks_the_batches_never_reach_are_listed(llama, make_batches):
    llama.tower = nn.Module()
    llama.tower.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
    report = prune(llama, make_batches(), PerRow(0.5), Wanda())
    reasons = {weight.name: weight.reason for weight in report.left_dense}
    assert reasons["tower.layers.0.0.weight"] == "tower.layers.0 is not run by these batches"
    assert len(report.layers) == 21


def test_batches_that_reach_no_layer_to_prune_are_refused(llama, make_batches):
    llama.tower = nn.Module()
    llama.tower.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
    with pytest.raises(MaskoptError, match="do not run any of the blocks that hold layers to prune"):
        prune(llama, make_batches(), PerRow(0.5), Wanda(), include=["tower.*"])


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_full_forwards_give_the_same_masks(build, make_batches, monkeypatch, propagate):
    reports = []
    for shortcut in (True, False):
        monkeypatch.setattr(Replay, "_reproduces", lambda self, finals, shortcut=shortcut: shortcut)
        options = {"include": ["model.layers.*", "lm_head"], "propagate": propagate}
        reports.append(prune(build("gemma3"), make_batches(padded=True), PerRow(0.5), Wanda(), **options))
        assert reports[-1].settings["block_by_block"] is shortcut
    assert reports[0].masks.keys() == reports[1].masks.keys()
    assert all(torch.equal(reports[1].masks[name], mask) for name, mask in reports[0].masks.items())
    assert [one.objective for one in reports[0].layers] == [two.objective for two in reports[1].layers]


def test_shared_blocks_are_calibrated_on_all_their_calls(make_batches, inputs_of, recorder):
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=61,
        embedding_size=8,
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=12,
    )
    model, batches = AlbertModel(config), make_batches()
    names = [layer.name for layer in select_layers(model).layers]
    inputs = inputs_of(model, batches, names)
    report = prune(model, batches, PerRow(0.5), recorder)
    for record, problem in zip(report.layers, recorder.problems, strict=True):
        x = inputs[record.name]
        assert record.tokens == len(x) == 4 * 3 * 2 * 12
        torch.testing.assert_close(problem.gram.double(), x.T @ x, rtol=1e-5, atol=1e-5 * float(problem.gram.max()))


def test_a_failure_in_dense_mode_leaves_the_model_whole(llama, make_batches):
    before = weights_of(llama)

    def fail(event):
        if event.done >= 15:
            raise KeyboardInterrupt

    llama.train()
    with pytest.raises(KeyboardInterrupt):
        prune(llama, make_batches(), PerRow(0.5), Wanda(), propagate="dense", progress=fail)
    assert all(torch.equal(parameter, before[name]) for name, parameter in llama.named_parameters())
    assert llama.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


IDS = torch.ones(2, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ([], "There are no calibration batches"),
        ([[1, 2, 3]], "calibration batch 0 must be a tensor of token ids or a dict .* it is a list"),
        ([IDS, {"attention_mask": IDS}], r"batch 1 must be .*'input_ids'; it is a dict with \['attention_mask'\]"),
        ([IDS.float()], "batch 0 must hold integer token ids .* torch.float32"),
        ([IDS[0]], r"batch 0 must hold integer token ids of shape \(sequences, positions\)"),
        ([IDS[:, :0]], "batch 0 must hold integer token ids"),
        ([IDS, IDS * 61], "batch 1 holds token id 61, but the model knows ids 0 to 60"),
        ([-IDS], "batch 0 holds token id -1"),
        ([{"input_ids": IDS, "attention_mask": IDS[:, 1:]}], r"an attention_mask of shape \(2, 7\)"),
        ([{"input_ids": IDS, "attention_mask": 0 * IDS}], "hold padding only"),
        ([IDS.repeat(1, 5)], "batch 0 has sequences of 40 tokens, but the model takes at most 32"),
    ],
)
def test_bad_batches_are_refused(llama, batches, sentence):
    before = weights_of(llama)
    with pytest.raises(MaskoptError, match=sentence):
        prune(llama, batches, PerRow(0.5), Wanda())
    assert all(torch.equal(parameter, before[name]) for name, parameter in llama.named_parameters())


def test_padded_batches_of_an_encoder_decoder_are_refused(build):
    batch = {"input_ids": IDS, "attention_mask": IDS.tril(), "decoder_input_ids": IDS}
    with pytest.raises(MaskoptError, match="batch 0 is padded, and padding cannot be told apart in an encoder-decoder"):
        prune(build("bart"), [batch], PerRow(0.5), Wanda())


def test_masks_that_do_not_fit_name_the_layer_before_any_work(llama):
    def never():
        raise AssertionError("no batch may be drawn")
        yield

    with pytest.raises(
        MaskoptError, match=r"do not fit the layer model.layers.0.self_attn.q_proj: NM.* divisible by 5"
    ):
        prune(llama, never(), NM(keep=2, group=5), Wanda())


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        ({"model.layers.7.q": torch.ones(2, 2).bool()}, "starting mask for model.layers.7.q, which is not a layer"),
        ({"model.layers.0.mlp.up_proj": torch.ones(2, 2).bool()}, r"boolean of shape \(24, 16\)"),
        ({"model.layers.0.mlp.up_proj": torch.ones(24, 16)}, r"it is torch.float32"),
        ({"model.layers.0.mlp.up_proj": torch.ones(24, 16).bool()}, "up_proj cannot be solved: The start must be"),
    ],
)
def test_bad_starting_masks_are_refused(llama, make_batches, start, sentence):
    with pytest.raises(MaskoptError, match=sentence):
        prune(llama, make_batches(), PerRow(0.5), Wanda(), start=start)


def test_an_unknown_mode_of_propagation_is_refused(llama, make_batches):
    with pytest.raises(MaskoptError, match="must be one of corrected, pruned, dense; got 'sparse'"):
        prune(llama, make_batches(), PerRow(0.5), propagate="sparse")


@pytest.mark.parametrize("value", [1e30, -3e38])
def test_activations_that_are_not_finite_name_the_layer(llama, make_batches, value):
    llama.model.layers[1].input_layernorm.weight.data[3] = value
    with pytest.raises(MaskoptError, match=r"The inputs of model.layers.1.self_attn.q_proj hold NaN or infinite"):
        prune(llama, make_batches(), PerRow(0.5), Wanda())


def test_experts_are_pruned_around_when_excluded(mixture, make_batches):
    model = mixture.build()
    report = prune(model, make_batches(), PerRow(0.5), Wanda(), exclude=["*.experts*"])
    assert len(report.layers) == 12
    assert sum("stacked matrices" in weight.reason for weight in report.left_dense) == 6


@pytest.mark.parametrize(
    ("masks", "solver", "words"),
    [
        ("2:4", None, "parse_masks makes one of '2:4'"),
        (0.5, None, "set of masks is an object such as"),
        (PerRow(0.5), "wanda", "make_solver makes one of 'wanda'"),
        (PerRow(0.5), Wanda, "got the class Wanda"),
    ],
)
def test_words_are_neither_sets_nor_solvers(llama, make_batches, masks, solver, words):
    before = weights_of(llama)
    with pytest.raises(MaskoptError, match=words):
        prune(llama, make_batches(), masks, solver)
    assert all(torch.equal(before[name], parameter) for name, parameter in llama.named_parameters())
