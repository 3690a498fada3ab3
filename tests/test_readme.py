"""The examples of the README and the contributing guide are run here, so that they stay correct."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import maskopt
from maskopt.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    result, better, wanda = (names[name] for name in ("result", "better", "wanda"))
    assert isinstance(result, maskopt.Result)
    assert isinstance(better, maskopt.Result)
    assert isinstance(wanda, maskopt.Result)
    assert result.total < wanda.total
    assert better.total <= wanda.total
    assert "LOCAL" not in capsys.readouterr().out  # the sentence, not the name


def test_contributing_example_is_what_the_class_takes() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    names: dict[str, object] = {"PartitionMatroid": maskopt.PartitionMatroid}
    exec(block[1], names)
    per_column = names["PerColumn"]
    assert callable(per_column)
    assert per_column(2).count((4, 3)) == 6**3


def _commands() -> list[list[str]]:
    joined = README.replace("\\\n", " ")
    return [line.split() for line in re.findall(r"^    \.venv/bin/maskopt (.*)$", joined, re.MULTILINE)]


def test_commands_exist_with_their_options() -> None:
    commands = _commands()
    assert {words[0] for words in commands} == {"prune", "evaluate", "solve", "compare", "trace", "verify", "certify"}
    for words in commands:
        shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"})
        assert shown.exit_code == 0
        for option in words:
            if option.startswith("--"):
                assert option in shown.output, f"{words[0]} has no {option}"


def test_layer_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maskopt.save_instance(tmp_path / "layer.safetensors", maskopt.synthetic(rows=8, d=16))
    monkeypatch.chdir(tmp_path)
    for words in _commands():
        if words[0] in ("solve", "compare", "trace"):
            words = ["layer.safetensors" if "*" in word else word for word in words]
            done = CliRunner().invoke(app, [*words, "--json", f"{words[0]}.json"])
            assert done.exit_code == 0, done.output
    assert (tmp_path / "mask.safetensors").is_file()
    assert (
        len(json.loads((tmp_path / "compare.json").read_text())["rows"][0]["results"]) == 4 * 2 + 2
    )  # kept and refitted, and joint methods


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
