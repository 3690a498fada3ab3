"""Commands on a GPU, where there is one."""

from __future__ import annotations

import pytest

from tests.cli.test_ranks import content, start
from tests.cli.test_resume import interrupt, named, weights
from tests.devices.gpu import needs_gpu

pytestmark = needs_gpu

__all__ = ["interrupt"]  # a fixture
DATA = ("--samples", 16, "--seqlen", 32, "--device", "cuda")


@pytest.fixture
def arguments(model, text):
    return ["prune", model, "OUT", "--calibration", text, "--pattern", "2:4", *DATA]


def test_models_go_through_every_command(run, read, model, text, tmp_path):
    plan, pruned, recovered, packed, shrunk = (tmp_path / name for name in ("plan.json", "a", "b", "c", "d"))
    data = ("--calibration", text, *DATA)
    run("allocate", model, *data, "-s", 0.5, "--solver", "wanda", "--out", plan)
    run("prune", model, pruned, *data, "--allocation", plan, "--recover", "block", "--evaluate", text)
    run("recover", pruned, recovered, "--against", model, *data, "--recover-tokens", 2000)
    run("pack", recovered, packed)
    run("shrink", model, shrunk, *data, "--neurons", 0.5, "--certify")
    perplexity = {}
    for folder in (recovered, packed, shrunk):
        for device in ("cpu", "cuda"):
            figures = tmp_path / f"{folder.name} {len(perplexity)}.json"
            run("evaluate", folder, "--text", text, "--device", device, "--json", figures)
            perplexity[folder.name, device] = read(figures)["perplexity"]
        assert perplexity[folder.name, "cuda"] == pytest.approx(perplexity[folder.name, "cpu"], rel=1e-3)
    assert perplexity["b", "cuda"] == perplexity["c", "cuda"]


def test_layers_go_through_every_command(run, read, layer, tmp_path):
    found = []
    for device in ("cpu", "cuda"):
        figures, mask = (tmp_path / f"{len(found)}{ending}" for ending in (".json", ".safetensors"))
        run("solve", layer, "-s", 0.5, "--weights", "best", "--device", device, "--json", figures)
        run("solve", layer, "-s", 0.5, "--device", device, "--out", mask)
        proof = tmp_path / f"proof {len(found)}.json"
        run("certify", layer, "-s", 0.5, "--bound", "sdp", "--mask", mask, "--device", device, "--json", proof)
        found.append((read(figures)["relative_error"], read(proof)["layer"]["bound"]))
        run("trace", layer, "-s", 0.5, "--solvers", "continuation", "--device", device)
        run("compare", layer, "-s", 0.5, "--device", device)
    assert found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.parametrize("blocks", [0, 1])
def test_an_interrupted_run_ends_with_the_same_bits(run, arguments, interrupt, tmp_path, blocks):
    run(*named(arguments, tmp_path / "whole"))
    run(*named(arguments, tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")
    if blocks:
        interrupt(blocks)
    run(*named(arguments, tmp_path / "out", "--resume"))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_rank_computes_what_a_process_does(run, arguments, tmp_path):
    run(*named(arguments, tmp_path / "one"))
    done = start(1, *named(arguments, tmp_path / "rank"))
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "rank") == content(tmp_path / "one")
