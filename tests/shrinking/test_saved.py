"""Folders of shrunk models, loaded in fresh processes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import maskopt
from maskopt.errors import MaskoptError
from maskopt.shrinking import Site, cut_model, find_units
from tests.models.conftest import weights_of
from tests.processes import outcomes_of
from tests.shrinking.made import data, keep, made, shrunk

ROOT = Path(__file__).parent.parent.parent
FRESH = Path(__file__).parent / "fresh.py"

HEADS = ("gemma3_text", "llama", "mistral", "mixtral", "phi3", "qwen3", "qwen3_moe")
"""Families whose configuration can say that blocks have fewer heads."""
NEURONS = ("gpt2", "gpt_neox", "olmo2", "opt")


def fresh(mode: str, folder: Path, path: Path) -> dict[str, str]:
    """Run `fresh.py`; without maskopt, one that refuses to be imported stands in the place of an installed one."""
    if mode in ("plain", "code"):
        stub = path / "stub"
        stub.mkdir(exist_ok=True)
        (stub / "maskopt.py").write_text("raise ImportError('maskopt is not installed here')\n")
    own = str(ROOT if mode in ("maskopt", "late") else path / "stub")
    return outcomes_of(FRESH, mode, folder, own, path)


def test_equal_widths_load_with_transformers_alone(tmp_path: Path) -> None:
    folders = tmp_path / "folders"
    for family in (*HEADS, *NEURONS):
        before = made(family).num_parameters()
        model, report = shrunk(family, neurons=0.3, heads=0.5 if family in HEADS else 0.0)
        assert report.cut.uniform
        assert report.loads_with == "transformers"
        gone = sum(width.parameters for width in report.widths)
        assert report.parameters == (before, before - gone)
        blocks = model.config.num_hidden_layers
        lost = [(width.kind, 1 - width.after / width.before) for width in report.widths]
        assert sorted(each for kind, each in lost if kind == "heads") == [0.5] * (blocks if family in HEADS else 0)
        assert [each for kind, each in lost if kind == "neurons"] == pytest.approx([0.3] * blocks, abs=0.01)
        keep(folders / family, model, before - gone)
    found = fresh("plain", folders, tmp_path)
    assert found == dict.fromkeys(sorted((*HEADS, *NEURONS)), "the same")


def test_llama_becomes_the_mistral_that_it_is_and_computes_what_its_folder_does(tmp_path: Path) -> None:
    """`LlamaConfig` does not allow 6 heads and a hidden size of 16."""
    model = made("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    implementation = model.config._attn_implementation
    report = maskopt.shrink(model, data(), heads=0.25, refit="units")
    assert report.cut.becomes == type(model).__name__ == "MistralForCausalLM"
    assert model.config._attn_implementation == implementation
    assert {id(module.config) for module in model.modules() if hasattr(module, "config")} == {id(model.config)}
    ids = data(1, 12, seed=2)[0]["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        assert torch.allclose(model(input_ids=ids[:, :5], use_cache=False).logits, logits[:, :5], atol=1e-5)
    keep(tmp_path / "folders" / "llama", model, model.num_parameters())
    assert fresh("plain", tmp_path / "folders", tmp_path) == {"llama": "the same"}


@pytest.mark.parametrize("family", [*NEURONS, "bloom"])
def test_heads_that_no_configuration_can_say_are_refused(family: str) -> None:
    model = made(family)
    before = weights_of(model)
    with pytest.raises(
        MaskoptError, match=r"can lose no heads: the configuration of \w+ cannot say that a block has fewer"
    ):
        maskopt.shrink(model, data(), neurons=0.3, heads=0.5)
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())


FREE = ("bloom", "gpt2", "gpt_neox", "llama", "mixtral", "olmo2")


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models whose blocks have different widths, whatever is best for them."""
    path = tmp_path_factory.mktemp("free") / "folders"
    random = torch.Generator().manual_seed(0)
    for family in FREE:
        model = made(family)
        structure = find_units(model, data()[0])
        kept = {site: some(site, random) for site in structure.sites}
        cut = cut_model(model, kept)
        assert not cut.uniform
        keep(path / family, model, model.num_parameters())
    return path


def some(site: Site, random: torch.Generator) -> torch.Tensor:
    """A random number of units, of experts in multiples of eight."""
    role = site.role
    step = 8 if role.experts else 1
    count = step * int(torch.randint(1, role.number // step, (), generator=random))
    rows = [torch.randperm(role.number, generator=random) < count for _ in range(max(1, role.experts))]
    return torch.stack(rows) if role.experts else rows[0]


@pytest.mark.parametrize("mode", ["maskopt", "code"])
def test_different_widths_load_with_maskopt_or_the_code_of_the_folder(free: Path, tmp_path: Path, mode: str) -> None:
    folders = tmp_path / "folders"
    shutil.copytree(free, folders)
    assert fresh(mode, folders, tmp_path) == dict.fromkeys(FREE, "the same")


def test_nobody_else_loads_different_widths(free: Path, tmp_path: Path) -> None:
    for outcome in fresh("plain", free, tmp_path).values():
        assert outcome.startswith("ValueError: ")
        assert "trust_remote_code=True" in outcome
