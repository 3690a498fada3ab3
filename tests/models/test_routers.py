"""Routers stay dense unless they are named."""

import pytest
import torch
import transformers
from torch import nn

from maskopt.models import prune, select_layers
from maskopt.models.routers import find_routers
from maskopt.oracles import PerRow
from maskopt.solvers import Wanda

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "max_position_embeddings": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**SMALL, "head_dim": 4, "intermediate_size_mlp": 24, "moe_layers": [0, 1], "attention_chunk_size": 16},
        "feed_forward.router",
    ),
    "qwen2 moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**SMALL, "shared_expert_intermediate_size": 8},
        "mlp.shared_expert_gate",
    ),
    "hunyuan": (
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        {**SMALL, "head_dim": 4, "moe_topk": 2},
        "mlp.gate.wg",
    ),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", SMALL, "mlp.router"),
    "afmoe": (
        "AfmoeForCausalLM",
        "AfmoeConfig",
        {**SMALL, "head_dim": 4, "num_dense_layers": 0, "num_shared_experts": 1},
        "mlp.router.gate",
    ),
}


@pytest.fixture(params=list(MODELS))
def routed(request):
    """A tiny model and the part of its layers' names that is a router's."""
    name, config, options, part = MODELS[request.param]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options)), part


def test_routers_are_left_dense_with_the_reason(routed, make_batches):
    model, part = routed
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = prune(model, make_batches(), PerRow(0.5), Wanda(), exclude=["*.experts*"])
    routers = {weight.name: weight.reason for weight in report.left_dense if "decides" in weight.reason}
    assert len(routers) == 2
    assert all(name.endswith(f"{part}.weight") for name in routers)
    assert set(routers.values()) <= {
        f"decides between experts or inputs; name {word} in include to prune it" for word in part.split(".")
    }
    assert not any(name.endswith(part) for name in report.masks)
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in routers)


def test_routers_are_pruned_where_a_pattern_names_them(routed, make_batches):
    model, part = routed
    report = prune(model, make_batches(), PerRow(0.5), Wanda(), include=[f"*.{part}", "*attn*o*proj"])
    assert sum(name.endswith(part) for name in report.masks) == 2


@pytest.mark.parametrize("pattern", ["*", "model.layers.*", "*.mlp.*"])
def test_patterns_that_only_happen_to_match_do_not_name_a_router(pattern):
    name, config, options, _ = MODELS["qwen2 moe"]
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    selection = select_layers(model, include=[pattern], exclude=["*.experts*"])
    assert selection.layers
    assert not any("gate" in layer.name.split(".")[-1].removesuffix("gate_proj") for layer in selection.layers)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)


class Mixture(nn.Module):
    """A mixture as in a model that is not part of transformers."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def experts(count=4):
    return nn.ModuleList([Mlp() for _ in range(count)])


@pytest.mark.parametrize(
    ("block", "routers"),
    [
        (Mixture(gate=nn.Linear(8, 4), experts=experts()), {"gate"}),
        (Mixture(w_choice=nn.Linear(8, 4), experts=experts()), {"w_choice"}),
        (Mixture(gate=Mixture(wg=nn.Linear(8, 4)), experts=experts()), {"gate.wg"}),
        (
            Mixture(router=nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), experts=experts()),
            {"router.0", "router.2"},
        ),
        (Mixture(shared_expert_gate=nn.Linear(8, 1), shared_expert=Mlp(), experts=experts()), {"shared_expert_gate"}),
        (Mixture(pre_expert_proj=nn.Linear(8, 8), experts=experts(), post_expert_proj=nn.Linear(8, 8)), set()),
        (Mixture(modality_router=nn.Linear(8, 2), up=nn.Linear(8, 8)), {"modality_router"}),
        (Mixture(gate=nn.Linear(8, 8), up=nn.Linear(8, 8), down=nn.Linear(8, 8)), set()),
        (Mixture(self_attn=Mixture(gate=nn.Linear(8, 8), q_proj=nn.Linear(8, 8)), mlp=Mlp()), set()),
        (Mixture(forget_gate=Mixture(a=nn.Linear(8, 8)), mlp=Mlp()), set()),
    ],
)
def test_routers_are_found_by_role_not_by_name(block, routers):
    assert set(find_routers(block)) == routers


def test_gates_of_gated_mlps_are_pruned(llama, make_batches):
    report = prune(llama, make_batches(), PerRow(0.5), Wanda())
    assert sum(name.endswith("gate_proj") for name in report.masks) == 3
