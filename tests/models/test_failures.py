"""What a failure or an interrupt midway leaves behind, and what is refused before any work."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from maskopt.errors import MaskoptError
from maskopt.models import PruningError, calibration_batches, perplexity, prune, select_layers, tokenize
from maskopt.models.edits import Edits
from maskopt.models.layers import Layer, LinearLayer
from maskopt.oracles import PerRow
from maskopt.solvers import Solver, Wanda
from maskopt.weights import ConditionalADMM
from tests.models.conftest import weights_of


def same(model, before):
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def pruned_layers(model):
    """The layers of which half of the weights are zero."""
    return {
        layer.name
        for layer in select_layers(model).layers
        if int((layer.weight == 0).sum()) == layer.weight.numel() // 2
    }


def failing_after(layers, error):
    def fail(event):
        if event.done >= layers:
            raise error

    return fail


FAILURES = [KeyboardInterrupt(), RuntimeError("no luck"), MaskoptError("The layer is odd.")]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("propagate", ["corrected", "pruned", "dense"])
@pytest.mark.parametrize("solver", [Wanda(), ConditionalADMM(iterations=4)], ids=["masks", "weights"])
def test_a_failure_gives_all_layers_their_weights_back(llama, make_batches, solver, propagate, error):
    before = weights_of(llama)
    addresses = {name: parameter.data_ptr() for name, parameter in llama.named_parameters()}
    for done in (0, 9, 21):
        with pytest.raises(type(error)) as caught:
            prune(llama, make_batches(), PerRow(0.5), solver, propagate=propagate, progress=failing_after(done, error))
        assert caught.value is error
        assert same(llama, before)
    notes = " ".join(error.__notes__)
    assert ("The model is as it was" in notes) == (propagate != "dense" or done == 21)
    assert {name: parameter.data_ptr() for name, parameter in llama.named_parameters()} == addresses
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())
    error.__notes__.clear()


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("propagate", ["corrected", "pruned"])
def test_a_failure_that_keeps_says_exactly_which_layers_are_pruned(build, make_batches, propagate, error):
    model = build("llama")
    before = weights_of(model)
    options = {"propagate": propagate, "on_error": "keep", "progress": failing_after(9, error)}
    with pytest.raises(PruningError if isinstance(error, MaskoptError) else type(error)) as caught:
        prune(model, make_batches(), PerRow(0.5), Wanda(), **options)
    pruned = pruned_layers(model)
    assert pruned
    assert len(pruned) < 21
    note = error.__notes__[-1]
    assert set(re.findall(r"model\.layers[\w.]*\w", note)) == pruned
    assert f"These {len(pruned)} layers" in note
    untouched = before.keys() - {f"{name}.weight" for name in pruned}
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in untouched)
    if isinstance(caught.value, PruningError):
        assert caught.value.report.masks.keys() == pruned
        assert {record.name for record in caught.value.report.layers} == pruned
        assert str(caught.value).startswith("The layer is odd; ")
        assert f"{len(pruned)} layers are pruned already and stay so" in str(caught.value)
        for name, mask in caught.value.report.masks.items():
            assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"] * mask)
    error.__notes__.clear()


def test_a_failure_before_the_first_layer_is_raised_as_it_is(llama, make_batches):
    error = MaskoptError("The layer is odd.")
    with pytest.raises(MaskoptError) as caught:
        prune(llama, make_batches(), PerRow(0.5), Wanda(), on_error="keep", progress=failing_after(0, error))
    assert caught.value is error
    assert error.__notes__ == ["No layer of the model was pruned."]


@pytest.mark.parametrize("restorable", [True, False])
def test_an_interrupt_between_weight_and_mask_leaves_no_layer_in_between(monkeypatch, restorable):
    layer = LinearLayer("a", nn.Linear(6, 4))
    dense, new = layer.weight.detach().clone(), torch.randn(4, 6)
    mask = torch.rand(4, 6) < 0.5
    edits = Edits(restorable)
    edits.choose(layer, mask, new)
    plain = Layer.apply

    def halfway(self, mask, weight=None):
        self.weight.data.copy_(weight)
        raise KeyboardInterrupt

    monkeypatch.setattr(Layer, "apply", halfway)
    with pytest.raises(KeyboardInterrupt):
        edits.apply([layer])
    monkeypatch.setattr(Layer, "apply", plain)
    edits.settle()
    assert edits.applied == [layer]
    assert torch.equal(layer.weight, new * mask)
    edits.undo()
    assert torch.equal(layer.weight, dense if restorable else new * mask)


def add_uncalled(model):
    """Layers that no forward calls, in two blocks."""
    for index in (0, 2):
        model.model.layers[index].mlp.adapter = nn.Linear(16, 16)
    return model


@pytest.mark.parametrize("propagate", ["corrected", "pruned", "dense"])
def test_layers_that_are_never_called_are_found_before_the_first_is_pruned(build, make_batches, recorder, propagate):
    model = add_uncalled(build("llama"))
    with pytest.raises(
        MaskoptError, match=r"never call 2 of the layers to prune, such as model.layers.0.mlp.adapter"
    ) as caught:
        prune(model, make_batches(), PerRow(0.5), recorder, propagate=propagate)
    assert not recorder.problems
    (pattern,) = re.findall(r"exclude '([^']*)'", str(caught.value))
    report = prune(model, make_batches(), PerRow(0.5), recorder, propagate=propagate, exclude=[pattern])
    assert len(report.layers) == 21


class Sparse(nn.Module):
    """An expert that only a certain token calls."""

    def __init__(self, mlp, token):
        super().__init__()
        self.mlp, self.token = mlp, token
        self.expert = nn.Linear(16, 16)
        self.seen = None

    def forward(self, x):
        out = self.mlp(x)
        chosen = self.seen == self.token
        return out.index_put((chosen,), self.expert(x[chosen])) if bool(chosen.any()) else out


def test_experts_that_a_later_batch_calls_are_pruned(build, make_batches):
    model, batches = build("llama"), make_batches()
    only_last = (set(batches[2]["input_ids"].flatten().tolist())) - {
        token for batch in batches[:2] for token in batch["input_ids"].flatten().tolist()
    }
    sparse = Sparse(model.model.layers[1].mlp, min(only_last))
    model.model.layers[1].mlp = sparse
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: setattr(sparse, "seen", args[0]))
    report = prune(model, batches, PerRow(0.5), Wanda(), propagate="pruned")
    assert "model.layers.1.mlp.expert" in report.masks
    with pytest.raises(MaskoptError, match=r"never call 1 of .*, such as model.layers.1.mlp.expert"):
        prune(model, batches[:2], PerRow(0.5), Wanda(), propagate="pruned")


class Scaled(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


class Plain(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + (0.0 if self.bias is None else self.bias)


def test_linear_layers_of_other_kinds_are_refused_where_they_are_no_product(build, make_batches, recorder):
    model = build("llama")
    model.model.layers[1].mlp.up_proj.__class__ = Plain
    assert len(prune(model, make_batches(), PerRow(0.5), Wanda()).layers) == 21
    model.model.layers[2].mlp.up_proj.__class__ = Scaled
    with pytest.raises(MaskoptError, match=r"model.layers.2.mlp.up_proj is a Scaled, which does more than multiply"):
        prune(model, make_batches(), PerRow(0.5), recorder)
    assert not recorder.problems


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_weights_that_are_no_plain_numbers_are_refused(llama, make_batches, dtype):
    layer = llama.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(MaskoptError, match=r"up_proj is stored as torch.*; only unquantised floating-point"):
        prune(llama, make_batches(), PerRow(0.5), Wanda())


@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens", "lm_head", "model.layers.1.self_attn.k_proj"])
def test_weights_without_data_are_refused(llama, tokenizer, make_batches, name):
    llama.get_submodule(name).to("meta")
    sentence = f"model's {name}.weight holds no data"
    with pytest.raises(MaskoptError, match=sentence):
        prune(llama, make_batches(), PerRow(0.5), Wanda())
    with pytest.raises(MaskoptError, match=sentence):
        perplexity(llama, tokenizer, "a" * 100)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_buffers_that_are_not_finite_are_refused(llama, make_batches, value):
    llama.model.layers[1].register_buffer("running", torch.tensor([1.0, value]))
    with pytest.raises(MaskoptError, match=r"^The model's model.layers.1.running has NaN or infinite entries"):
        prune(llama, make_batches(), PerRow(0.5), Wanda())
    # Buffers that are not saved, and bounds that are never reached, may be infinite.
    llama.model.layers[1].register_buffer("running", torch.tensor([1.0, value]), persistent=False)
    llama.model.layers[2].register_buffer("bound", torch.tensor(float("inf")))
    assert len(prune(llama, make_batches(), PerRow(0.5), Wanda()).layers) == 21


def test_autocast_changes_nothing(build, tokenizer, make_batches):
    plain, inside = build("llama"), build("llama")
    prune(plain, make_batches(), PerRow(0.5), ConditionalADMM(iterations=8))
    expected = perplexity(plain, tokenizer, "abc " * 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = prune(inside, make_batches(), PerRow(0.5), ConditionalADMM(iterations=8))
        assert perplexity(inside, tokenizer, "abc " * 40) == expected
    assert report.layers
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), inside.parameters(), strict=True))


def test_the_default_type_changes_nothing(build, make_batches):
    plain, inside = build("llama"), build("llama")
    prune(plain, make_batches(), PerRow(0.5), Wanda(), propagate="corrected")
    torch.set_default_dtype(torch.float64)
    try:
        prune(inside, make_batches(), PerRow(0.5), Wanda(), propagate="corrected")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), inside.parameters(), strict=True))


def test_classifiers_without_padding_token_are_refused_in_one_sentence():
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=24,
        pad_token_id=None,
    )
    model = LlamaForSequenceClassification(config)
    ids = torch.ones(2, 8, dtype=torch.int64)
    with pytest.raises(
        MaskoptError, match=r"^The LlamaForSequenceClassification cannot be run on calibration batch 0: [^\n]*padding"
    ):
        prune(model, [ids], PerRow(0.5), Wanda())
    assert len(prune(model, [ids[:1]], PerRow(0.5), Wanda()).layers) == 7


class NoMemory(nn.Module):
    def forward(self, *args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_a_lack_of_memory_is_not_blamed_on_the_batches(llama, make_batches):
    llama.model.layers[1].mlp.act_fn = NoMemory()
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        prune(llama, make_batches(), PerRow(0.5), Wanda())


IDS = torch.ones(2, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "llama"}, "The model must be a transformers PreTrainedModel, .* got 'llama'"),
        ({"model": nn.Linear(4, 4)}, "The model must be a transformers PreTrainedModel, .* got Linear"),
        ({"solver": "wanda"}, r"A solver is an object such as Wanda\(\); make_solver makes one of 'wanda'"),
        ({"solver": Wanda}, r"Wanda\(\), with brackets; got the class Wanda"),
        ({"masks": "2:4"}, r"A set of masks is an object such as PerRow\(0.5\); parse_masks makes one of '2:4'"),
        ({"masks": PerRow}, "A set of masks is an object .* got the function PerRow"),
        ({"masks": 0.5}, "A set of masks is an object .* got 0.5"),
        ({"batches": "text"}, "The calibration batches must be an iterable of batches, .* got 'text'"),
        ({"batches": {"input_ids": IDS}}, "The calibration batches must be an iterable of batches, .* got a dict"),
        ({"batches": 3}, "The calibration batches must be an iterable of batches, .* got 3"),
        ({"batches": IDS}, "batch 0 must hold integer token ids of shape"),
        (
            {"batches": [np.ones((2, 8), dtype=int)]},
            "batch 0 must be a tensor of token ids or a dict .* it is a ndarray",
        ),
        ({"batches": [{"input_ids": np.ones((2, 8))}]}, "batch 0 must be a tensor of token ids or a dict"),
        ({"batches": [IDS.to("meta")]}, "batch 0 holds no data: input_ids is on the meta device"),
        (
            {"batches": [{"input_ids": IDS, "attention_mask": [1]}]},
            "batch 0 needs a tensor as attention_mask; got \\[1\\]",
        ),
        ({"batches": [{"input_ids": IDS, "position_ids": "x"}]}, "cannot be run on calibration batch 0: .*"),
        ({"include": "q_proj"}, r"include is a sequence of patterns; write include=\['q_proj'\]"),
        ({"exclude": [3]}, r"exclude must be a sequence of strings; got \[3\]"),
        ({"exclude": 3}, "exclude must be a sequence of strings; got 3"),
        ({"start": "wanda"}, "start must be a dict of boolean tensors by layer names; got 'wanda'"),
        ({"start": {"a": np.ones(3)}}, "start must be a dict of boolean tensors"),
        ({"propagate": ["dense"]}, "propagate must be one of corrected, pruned, dense; got \\['dense'\\]"),
        ({"propagate": torch.ones(3)}, "propagate must be one of corrected, pruned, dense; got a torch.float32 tensor"),
        ({"on_error": "ignore"}, "on_error must be one of restore, keep; got 'ignore'"),
        ({"on_error": None}, "on_error must be one of restore, keep; got None"),
        ({"progress": "bar"}, "progress must be a function of one argument; got 'bar'"),
        ({"memory": "1G"}, "memory must be a positive whole number of bytes; got '1G'"),
        ({"memory": 0}, "memory must be a positive whole number of bytes; got 0"),
        ({"memory": True}, "memory must be a positive whole number of bytes; got True"),
        ({"device": "nope"}, "The model cannot be moved to the device 'nope'"),
        ({"device": "meta"}, "The model cannot be moved to the device 'meta'"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused_in_one_sentence(llama, change, sentence):
    before = weights_of(llama)
    arguments = {"model": llama, "batches": [IDS], "masks": PerRow(0.5), "solver": Wanda(), **change}
    with pytest.raises(MaskoptError, match=sentence) as caught:
        prune(**arguments)
    assert "\n" not in str(caught.value)
    assert same(llama, before)


def test_bad_arguments_of_the_other_functions_are_refused(llama, tokenizer):
    with pytest.raises(MaskoptError, match="The model must be a transformers PreTrainedModel"):
        perplexity("llama", tokenizer, "abc")
    with pytest.raises(MaskoptError, match="The tokenizer must be one of transformers; got 'gpt2'"):
        perplexity(llama, "gpt2", "abc")
    for text in (None, b"abc", ["abc"], 3):
        with pytest.raises(MaskoptError, match=r"The text must be a string, or the pathlib.Path of a file; got"):
            tokenize(tokenizer, text)
    for length in ("9", 2.5, True, None):
        with pytest.raises(MaskoptError, match="seqlen must be an integer of at least 1; got"):
            calibration_batches(tokenizer, "abc", seqlen=length)
    for seed in (2**64, -(2**63) - 1, 1.5, "1", None):
        with pytest.raises(MaskoptError, match="The seed must be an integer of at most 64 bits; got"):
            calibration_batches(tokenizer, "abc", samples=1, seqlen=2, seed=seed)
    assert len(calibration_batches(tokenizer, "abcdef", samples=1, seqlen=2, seed=2**64 - 1)) == 1


def test_solvers_say_whether_they_correct():
    assert not Solver.corrects
    assert not Wanda.corrects
    assert ConditionalADMM.corrects
