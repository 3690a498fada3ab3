"""Libraries that exclude each other: their tests run in environments of their own, `make hosts`."""

import importlib.util
import warnings

import pytest
import torch

_HOSTS = {"test_llm_compressor.py": "llmcompressor", "test_modelopt.py": "modelopt"}

collect_ignore = [file for file, package in _HOSTS.items() if importlib.util.find_spec(package) is None]


@pytest.fixture(autouse=True)
def _warnings_of_hosts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def windows():
    return torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tmp_path):
    """A small random model with tied embeddings, loaded from a folder, as hosts expect."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(pad_token_id=0, tie_word_embeddings=True, **sizes)).save_pretrained(tmp_path / "dense")
    return LlamaForCausalLM.from_pretrained(tmp_path / "dense").eval()
