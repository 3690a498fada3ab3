from __future__ import annotations

import json

import pytest

from maskopt.allocation import load_plan
from maskopt.models import RULES, load_model, select_layers


@pytest.fixture
def shapes(model):
    network, _ = load_model(model)
    return {layer.name: layer.shape for layer in select_layers(network).layers}


@pytest.fixture
def allocated(run, model, text, tmp_path):
    """The result of `maskopt allocate` with Wanda, the plan, the plot and the JSON."""
    plan, plot, figures = (tmp_path / name for name in ("plan.json", "plan.svg", "figures.json"))
    command = ("allocate", model, "--calibration", text, "-s", 0.6, "--solver", "wanda", "--samples", 12)
    return run(*command, "--out", plan, "--plot", plot, "--json", figures), plan, plot, figures


def test_the_plan_is_what_prune_takes(allocated, run, model, text, tmp_path, read, shapes):
    result, plan_file, plot, figures_file = allocated
    plan, figures = load_plan(plan_file), read(figures_file)
    assert plan.rule == "auto"
    assert plan.sparsities == figures["sparsities"]
    assert figures["kept"] == plan.kept(shapes)
    assert figures["sparsity"] == pytest.approx(plan.sparsity(shapes))
    assert figures["sparsity"] == pytest.approx(0.6, abs=0.03)
    assert plan.details["chosen"] in plan.details["divergence"]
    assert "nats per token" in result.stdout
    for name, sparsity in plan.sparsities.items():
        assert name in result.stdout
        assert f"{sparsity:.4f}" in result.stdout
    assert plot.read_text().lstrip().startswith("<?xml")
    out = tmp_path / "pruned"
    run("prune", model, out, "--calibration", text, "--samples", 12, "--solver", "wanda", "--allocation", plan_file)
    report = read(out / "report.json")
    assert {layer["name"]: layer["sparsity"] for layer in report["layers"]} == pytest.approx(plan.sparsities)
    assert report["plan"]["sparsities"] == plan.sparsities
    assert report["command"]["allocation"] == str(plan_file)
    again = tmp_path / "again"
    run(
        "prune",
        model,
        again,
        "--calibration",
        text,
        "--samples",
        12,
        "--solver",
        "wanda",
        "--allocation",
        out / "report.json",
    )
    assert read(again / "report.json")["plan"] == report["plan"]


def test_prune_allocates_by_itself(allocated, run, model, text, tmp_path, read):
    """With the same seed and settings the plan is that of `maskopt allocate`."""
    _, plan_file, _, _ = allocated
    out, plot = tmp_path / "pruned", tmp_path / "sparsities.png"
    command = ("prune", model, out, "--calibration", text, "-s", 0.6, "--solver", "wanda", "--samples", 12)
    result = run(*command, "--allocation", "auto", "--plot", plot)
    report = read(out / "report.json")
    assert report["plan"]["sparsities"] == load_plan(plan_file).sparsities
    assert "sparsity of each layer by the plan (auto)" in " ".join(result.stdout.split())
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_sparsities_of_patterns(run, model, text, tmp_path, read):
    out = tmp_path / "pruned"
    command = ("prune", model, out, "--calibration", text, "-s", 0.5, "--solver", "magnitude", "--samples", 2)
    run(*command, "--sparsity-of", "*.mlp.*=0.25", "--sparsity-of", "*.down_proj=0.75")
    for layer in read(out / "report.json")["layers"]:
        expected = 0.75 if "down_proj" in layer["name"] else 0.25 if "mlp" in layer["name"] else 0.5
        assert layer["sparsity"] == expected


def test_the_mean_of_a_pattern_n_m_is_its_own_or_the_users(run, model, text, tmp_path, shapes):
    for options, sparsity in (((), 0.5), (("-s", 0.625), 0.625)):
        plan = tmp_path / f"{sparsity}.json"
        command = ("allocate", model, "--calibration", text, "--pattern", "4:8", *options, "--solver", "wanda")
        run(*command, "--samples", 6, "--allocation", "kl", "--out", plan)
        found = load_plan(plan)
        assert found.pattern == "4:8"
        assert found.sparsity(shapes) == pytest.approx(sparsity, abs=0.03)
        assert all(round(8 * value, 9) == round(8 * value) for value in found.sparsities.values())


def test_the_rules_are_those_of_the_package(fails, model, text, tmp_path):
    sentence = fails(
        "allocate", model, "--calibration", text, "-s", 0.5, "--out", tmp_path / "p", "--allocation", "best"
    )
    assert f"choose one of {', '.join(RULES)}" in sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--allocation", "nowhere.json"), "neither a file nor a rule"),
        (("--sparsity-of", "*.mlp.*"), "takes a pattern of names and a sparsity"),
        (("--sparsity-of", "*.mlp.*=2"), "takes a pattern of names and a sparsity"),
        (("--sparsity-of", "*.none=0.5"), "matches no layer to prune"),
        (("--together", "*.q_proj,*.k_proj"), "--together is for the rules of --allocation"),
        (("--allocation", "owl", "--together", "*.q_proj,"), "patterns of names with commas between them"),
        (("--allocation", "owl", "--together", "*.gate_proj,*.down_proj"), "cannot have one sparsity"),
        (("--plot", "plan.jpg"), "A figure is a"),
        (("--allocation", "auto", "--samples", "2"), "at least three calibration sequences"),
    ],
)
def test_wrong_options_of_prune(fails, model, text, tmp_path, options, sentence):
    out = tmp_path / "pruned"
    assert sentence in fails("prune", model, out, "--calibration", text, "-s", 0.5, "--solver", "wanda", *options)
    assert not out.exists()


def test_a_plan_says_its_sparsities_and_pattern(fails, model, text, tmp_path, shapes):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"pattern": "2:4", "sparsities": dict.fromkeys(shapes, 0.5)}))
    command = ("prune", model, tmp_path / "pruned", "--calibration", text, "--allocation", plan)
    assert "says the sparsities" in fails(*command, "-s", 0.5)
    assert "is for 2:4, not unstructured" in fails(*command, "--pattern", "unstructured")
    plan.write_text(json.dumps({"pattern": "2:4", "sparsities": {"model.layers.0.mlp.up_proj": 0.5}}))
    assert "no sparsity for 13 layers to prune" in fails(*command)
    plan.write_text("[")
    assert "cannot be read" in fails(*command)


def test_nothing_is_overwritten(fails, model, text, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text("mine")
    assert "exists" in fails("allocate", model, "--calibration", text, "-s", 0.5, "--out", plan)
    assert plan.read_text() == "mine"
