"""Bad input: one sentence that names the cause, exit code 2, no output."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from maskopt import synthetic


def damaged(change):
    """A good layer's tensors after a change."""
    good = synthetic(rows=4, d=8)
    tensors = {"weight": good.weight.clone(), "gram": good.gram.clone()}
    change(tensors)
    return tensors


def nan_weight(tensors):
    tensors["weight"][1, 2] = torch.nan


def infinite_gram(tensors):
    tensors["gram"][3, 3] = torch.inf


def asymmetric(tensors):
    tensors["gram"][0, 5] += tensors["gram"].abs().max()


def indefinite(tensors):
    tensors["gram"] -= 0.5 * tensors["gram"].diagonal().mean() * torch.eye(8)


def negative_diagonal(tensors):
    tensors["gram"][2, 2] *= -1


def other_shape(tensors):
    tensors["gram"] = tensors["gram"][:7, :7].clone()


def vector(tensors):
    tensors["weight"] = tensors["weight"][0].clone()


def integers(tensors):
    tensors["weight"] = tensors["weight"].int()


def no_gram(tensors):
    del tensors["gram"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nan_weight, "weight must be finite, but entry (1, 2) is nan"),
        (infinite_gram, "Gram must be finite, but entry (3, 3) is inf"),
        (asymmetric, "must be symmetric"),
        (indefinite, "must be positive semidefinite"),
        (negative_diagonal, "diagonal entry 2"),
        (other_shape, "8 input features but the Gram has shape (7, 7)"),
        (vector, "got shapes (8,)"),
        (integers, "must be floating point"),
        (no_gram, "no tensor named gram"),
    ],
)
def test_damaged_layers_are_refused(fails, tmp_path, change, words):
    path, out = tmp_path / "bad.safetensors", tmp_path / "mask.safetensors"
    save_file(damaged(change), path)
    sentence = fails("solve", path, "--sparsity", 0.5, "--out", out)
    assert words in sentence
    assert str(path) in sentence
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool])
@pytest.mark.parametrize("name", ["weight", "gram"])
def test_layers_of_other_types(fails, tmp_path, name, dtype):
    good = synthetic(rows=4, d=8)
    tensors = {"weight": good.weight, "gram": good.gram}
    save_file({**tensors, name: tensors[name].to(dtype)}, tmp_path / "bad")
    assert "must be floating point, of 16, 32 or 64 bits" in fails("solve", tmp_path / "bad", "-s", 0.5)


def test_names_and_metadata_that_cannot_be_printed(run, fails, layer, tmp_path):
    odd = tmp_path / "caf\u00e9\n[red]\x1b"
    shutil.copy(layer, odd)
    run("solve", odd, "-s", 0.5, "--solver", "wanda", "--out", tmp_path / "m\n", "--json", tmp_path / "f\n")
    assert r"\n[red]\x1b has no tensor" in fails("solve", odd, "-s", 0.5, "--start", odd, "--solver", "one-swap")
    save_file({"weight": torch.ones(2, 4), "gram": torch.eye(4)}, tmp_path / "long", {"tokens": "9" * 5000})
    run("solve", tmp_path / "long", "-s", 0.5, "--solver", "wanda")


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_names_that_are_not_utf_8_are_found_before_the_work(fails, layer, tmp_path, option):
    (tmp_path / "full").mkdir()
    name = tmp_path / "full" / os.fsdecode(b"caf\xe9")
    said = fails("solve", layer, "-s", 0.5, "--solver", "wanda", option, name)
    assert r"full/caf\udce9 cannot be written: its name is not text in UTF-8." in said
    assert list((tmp_path / "full").iterdir()) == []
    shutil.copy(layer, name)
    assert r"caf\udce9 is not a readable safetensors file" in fails("solve", name, "-s", 0.5)


def test_solvers_without_a_name(fails, layer):
    assert "One solver has no name" in fails("compare", layer, "-s", 0.5, "--solvers", "wanda,,ria")
    assert "At least one solver is needed" in fails("compare", layer, "-s", 0.5, "--solvers", "")


def test_files_that_are_no_layers_are_refused(fails, tmp_path):
    assert "does not exist" in fails("solve", tmp_path / "missing.safetensors", "-s", 0.5)
    assert "not a file" in fails("solve", tmp_path, "-s", 0.5)
    text = tmp_path / "text.txt"
    text.write_text("Hello")
    assert "not a readable safetensors file" in fails("solve", text, "-s", 0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sparsity", "1.5"), "between 0 and 1"),
        (("--sparsity", "-0.1"), "between 0 and 1"),
        (("--sparsity", "nan"), "between 0 and 1"),
        ((), "needs a sparsity"),
        (("-p", "2:4", "-s", "0.6"), "leave the sparsity out"),
        (("-p", "2:5"), "divisible by 5"),
        (("-p", "5:4"), "impossible"),
        (("-p", "column", "-s", "0.5"), "no pattern 'column'"),
        (("-s", "0.5", "--solver", "best"), "no solver 'best'; choose one of magnitude"),
        (("-s", "0.5", "-o", "steps=3"), "no setting 'steps'; it has iterations"),
        (("-s", "0.5", "-o", "iterations"), "key=value"),
        (("-s", "0.5", "-o", "iterations=many"), "takes a whole number; got 'many'"),
        (("-s", "0.5", "-o", "iterations=0.5"), "takes a whole number"),
        (("-s", "0.5", "-o", "iterations=0"), "iterations >= 1"),
        (("-s", "0.5", "-o", "polish=perhaps"), "takes true or false"),
        (("-s", "0.5", "-o", "start=best"), "no solver 'best'"),
        (("-s", "0.5", "--solver", "one-swap", "-o", "max_steps=x"), "takes a whole number or none"),
        (("-s", "0.5", "--solver", "wanda", "-o", "power=1"), "it has none"),
        (("-s", "0.5", "--memory", "lots"), "such as 500M or 2G"),
        (("-s", "0.5", "--memory", "0"), "such as 500M or 2G"),
        (("-p", "9" * 5000 + ":4"), "There is no pattern"),
        (("-s", "0.5", "--memory", "9" * 5000), "such as 500M or 2G"),
        (("-s", "0.5", "-o", "iterations=" + "9" * 5000), "takes a whole number"),
        (("-s", "0.5", "-o", "iterations=1_0"), "takes a whole number"),
        (("-s", "0.5", "-o", "second=nan"), "needs second in [0, 1]; got nan"),
        (("-s", "0.5", "-o", ""), "key=value"),
        (("-s", "0.5", "--solver", ""), "no solver ''"),
        (("-s", "0.5", "--solver", "wanda:"), "key=value"),
        (("-s", "0.5", "--solver", "ria", "-o", "power=nan"), "needs power in [0, 8]; got nan"),
        (("-s", "0.5", "--solver", "stochastic:seed=1"), "no setting 'seed'"),
        (("-s", "0.5", "--solver", "branch-and-bound:nodes=-1"), "needs nodes >= 1"),
        (("-s", "0.5", "--solver", "branch-and-bound", "-o", "row_block_seconds=nan"), "needs row_block_seconds > 0"),
        (("-s", "0.5", "--time-limit", "nan"), "time limit must be a positive number of seconds; got nan"),
        (("-s", "0.5", "--time-limit", "0"), "time limit must be a positive number of seconds; got 0.0"),
        (("-s", "0.5", "--out", "-"), "Only --json accepts - for standard output"),
        (("-s", "0.5", "--json", ""), "needs a name"),
        *(
            (("-s", "0.5", "--device", name), f"{name!r} cannot be used")
            for name in ("hpu", "mtia", "xla", "privateuseone")
        ),
        (("-s", "0.5", "--device", "quantum"), "device 'quantum' cannot be used"),
        (("-s", "0.5", "--device", "meta"), "device 'meta' cannot be used"),
    ],
)
def test_bad_arguments_are_refused(fails, layer, arguments, words):
    assert words in fails("solve", layer, *arguments)


@pytest.mark.parametrize("arguments", [("solve",), ("solve", "x", "--sparsity", "half"), ("sovle", "x"), ("--oops",)])
def test_usage_errors_have_no_traceback(run, arguments):
    assert "Traceback" not in run(*arguments, code=2).stderr


def test_existing_outputs_are_refused_before_any_work_and_kept(fails, layer, tmp_path, monkeypatch):
    monkeypatch.setattr("maskopt.cli.solve.load_layer", lambda *args: pytest.fail("work has begun"))
    taken = tmp_path / "taken"
    taken.write_bytes(b"precious")
    for option in ("--out", "--json"):
        assert f"{taken} exists already" in fails("solve", layer, "-s", 0.5, option, taken)
    assert taken.read_bytes() == b"precious"
    assert "does not exist" in fails("solve", layer, "-s", 0.5, "--out", tmp_path / "no" / "mask")
    assert "same name" in fails("solve", layer, "-s", 0.5, "--out", tmp_path / "a", "--json", tmp_path / "a")
    assert sorted(tmp_path.iterdir()) == [layer, taken]


def test_bad_calibration_texts_are_refused(fails, model, tmp_path):
    def words(content: bytes, name: str = "text.txt", *options: object) -> str:
        (tmp_path / name).write_bytes(content)
        return fails("prune", model, tmp_path / "out", "--calibration", tmp_path / name, "-s", 0.5, *options)

    assert "is empty" in words(b"")
    assert "is empty" in words(b" \n ")
    assert "is not text in UTF-8" in words(bytes(range(256)))
    assert "holds 5 tokens, but at least 32 are needed" in words(b"short")
    assert "line 1" in words(b'{"content": "a"}\n', "text.jsonl")
    assert "does not exist" in fails("prune", model, tmp_path / "out", "--calibration", tmp_path / "no", "-s", 0.5)
    assert not (tmp_path / "out").exists()


def test_incomplete_model_folders_are_refused(fails, model, text, tmp_path):
    def words(folder) -> str:
        return fails("prune", folder, tmp_path / "out", "--calibration", text, "-s", 0.5)

    for name, missing, culprit in (("a", "config.json", "config.json"), ("b", "tokenizer*", "tokenizer")):
        folder = tmp_path / name
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns(missing))
        sentence = words(folder)
        assert culprit in sentence
        assert str(folder) in sentence
    assert "There is no model folder" in words(tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_bad_prune_settings_are_refused(fails, model, text, tmp_path):
    def words(*options: object) -> str:
        return fails("prune", model, tmp_path / "out", "--calibration", text, *options)

    assert "at most 32 tokens" in words("-s", 0.5, "--seqlen", 33)
    assert "needs a sparsity" in words()
    assert "divisible by 5" in words("-p", "2:5")
    assert "matches no layer" in words("-s", 0.5, "--exclude", "*.nothing")
    assert "does not exist" in words("-s", 0.5, "--evaluate", tmp_path / "no")
    (tmp_path / "brief").write_text("brief")
    assert "brief holds 5 tokens" in words("-s", 0.5, "--evaluate", tmp_path / "brief")
    assert not (tmp_path / "out").exists()


def test_bad_evaluate_inputs_are_refused(fails, model, text, tmp_path):
    assert "at most 32 tokens" in fails("evaluate", model, "--text", text, "--seqlen", 64)
    assert "does not exist" in fails("evaluate", model, "--text", tmp_path / "no")
    assert "There is no model folder" in fails("evaluate", tmp_path / "no", "--text", text)


@pytest.mark.parametrize("command", ["prune", "evaluate", "demo"])
def test_the_extra_is_named_where_transformers_is_missing(fails, command, text, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = {
        "prune": ("model", tmp_path / "out", "--calibration", text, "-s", 0.5),
        "evaluate": ("model", "--text", text),
        "demo": (),
    }
    assert 'pip install "maskopt[hf]"' in fails(command, *arguments[command])


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_missing_packages_are_named(fails, tmp_path, monkeypatch, package):
    (tmp_path / "text").write_text("a text")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    said = fails("prune", tmp_path / "model", tmp_path / "out", "--calibration", tmp_path / "text", "-s", "0.5")
    assert said.rstrip() == f'Language models need {package}, which is missing: pip install "maskopt[hf]".'
