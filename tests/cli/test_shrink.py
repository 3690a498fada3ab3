"""`maskopt shrink`, and shrunk folders as models of other commands."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from maskopt.cli.shrink import METHODS
from maskopt.models import load_model
from maskopt.shrinking import cut_model, find_units, save_shrunk, shrink
from maskopt.structured import STRUCTURED
from tests.cli.conftest import _save

DATA = ("--samples", 8, "--refit", "units", "--no-speed")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama of two heads."""
    return _save(tmp_path_factory.mktemp("models") / "grouped", "Llama", num_key_value_heads=2)


@pytest.fixture
def free(grouped: Path, tmp_path: Path) -> Path:
    """A folder of a model whose blocks have 8 and 16 neurons, and one and two heads."""
    network, tokenizer = load_model(grouped)
    structure = find_units(network, {"input_ids": torch.arange(1, 17).view(1, -1)})
    kept = {}
    for kind, counts in (("neurons", (8, 16)), ("heads", (1, 2))):
        for site, count in zip(structure.of(kind), counts, strict=True):
            kept[site] = torch.arange(site.role.number) < count
    cut_model(network, kept)
    path = tmp_path / "free"
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_names_of_methods_in_help_are_those_of_the_registry() -> None:
    assert set(METHODS) == set(STRUCTURED)


def test_the_folder_and_the_figures(run: Any, grouped: Path, text: Path, tmp_path: Path, read: Any) -> None:
    out, figures, other = tmp_path / "out", tmp_path / "figures.json", tmp_path / "other.txt"
    other.write_text("quick dogs jump over a lazy fox.\n" * 20)
    command = ("shrink", grouped, out, "--calibration", text, "--neurons", 0.5, "--heads", 0.5, *DATA)
    result = run(*command, "--evaluate", text, "--evaluate", other, "--json", figures)
    assert result.stderr == ""  # no bar and no time left where nobody watches
    report = read(figures)
    assert read(out / "report.json") == report
    dense, smaller = load_model(grouped)[0], AutoModelForCausalLM.from_pretrained(out)
    before, after = dense.num_parameters(), smaller.num_parameters()
    assert report["parameters"] == {"before": before, "after": after}
    assert before - after == sum(width["parameters"] for width in report["widths"])
    assert report["cache_bytes_per_token"] == {"before": 256.0, "after": 128.0}
    assert [(width["kind"], width["before"], width["after"]) for width in report["widths"]] == [
        ("heads", 2, 1),
        ("neurons", 24, 12),
    ] * 2
    assert report["loads_with"] == "transformers"
    assert set(report["perplexity"]) == {str(text), str(other)}
    for measured in report["perplexity"].values():
        assert set(measured) == {"before", "after"}
    assert report["command"]["neurons"] == 0.5
    assert report["speed"] == report["refused"] == {} or report["refused"] == []
    assert {"maskopt", "torch"} <= set(report["versions"])
    kept = load_file(out / "units.safetensors")
    assert {name: int(units.sum()) for name, units in kept.items()} == {
        width["name"]: width["after"] for width in report["widths"]
    }
    # The rows that stayed are the dense model's.
    units = kept["model.layers.1.mlp.down_proj"]
    layers = [model.model.layers[1].mlp for model in (dense, smaller)]
    assert torch.equal(layers[1].up_proj.weight, layers[0].up_proj.weight[units])
    said = " ".join(result.stdout.split())
    assert f"parameters {before} before, {after} after" in said
    assert "KV cache 256 bytes a token before, 128 after" in said
    assert f"perplexity, {other}" in said
    assert f"saved in {out}" in said
    measured = json.loads(run("evaluate", out, "--text", other, "--seqlen", 32, "--json", "-", "--quiet").stdout)
    assert measured["perplexity"] == pytest.approx(report["perplexity"][str(other)]["after"]["perplexity"], rel=1e-5)


def test_speed_and_every_layer_are_shown_when_asked_for(
    run: Any, grouped: Path, text: Path, tmp_path: Path, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["maskopt.shrinking.speed"], "_SECONDS", 0.0)  # as few repetitions as there may be
    command = ("shrink", grouped, tmp_path / "out", "--calibration", text, "--params", 0.2, *DATA[:-1])
    result = run(*command, "--report", "--json", tmp_path / "figures.json")
    speed = read(tmp_path / "figures.json")["speed"]
    assert set(speed) == {"batch 1", "batch 16"}
    for measured in speed.values():
        for when in ("before", "after"):
            assert measured[when]["prefill"] > 0
            assert measured[when]["decode"] > 0
    assert "tokens a second, batch 16" in result.stdout
    assert "layers.0.mlp.down_proj" in result.stdout
    assert "layers.1.mlp.down_proj" in result.stdout


@pytest.mark.parametrize(("refit", "samples"), [("block", 16), ("units", None)])
def test_blocks_are_fitted_to_twice_as_many_other_windows(
    run: Any,
    grouped: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refit: str,
    samples: int | None,
) -> None:
    given: dict[str, Any] = {}

    def seen(*args: Any, **options: Any) -> Any:
        given.update(options)
        return shrink(*args, **options)

    monkeypatch.setattr(sys.modules["maskopt.shrinking"], "shrink", seen)
    command = ("shrink", grouped, tmp_path / "out", "--calibration", text, "--neurons", 0.5, "--samples", 8)
    run(*command, "--no-speed", "--refit", refit, "--seqlen", 8)
    assert given["held_out"].samples == 1
    assert (None if given["further"] is None else given["further"].samples) == samples


WRONG = {
    "nothing": ((), "nothing to remove"),
    "too much": (("--neurons", 1.5), "neurons must be a fraction"),
    "experts": (("--experts", 1.5), "fraction of the experts must lie"),
    "both": (("--neurons", 0.5, "--params", 0.5), "leave those out"),
    "method": (("--neurons", 0.5, "--method", "lottery"), "lottery"),
    "widths": (("--neurons", 0.5, "--widths", "wide"), "widths must be uniform, free or the file of a plan"),
    "refit": (("--neurons", 0.5, "--refit", "none"), "refit must be one of"),
    "epochs": (("--neurons", 0.5, "--refit-epochs", 0), "epochs"),
    "epochs of nothing": (("--neurons", 0.5, "--refit", "units", "--refit-epochs", 2), "leave them out"),
    **{
        f"{name} without units": (("--drop-blocks", 1, name, *value), f"{name} is for units that go by --neurons")
        for name, *value in (
            ("--certify",),
            ("--refit", "model"),
            ("--refit-epochs", 2),
            ("--widths", "free"),
            ("--round-to", 8),
            ("--method", "fasp"),
        )
    },
    "rounded heads": (("--heads", 0.5, "--round-to", 8), "--round-to is for numbers of neurons"),
    "time": (("--neurons", 0.5, "--time-limit", 3), "--time-limit applies to the proofs of --certify"),
    "text": (("--neurons", 0.5, "--evaluate", "nowhere.txt"), "evaluation text nowhere.txt"),
    "memory": (("--neurons", 0.5, "--memory", "much"), "much"),
    "device": (("--neurons", 0.5, "--device", "abacus"), "abacus"),
}


@pytest.mark.parametrize(("options", "words"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_found_before_the_model_is_loaded(
    fails: Any, text: Path, tmp_path: Path, options: Any, words: str
) -> None:
    assert words in fails("shrink", tmp_path / "no model", tmp_path / "out", "--calibration", text, *options)
    assert not (tmp_path / "out").exists()


def test_outputs_are_not_overwritten(fails: Any, grouped: Path, text: Path, tmp_path: Path) -> None:
    command = ("shrink", grouped, grouped, "--calibration", text, "--neurons", 0.5)
    assert f"{grouped} exists already" in fails(*command)
    command = ("shrink", grouped, tmp_path / "out", "--calibration", text, "--neurons", 0.5)
    assert "exists already" in fails(*command, "--json", text)
    assert not (tmp_path / "out").exists()


def test_heads_that_cannot_go_are_refused_and_neurons_go(run: Any, fails: Any, text: Path, tmp_path: Path) -> None:
    folder = _save(tmp_path / "olmo", "Olmo2")
    command = ("shrink", folder, tmp_path / "out", "--calibration", text, "--neurons", 0.5, *DATA)
    assert "can lose no heads: the configuration of Olmo2ForCausalLM cannot say" in fails(*command, "--heads", 0.5)
    assert not (tmp_path / "out").exists()
    result = run(*command)
    assert "left alone, 2 layers" in result.stdout
    assert "heads: the configuration of Olmo2ForCausalLM" in result.stdout


def test_other_commands_take_folders_of_different_widths(
    run: Any, fails: Any, free: Path, text: Path, tmp_path: Path, read: Any
) -> None:
    before = json.loads(run("evaluate", free, "--text", text, "--json", "-", "--quiet").stdout)["perplexity"]
    assert before > 1
    out = tmp_path / "pruned"
    prune = ("prune", free, out, "--calibration", text, "-s", 0.5, "--solver", "wanda", "--samples", 8, "--quiet")
    assert "different widths" in fails(*prune, "--packed")
    run(*prune)
    pruned, _ = load_model(out)
    assert [block.mlp.down_proj.in_features for block in pruned.model.layers] == [8, 16]
    for block in pruned.model.layers:
        assert float((block.mlp.down_proj.weight == 0).float().mean()) == 0.5
    assert "different widths" in fails("pack", out, tmp_path / "packed")
    recovered = tmp_path / "recovered"
    run("recover", out, recovered, "--against", free, "--calibration", text, "--samples", 8, "--recover-tokens", 300)
    again = tmp_path / "again"
    run("shrink", free, again, "--calibration", text, "--neurons", 0.5, *DATA)
    smaller = AutoModelForCausalLM.from_pretrained(again)
    assert [block.mlp.down_proj.in_features for block in smaller.model.layers] == [4, 8]
    assert "import maskopt" in read(again / "report.json")["loads_with"]


PROGRAM = """
import sys, time
from maskopt import shrinking
import maskopt.shrinking.saving as saving
where = sys.argv.pop(1)
def wait(*args, **kwargs):
    print("now", file=sys.stderr, flush=True)
    time.sleep(30)
if where == "work":
    shrinking.shrink = wait
else:
    saving.write_report = wait
from maskopt.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["work", "write"])
def test_an_interrupted_command_leaves_nothing(run: Any, grouped: Path, text: Path, tmp_path: Path, where: str) -> None:
    out, figures = tmp_path / "out", tmp_path / "figures"
    command = [sys.executable, "-c", PROGRAM, where, "shrink", grouped, out, "--calibration", text, "--neurons", 0.5]
    command += [*DATA, "--json", figures]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "now\n"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)
    if where == "work":
        assert (process.returncode, said) == (130, ("", "Interrupted; nothing was written.\n"))
        assert list(tmp_path.iterdir()) == [text]
        return
    kept = tmp_path / "out.unfinished"
    assert (process.returncode, said[0]) == (130, "")
    assert said[1].startswith("Interrupted; 2 finished blocks kept in ")
    assert sorted(tmp_path.iterdir()) == sorted([kept, text])
    run(*command[4:], "--resume")
    assert not kept.exists()
    assert (out / "model.safetensors").exists()
    assert figures.exists()


def test_blocks_that_lie_on_disk_become_what_they_become_in_memory(grouped: Path, tmp_path: Path) -> None:
    ids = [torch.randint(1, 17, (2, 16), generator=torch.Generator().manual_seed(number)) for number in range(4)]
    results = []
    for offload in (None, tmp_path / "work"):
        if offload is not None:
            offload.mkdir()
        model, tokenizer = load_model(grouped, offload=offload)
        report = shrink(model, ids, neurons=0.4, heads=0.5, refit="block", epochs=1)
        out = tmp_path / f"out-{offload is None}"
        save_shrunk(out, model, tokenizer, report)
        results.append((report.parameters, report.cache_bytes, load_file(out / "model.safetensors")))
    (parameters, cache, whole), (others, other_cache, streamed) = results
    assert (parameters, cache) == (others, other_cache)
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in whole.items())


def test_experts_are_dropped_before_neurons(run: Any, text: Path, tmp_path: Path, read: Any) -> None:
    mixture = _save(tmp_path / "mixture", "Mixtral", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2)
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    command = ("shrink", mixture, out, "--calibration", text, "--experts", 0.5, "--neurons", 0.5, *DATA)
    result = run(*command, "--json", figures)
    assert "4 before, 2 after" in result.stdout
    report = read(figures)
    smaller = AutoModelForCausalLM.from_pretrained(out)
    assert smaller.config.num_local_experts == 2
    assert smaller.num_parameters() == report["parameters"]["after"]
    assert load_model(mixture)[0].num_parameters() == report["parameters"]["before"]
    assert [each["before"] for each in report["experts"]["blocks"]] == [4, 4]
    assert {width["kind"] for width in report["widths"]} == {"neurons"}
    assert "Experts that were dropped" in (out / "report.html").read_text()
    few = ("--samples", 8, "--no-speed")
    alone = run("shrink", mixture, tmp_path / "alone", "--calibration", text, "--experts", 0.5, *few)
    assert "loads with" in alone.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "alone").config.num_local_experts == 2
    back = tmp_path / "recovered"
    run("recover", out, back, "--against", mixture, "--calibration", text, "--samples", 8, "--recover-epochs", 1)
    assert AutoModelForCausalLM.from_pretrained(back).num_parameters() == smaller.num_parameters()
    assert not (back / "masks.safetensors").exists()


def test_a_page_lies_beside_the_model(run: Any, grouped: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("shrink", grouped, out, "--calibration", text, "--neurons", 0.5, "--evaluate", text, "--certify", *DATA)
    run(*command)
    report = json.loads((out / "report.json").read_text())
    page = (out / "report.html").read_text()
    for width in report["widths"]:
        assert width["name"] in page
        assert f"{100 * width['proof']['share']:.0f} %" in page
    assert "perplexity, text.txt" in page
    run("report", out, "--html", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page
