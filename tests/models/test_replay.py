"""Running a model block by block is running the model."""

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel, PretrainedConfig, PreTrainedModel

from maskopt.errors import MaskoptError
from maskopt.models import find_blocks
from maskopt.models.batches import prepare_batches
from maskopt.models.replay import Replay, evaluation_mode


def record_outputs(modules, record):
    """Record every call's hidden states, in order."""

    def hook(module, args, output):
        record.append((output if isinstance(output, torch.Tensor) else output[0]).clone())

    return [module.register_forward_hook(hook) for module in modules]


def states_of_forward(model, blocks, batches):
    states = []
    handles = record_outputs([block.module for block in blocks], states)
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return states


def states_of_replay(replay, count):
    states = []
    for position in range(len(replay.order)):
        record = []
        (handle,) = record_outputs([replay.order[position].module], record)
        replay.run(position, store=True)
        handle.remove()
        assert len(record) == count  # no block but this one was computed
        states.append(record)
    return [states[position][batch] for batch in range(count) for position in range(len(replay.order))]


@pytest.mark.parametrize("padded", [False, True])
def test_blocks_one_by_one_reproduce_the_forward(architecture, make_batches, padded):
    model, batches = architecture.build(), make_batches(padded)
    blocks = find_blocks(model)
    with evaluation_mode(model):
        replay = Replay(model, blocks, prepare_batches(model, batches))
        assert replay.shortcut
        assert replay.order == blocks
        expected = states_of_forward(model, blocks, batches)
        for state, wanted in zip(states_of_replay(replay, len(batches)), expected, strict=True):
            torch.testing.assert_close(state, wanted, rtol=0, atol=0, equal_nan=True)


def test_replay_accepts_padding_on_the_left(build, make_batches):
    model, batches = build("llama"), make_batches(True)
    for batch in batches:
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    blocks = find_blocks(model)
    with evaluation_mode(model):
        replay = Replay(model, blocks, prepare_batches(model, batches))
        assert replay.shortcut
        expected = states_of_forward(model, blocks, batches)
        for state, wanted in zip(states_of_replay(replay, len(batches)), expected, strict=True):
            torch.testing.assert_close(state, wanted, rtol=0, atol=0, equal_nan=True)


def test_replay_covers_both_stacks_of_an_encoder_decoder(encoder_decoder, make_batches):
    model = encoder_decoder.build()
    batches = [{**batch, "decoder_input_ids": batch["input_ids"][:, :7]} for batch in make_batches()]
    blocks = find_blocks(model)
    with evaluation_mode(model):
        replay = Replay(model, blocks, prepare_batches(model, batches))
        assert replay.shortcut
        assert [block.name for block in replay.order] == [block.name for block in blocks]
        expected = states_of_forward(model, blocks, batches)
        for state, wanted in zip(states_of_replay(replay, len(batches)), expected, strict=True):
            torch.testing.assert_close(state, wanted, rtol=0, atol=0)


def test_gemma_would_show_arguments_of_another_block(build, make_batches):
    """The replay test is sensitive: a window for all blocks, or for none, gives other states."""
    ids = make_batches()[0]["input_ids"]
    finals = []
    for kinds in (["sliding_attention", "full_attention"] * 2, ["sliding_attention"] * 4, ["full_attention"] * 4):
        with evaluation_mode(model := build("gemma3", layer_types=kinds)):
            finals.append(model.model(ids).last_hidden_state)
    assert all((finals[0] - other).norm() > 0.1 * finals[0].norm() for other in finals[1:])


def test_blocks_that_run_several_times_use_full_forwards(make_batches):
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
    with evaluation_mode(model):
        replay = Replay(model, find_blocks(model), prepare_batches(model, batches))
        assert not replay.shortcut
        states = []
        handles = record_outputs([replay.order[0].module], states)
        replay.run(0, store=True)
        assert len(states) == 4 * len(batches)
        assert handles[0].remove() is None
        assert torch.equal(states[3], model(**batches[0]).last_hidden_state)


class Leaky(nn.Module):
    """A block that hands part of its state on through a side channel."""

    def __init__(self, index, channel):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.index, self.channel = index, channel

    def forward(self, x):
        self.channel[self.index] = x.mean()
        return self.linear(x) + self.channel.get(self.index - 1, 0)


class LeakyModel(PreTrainedModel):
    """Embedding and leaky blocks; some detect skipped blocks, and some keep the state of earlier batches."""

    config_class = PretrainedConfig

    def __init__(self, config, kind):
        super().__init__(config)
        self.embedding = nn.Embedding(61, 4)
        self.channel = {}
        self.blocks = nn.ModuleList([Leaky(index, self.channel) for index in range(3)])
        self.kind = kind
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        if self.kind != "remembers":
            self.channel.clear()
        x = self.embedding(input_ids)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.kind == "strict" and len(self.channel) != index + 1:
                raise RuntimeError("a block was skipped")
        return x


@pytest.mark.parametrize("kind", ["naive", "strict", "remembers"])
def test_models_that_cannot_skip_blocks_use_full_forwards(make_batches, kind):
    torch.manual_seed(0)
    model, batches = LeakyModel(PretrainedConfig(), kind), make_batches()
    blocks = find_blocks(model)
    with evaluation_mode(model):
        replay = Replay(model, blocks, prepare_batches(model, batches))
        assert not replay.shortcut
        expected = states_of_forward(model, blocks, batches)
        for position, block in enumerate(replay.order):
            states = []
            (handle,) = record_outputs([block.module], states)
            replay.run(position, store=True)
            handle.remove()
            for index, state in enumerate(states):
                assert torch.equal(state, expected[index * 3 + position])


def test_the_model_is_left_as_it_was(llama, make_batches):
    llama.train()
    llama.model.layers[1].mlp.eval()
    modes = {name: module.training for name, module in llama.named_modules()}
    own = llama.model.layers[0].forward
    llama.model.layers[0].forward = own  # as accelerate's hooks do
    with evaluation_mode(llama):
        assert not any(module.training for module in llama.modules())
        assert not torch.is_grad_enabled()
        replay = Replay(llama, find_blocks(llama), prepare_batches(llama, make_batches()))
        replay.run(0, store=True)
        replay.run(1, store=True)
    assert torch.is_grad_enabled()
    assert {name: module.training for name, module in llama.named_modules()} == modes
    assert llama.model.layers[0].__dict__["forward"] is own
    assert "forward" not in llama.model.layers[1].__dict__
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


def test_an_error_inside_a_block_leaves_no_hook_behind(llama, make_batches):
    with evaluation_mode(llama):
        replay = Replay(llama, find_blocks(llama), prepare_batches(llama, make_batches()))
        replay.run(0, store=True)
        llama.model.layers[1].forward = lambda *args, **kwargs: 1 / 0
        with pytest.raises(MaskoptError, match=r"cannot be run on calibration batch 0: division by zero \(ZeroDiv"):
            replay.run(1)
    assert "forward" not in llama.model.layers[0].__dict__
    assert not llama.model.layers[1]._forward_hooks


def test_hidden_states_changed_in_place_do_not_spoil_the_stored_ones(make_batches):
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            x += self.linear(x)
            return x

    class AddingModel(LeakyModel):
        def __init__(self, config):
            super().__init__(config, "naive")
            self.blocks = nn.ModuleList([Adding() for _ in range(3)])

    model, batches = AddingModel(PretrainedConfig()), make_batches()
    blocks = find_blocks(model)
    with evaluation_mode(model):
        replay = Replay(model, blocks, prepare_batches(model, batches))
        assert replay.shortcut
        expected = states_of_forward(model, blocks, batches)
        replay.run(0, store=True)
        replay.run(1)
        replay.run(1, store=True)
        states = []
        record_outputs([blocks[2].module], states)
        replay.run(2)
        assert torch.equal(states[0], expected[2])
