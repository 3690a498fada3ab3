"""Recovery of models: blocks fitted to the dense model's blocks, and the model to its predictions."""

import copy
from dataclasses import replace

import pytest
import torch

import maskopt
from maskopt.errors import MaskoptError
from maskopt.models import prune, recognised, recover, recovery_bytes
from maskopt.models.batches import Batch, prepare_batches
from maskopt.models.divergence import Divergence
from maskopt.models.gram import GramCollector
from maskopt.models.objectives import BlockOutput, Predictions
from maskopt.models.replay import evaluation_mode
from maskopt.models.windows import divided
from maskopt.oracles import NM, Columns, PerRow, Unstructured
from maskopt.recovery import Continuation, FixedMasks, GumbelMasks, Recovery, Reselection
from maskopt.solvers import Wanda
from maskopt.weights import ConditionalADMM
from tests.models.conftest import ARCHITECTURES, MIXTURES, VOCABULARY, weights_of

SHORT = Recovery("block", epochs=2)


@pytest.fixture
def build():
    """Builds a model of two blocks: what is true of the second one is true of a third."""

    def of(name, **changes):
        return {**ARCHITECTURES, **MIXTURES}[name].build(
            **{"n_layer" if name == "gpt2" else "num_hidden_layers": 2, **changes}
        )

    return of


@pytest.fixture
def batches(make_batches):
    return make_batches(count=32, length=28)


def block_errors(model, dense, batches, prefix):
    """Mean over tokens of every block's squared error relative to the dense model's output, run as a whole."""
    states = []
    for network in (model, dense):
        seen = {}
        hooks = []
        for name, module in network.named_modules():

            def hook(module, args, output, name=name, seen=seen):
                seen.setdefault(name, []).append(output if isinstance(output, torch.Tensor) else output[0])

            if name.rpartition(".")[0] == prefix:
                hooks.append(module.register_forward_hook(hook))
        with evaluation_mode(network):
            for batch in batches:
                network(**batch)
        for hook in hooks:
            hook.remove()
        states.append({name: torch.cat(outputs) for name, outputs in seen.items()})
    now, before = states
    return {name: float(((now[name] - y).square().sum(-1) / y.square().sum(-1)).mean()) for name, y in before.items()}


@pytest.mark.parametrize(
    ("name", "rule"),
    [("llama", None), ("llama", FixedMasks()), ("llama", Reselection()), ("gpt2", None), ("opt", None)],
)
def test_blocks_come_nearer_and_masks_stay_in_their_set(build, batches, name, rule):
    model, dense, plain = build(name), build(name), build(name)
    recovery = Recovery("block", epochs=3, rule=rule)
    report = prune(model, batches, PerRow(0.5), ConditionalADMM(), recover=recovery)
    prune(plain, batches, PerRow(0.5), ConditionalADMM())
    assert all(record.after <= record.before for record in report.recovery)
    # Straight-through gradients may find nothing that helps on so little data.
    assert any(record.accepted for record in report.recovery) or rule == Reselection()
    for layer, mask in report.masks.items():
        weight = model.get_submodule(layer).weight
        matrix = mask.T if name == "gpt2" else mask
        assert PerRow(0.5).contains(matrix.contiguous())
        assert torch.equal(mask, (weight != 0))
    stack = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}
    now = block_errors(model, dense, batches, stack[name])
    before = block_errors(plain, dense, batches, stack[name])
    last = list(now)[-1]
    assert now[last] < before[last] or rule == Reselection()


def test_recorded_losses_are_those_of_the_models(build, batches):
    """What the report says about the first block is what running both models on the held-out windows gives."""
    model, dense = build("llama"), build("llama")
    report = prune(model, batches, PerRow(0.5), ConditionalADMM(), recover=SHORT)
    data = divided(prepare_batches(model, batches))
    held = torch.cat([data.batches[index].inputs["input_ids"] for index in data.held_out])
    errors = [
        block_errors(model, dense, [{"input_ids": window[None]}], "model.layers")["model.layers.0"] for window in held
    ]
    assert report.recovery[0].after == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_predictions_come_nearer(build, batches):
    model, dense = build("llama"), build("llama")
    report = prune(model, batches, PerRow(0.5), ConditionalADMM(), recover=Recovery("model", epochs=2))
    assert [record.level for record in report.recovery] == ["block"] * 2 + ["model"]
    last = report.recovery[-1]
    assert last.after < last.before
    data = divided(prepare_batches(dense, batches))
    with evaluation_mode(dense), evaluation_mode(model):
        divergence = Divergence(dense, [data.batches[index] for index in data.held_out])
        assert last.after == pytest.approx(float(divergence.each(model).mean()), rel=1e-4)


@pytest.mark.parametrize("solver", [Wanda(), ConditionalADMM()])
@pytest.mark.parametrize("level", ["block", "model"])
def test_any_solver_and_padding(build, make_batches, solver, level):
    model = build("llama")
    report = prune(model, make_batches(padded=True), NM(keep=2, group=4), solver, recover=Recovery(level, epochs=1))
    assert report.settings["propagate"] == ("corrected" if solver.corrects else "pruned")
    assert all(record.after <= record.before for record in report.recovery)
    assert all(NM(keep=2, group=4).contains(mask) for mask in report.masks.values())


def test_half_precision(build, batches):
    model = build("llama").bfloat16()
    report = prune(model, batches, PerRow(0.5), ConditionalADMM(), recover=Recovery("model", epochs=1))
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert all(record.after <= record.before for record in report.recovery)


def test_two_runs_are_identical(build, batches):
    def once():
        model = build("llama")
        prune(model, batches, PerRow(0.5), ConditionalADMM(), recover=Recovery("model", epochs=1))
        return weights_of(model)

    first, second = once(), once()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_activations_that_are_computed_again_change_no_bit_and_take_less_memory(build, batches, name, monkeypatch):
    found = {}
    loss = Predictions.loss
    for checkpoint in (False, True):
        kept: dict[int, int] = {}

        def watched(self, index, kept=kept, checkpoint=checkpoint):
            def keep(tensor):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                value = loss(self, index)
            found.setdefault((checkpoint, "bytes"), sum(kept.values()))
            return value

        monkeypatch.setattr(Predictions, "loss", watched)
        model = build(name)
        recovery = Recovery("model", epochs=1, checkpoint=checkpoint)
        report = prune(model, batches, PerRow(0.5), Wanda(), recover=recovery)
        assert report.recovery[-1].accepted
        found[checkpoint] = weights_of(model)
        assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(found[False][each], weight) for each, weight in found[True].items())
    assert found[True, "bytes"] < 0.6 * found[False, "bytes"]
    plain, less = (recovery_bytes(build(name), batches, Recovery("model", checkpoint=each)) for each in (False, True))
    assert less < plain


@pytest.mark.parametrize("where", ["model.layers.1", "model"])
def test_a_failure_restores_all_parameters(build, batches, where):
    model = build("llama")
    before, flags = weights_of(model), [parameter.requires_grad for parameter in model.parameters()]

    def fail(event):
        if event.stage == "recover" and event.name == where and event.fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, batches, PerRow(0.5), Wanda(), recover=Recovery("model", epochs=2), progress=fail)
    after = weights_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_what_is_fitted(build, batches):
    """Embeddings and head never; norms not with "pruned"; matrices not with "vectors"."""
    cases = (
        ("all", (True, True)),
        ("pruned", (True, False)),
        ("vectors", (False, True)),
        ("lora", (True, True)),
    )
    plain = build("llama")
    prune(plain, batches, PerRow(0.5), Wanda())
    for parameters, changed in cases:
        model = build("llama")
        recovery = Recovery("block", epochs=2, parameters=parameters)
        # Windows that are fitted are held out, so that the fits are kept.
        report = prune(model, batches, PerRow(0.5), Wanda(), recover=recovery, held_out=batches[:2])
        assert report.recovery[0].accepted
        # The first block is pruned alike in both.
        own, other = weights_of(model), weights_of(plain)
        differs = {name: not torch.equal(own[name], other[name]) for name in own}
        assert not differs["model.embed_tokens.weight"]
        assert not differs["lm_head.weight"]
        block = [name for name in differs if name.startswith("model.layers.0.")]
        assert any(differs[name] for name in block if own[name].ndim == 2) == changed[0]
        assert any(differs[name] for name in block if own[name].ndim == 1) == changed[1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_changes_of_low_rank_keep_every_zero(build, batches, name):
    model, dense = build(name), build(name)
    before = prune(model, batches, NM(keep=2, group=4), Wanda())
    zeros = {layer: ~mask for layer, mask in before.masks.items()}
    old = weights_of(model)
    report = recover(model, dense, batches, Recovery("model", epochs=2, parameters="lora", rank=2), masks=before.masks)
    assert any(record.accepted for record in report.recovery)
    new = weights_of(model)
    for layer, zero in zeros.items():
        assert not bool(new[f"{layer}.weight"][zero].any())
        assert torch.equal(report.masks[layer], ~zero)
    assert any(not torch.equal(old[f"{layer}.weight"], new[f"{layer}.weight"]) for layer in zeros)
    whole = sum(value.numel() for key, value in old.items() if key.removesuffix(".weight") in zeros)
    assert all(record.parameters < whole for record in report.recovery)


def test_rules_refuse_sets_before_anything_is_pruned(build, batches):
    model = build("llama")
    before = weights_of(model)
    with pytest.raises(MaskoptError, match="not compatible with GumbelMasks"):
        prune(model, batches, Columns(0.5), Wanda(), recover=Recovery("block", rule=GumbelMasks()))
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())


def test_pruned_models_recover_beside_the_dense_one(build, batches):
    model, dense = build("llama"), build("llama")
    prune(model, batches, PerRow(0.5), Wanda())
    zeros = {name: weight == 0 for name, weight in weights_of(model).items()}
    original = weights_of(dense)
    told = []
    report = recover(
        model,
        dense,
        batches,
        Recovery("model", epochs=2, rule=FixedMasks()),
        progress=lambda name, fraction: told.append(fraction),
    )
    assert all(record.after <= record.before for record in report.recovery)
    assert report.recovery[-1].accepted
    now = weights_of(model)
    assert all(bool((now[name] == 0)[zero].all()) for name, zero in zeros.items() if name.endswith("proj.weight"))
    assert all(torch.equal(original[name], value) for name, value in weights_of(dense).items())
    assert report.sparsity == pytest.approx(0.5)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


def test_recovery_within_pruning_and_beside_the_dense_model_agree(build, batches):
    """The first block of both sees the same inputs and targets."""
    inside, outside, dense = build("llama"), build("llama"), build("llama")
    recovery = SHORT
    first = prune(inside, batches, PerRow(0.5), Wanda(), recover=recovery).recovery[0]
    # Wanda on the same micro-batches, so that sums are in the same order.
    data = divided(prepare_batches(outside, batches))
    prune(outside, [data.batches[index].inputs for index in data.fitted], PerRow(0.5), Wanda())
    second = recover(outside, dense, batches, recovery).recovery[0]
    assert first.before == pytest.approx(second.before, rel=1e-6)
    assert first.after == pytest.approx(second.after, rel=1e-6)


@pytest.mark.parametrize("propagate", ["corrected", "pruned"])
def test_blocks_and_the_model_are_fitted_to_further_windows_and_layers_are_not(build, batches, monkeypatch, propagate):
    predicted, squared, summed = [], [], []
    logits, errors, begin = Divergence.logits, BlockOutput._losses, GramCollector.begin

    def rows(batch):
        return [tuple(row) for row in batch.inputs["input_ids"].tolist()]

    def watched(self, model, index, *args, **kwargs):
        predicted.extend(rows(self.batches[index]))
        return logits(self, model, index, *args, **kwargs)

    def measured(self, index):
        squared.extend(rows(self._data.batches[index]))
        return errors(self, index)

    def collected(self, batch):
        summed.extend(rows(batch))
        begin(self, batch)

    monkeypatch.setattr(Divergence, "logits", watched)
    monkeypatch.setattr(BlockOutput, "_losses", measured)
    monkeypatch.setattr(GramCollector, "begin", collected)
    further = [{"input_ids": batch["input_ids"].flip(1)} for batch in batches[:16]]
    recovery = Recovery("model", epochs=1, step_size=1e-3, rule=FixedMasks())
    data = {"propagate": propagate, "held_out": batches[24:], "further": further}
    report = prune(build("llama"), batches[:24], PerRow(0.5), Wanda(), recover=recovery, **data)

    def wanted(chosen):
        return {tuple(row) for batch in chosen for row in batch["input_ids"].tolist()}

    assert set(predicted) == set(squared) == wanted([*further, *batches[24:]])
    assert set(summed) == wanted(batches)
    assert report.settings["further_tokens"] == 16 * 2 * 28
    assert report.settings["calibration_tokens"] == 24 * 2 * 28
    # Layers do not know of the recovery's windows.
    alone = prune(build("llama"), batches[:24], PerRow(0.5), Wanda(), propagate=propagate, held_out=batches[24:])
    first = [layer.relative_error for layer in report.layers if ".layers.0." in layer.name]
    expected = [layer.relative_error for layer in alone.layers if ".layers.0." in layer.name]
    assert first == pytest.approx(expected, rel=1e-5)  # other micro-batches, other rounding


def test_masks_move_on_further_windows_behind_a_calibration_on_the_dense_model(build, batches):
    """Its blocks run on the windows for layers alone, and the fit of the model on the others alone."""
    further = [{"input_ids": batch["input_ids"].flip(1)} for batch in batches[:16]]
    recovery = Recovery("model", epochs=1, step_size=1e-3, rule=Continuation())
    data = {"propagate": "dense", "held_out": batches[24:], "further": further}
    fits = prune(build("llama"), batches[:24], PerRow(0.5), Wanda(), recover=recovery, **data).recovery
    assert [fit.name for fit in fits] == ["model"]
    assert fits[0].after <= fits[0].before


def test_windows_are_held_out_of_those_to_fit(batches):
    model_batches = [Batch({"input_ids": batch["input_ids"]}, tuple(batch["input_ids"].shape)) for batch in batches[:8]]
    further = [replace(batch, purpose="recovery") for batch in model_batches[4:]]
    data = divided([*model_batches[:4], *further])
    purposes = [batch.purpose for batch in data.batches]
    assert [purposes[index] for index in data.fitted] == ["recovery"] * len(data.fitted)
    assert [purposes[index] for index in data.held_out] == ["held out"] * len(data.held_out)
    assert purposes.count("layers") == data.fitted.start > 0
    assert sum(batch.shape[0] for batch in data.batches) == 16
    assert data.alone.batches == data.batches[data.fitted.start :]
    assert [data.alone.batches[index] for index in data.alone.held_out] == [data.batches[i] for i in data.held_out]


def test_patterns_are_recognised():
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(16, 64, generator=generator)
    for masks in (NM(keep=2, group=4), NM(keep=4, group=8), PerRow(20), Unstructured(400)):
        assert repr(recognised(masks.lmo_mask(-score))) == repr(masks)
    few = NM(keep=2, group=4).lmo_mask(-score)
    few[0, 0] = few[3, 7] = False
    assert repr(recognised(few)) == repr(NM(keep=2, group=4))
    assert repr(recognised(torch.zeros(4, 8, dtype=torch.bool))) == repr(PerRow(0))


def test_an_eighth_of_the_windows_is_held_out_and_those_that_overlap_least(llama):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (40, 32), generator=generator)
    ids[-1] = ids[0]  # the last one repeats the first
    data = divided(prepare_batches(llama, list(ids.split(8))))
    held = torch.cat([data.batches[index].inputs["input_ids"] for index in data.held_out])
    fitted = torch.cat([data.batches[index].inputs["input_ids"] for index in data.fitted])
    assert len(held) == 5
    assert len(fitted) == 35
    assert torch.equal(held, ids[34:39])
    assert data.tokens == 35 * 32
    assert len(divided(prepare_batches(llama, list(ids[:3].split(1)))).held_out) == 1


def test_states_beside_pruned_ones_are_the_dense_models(build, batches):
    """Whatever the propagation, blocks are fitted to the outputs of the model as it was."""
    for solver in (Wanda(), ConditionalADMM()):
        model, dense = build("llama"), build("llama")
        targets = {}
        fit_block = maskopt.models.recovery.Recoverer.fit_block

        def spy(self, position, layers, outputs, targets=targets, fit_block=fit_block):
            targets[position] = [outputs(index).clone() for index in range(len(self._data.batches))]
            return fit_block(self, position, layers, outputs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(maskopt.models.recovery.Recoverer, "fit_block", spy)
            prune(model, batches, PerRow(0.5), solver, recover=SHORT)
        data = divided(prepare_batches(dense, batches))
        with evaluation_mode(dense):
            for index, batch in enumerate(data.batches):
                states = dense(**batch.inputs, output_hidden_states=True).hidden_states
                for position in range(len(targets) - 1):  # the last one is normed
                    torch.testing.assert_close(targets[position][index], states[position + 1])


def test_errors_say_what_is_wrong(build, batches, make_batches):
    model = build("llama")
    cases = [
        (lambda: prune(model, batches[:1][0]["input_ids"][None, :1], PerRow(0.5), recover=SHORT), "at least two"),
        (lambda: prune(model, batches, PerRow(0.5), propagate="dense", recover=SHORT), "propagate"),
        (lambda: prune(model, batches, PerRow(0.5), recover="block"), "recover"),
        (lambda: recover(model, model, batches), "one object"),
        (lambda: recover(model, build("llama"), batches), "no layer|No layer"),
        (lambda: recover(build("llama", intermediate_size=32), build("llama"), batches), "do not belong together"),
        (lambda: recover(model, build("llama"), batches, "block"), "Recovery"),
        (lambda: Recovery("layer"), "level"),
        (lambda: Recovery(epochs=0), "epochs"),
        (lambda: Recovery(step_size=-1.0), "step_size"),
        (lambda: Continuation(until=0.0), "until"),
    ]
    before = weights_of(model)
    for call, words in cases:
        with pytest.raises(MaskoptError, match=words):
            call()
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())


def test_masks_given_must_fit(build, batches):
    model, dense = build("llama"), build("llama")
    report = prune(model, batches, PerRow(0.5), Wanda())
    name = next(iter(report.masks))
    for masks, words in (
        ({"nothing": report.masks[name]}, "not a layer"),
        ({name: report.masks[name].float()}, "boolean"),
        ({name: ~report.masks[name]}, "not zero"),
    ):
        with pytest.raises(MaskoptError, match=words):
            recover(model, dense, batches, SHORT, masks=masks)


def test_blocks_that_share_weights_keep_what_is_shared(build, batches):
    """Parameters of several blocks are not fitted to one of them."""
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    shared = copy.deepcopy(model.model.layers[0].mlp)
    report = prune(model, batches, PerRow(0.5), Wanda(), recover=Recovery("block", epochs=2), exclude=["*.mlp.*"])
    assert any(record.accepted for record in report.recovery)
    for own, other in zip(model.model.layers[0].mlp.parameters(), shared.parameters(), strict=True):
        assert torch.equal(own, other)


def test_memory_of_models_that_do_not_name_their_head_is_estimated(build, batches, monkeypatch):
    model = build("llama")
    expected = recovery_bytes(model, batches, Recovery("model"))
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    assert recovery_bytes(model, batches, Recovery("model")) == expected


def test_memory_is_estimated_before(build, batches):
    """Of blocks: moments, best state, masters and one gradient; activations grow with the micro-batch."""
    model = build("llama")
    before = weights_of(model)
    block = model.model.layers[0]
    numbers = [parameter.numel() for parameter in block.parameters()]
    moving, fixed, vectors, lora, model_level = (
        recovery_bytes(model, batches, recovery)
        for recovery in (
            Recovery("block"),
            Recovery("block", rule=FixedMasks()),
            Recovery("block", parameters="vectors"),
            Recovery("block", parameters="lora", rank=2),
            Recovery("model"),
        )
    )
    assert moving - fixed == 4 * sum(numbers)
    norms = [parameter.numel() for parameter in block.parameters() if parameter.ndim == 1]
    assert fixed - vectors == 12 * (sum(numbers) - sum(norms)) + 4 * (max(numbers) - max(norms))
    matrices = [parameter for parameter in block.parameters() if parameter.ndim == 2]
    factors = sum(2 * sum(parameter.shape) for parameter in matrices)
    entries = sum(parameter.numel() for parameter in matrices)
    # Two moments of the factors, these and their best, a copy of the weights; a gradient and a change.
    assert lora - vectors == 16 * factors + 4 * entries + 8 * max(numbers) - 4 * max(norms)
    assert model_level > moving
    activations = fixed - 12 * sum(numbers) - 4 * max(numbers)
    assert activations > 0
    halves = [{"input_ids": batch["input_ids"][:, :14]} for batch in batches]
    shorter = recovery_bytes(model, halves, Recovery("block", rule=FixedMasks())) - (fixed - activations)
    assert activations > 1.5 * shorter > 0
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(model).items())
    assert not any(
        parameter.requires_grad != own.requires_grad
        for parameter, own in zip(model.parameters(), build("llama").parameters(), strict=True)
    )
