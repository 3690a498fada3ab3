"""Layers, a tiny language model on disk, texts, and fixtures that run commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from maskopt import save_instance, synthetic
from maskopt.cli.app import app

CONTEXT = 32


@pytest.fixture
def run() -> Callable[..., Any]:
    """Run `maskopt` with arguments; by default it must succeed."""

    def invoke(*args: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return invoke


@pytest.fixture
def fails(run: Callable[..., Any]) -> Callable[..., str]:
    """Run `maskopt` with arguments that must fail with one sentence on standard error, and return the sentence."""

    def invoke(*args: object, code: int = 2) -> str:
        result = run(*args, code=code)
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.stderr
        return str(result.stderr)

    return invoke


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """A layer of 12 rows and 24 inputs."""
    path = tmp_path / "layer.safetensors"
    save_instance(path, synthetic(rows=12, d=24))
    return path


@pytest.fixture
def read() -> Callable[[Path], Any]:
    """Read JSON strictly, without NaN and infinities."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return lambda path: json.loads(path.read_text(), parse_constant=refuse)


def _save(folder: Path, kind: str, **changes: Any) -> Path:
    """Save a tiny random model of a kind, and a tokenizer that makes a token of every character."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, **{letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz .\n", 1)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama."""
    return _save(tmp_path_factory.mktemp("models") / "tiny", "Llama")


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Mixtral of 12 experts."""
    return _save(tmp_path_factory.mktemp("models") / "mixture", "Mixtral", num_local_experts=12, num_key_value_heads=2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of about two thousand tokens."""
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog.\n" * 45)
    return path
