"""Packed folders are registered when transformers is imported, before maskopt or after it, and not earlier."""

import subprocess
import sys
from pathlib import Path

import pytest

from maskopt.packed import registration


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A package with a module that is waited for; the list says in which order things happened."""
    (tmp_path / "library_of_tables").mkdir()
    (tmp_path / "library_of_tables" / "__init__.py").write_text("")
    (tmp_path / "library_of_tables" / "table.py").write_text("import sys\nsys.happened.append('table')\n")
    happened: list[str] = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "happened", happened, raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(registration, "_STEPS", {"library_of_tables.table": "register_table"})
    monkeypatch.setattr(registration, "_READERS", ("maskopt.packed.reader",))
    monkeypatch.setattr("maskopt.packed.reader.register_table", lambda: happened.append("registered"), raising=False)
    for name in ("library_of_tables", "library_of_tables.table"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return happened


def load() -> object:
    import library_of_tables.table

    return library_of_tables.table


def test_the_step_is_taken_once_and_after_the_import(late: list[str]) -> None:
    registration.register()
    assert late == []
    module = load()
    assert late == ["table", "registered"]
    assert load() is module
    assert late == ["table", "registered"]


def test_what_is_imported_already_is_told_at_once(late: list[str]) -> None:
    finders = len(sys.meta_path)
    load()
    registration.register()
    assert late == ["table", "registered"]
    assert len(sys.meta_path) == finders


def test_no_import_fails_because_of_it(late: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AttributeError("no such table")

    monkeypatch.setattr("maskopt.packed.reader.register_table", fail)
    registration.register()
    with pytest.warns(UserWarning, match="packed folders cannot be loaded by this version of transformers: .*no such"):
        assert load().__name__ == "library_of_tables.table"
    assert late == ["table"]


def test_one_reader_that_fails_does_not_stop_the_others(late: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_READERS", ("maskopt.packed.nothing", "maskopt.packed.reader"))
    registration.register()
    with pytest.warns(UserWarning, match="cannot be loaded by this version of transformers"):
        load()
    assert late == ["table", "registered"]


@pytest.mark.slow
def test_importing_maskopt_imports_no_library(tmp_path: Path) -> None:
    code = (
        "import sys, maskopt\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'safetensors') if name in sys.modules])\n"
        "import transformers\n"
        "print('maskopt.packed.reader' in sys.modules)\n"
        "transformers.AutoConfig\n"
        "from transformers import CONFIG_MAPPING\n"
        "print('maskopt-packed' in CONFIG_MAPPING and 'maskopt-shrunk' in CONFIG_MAPPING)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["[]", "False", "True"]
