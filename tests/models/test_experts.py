"""Matrices stacked in one parameter: experts of many families, their Gram matrices, and what else has three axes."""

import copy
import math

import pytest
import torch
import transformers
from torch import nn

from maskopt import Recovery, allocate, prune, recover
from maskopt.errors import MaskoptError
from maskopt.models import load_masks, save_pruned, select_layers
from maskopt.models.batches import Batch
from maskopt.models.edits import Edits
from maskopt.models.experts import Stack, StackedLayer, eager_experts, in_groups, stacks
from maskopt.models.gram import GramCollector
from maskopt.models.layers import LinearLayer
from maskopt.oracles import NM, PerRow
from maskopt.solvers import Magnitude, Wanda
from maskopt.weights import ConditionalADMM, SparseGPT
from tests.helpers import combinations

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {**SMALL, "num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 8}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "head_dim": 4,
}
JAMBA = {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0, "expert_layer_period": 1}
JAMBA |= {"mamba_d_state": 4, "mamba_expand": 1, "use_mamba_kernels": False}
FAMILIES = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", EXPERTS),
    "qwen2 moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 8}),
    "qwen3 moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**EXPERTS, "head_dim": 4}),
    "deepseek v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", LATENT),
    "deepseek v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**EXPERTS, "head_dim": 4, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1, "moe_layers": [0, 1]},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", EXPERTS),
    "granite": ("GraniteMoeForCausalLM", "GraniteMoeConfig", EXPERTS),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", EXPERTS),
    "jamba": ("JambaForCausalLM", "JambaConfig", {**EXPERTS, **JAMBA}),
    "dbrx": (
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "vocab_size": 61,
            "d_model": 16,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 32,
            "initializer_range": 0.3,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", {**EXPERTS, "kv_channels": 4}),
}
LEFT_OUT = {"jamba": ["*.dt_proj"]}  # linear modules that the model never calls


def made(family, **changes):
    name, config, options = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**{**options, **changes})).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 or "bias" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def token_batches(count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 61, (4, 24), generator=generator) for _ in range(count)]


def divergence(model, dense, batches):
    """Mean Kullback-Leibler divergence of the predictions, nats per token."""
    with torch.no_grad():
        logs = [(dense(batch).logits.log_softmax(-1), model(batch).logits.log_softmax(-1)) for batch in batches]
    return float(torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in logs]).mean())


def weight_of(model, name):
    """The weight of a layer of this name, as it is stored."""
    stem, _, last = name.rpartition(".")
    if not last.isdecimal():
        return model.get_parameter(f"{name}.weight")
    stack = Stack(stem, model.get_submodule(stem.rpartition(".")[0]))
    return stack.parameter.view(stack.shape)[int(last)]


def gram_of(rows):
    return sum(torch.outer(row, row) for row in rows.double())


def layers_of(model, report, exclude):
    """Layers by name, oriented as the report says: how stacked matrices are stored may show only when a model runs."""
    layers = {layer.name: layer for layer in select_layers(model, exclude=exclude).layers}
    for record in report.layers:
        if layers[record.name].shape != (record.rows, record.columns):
            layers[record.name].stack.transposed = True
    return layers


@combinations(2, family=FAMILIES, masks=[PerRow(0.5), NM(keep=2, group=4)], ids=str)
def test_every_expert_is_pruned_and_stays_so(family, masks, tmp_path, tokenizer):
    dense = made(family)
    model, worse = copy.deepcopy(dense), copy.deepcopy(dense)
    exclude = LEFT_OUT.get(family, [])
    report = prune(model, token_batches(), masks, ConditionalADMM(), exclude=exclude)
    save_pruned(tmp_path / "out", model, tokenizer, report)
    back = type(model).from_pretrained(tmp_path / "out")

    layers = layers_of(model, report, exclude)
    assert layers.keys() == report.masks.keys()
    expected = {f"{stack.name}.{i}" for stack in stacks(dense) for i in range(4)}
    assert expected
    assert expected == {name for name, layer in layers.items() if isinstance(layer, StackedLayer)}
    stored = load_masks(tmp_path / "out")
    for name, layer in layers.items():
        mask = report.masks[name]
        assert torch.equal(stored[name], mask)
        assert masks.contains(layer.oriented(mask))
        assert torch.equal(weight_of(back, name) != 0, mask)
    pruned = {stack.name for stack in stacks(dense)} | {f"{name}.weight" for name in layers}
    for name, parameter in back.named_parameters():
        if name not in pruned:
            assert torch.equal(parameter, dense.get_parameter(name)), name

    prune(worse, token_batches(), masks, Magnitude(), exclude=exclude)
    others = token_batches(seed=2)
    lost = divergence(back, dense, others)
    assert math.isfinite(lost)
    assert lost < divergence(worse, dense, others)


def collected(model, batches, layers=None, reals=None):
    """Gram matrices of layers, by default all of the first block, on the dense model."""
    selection = select_layers(model)
    chosen = list(selection.layers if layers is None else layers)
    with torch.no_grad(), eager_experts(model, chosen), GramCollector(chosen) as grams:
        for index, batch in enumerate(batches):
            grams.begin(Batch({}, tuple(batch.shape), None if reals is None else reals[index]))
            model(batch)
    return {layer.name: grams[layer] for layer in chosen}


def inputs_of(model, name, batches):
    """What a module is called with, all tokens in rows."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


def check_block(grams, stem, chosen, up, down):
    """Compare the matrices of a block's experts with those of all tokens, (E, tokens) chosen, inputs (E, tokens, d)."""
    for key, inputs in (("gate_up_proj", up), ("down_proj", down)):
        for expert, routed in enumerate(chosen):
            gram = grams[f"{stem}.{key}.{expert}"]
            assert gram.tokens == int(routed.sum())
            assert not gram.pooled
            torch.testing.assert_close(gram.matrix.double(), gram_of(inputs[expert][routed]), rtol=1e-4, atol=1e-4)


def test_gram_matrices_of_mixtral_are_those_of_its_definition():
    model, batches = made("mixtral"), token_batches()
    grams = collected(model, batches)
    for stem in ("model.layers.0.mlp", "model.layers.1.mlp"):
        x = inputs_of(model, stem, batches)
        weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
        best = (x @ weights[f"{stem}.gate.weight"].T).topk(2, dim=-1).indices
        chosen = (best.unsqueeze(0) == torch.arange(4).reshape(-1, 1, 1)).any(-1)
        gate, up = torch.einsum("td,erd->etr", x, weights[f"{stem}.experts.gate_up_proj"]).chunk(2, -1)
        check_block(grams, f"{stem}.experts", chosen, x.expand(4, -1, -1), nn.functional.silu(gate) * up)


def test_gram_matrices_of_gpt_oss_have_biases_and_interleaved_gates():
    model, batches = made("gpt-oss"), token_batches()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.3)
    grams = collected(model, batches)
    stem = "model.layers.1.mlp"
    x = inputs_of(model, stem, batches)
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    best = (x @ weights[f"{stem}.router.weight"].T + weights[f"{stem}.router.bias"]).topk(2, dim=-1).indices
    chosen = (best.unsqueeze(0) == torch.arange(4).reshape(-1, 1, 1)).any(-1)
    both = torch.einsum("td,edr->etr", x, weights[f"{stem}.experts.gate_up_proj"])
    both += weights[f"{stem}.experts.gate_up_proj_bias"].unsqueeze(1)
    gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
    check_block(grams, f"{stem}.experts", chosen, x.expand(4, -1, -1), (up + 1) * gate * (1.702 * gate).sigmoid())


def test_gram_matrices_of_llama4_leave_out_tokens_that_went_elsewhere():
    model, batches = made("llama4", num_experts_per_tok=1), token_batches()
    grams = collected(model, batches)
    stem = "model.layers.0.feed_forward"
    x = inputs_of(model, stem, batches)
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    scores = x @ weights[f"{stem}.router.weight"].T
    chosen = (scores.argmax(-1) == torch.arange(4).unsqueeze(1)).squeeze()
    inputs = x * scores.sigmoid().T.unsqueeze(-1)
    gate, up = torch.einsum("etd,edr->etr", inputs, weights[f"{stem}.experts.gate_up_proj"]).chunk(2, -1)
    check_block(grams, f"{stem}.experts", chosen, inputs, up * nn.functional.silu(gate))


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek v3", "llama4"])
def test_padding_is_left_out(family):
    model, batches = made(family, num_experts_per_tok=1), token_batches(2)
    real = torch.ones(4, 24, dtype=torch.bool)
    real[1, 13:] = False
    real[3, 1:] = False
    layers = [layer for layer in select_layers(model).layers if ".1." in layer.name and "experts." in layer.name]
    layers = [layer for layer in layers if isinstance(layer, StackedLayer)]
    # Attention is causal and no mask is given, so that the tokens before the padding are as they are without it.
    grams = collected(model, batches, layers, [None, real])
    alone = [batches[0], *(row[:n].unsqueeze(0) for row, n in zip(batches[1], (24, 13, 24, 1), strict=True))]
    expected = collected(model, alone, layers)
    for name, gram in expected.items():
        assert grams[name].tokens == gram.tokens
        assert grams[name].pooled == gram.pooled
        torch.testing.assert_close(grams[name].matrix, gram.matrix, rtol=1e-4, atol=1e-4)
    for key in {layer.stack.key for layer in layers}:
        assert sum(gram.tokens for name, gram in grams.items() if key in name) == 96 + int(real.sum())


def test_padding_among_tokens_that_are_gathered_before_is_refused():
    real = torch.ones(4, 24, dtype=torch.bool)
    real[1, 13:] = False
    with pytest.raises(MaskoptError, match=r"v1.0 has inputs of shape .* padding cannot be identified|w1.0 has inputs"):
        collected(made("dbrx"), token_batches(1), reals=[real])


@pytest.mark.parametrize("padded", [False, True])
def test_inputs_of_experts_that_are_not_finite_name_one(padded):
    real = torch.ones(4, 24, dtype=torch.bool)
    real[1, 13:] = not padded
    model = made("mixtral")
    model.model.layers[1].post_attention_layernorm.weight.data[2] = float("nan")
    layers = [layer for layer in select_layers(model).layers if ".1.mlp.experts" in layer.name]
    with pytest.raises(MaskoptError, match=r"inputs of model.layers.1.mlp.experts.gate_up_proj.\d hold NaN"):
        collected(model, token_batches(1), layers, [real])


def test_a_padded_batch_is_pruned_as_its_tokens_say():
    tokens = token_batches(2)
    mask = torch.ones(4, 24, dtype=torch.int64)
    mask[1, 13:] = 0
    first = prune(made("mixtral"), [tokens[0], {"input_ids": tokens[1], "attention_mask": mask}], PerRow(0.5), Wanda())
    noise = torch.where(mask.bool(), tokens[1], (tokens[1] + 7) % 58 + 3)
    second = prune(made("mixtral"), [tokens[0], {"input_ids": noise, "attention_mask": mask}], PerRow(0.5), Wanda())
    for name, kept in first.masks.items():
        assert torch.equal(kept, second.masks[name])


class Mixture(nn.Module):
    """Matrices of one parameter, each for the tokens whose first feature is its number."""

    def __init__(self, transposed=False, size=6, experts=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, size, size))
        self.transposed = transposed
        self.scale = nn.Parameter(torch.rand(2, 3, size))

    def forward(self, x):
        out = torch.zeros_like(x)
        for index, weight in enumerate(self.weight):
            rows = x[..., 0] == index
            if rows.any():
                out[rows] = x[rows] @ weight if self.transposed else (weight @ x[rows].T).T
        return out * self.scale.sum((0, 1))


def numbered(counts, size=6, seed=0):
    """Tokens of which so many go to each matrix."""
    x = torch.randn(1, sum(counts), size, generator=torch.Generator().manual_seed(seed))
    x[0, :, 0] = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).float()
    return x


def run_collector(layers, calls, held_out=()):
    with torch.no_grad(), GramCollector(layers) as grams:
        for index, x in enumerate(calls):
            purpose = "held out" if index in held_out else "layers"
            grams.begin(Batch({}, tuple(x.shape[:2]), purpose=purpose))
            layers[0].module(x)
    return grams


@pytest.mark.parametrize("subset", [(0, 1, 2, 3), (1, 3)])
def test_missing_tokens_are_those_of_all_experts(subset):
    torch.manual_seed(0)
    layers = [layer for layer in Stack("weight", Mixture()).layers() if layer.index in subset]
    x = numbered([9, 2, 5, 0])
    grams = run_collector(layers, [x[:, :7], x[:, 7:]])
    rows = [x[0][x[0, :, 0] == index] for index in range(4)]
    mean = gram_of(x[0]) / 16
    expected = {0: gram_of(rows[0]), 1: gram_of(rows[1]) + 4 * mean, 2: gram_of(rows[2]) + mean, 3: 6 * mean}
    for layer in layers:
        gram = grams[layer]
        torch.testing.assert_close(gram.matrix.double(), expected[layer.index], rtol=1e-5, atol=1e-5)
        assert gram.tokens == len(rows[layer.index])
        assert gram.pooled == (layer.index > 0)
        assert gram.cross is None
        assert grams[layer] is gram


def test_held_out_tokens_are_kept_apart_and_not_pooled():
    layers = Stack("weight", Mixture()).layers()
    x = numbered([9, 2, 5, 0])
    y = numbered([1, 0, 0, 8], seed=1)
    grams = run_collector(layers, [x, y], held_out=(1,))
    rows = y[0][y[0, :, 0] == 3]
    torch.testing.assert_close(grams[layers[3]].held_out.double(), gram_of(rows), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grams[layers[3]].matrix.double(), 6 * gram_of(x[0]) / 16, rtol=1e-5, atol=1e-5)
    assert grams[layers[1]].held_out is None
    assert (grams[layers[3]].tokens, grams[layers[3]].pooled) == (0, True)


def test_experts_that_none_reach_are_named():
    layers = Stack("mlp.weight", Mixture()).layers()
    with pytest.raises(MaskoptError, match=r"mlp.weight.0 saw no token"):
        run_collector(layers, [torch.full((1, 3, 6), 9.0)])[layers[0]]


def model_of(*mixtures):
    """A transformers model whose blocks have mixtures in place of a projection."""
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    for layer, mixture in zip(llama.model.layers, mixtures, strict=False):
        layer.mlp.down_proj = mixture
    return llama.eval()


class Bank(nn.Module):
    """Matrices (4, 16, 24), or (4, 24, 16), all of which see all tokens, in one of many forms."""

    def __init__(self, form, transposed=False):
        super().__init__()
        torch.manual_seed(0)
        self.bank = nn.Parameter(torch.randn((4, 24, 16) if transposed else (4, 16, 24)) * 0.1)
        self.form = form

    def forward(self, x):
        return self.form(x, self.bank)


FORMS = {
    "linear": (False, lambda x, w: sum(nn.functional.linear(x, one) for one in w)),
    "left": (False, lambda x, w: sum((one @ x.mT).mT for one in w)),
    "einsum": (False, lambda x, w: torch.einsum("bsd,erd->bsr", x, w)),
    "vector": (False, lambda x, w: torch.stack([w[0].mv(row) for row in x.reshape(-1, 24)]).view(*x.shape[:2], 16)),
    "right": (True, lambda x, w: sum(x @ one for one in w)),
    "batched": (True, lambda x, w: torch.bmm(x.reshape(1, -1, 24).expand(4, -1, -1), w).sum(0).view(*x.shape[:2], 16)),
    "plus": (
        True,
        lambda x, w: (
            torch.baddbmm(torch.ones(4, 1, 16), x.reshape(1, -1, 24).expand(4, -1, -1), w).sum(0).view(*x.shape[:2], 16)
        ),
    ),
}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "einsum"])
def test_products_show_inputs_and_orientation(form):
    transposed, function = FORMS[form]
    model = model_of(Bank(function, transposed))
    selection = select_layers(model, include=["*.bank*"])
    x = inputs_of(model, "model.layers.0.mlp.down_proj", token_batches(1))
    for layer in selection.layers:
        layer.stack.transposed = not transposed  # a wrong guess
    report = prune(model, token_batches(1), PerRow(0.5), Wanda(), include=["*.bank*"], propagate="dense")
    assert [record.rows for record in report.layers] == [16] * 4
    assert {record.columns for record in report.layers} == {24}
    kept = x.square().sum(0).sqrt()
    for name, mask in report.masks.items():
        stored = weight_of(model_of(Bank(function, transposed)), name)
        scores = (stored.T if transposed else stored).detach().abs().double() * kept
        rows = mask.T if transposed else mask
        assert torch.equal(rows, scores >= scores.sort(1).values[:, 12:13])


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda x, w: sum(nn.functional.linear(x, one) for one in w.clone()), "used by clone"),
        (lambda x, w: nn.functional.linear(x, w[torch.tensor([1, 2])].sum(0)), "used by index,"),
        (lambda x, w: nn.functional.linear(x, torch.cat([w[0, :8], w[1, 8:]])), "used by cat"),
        (lambda x, w: torch.cat([nn.functional.linear(x, one) for one in w[0].split(8)], -1), "used by mm in parts"),
        (lambda x, w: x @ (w[0].T @ w[1]) @ w[2].T, "used by mm in parts"),
        (lambda x, w: nn.functional.linear(x, w[0]) @ w[1] @ w[0].T, "used by mm from both sides"),
        (FORMS["einsum"][1], "used by"),
        (lambda x, w: nn.functional.linear(x, w[0]) * w[0].mean(), "used by mean"),
        (lambda x, w: nn.functional.linear(x, w[0]) + w[0].abs().amax(), "used by abs"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(form, words):
    model = model_of(Bank(form))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MaskoptError, match=words) as caught:
        prune(model, token_batches(1), PerRow(0.5), Wanda())
    assert "layers.0.mlp.down_proj.bank are" in str(caught.value)
    assert "exclude '*.down_proj*'" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = prune(model, token_batches(1), PerRow(0.5), Wanda(), exclude=["*.down_proj*"])
    assert not any("bank" in name for name in report.masks)


def test_parameters_that_are_no_matrices_stay_dense():
    def scaled(x, w):
        return x[..., :16] * w.exp().sum((0, 2)) + nn.functional.conv1d(x.mT, w).sum() * 1e-3

    model = model_of(Bank(scaled))
    model.model.layers[0].mlp.down_proj.bank.data = torch.randn(4, 16, 24).mul_(0.1)
    with pytest.raises(MaskoptError, match="cannot be run"):  # the convolution has other channels
        prune(model, token_batches(1), PerRow(0.5), Wanda())
    model.model.layers[0].mlp.down_proj.form = lambda x, w: x[..., :16] * w.exp().sum((0, 2))
    report = prune(model, token_batches(1), PerRow(0.5), Wanda())
    assert len(report.masks) == 13
    (left,) = [weight for weight in report.left_dense if "bank" in weight.name]
    assert left.reason == "no matrices: used by aten.exp alone"
    with pytest.raises(MaskoptError, match="leave no layer to prune"):
        prune(model, token_batches(1), PerRow(0.5), Wanda(), include=["*.bank*"])


def test_patterns_choose_single_experts():
    model = made("mixtral")
    stem = "model.layers.1.mlp.experts"
    selection = select_layers(model, include=[f"{stem}.down_proj.2", "*.0.mlp.experts.gate_up_proj"])
    assert [layer.name for layer in selection.layers] == [
        *(f"model.layers.0.mlp.experts.gate_up_proj.{index}" for index in range(4)),
        f"{stem}.down_proj.2",
    ]
    reasons = {weight.name: weight.reason for weight in selection.left_dense}
    assert reasons[f"{stem}.down_proj.1"] == "matched by no include pattern"
    assert reasons[f"{stem}.gate_up_proj"] == "stacked matrices, matched by no include pattern"
    assert f"{stem}.down_proj.2" not in reasons
    assert f"{stem}.down_proj" not in reasons
    dense = copy.deepcopy(model)
    report = prune(model, token_batches(1), PerRow(0.5), Wanda(), exclude=[f"{stem}.down_proj.[013]"])
    assert report.masks.keys() & {f"{stem}.down_proj.{index}" for index in range(4)} == {f"{stem}.down_proj.2"}
    kept = [
        torch.equal(a, b)
        for a, b in zip(model.get_parameter(f"{stem}.down_proj"), dense.get_parameter(f"{stem}.down_proj"), strict=True)
    ]
    assert kept == [True, True, False, True]


def test_experts_that_see_few_tokens_or_none_are_pruned_and_reported():
    model = made("mixtral", num_experts=32, num_local_experts=32)
    report = prune(model, [token_batches(1)[0][:1]], PerRow(0.5), ConditionalADMM())
    experts = [record for record in report.layers if "experts" in record.name]
    assert len(experts) == 128
    assert all(record.pooled == (record.tokens < record.columns) for record in experts)
    assert any(record.tokens == 0 for record in experts)
    assert {record.sparsity for record in experts} == {0.5}
    assert sum(record.tokens for record in experts if ".0.mlp.experts.down_proj" in record.name) == 48
    assert all(
        entry["pooled"] == record.pooled
        for entry, record in zip(report.to_json()["layers"], report.layers, strict=True)
    )
    assert not any(record.pooled for record in report.layers if "experts" not in record.name)


def test_unseen_experts_are_solved_together():
    model = made("mixtral", num_experts=32, num_local_experts=32)
    names = set()
    batch, include = token_batches(1)[0][:1, :4], ["*.0.mlp.experts.down_proj"]
    report = prune(model, [batch], PerRow(0.5), Wanda(), include=include, progress=lambda event: names.add(event.name))
    unseen = [record.name for record in report.layers if not record.tokens]
    assert len(unseen) > 20
    assert ", ".join(unseen) in names


@pytest.mark.parametrize("propagate", ["dense", "pruned", "corrected"])
def test_groups_of_experts_that_fit_the_memory_give_the_same_masks(propagate, monkeypatch):
    sizes = []
    collect = GramCollector.__enter__

    def counted(self):
        sizes.append(sum(isinstance(layer, StackedLayer) for layer in self._layers))
        return collect(self)

    monkeypatch.setattr(GramCollector, "__enter__", counted)
    reports = []
    for memory in (2**20, 2 * 4 * 16**2):
        sizes.clear()
        model = made("qwen3 moe")
        include = ["*.experts.gate_up_proj*"]
        reports.append(
            prune(model, token_batches(2), PerRow(0.5), Wanda(), include=include, propagate=propagate, memory=memory)
        )
        assert max(sizes) == (4 if memory == 2**20 else 2)
    for name, mask in reports[0].masks.items():
        assert torch.equal(mask, reports[1].masks[name])
    for first, second in zip(reports[0].layers, reports[1].layers, strict=True):
        assert first.relative_error == pytest.approx(second.relative_error, rel=1e-4)


@pytest.mark.parametrize("propagate", ["dense", "pruned", "corrected"])
@pytest.mark.parametrize("family", ["qwen3 moe", "gpt-oss"])
def test_little_memory_changes_no_errors(family, propagate):
    """Groups of experts, and dense weights that come back for every run of the dense block."""
    first, second = (
        prune(made(family), token_batches(2), PerRow(0.5), Wanda(), propagate=propagate, memory=memory)
        for memory in (2**24, 2**11)
    )
    errors = {record.name: record.relative_error for record in second.layers}
    for record in first.layers:
        assert errors[record.name] == pytest.approx(record.relative_error, rel=1e-3), record.name


def test_groups_of_experts_leave_the_dense_states_as_they_are():
    masks, recovery = NM(keep=2, group=4), Recovery("block", epochs=1)
    found = []
    for memory in (2**20, 2 * 4 * 16**2):
        model = made("qwen3 moe")
        report = prune(
            model,
            token_batches(4),
            masks,
            SparseGPT(),
            propagate="pruned",
            include=["*.gate_up_proj*"],
            memory=memory,
            recover=recovery,
        )
        found.append([record.before for record in report.recovery])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_turns_are_cut_where_the_gram_matrices_exceed_the_memory():
    module = nn.Linear(3, 3)
    layers = [LinearLayer("a", module), *Stack("weight", Mixture()).layers()]
    size = 4 * 6**2
    cut = [[layer.name[-1] for layer in part] for part in in_groups([layers], 3 * size)]
    assert cut == [["a", "0", "1", "2"], ["3"]]
    assert [len(part) for part in in_groups([layers], 1)] == [2, 1, 1, 1]
    assert in_groups([layers[:1], layers[1:]], 4 * size) == [tuple(layers[:1]), tuple(layers[1:])]


def test_the_implementation_of_experts_is_restored():
    model = made("mixtral")
    model.set_experts_implementation("batched_mm")
    before = model.get_experts_implementation()
    prune(model, token_batches(1), PerRow(0.5), Wanda())
    assert model.get_experts_implementation() == before
    with pytest.raises(MaskoptError):
        prune(model, [torch.full((1, 4), 61)], PerRow(0.5), Wanda())
    assert model.get_experts_implementation() == before
    with eager_experts(model, select_layers(model, exclude=["*.experts*"]).layers):
        assert model.get_experts_implementation() == before


def test_a_failure_restores_every_expert():
    model = made("gpt-oss")
    before = copy.deepcopy(model.state_dict())

    def fail(event):
        if event.stage == "solve" and event.name.endswith("layers.1.mlp.experts.down_proj.3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, token_batches(1), PerRow(0.5), SparseGPT(), progress=fail)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_stack_is_restored_after_a_fit_of_the_whole_parameter():
    module = Mixture()
    dense = module.weight.detach().clone()
    layers = Stack("weight", module).layers()
    edits = Edits(restorable=True)
    edits.choose(layers[2], torch.zeros(6, 6, dtype=torch.bool), None)
    edits.apply([layers[2]])
    edits.remember(module.parameters())
    module.weight.data += 1.0
    edits.undo()
    assert torch.equal(module.weight, dense)


def test_starting_masks_have_the_names_of_experts():
    first = prune(made("gpt-oss"), token_batches(1), PerRow(0.5), Magnitude())
    names = [name for name in first.masks if "experts" in name]
    start = {name: first.masks[name] for name in names}
    again = prune(made("gpt-oss"), token_batches(1), PerRow(0.5), start=start)
    assert again.settings["warm_started_layers"] == sorted(names)
    with pytest.raises(MaskoptError, match=r"must be boolean of shape \(16, 48\)"):
        prune(made("gpt-oss"), token_batches(1), PerRow(0.5), start={names[0]: torch.ones(16, 8).bool()})


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4", "dbrx"])
def test_recovery_fits_experts_and_keeps_their_pattern(family):
    masks = NM(keep=2, group=4)
    dense = made(family)
    model = copy.deepcopy(dense)
    exclude = ["*.experts.*.1"]
    first = prune(model, token_batches(), masks, Wanda(), exclude=exclude)
    changed = copy.deepcopy(model)
    report = recover(model, dense, token_batches(8), Recovery("block", epochs=3), exclude=exclude)
    assert any(record.accepted for record in report.recovery)
    layers = layers_of(model, first, exclude)
    assert report.masks.keys() == first.masks.keys() == layers.keys()
    for name, mask in report.masks.items():
        assert masks.contains(layers[name].oriented(mask))
        assert not weight_of(model, name)[~mask].any()
    others = token_batches(seed=2)
    assert divergence(model, dense, others) < divergence(changed, dense, others)
    name = next(name for name in layers if "experts" in name)
    assert not torch.equal(weight_of(model, name), weight_of(changed, name))


def test_experts_have_sparsities_of_their_own():
    model = made("mixtral", num_hidden_layers=1)
    before = copy.deepcopy(model.state_dict())
    plan = allocate(model, token_batches(6), "per-row", 0.5, Wanda(), rule="kl")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = prune(model, token_batches(2), plan, Wanda())
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert len({record.sparsity for record in report.layers if "experts" in record.name}) > 1


def test_bfloat16_experts_are_pruned():
    model = made("qwen3 moe").bfloat16()
    report = prune(model, token_batches(1), NM(keep=2, group=4), ConditionalADMM())
    assert report.sparsity == 0.5
    assert weight_of(model, "model.layers.0.mlp.experts.down_proj.0").dtype == torch.bfloat16
