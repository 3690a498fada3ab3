"""`maskopt scale` counts from a configuration alone."""

import shutil

from maskopt.models import load_model


def test_it_needs_no_weights(run, model, tmp_path, read):
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    out = run("scale", folder, "--samples", 8, "--speed", "1e9", "--json", tmp_path / "cost.json").stdout
    figures = read(tmp_path / "cost.json")
    network, _ = load_model(model)
    assert figures["parameters"] == network.num_parameters()
    assert figures["tokens"] == 8 * 32
    assert figures["operations"] == sum(figures[name] for name in ("running", "grams", "targets", "solving"))
    assert figures["seconds_at_speed"]["running"] == figures["running"] / 1e9
    assert "in all" in out
    more = run(
        "scale", folder, "--samples", 8, "--speed", "1e9", "--recover", "block", "--json", tmp_path / "more.json"
    )
    assert "recovery" in more.stdout
    with_recovery = read(tmp_path / "more.json")
    assert with_recovery["operations"] == figures["operations"] + with_recovery["fitting"]
    assert with_recovery["fitting"] > figures["running"]
    same = run("scale", folder / "config.json", "--samples", 8, "--speed", "1e9", "--json", "-").stdout
    assert '"tokens": 256' in same


def test_what_is_no_model_is_refused(fails, tmp_path):
    assert "cannot be loaded" in fails("scale", tmp_path)
    assert "--speed" in fails("scale", tmp_path, "--speed", "0")
