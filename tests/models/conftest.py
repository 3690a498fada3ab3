"""Tiny random models of many architectures, their batches, and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from maskopt.oracles import PartitionMatroid
from maskopt.problems import LayerReconstruction, Problem, Saliency
from maskopt.solvers import Solver
from maskopt.solvers.base import Monitor, Outcome, Status

VOCABULARY = 61

# What every tiny transformer needs; with weights of this size attention has an effect, so that wrong masks are found.
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
_GQA = {**_SMALL, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32}
_GPT2 |= {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
_OPT = {
    **{name: value for name, value in _SMALL.items() if name not in ("intermediate_size", "initializer_range")},
    "ffn_dim": 24,
    "init_std": 0.3,
    "word_embed_proj_dim": 12,
}
_GEMMA = {
    **_GQA,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_MOE = {**_GQA, "moe_intermediate_size": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "init_std": 0.3,
}


@dataclass(frozen=True)
class Architecture:
    """A function that builds a tiny model, and properties of the model."""

    name: str
    model: str
    config: str
    options: dict[str, Any]
    stack: str
    linears: int
    """Linear layers per block."""

    def build(self, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.options, **changes})
        model = getattr(transformers, self.model)(config)
        # Biases and norms of a fresh model are 0 and 1; a model that was trained has others.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return copies of a model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "LlamaForCausalLM", "LlamaConfig", _GQA, "model.layers", 7),
        Architecture("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2, "transformer.h", 4),
        Architecture("opt", "OPTForCausalLM", "OPTConfig", _OPT, "model.decoder.layers", 6),
        Architecture("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**_GQA, "head_dim": 8}, "model.layers", 7),
        Architecture("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA, "model.layers", 7),
        Architecture(
            "mistral", "MistralForCausalLM", "MistralConfig", {**_GQA, "sliding_window": 4}, "model.layers", 7
        ),
        Architecture("phi", "PhiForCausalLM", "PhiConfig", _SMALL, "model.layers", 6),
        Architecture("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _SMALL, "gpt_neox.layers", 4),
        Architecture("bert", "BertModel", "BertConfig", _SMALL, "encoder.layer", 6),
    )
}
MIXTURES = {
    "mixtral": Architecture("mixtral", "MixtralForCausalLM", "MixtralConfig", _MOE, "model.layers", 4),
    "qwen3_moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _MOE, "model.layers", 4),
}
ENCODER_DECODERS = {
    "t5": Architecture("t5", "T5ForConditionalGeneration", "T5Config", _T5, "encoder.block", 6),
    "bart": Architecture("bart", "BartModel", "BartConfig", _BART, "encoder.layers", 6),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost tiny models far more than they give, and much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    """Every supported architecture in turn."""
    return ARCHITECTURES[request.param]


@pytest.fixture(params=list(MIXTURES))
def mixture(request: pytest.FixtureRequest) -> Architecture:
    """Every architecture with 3-D expert weights in turn."""
    return MIXTURES[request.param]


@pytest.fixture(params=list(ENCODER_DECODERS))
def encoder_decoder(request: pytest.FixtureRequest) -> Architecture:
    """Every architecture with two stacks in turn."""
    return ENCODER_DECODERS[request.param]


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny Llama with grouped queries."""
    return ARCHITECTURES["llama"].build()


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    """Build a model by name, with changes to its configuration."""
    known = {**ARCHITECTURES, **MIXTURES, **ENCODER_DECODERS}
    return lambda name, **changes: known[name].build(**changes)


@pytest.fixture
def make_batches() -> Callable[..., list[dict[str, Tensor]]]:
    """Draw batches: three of two sequences with 12 positions, padded on the right on demand."""

    def make(padded: bool = False, count: int = 3, length: int = 12) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        batches = []
        for index in range(count):
            batch = {"input_ids": torch.randint(1, VOCABULARY, (2, length), generator=generator)}
            if padded:
                lengths = torch.tensor([[length - 1 - index], [length // 2]])
                batch["attention_mask"] = (torch.arange(length) < lengths).long()
                batch["input_ids"] *= batch["attention_mask"]
            batches.append(batch)
        return batches

    return make


class Recorder(Solver):
    """Wanda that remembers the problems it was given, one by one."""

    row_wise = False

    def __init__(self) -> None:
        self.problems: list[LayerReconstruction] = []

    def run(self, problem: Problem, masks: PartitionMatroid, start: Tensor | None, monitor: Monitor) -> Outcome:
        assert isinstance(problem, LayerReconstruction)
        self.problems.append(problem)
        scores = Saliency.wanda(problem.weight, problem.gram).scores
        return Outcome(masks.lmo_mask(-scores), Status.GREEDY, 1)


@pytest.fixture
def recorder() -> Recorder:
    """A solver that remembers its problems, in the order of the layers."""
    return Recorder()


@pytest.fixture
def inputs_of() -> Callable[..., dict[str, Tensor]]:
    """Run a model as it is and return the inputs of its linear layers at unpadded positions, float64, (tokens, d)."""

    def collect(
        model: PreTrainedModel, batches: list[dict[str, Tensor]], names: list[str], **extra: Any
    ) -> dict[str, Tensor]:
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        current: dict[str, Tensor] = {}
        hooks = []
        for name in names:

            def hook(module: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                rows = args[0].reshape(-1, args[0].shape[-1])
                real = current["real"].reshape(-1)
                seen[name] += [row for row, keep in zip(rows, real, strict=True) if keep]

            hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
        model.eval()
        with torch.no_grad():
            for batch in batches:
                current["real"] = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
                model(**batch, **extra)
        for handle in hooks:
            handle.remove()
        return {name: torch.stack(rows).double() for name, rows in seen.items()}

    return collect


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of a small alphabet, with a begin-of-text token in front."""
    alphabet = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,\n"
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {letter: 4 + i for i, letter in enumerate(alphabet)}
    assert len(vocabulary) <= VOCABULARY
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
