"""Finding blocks and choosing layers."""

import fnmatch

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import AlbertConfig, AlbertModel

from maskopt.errors import MaskoptError
from maskopt.models import find_blocks, select_layers
from maskopt.models.layers import linear_layers


class Feed(nn.Module):
    """A block with one linear layer."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x):
        return self.up(x)


def test_every_architecture_shows_its_blocks(architecture):
    model = architecture.build()
    blocks = find_blocks(model)
    depth = model.config.num_hidden_layers
    assert [block.name for block in blocks] == [f"{architecture.stack}.{index}" for index in range(depth)]
    assert all(len(list(linear_layers(block.module))) == architecture.linears for block in blocks)


def test_all_linear_layers_of_the_blocks_and_nothing_else_is_selected(architecture):
    model = architecture.build()
    names = {layer.name for layer in select_layers(model).layers}
    inside = {name for name, _ in model.named_modules() if name.startswith(architecture.stack)}
    assert len(names) == architecture.linears * model.config.num_hidden_layers
    assert names <= inside


def test_every_weight_is_either_pruned_or_accounted_for(architecture):
    model = architecture.build()
    selection = select_layers(model)
    pruned = {f"{layer.name}.weight" for layer in selection.layers}
    dense = {weight.name for weight in selection.left_dense}
    expected = {name for name, p in model.named_parameters() if p.ndim >= 2 and p.numel() > max(p.shape)}
    assert not pruned & dense
    assert pruned | dense == expected


def test_an_encoder_decoder_has_two_stacks(encoder_decoder):
    stacks = {block.stack.split(".")[0] for block in find_blocks(encoder_decoder.build())}
    assert stacks == {"encoder", "decoder"}


def test_a_list_of_heads_is_no_stack_and_experts_belong_to_their_block():
    block = Feed()
    block.experts = nn.ModuleList([Feed(), Feed()])
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    model.heads = nn.ModuleList([nn.Linear(4, 4)])
    assert [block.name for block in find_blocks(model)] == ["layers.0"]
    selection = select_layers(model)
    assert [layer.name for layer in selection.layers] == [
        "layers.0.up",
        "layers.0.experts.0.up",
        "layers.0.experts.1.up",
    ]
    assert [(weight.name, weight.reason) for weight in selection.left_dense] == [
        ("heads.0.weight", "outside the blocks")
    ]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(MaskoptError, match=r"Linear holds no transformer blocks"):
        find_blocks(nn.Linear(3, 3))


@pytest.mark.parametrize("pattern", ["*q_proj", "model.layers.1.*", "*.mlp.[gu]*_proj"])
def test_patterns_match_full_names(llama, pattern):
    inside = [layer.name for layer in select_layers(llama).layers]
    matching = [name for name in inside if fnmatch.fnmatchcase(name, pattern)]
    assert matching
    assert [layer.name for layer in select_layers(llama, include=[pattern]).layers] == matching
    rest = [name for name in inside if name not in matching]
    excluding = select_layers(llama, exclude=[pattern])
    assert [layer.name for layer in excluding.layers] == rest
    reasons = {weight.name: weight.reason for weight in excluding.left_dense}
    assert all(reasons[f"{name}.weight"] == "excluded by a pattern" for name in matching)


def test_exclude_wins_over_include(llama):
    names = [layer.name for layer in select_layers(llama, include=["*.mlp.*"], exclude=["*.down_proj"]).layers]
    assert {name.rpartition(".")[2] for name in names} == {"gate_proj", "up_proj"}


def test_layers_outside_the_blocks_come_by_name_only(llama):
    assert "lm_head" not in {layer.name for layer in select_layers(llama).layers}
    selection = select_layers(llama, include=["lm_head", "model.layers.0.*"])
    assert [layer.name for layer in selection.outside] == ["lm_head"]
    assert len(selection.layers) == 8


def test_weights_shared_by_modules_are_pruned_once(llama):
    llama.model.layers[2].mlp.up_proj.weight = llama.model.layers[0].mlp.up_proj.weight
    names = [layer.name for layer in select_layers(llama).layers]
    assert "model.layers.0.mlp.up_proj" in names
    assert "model.layers.2.mlp.up_proj" not in names


def test_shared_modules_are_pruned_once():
    config = AlbertConfig(
        vocab_size=20,
        embedding_size=8,
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=12,
    )
    assert len(select_layers(AlbertModel(config)).layers) == 6


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_a_typing_error(llama, where):
    with pytest.raises(MaskoptError, match=r"'\*qproj' matches no layer; full names look like 'model.layers.0.self"):
        select_layers(llama, **{where: ["*.mlp.*", "*qproj"]})


def test_a_string_is_no_sequence_of_patterns(llama):
    with pytest.raises(MaskoptError, match=r"write exclude=\['\*'\]"):
        select_layers(llama, exclude="*")


def test_nothing_left_is_refused(llama):
    with pytest.raises(MaskoptError, match="leave no layer to prune"):
        select_layers(llama, exclude=["*"])


def test_experts_are_layers_of_their_own(mixture):
    selection = select_layers(mixture.build())
    names = [layer.name for layer in selection.layers if "experts" in layer.name]
    assert names[:5] == [
        f"model.layers.0.mlp.experts.{name}" for name in [*(f"gate_up_proj.{i}" for i in range(4)), "down_proj.0"]
    ]
    assert len(names) == len(set(names)) == 24
    assert not any("experts" in weight.name for weight in selection.left_dense)


@pytest.mark.parametrize("pattern", ["*.experts*", "*.experts", "*.experts.*_proj"])
def test_excluded_experts_are_listed(mixture, pattern):
    selection = select_layers(mixture.build(), exclude=[pattern])
    assert {layer.name.rpartition(".")[2] for layer in selection.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    reasons = {weight.name: weight.reason for weight in selection.left_dense}
    for kind in ("gate_up_proj", "down_proj"):
        assert reasons[f"model.layers.2.mlp.experts.{kind}"] == "stacked matrices, excluded by a pattern"
    assert "neither nn.Linear nor Conv1D" in reasons["model.layers.1.mlp.gate.weight"]


def test_experts_that_were_not_asked_for_are_listed(mixture):
    selection = select_layers(mixture.build(), include=["*.q_proj"])
    reasons = {weight.name: weight.reason for weight in selection.left_dense}
    assert reasons["model.layers.0.mlp.experts.down_proj"] == "stacked matrices, matched by no include pattern"


def test_a_convolution_is_no_expert():
    block = Feed()
    block.conv = nn.Conv1d(4, 4, 3)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    (weight,) = select_layers(model).left_dense
    assert weight.name == "layers.0.conv.weight"
    assert weight.shape == (4, 4, 3)
    assert "a parameter of Conv1d" in weight.reason


def test_weights_that_cannot_be_pruned_in_place_are_refused(llama):
    layer = llama.model.layers[1].mlp.up_proj
    torch_prune.l1_unstructured(layer, "weight", amount=0.5)
    with pytest.raises(MaskoptError, match=r"layers.1.mlp.up_proj is recomputed .* torch.nn.utils.prune.remove"):
        select_layers(llama)
    torch_prune.remove(layer, "weight")
    select_layers(llama)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda weight: weight.detach().to(torch.int8), r"up_proj is stored as torch.int8 .* unquantised"),
        (lambda weight: weight.detach().to("meta"), r"up_proj holds no data"),
        (lambda weight: weight.detach().index_fill(1, torch.tensor([3]), float("inf")), r"up_proj has NaN or infinite"),
        (lambda weight: weight.detach() * float("nan"), r"up_proj has NaN or infinite"),
    ],
)
def test_unusable_weights_are_named(llama, change, sentence):
    layer = llama.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(change(layer.weight), requires_grad=False)
    with pytest.raises(MaskoptError, match=rf"model.layers.1.mlp.{sentence}"):
        select_layers(llama)
