"""Which slices of parameters serve single units, and which entries of a configuration count them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import maskopt
from maskopt.errors import MaskoptError
from maskopt.shrinking import Site, Structure, find_units
from maskopt.shrinking.dependence import BlockCall, Owned, Probe
from tests.models.families import build
from tests.shrinking.made import data, made

WIDTH, INNER = 8, 12


def structure_of(model: PreTrainedModel) -> Structure:
    return find_units(model, data()[0])


def site_of(structure: Structure, name: str) -> Site:
    return next(site for site in structure.sites if site.name.endswith(name))


def owners(site: Site) -> dict[tuple[str, int], list[int]]:
    return {(each.name, each.axis): each.owner.tolist() for each in site.role.owned}


def test_gates_and_inputs_in_one_matrix_have_a_row_of_each_neuron() -> None:
    site = site_of(structure_of(build("phi3")), "layers.0.mlp.down_proj")
    assert owners(site) == {("mlp.gate_up_proj.weight", 0): [*range(24), *range(24)]}
    assert site.size == 3 * 16


def test_queries_keys_and_values_in_one_matrix_go_with_their_group() -> None:
    site = site_of(structure_of(build("phi3")), "layers.0.self_attn.o_proj")
    queries = [head // 2 for head in range(4) for _ in range(4)]
    keys = [group for group in range(2) for _ in range(4)]
    assert owners(site) == {("self_attn.qkv_proj.weight", 0): queries + keys + keys}
    assert site.size == 16 * (8 + 8 + 4 + 4)


def test_heads_whose_queries_keys_and_values_alternate() -> None:
    site = site_of(structure_of(build("gpt_neox")), "layers.0.attention.dense")
    rows = [head for head in range(4) for _ in range(3 * 4)]
    assert owners(site) == {(f"attention.query_key_value.{kind}", 0): rows for kind in ("weight", "bias")}
    assert site.size == 12 * 17 + 4 * 16


def test_matrices_stored_the_other_way_and_biases() -> None:
    site = site_of(structure_of(build("gpt2")), "h.0.mlp.c_proj")
    assert owners(site) == {("mlp.c_fc.weight", 1): [*range(64)], ("mlp.c_fc.bias", 0): [*range(64)]}
    assert (site.role.column_axis, site.size) == (0, 16 + 16 + 1)


@pytest.mark.parametrize(("groups", "number", "letters"), [(4, 4, "qkv"), (2, 2, "qkv"), (1, 4, "q")])
def test_heads_go_with_their_keys_and_alone_where_all_have_the_same(groups: int, number: int, letters: str) -> None:
    structure = structure_of(build("llama", num_key_value_heads=groups))
    site = site_of(structure, "layers.0.self_attn.o_proj")
    assert (site.role.kind, site.role.number, site.role.width) == ("heads", number, 16 // number)
    assert {name for name, _ in owners(site)} == {f"self_attn.{letter}_proj.weight" for letter in letters}
    counted = {"num_attention_heads": Fraction(4, number)}
    assert site.role.fields is not None
    assert site.role.fields.scaled == counted | ({} if groups == 1 else {"num_key_value_heads": Fraction(1)})


def test_norms_of_single_heads_stay_and_norms_of_all_forbid_removal() -> None:
    site = site_of(structure_of(build("qwen3")), "layers.0.self_attn.o_proj")
    assert {name for name, _ in owners(site)} == {f"self_attn.{letter}_proj.weight" for letter in "qkv"}
    structure = structure_of(build("olmo2"))
    assert not structure.of("heads")
    assert {(each.name, each.kind) for each in structure.refused} == {
        (f"model.layers.{block}.self_attn.o_proj", "heads") for block in (0, 1)
    }
    assert all("cannot say that a block has fewer heads" in each.reason for each in structure.refused)


def test_experts_lose_neurons_of_their_own_and_shared_ones_say_how_wide_they_are() -> None:
    structure = structure_of(build("qwen2_moe"))
    experts = site_of(structure, "layers.1.mlp.experts.down_proj")
    assert (experts.role.experts, experts.role.number, len(experts.layers)) == (4, 8, 4)
    assert owners(experts) == {("mlp.experts.gate_up_proj", 1): [*range(8), *range(8)]}
    shared = site_of(structure, "layers.1.mlp.shared_expert.down_proj")
    fields = [site.role.fields for site in (experts, shared)]
    assert [dict(each.scaled) for each in fields if each] == [
        {"moe_intermediate_size": 1},
        {"shared_expert_intermediate_size": 1},
    ]


def test_an_entry_that_widens_shared_experts_several_times_is_found_with_both() -> None:
    structure = structure_of(build("deepseek_v3", n_shared_experts=2))
    experts = site_of(structure, "layers.1.mlp.experts.down_proj")
    shared = site_of(structure, "layers.1.mlp.shared_experts.down_proj")
    assert (experts.role.number, shared.role.number) == (8, 16)
    for site, each in ((experts, Fraction(1)), (shared, Fraction(1, 2))):
        assert site.role.fields is not None
        assert site.role.fields.scaled == {"moe_intermediate_size": each}
        assert site.role.fields.entries(site.role.number // 2) == {"moe_intermediate_size": 4}
        assert site.role.fields.units("moe_intermediate_size", 4) == site.role.number // 2


def test_blocks_that_share_parameters_are_refused() -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        MaskoptError, match=r"layers\.0 and model\.layers\.1 have the parameter mlp\.up_proj\.weight in"
    ):
        structure_of(model)


def test_weights_and_gradients_of_the_model_do_not_matter_and_are_left_alone() -> None:
    model = made("llama")
    expected = [(site.name, owners(site)) for site in structure_of(model).sites]
    for parameter in model.parameters():
        parameter.data.zero_()
    model.bfloat16()
    found = [(site.name, owners(site)) for site in structure_of(model).sites]
    assert found == expected
    assert all(not bool(each.any()) and each.grad is None for each in model.parameters())
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}


class Part(nn.Module):
    """A feed-forward part that something is done to in the middle."""

    def __init__(self, middle: Callable[[Tensor], Tensor] | nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, INNER, bias), nn.Linear(INNER, WIDTH)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.middle(self.first(x)))


def owned(block: nn.Module, seed: int = 0) -> list[Owned]:
    probe = Probe(block.eval(), BlockCall((torch.zeros(2, 5, WIDTH),), {}), seed)
    return probe.owned("last.weight", 1, torch.arange(INNER))


@pytest.mark.parametrize("seed", range(5))
def test_neurons_that_seldom_fire_are_found(seed: int) -> None:
    found = owned(Part(lambda x: torch.relu(x - 0.5), bias=False), seed)
    assert [(each.name, each.owner.tolist()) for each in found] == [("first.weight", [*range(INNER)])]


class Scale(nn.Module):
    """A norm over all neurons, and a factor for each."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(INNER))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * torch.nn.functional.rms_norm(torch.relu(x), (INNER,))


def test_a_norm_over_all_neurons_makes_rows_serve_several() -> None:
    assert not owned(Part(Scale()))


def test_neurons_that_are_permuted_are_followed() -> None:
    (weight, bias) = owned(Part(lambda x: torch.relu(x).flip(-1)))
    assert weight.owner.tolist() == bias.owner.tolist() == [*range(INNER)][::-1]


def test_two_factors_of_low_rank_are_no_neurons() -> None:
    block = Part(nn.Identity(), bias=False).eval()
    probe = Probe(block, BlockCall((torch.zeros(2, 5, WIDTH),), {}))
    found = probe.owned("last.weight", 1, torch.arange(INNER))
    assert [each.name for each in found] == ["first.weight"]
    assert probe.is_linear("last.weight", found)
    curved = Probe(Part(torch.relu, bias=False).eval(), BlockCall((torch.zeros(2, 5, WIDTH),), {}))
    assert not curved.is_linear("last.weight", found)


def test_what_a_kept_state_is_as_wide_as_stays() -> None:
    # Attention of RWKV computes with fewer channels, but the state that it keeps has those of the hidden size.
    model = build("rwkv")
    structure = find_units(model, {"input_ids": torch.arange(1, 17).view(1, -1)})
    assert structure.sites
    assert not any("attention" in site.name for site in structure.sites)
    maskopt.shrink(model, data(), neurons=0.5, refit="units")
    ids = torch.arange(1, 9).view(1, -1)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert written.shape == (1, 12)


def test_models_that_cannot_keep_what_they_have_read_shrink() -> None:
    model = build("bailing_hybrid")
    report = maskopt.shrink(model, data(), neurons=0.3, refit="units")
    assert report.cache_bytes is None
    assert report.parameters[1] < report.parameters[0]
