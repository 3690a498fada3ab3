"""The how-to pages are run, block after block, and so are the examples of docstrings, so that they stay correct."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import maskopt
from tests.registry import DOCS, SET_ENTRIES, SOLVER_ENTRIES, code_of, definitions_of

PAGES = sorted(page for page in DOCS.glob("*.md") if code_of(page))


def with_examples() -> list[str]:
    folder = Path(maskopt.__file__).parent
    names = (module.name for module in pkgutil.walk_packages([str(folder)], "maskopt."))
    files = {name: folder / Path(*name.split(".")[1:]) for name in names}
    return sorted(name for name, file in files.items() if ">>> " in _source(file))


def _source(file: Path) -> str:
    return (file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text()


def test_every_how_to_is_here() -> None:
    assert {page.stem for page in PAGES} == {
        "add-a-set",
        "add-a-solver",
        "add-an-objective",
        "beyond-the-layer",
        "choose-a-solver",
        "fine-tune",
        "packed-folders",
        "plug-in",
        "shrink",
        "sparsity-per-layer",
        "verify-on-a-cluster",
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for lines, block in code_of(page):
        # Line numbers of the page, so that a failure points to its line.
        exec(compile("\n" * lines + block, str(page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("name", with_examples())
def test_examples_of_docstrings_give_what_they_say(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_classes_of_the_pages_are_registered() -> None:
    for page, name, registry in (("add-a-set", "SETS", SET_ENTRIES), ("add-a-solver", "SOLVERS", SOLVER_ENTRIES)):
        entries = definitions_of(DOCS / f"{page}.md")[name]
        assert entries
        assert set(entries) <= set(registry)


def test_a_file_of_ones_own_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.registry import registered_elsewhere

    file = tmp_path / "mine.py"
    file.write_text(
        "from maskopt.oracles import PerRow\nfrom tests.entries import SetEntry\n"
        'SETS = {"mine": SetEntry(lambda shape, fraction: PerRow(fraction), matroid=True)}\n'
    )
    monkeypatch.setenv("MASKOPT_REGISTER", str(file))
    assert registered_elsewhere("SETS")["mine"].matroid


def test_keep_per_column_is_short() -> None:
    """A partition matroid of your own takes at most 30 lines, a set of another kind not many more."""
    _, block = code_of(DOCS / "add-a-set.md")[0]
    assert len(block.strip().splitlines()) <= 30
