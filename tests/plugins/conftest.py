"""A small language model, pruned, and windows to train it on."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import maskopt

WINDOWS = torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(0))


def _pruned(model):
    model.eval()
    maskopt.prune(model, [WINDOWS], maskopt.PerRow(0.5), maskopt.Wanda(), propagate="dense")
    return model


@pytest.fixture(scope="session")
def pruned_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return _pruned(LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, pad_token_id=0, **sizes)))


@pytest.fixture(scope="session")
def pruned_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    return _pruned(GPT2LMHeadModel(config))


@pytest.fixture(params=["llama", "gpt2"])
def pruned(request):
    return copy.deepcopy(request.getfixturevalue(f"pruned_{request.param}"))


@pytest.fixture
def windows():
    return WINDOWS


@pytest.fixture
def loss():
    def measure(model):
        model.eval()
        with torch.no_grad():
            return float(model(input_ids=WINDOWS, labels=WINDOWS, use_cache=False).loss)

    return measure


@pytest.fixture
def zeros():
    """Function that returns the zeros of all matrices that have some."""

    def found(model):
        named = {name: parameter.detach() == 0 for name, parameter in model.named_parameters() if parameter.ndim > 1}
        return {name: zero for name, zero in named.items() if bool(zero.any())}

    return found
