"""What is installed: every package, also from a checkout without symbolic links, and none of it twice."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import maskopt

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_listed() -> None:
    found = {"maskopt"}
    for init in [*ROOT.glob("maskopt/*/__init__.py"), *ROOT.glob("maskopt/*/*/__init__.py")]:
        found.add(".".join(init.parent.relative_to(ROOT).parts))
    assert sorted(SETTINGS["packages"]) == SETTINGS["packages"] == sorted(found)


def test_no_package_needs_a_link_to_be_built() -> None:
    for package in SETTINGS["packages"]:
        folder = ROOT / SETTINGS["package-dir"].get(package, package.replace(".", "/"))
        assert (folder / "__init__.py").is_file()
        assert not folder.is_symlink()


@pytest.mark.parametrize("name", ["problems", "oracles", "problems.layer", "oracles.base"])
def test_a_second_copy_of_the_classes_cannot_be_imported(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    folder = name.partition(".")[0]
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: Import maskopt.{folder} instead of {folder}, which would make a second copy of every class."
    )


def test_every_public_name_is_there_and_lazily_so() -> None:
    for name in maskopt.__all__:
        assert getattr(maskopt, name) is not None
        assert name in dir(maskopt)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = maskopt.nothing
    code = "import maskopt, sys; print('torch' in sys.modules, maskopt.solvers.Wanda is maskopt.Wanda)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
