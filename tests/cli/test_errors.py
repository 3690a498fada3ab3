"""Bad input: one sentence that names the cause, exit code 2, no output."""

from __future__ import annotations

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
