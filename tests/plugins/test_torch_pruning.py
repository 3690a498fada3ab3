"""Torch-Pruning by its own entry points: channels of any group, scored by the layers that read them."""

from __future__ import annotations

import pytest
import torch
import torch_pruning
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from maskopt.errors import MaskoptError
from maskopt.plugins.moments import InputMoments
from maskopt.plugins.torch_pruning import LayerImportance, observing
from maskopt.problems import ColumnSubset, LayerReconstruction
from maskopt.structured.order import removal_scores


class Residual(nn.Module):
    """Blocks that add to a stream, which every block and the output read."""

    ignored = ("out",)

    def __init__(self, width=24, hidden=48, blocks=3):
        super().__init__()
        parts = {"norm": lambda: nn.LayerNorm(width), "up": lambda: nn.Linear(width, hidden)}
        parts["down"] = lambda: nn.Linear(hidden, width)
        self.first, self.out = nn.Linear(16, width), nn.Linear(width, 5)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: make() for name, make in parts.items()}) for _ in range(blocks)
        )

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block["down"](functional.gelu(block["up"](block["norm"](x))))
        return self.out(x)

    data = staticmethod(lambda: torch.randn(512, 16) @ torch.randn(16, 16))


class Images(nn.Module):
    """Convolutions with strides, a sum of two of them, and a layer that reads every channel at 16 places."""

    ignored = ("last",)

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.two = nn.Conv2d(16, 24, 3, padding="same")
        self.three, self.short = nn.Conv2d(24, 24, 3, stride=2, padding=1), nn.Conv2d(24, 24, 1, stride=2)
        self.last = nn.Linear(24 * 16, 10)

    def forward(self, x):
        x = functional.relu(self.norm(self.one(x)))
        x = functional.relu(self.two(x))
        return self.last(functional.relu(self.three(x) + self.short(x)).flatten(1))

    data = staticmethod(lambda: 3 * functional.avg_pool2d(torch.randn(64, 3, 12, 12), 5, 1))


class Joined(nn.Module):
    """A layer that reads the channels of two others, which are pruned one after the other."""

    ignored = ("last",)

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 20), nn.Linear(16, 12)
        self.both, self.last = nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x):
        both = torch.cat([functional.relu(self.one(x)), functional.relu(self.two(x))], 1)
        return self.last(functional.relu(self.both(both)))

    data = staticmethod(lambda: torch.randn(512, 16) @ torch.randn(16, 16))


class Divided(nn.Module):
    """A layer whose channels are read in halves, by different layers."""

    ignored = ("last",)
    halves = ("one",)  # of which as many channels have to go

    def __init__(self):
        super().__init__()
        self.one, self.gate, self.plain = nn.Linear(16, 48), nn.Linear(24, 16), nn.Linear(24, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, x):
        first, second = functional.gelu(self.one(x)).chunk(2, dim=1)
        return self.last(torch.sigmoid(self.gate(first)) * self.plain(second))

    data = staticmethod(lambda: torch.randn(512, 16) @ torch.randn(16, 16))


class Attention(nn.Module):
    """Attention with separate layers for queries, keys and values."""

    def __init__(self, heads=4, size=6):
        super().__init__()
        self.size = size
        self.q, self.k, self.v = nn.Linear(16, heads * size), nn.Linear(16, heads * size), nn.Linear(16, heads * size)
        self.out = nn.Linear(heads * size, 5)

    def forward(self, x):
        q, k, v = (layer(x).view(*x.shape[:2], -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(2, 3)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    data = staticmethod(lambda: torch.randn(64, 8, 16) @ torch.randn(16, 16))


def made(kind, seed=0):
    torch.manual_seed(seed)
    return kind().eval(), kind.data()


def observed(model, data):
    with torch.no_grad(), observing(model, exclude=()) as moments:
        model(data)
    return moments


def pruned(kind, how, ratio=0.5, seed=0, **options):
    """Prune a model, and return its parameters and the error of its output relative to the dense one's variance."""
    model, data = made(kind, seed)
    dense = model(data).detach()
    importance = torch_pruning.importance.GroupMagnitudeImportance()
    if how != "magnitude":
        importance = LayerImportance(model, observed(model, data), refit=how == "fitted")
    pruner = torch_pruning.pruner.BasePruner(
        model,
        data[:1],
        importance,
        pruning_ratio=ratio,
        ignored_layers=[model.get_submodule(name) for name in kind.ignored],
        out_channel_groups={model.get_submodule(name): 2 for name in getattr(kind, "halves", ())},
        **options,
    )
    for _ in range(options.get("iterative_steps", 1)):
        if how == "fitted":
            for group in pruner.step(interactive=True):
                importance.prune(group)
        else:
            pruner.step()
    error = float((model(data).detach() - dense).square().mean() / dense.var())
    return sum(parameter.numel() for parameter in model.parameters()), error


@pytest.mark.parametrize("kind", [Residual, Images, Joined, Divided])
def test_outputs_change_less_than_by_magnitude(kind):
    errors = {how: [] for how in ("magnitude", "scored", "fitted")}
    for seed in range(3):
        sizes = set()
        for how, found in errors.items():
            parameters, error = pruned(kind, how, seed=seed)
            sizes.add(parameters)
            found.append(error)
        assert len(sizes) == 1
    assert sum(errors["scored"]) < sum(errors["magnitude"])
    assert sum(errors["fitted"]) < 0.5 * sum(errors["magnitude"])


@pytest.mark.parametrize("kind", [Residual, Images, Joined])  # halves fail there in a second step, by any importance
def test_several_steps_and_ranks_over_all_groups(kind):
    parameters, error = pruned(kind, "fitted")
    again, in_steps = pruned(kind, "fitted", iterative_steps=3)
    assert again == parameters
    assert in_steps < 0.5 * pruned(kind, "magnitude")[1]
    dense = sum(parameter.numel() for parameter in made(kind)[0].parameters())
    few, small = pruned(kind, "fitted", ratio=0.25, global_pruning=True)
    assert few < dense
    assert small < error


@pytest.mark.parametrize("kind", [Residual, Joined])
def test_channels_that_nothing_needs_go_first_and_change_nothing(kind):
    model, data = made(kind)
    readers = {Residual: ["blocks.0.down"], Joined: ["both"]}[kind]
    writer = {Residual: "blocks.0.up", Joined: "one"}[kind]
    with torch.no_grad():
        for name in readers:
            model.get_submodule(name).weight[:, 3:9] = 0.0
    importance = LayerImportance(model, observed(model, data))
    graph = torch_pruning.DependencyGraph().build_dependency(model, data[:1])
    layer = model.get_submodule(writer)
    every = graph.get_pruning_group(layer, torch_pruning.prune_linear_out_channels, list(range(layer.out_features)))
    scores = importance(every)
    chosen = scores.argsort()[:6].sort().values.tolist()
    assert chosen == list(range(3, 9))
    before = model(data).detach()
    importance.refit = False  # a fit with a ridge changes weights a little
    importance.prune(graph.get_pruning_group(layer, torch_pruning.prune_linear_out_channels, chosen))
    torch.testing.assert_close(model(data), before)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_scores_do_not_depend_on_the_size_of_inputs_nor_on_weights_that_nothing_reaches(ridge):
    model, data = made(Joined)
    with torch.no_grad():
        for layer in (model.one, model.two, model.both):
            layer.bias.zero_()
        model.one.weight[4], model.two.weight[2] = 0.0, 0.0
        model.both.weight[:, 4] = 1e6
    found = []
    for size in (1.0, 1e-7, 1e7):
        importance = LayerImportance(model, observed(model, size * data), ridge=ridge)
        graph = torch_pruning.DependencyGraph().build_dependency(model, data[:1])
        found.append(importance(graph.get_pruning_group(model.one, torch_pruning.prune_linear_out_channels, range(20))))
    assert int(found[0].argmin()) == 4
    for scores in found[1:]:
        torch.testing.assert_close(scores, found[0], rtol=1e-3, atol=0)


def test_fitted_weights_are_those_of_least_error():
    model, data = made(Residual)
    moments = observed(model, data)
    down = model.blocks[1]["down"]
    weight, gram = down.weight.detach().double().clone(), moments["blocks.1.down"].gram.double()
    importance = LayerImportance(model, moments, ridge=0.0)
    graph = torch_pruning.DependencyGraph().build_dependency(model, data[:1])
    up = model.blocks[1]["up"]
    removed = [0, 5, 17, 40]
    importance.prune(graph.get_pruning_group(up, torch_pruning.prune_linear_out_channels, removed))
    kept = [column for column in range(48) if column not in removed]
    expected = torch.linalg.lstsq(gram[kept][:, kept], (weight @ gram[:, kept]).T).solution.T
    torch.testing.assert_close(down.weight.detach().double(), expected, rtol=1e-3, atol=1e-4)
    assert moments["blocks.1.down"].gram.shape == (44, 44)


def test_whole_heads_are_scored_together():
    model, data = made(Attention)
    with torch.no_grad():
        model.out.weight[:, 6:12] = 0.0  # nobody reads the second head
    heads = dict.fromkeys((model.q, model.k, model.v), 4)
    importance = LayerImportance(model, observed(model, data), heads=heads)
    before = model(data).detach()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        data[:1],
        importance,
        pruning_ratio=0.25,  # with 0 it looks at no group
        num_heads=dict(heads),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.25,
        ignored_layers=[model.out],
    )
    importance.refit = False
    for group in pruner.step(interactive=True):
        importance.prune(group)
    assert model.q.out_features == model.out.in_features == 18
    torch.testing.assert_close(model(data), before)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
def test_neurons_and_the_stream_of_a_language_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=64,
        num_hidden_layers=2,
        pad_token_id=0,
        initializer_range=0.2,
        attn_implementation="eager",  # what Torch-Pruning can trace
        **sizes,
    )
    data = torch.randint(1, 64, (16, 32))
    errors = {}
    for how in ("magnitude", "fitted"):
        torch.manual_seed(1)
        model = LlamaForCausalLM(config).eval()
        dense = model(input_ids=data, use_cache=False).logits.detach()
        with torch.no_grad(), observing(model, exclude=()) as moments:
            model(input_ids=data, use_cache=False)
        importance = torch_pruning.importance.GroupMagnitudeImportance()
        if how == "fitted":
            importance = LayerImportance(model, moments)
        for what in ("neurons", "stream"):
            wanted = ("gate_proj", "up_proj") if what == "neurons" else ("o_proj", "down_proj")
            linear = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear)]
            pruner = torch_pruning.pruner.BasePruner(
                model,
                {"input_ids": data[:1, :3], "use_cache": False},
                importance,
                pruning_ratio=0.25,
                ignored_layers=[each for name, each in linear if not name.endswith(wanted)],
                output_transform=lambda output: output.logits.sum(),
            )
            for group in pruner.step(interactive=True):
                if how == "fitted":
                    importance.prune(group)
                else:
                    group.prune()
        assert model.model.layers[1].mlp.down_proj.weight.shape == (24, 36)
        errors[how] = float((model(input_ids=data, use_cache=False).logits.detach() - dense).square().mean())
    assert errors["fitted"] < 0.8 * errors["magnitude"]


@pytest.mark.parametrize("padding", [0, 1, (2, 0), "same", "valid"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_moments_of_patches_are_those_of_the_products(padding, dilation):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (3, 5), padding=padding, dilation=dilation, stride=1 if padding == "same" else 2)
    moments = InputMoments(conv)
    x = torch.randn(4, 3, 11, 9)
    handle = moments.watch(conv)
    out = conv(x).detach() - conv.bias.detach().view(-1, 1, 1)
    handle.remove()
    assert moments.tokens == out.shape[0] * out.shape[2] * out.shape[3]
    matrix = moments.matrix(conv.weight.detach())
    # |W X|^2 of each output channel.
    torch.testing.assert_close(((matrix @ moments.gram) * matrix).sum(1), out.square().sum((0, 2, 3)))
    assert torch.equal(moments.stored(matrix, conv.weight), conv.weight)


@pytest.mark.parametrize("refit", [True, False])
def test_scores_are_those_of_greedy_removal(refit):
    torch.manual_seed(0)
    layers = []
    for rows, width in ((3, 1), (5, 2)):
        x, weight = torch.randn(8 * width, 40), torch.randn(rows, 8 * width)
        layers.append(LayerReconstruction(weight, x @ x.T))
    problems = [
        ColumnSubset.of(layer, torch.arange(layer.shape[1]) // (layer.shape[1] // 8), ridge=0.0) for layer in layers
    ]

    def error(gone):
        total = 0.0
        for layer in layers:
            width = layer.shape[1] // 8
            flags = torch.tensor([unit in gone for unit in range(8)]).repeat_interleave(width)
            weight, gram = layer.weight.double(), layer.gram.double()
            if refit and not flags.all():
                fitted = torch.linalg.solve(gram[~flags][:, ~flags], (weight @ gram[:, ~flags]).T).T
                rest = weight.clone()
                rest[:, ~flags] -= fitted
            else:
                rest = weight * flags
            total += float(((rest @ gram) * rest).sum() / ((weight @ gram) * weight).sum())
        return total

    gone = []
    while len(gone) < 8:
        gone.append(min((unit for unit in range(8) if unit not in gone), key=lambda unit: error([*gone, unit])))
    scores = removal_scores(problems, refit=refit)
    assert scores.argsort().tolist() == gone
    if refit:
        assert float(scores[gone[0]]) == pytest.approx(error(gone[:1]))


def test_errors_say_what_is_wrong():
    model, data = made(Residual)
    moments = observed(model, data)
    with pytest.raises(MaskoptError, match="no module nowhere, of which there are moments"):
        LayerImportance(model, {"nowhere": moments["out"]})
    some = {name: each for name, each in moments.items() if name != "blocks.1.down"}
    graph = torch_pruning.DependencyGraph().build_dependency(model, data[:1])
    up = model.blocks[1]["up"]
    group = graph.get_pruning_group(up, torch_pruning.prune_linear_out_channels, list(range(48)))
    with pytest.raises(MaskoptError, match=r"reads the channels of blocks\.1\.up was observed \(blocks\.1\.down\)"):
        LayerImportance(model, some)(group)
    with pytest.raises(MaskoptError, match="saw no input"):
        LayerImportance(model, {"blocks.1.down": InputMoments(model.blocks[1]["down"])})(group)
    importance = LayerImportance(model, moments)
    graph.get_pruning_group(up, torch_pruning.prune_linear_out_channels, [0, 1]).prune()
    group = graph.get_pruning_group(up, torch_pruning.prune_linear_out_channels, list(range(46)))
    with pytest.raises(MaskoptError, match=r"has 46 inputs, but had 48 when it was observed"):
        importance(group)
    with pytest.raises(MaskoptError, match="without groups"):
        InputMoments(nn.Conv2d(4, 4, 3, groups=2))
