"""Corrected runs of models whose blocks have common weights: the dense model is dense in all blocks."""

import pytest
import torch
from torch import nn
from transformers import ZambaConfig, ZambaForCausalLM

from maskopt.models import CORRECTION, find_blocks, prune
from maskopt.models.batches import prepare_batches
from maskopt.models.gram import GramCollector
from maskopt.models.propagation import Corrected, last_uses
from maskopt.models.replay import Replay, evaluation_mode
from maskopt.oracles import PerRow
from maskopt.problems import LayerReconstruction
from maskopt.solvers import Wanda


def with_shared_modules(model):
    """One nn.Linear, and one MLP, in several blocks."""
    layers = model.model.layers
    layers[2].self_attn.o_proj = layers[0].self_attn.o_proj
    layers[2].mlp = layers[0].mlp
    return model


def with_shared_parameters(model):
    """Parameters of different modules that are one."""
    layers = model.model.layers
    for name in ("mlp.down_proj", "self_attn.q_proj"):
        for later in (1, 2):
            layers[later].get_submodule(name).weight = layers[0].get_submodule(name).weight
    return model


def zamba():
    torch.manual_seed(0)
    config = ZambaConfig(
        vocab_size=61,
        hidden_size=16,
        attention_hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_head_dim=8,
        n_mamba_heads=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        mamba_expand=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "hybrid"],
        initializer_range=0.3,
        pad_token_id=0,
    )
    return ZambaForCausalLM(config)


@pytest.fixture(params=["modules", "parameters", "zamba"])
def shared(request, build):
    """A function that builds the same model with shared weights."""
    if request.param == "zamba":
        return zamba
    change = with_shared_modules if request.param == "modules" else with_shared_parameters
    return lambda: change(build("llama"))


@pytest.mark.parametrize("memory", [2**30, 1])
def test_the_dense_stream_is_that_of_the_dense_model(shared, make_batches, monkeypatch, memory):
    """The dense model's inputs of `Corrected`, layer by layer, are the inputs of an unpruned model's layers."""
    model, untouched, batches = shared(), shared(), make_batches()
    batches = prepare_batches(model, batches)
    expected = []
    with evaluation_mode(untouched):
        replay = Replay(untouched, find_blocks(untouched), batches)
        assert replay.shortcut
        for position in range(len(replay.order)):
            states = []
            hook = replay.order[position].module.register_forward_hook(
                lambda module, args, output, states=states: states.append(output)
            )
            replay.run(position, store=True)
            hook.remove()
            expected.append(states)
    seen = []
    run = Replay.run

    def record(self, position, *, store=False, **options):
        run(self, position, store=store, **options)
        if store and position is not None:
            index = options.get("indices", range(self.batches))
            seen.append((id(self), position, [self._states.get((self.order[position].stack, i)) for i in index]))

    monkeypatch.setattr(Replay, "run", record)
    exclude = ["*.mamba*"] if isinstance(model, ZambaForCausalLM) else []
    report = prune(
        model, batches_of(batches), PerRow(0.5), Wanda(), propagate="corrected", exclude=exclude, memory=memory
    )
    assert report.layers
    streams: dict[int, dict[int, list[object]]] = {}
    for stream, position, states in seen:
        streams.setdefault(stream, {}).setdefault(position, []).extend(states)
    dense = [
        stream for stream in streams.values() if all(same(stream[p], expected[p][: len(stream[p])]) for p in stream)
    ]
    assert len(dense) >= 1
    assert max(max(stream) for stream in dense) >= len(expected) - 2


def batches_of(prepared):
    return [batch.inputs for batch in prepared]


def same(states, expected):
    leaves = [state[0] if isinstance(state, tuple) else state for state in states]
    wanted = [state[0] if isinstance(state, tuple) else state for state in expected]
    return all(torch.equal(a, b) for a, b in zip(leaves[: len(wanted)], wanted, strict=False))


def test_targets_aim_at_the_dense_model(build, make_batches, inputs_of, recorder):
    """Of a layer without shared weights in the last block, behind blocks with them."""
    model, dense, batches = (
        with_shared_parameters(build("llama")),
        with_shared_parameters(build("llama")),
        make_batches(),
    )
    prune(model, batches, PerRow(0.5), recorder, propagate="corrected")
    name = "model.layers.2.self_attn.v_proj"
    y, x = inputs_of(model, batches, [name])[name], inputs_of(dense, batches, [name])[name]
    (problem,) = [
        problem for problem in recorder.problems if torch.equal(problem.weight, dense.get_submodule(name).weight)
    ]
    aim = LayerReconstruction.towards(problem.weight.double(), y.T @ y, x.T @ y, strength=CORRECTION).scaled_target
    assert float((aim - problem.weight).norm()) > 0.01 * float(problem.weight.norm())
    torch.testing.assert_close(problem.scaled_target.double(), aim, rtol=0, atol=2e-3 * float(aim.abs().max()))


def test_shared_weights_are_pruned_once_and_stay_shared(shared, make_batches):
    model, dense = shared(), shared()
    exclude = ["*.mamba*"] if isinstance(model, ZambaForCausalLM) else []
    report = prune(model, make_batches(), PerRow(0.5), Wanda(), propagate="corrected", exclude=exclude)
    weights = [id(model.get_submodule(name).weight) for name in report.masks]
    assert len(set(weights)) == len(weights)
    for name, mask in report.masks.items():
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight * mask)
    before, after = ({name: id(p) for name, p in m.named_parameters(remove_duplicate=False)} for m in (dense, model))
    groups = [
        {frozenset(name for name, p in ids.items() if p == identity) for identity in ids.values()}
        for ids in (before, after)
    ]
    assert groups[0] == groups[1]


def test_only_what_later_blocks_use_is_remembered(build, make_batches):
    model = with_shared_parameters(build("llama"))
    model.lm_head.weight = nn.Parameter(model.model.layers[1].self_attn.o_proj.weight.detach().clone())
    model.lm_head.weight = model.model.layers[1].self_attn.o_proj.weight
    with evaluation_mode(model):
        blocks = find_blocks(model)
        from maskopt.models.layers import linear_layers
        from maskopt.models.propagation import Stage

        replay = Replay(model, blocks, prepare_batches(model, [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]))
        stages = [
            Stage(position, block.name, tuple(linear_layers(block.module, block.name)))
            for position, block in enumerate(blocks)
        ]
        uses = {layer.name: position for layer, position in last_uses(model, replay, stages).items()}
    assert uses == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.0.mlp.down_proj": 2,
        "model.layers.1.mlp.down_proj": 2,
        "model.layers.1.self_attn.o_proj": 3,
    }


@pytest.mark.parametrize("states", [None, "device", "host", "disk"])
def test_the_dense_block_runs_once_and_the_pruned_one_once_in_pieces(build, make_batches, states):
    results = []
    for memory, place in ((2**30, None), (1, states)):
        model, calls = build("llama"), {"attention": [], "mlp": []}
        block = model.model.layers[1]
        block.self_attn.q_proj.register_forward_hook(lambda *_, calls=calls: calls["attention"].append(None))
        block.mlp.gate_proj.register_forward_hook(lambda *_, calls=calls: calls["mlp"].append(None))
        report = prune(model, make_batches(), PerRow(0.5), Wanda(), propagate="corrected", memory=memory, states=place)
        # The first run and the verification (two batches); then for three batches the dense block, the turn that
        # calibrates these layers, and the one behind it. What is before a layer is not run again.
        assert {name: len(made) for name, made in calls.items()} == dict.fromkeys(calls, 1 + 2 + 3 * (1 + 1 + 1))
        results.append(report.masks)
    assert all(torch.equal(mask, results[1][name]) for name, mask in results[0].items())


def test_finding_the_turns_builds_no_gram(build, make_batches, monkeypatch):
    built = []
    plain = GramCollector.__init__
    monkeypatch.setattr(
        GramCollector,
        "__init__",
        lambda self, layers, *rest, **options: (built.append(len(layers)), plain(self, layers, *rest, **options))[1],
    )
    prune(build("llama"), make_batches(), PerRow(0.5), Wanda(), propagate="corrected")
    assert built == [3, 1, 2, 1] * 3
    assert Corrected.turns is not None
