"""What the documentation site holds; `make docs`, a part of `make check`, builds it with warnings as errors."""

import importlib
import pkgutil
import re
from pathlib import Path

import maskopt

ROOT = Path(__file__).parent.parent
API = {page.stem: page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")}


def documented(page: str) -> set[str]:
    return set(re.findall(r"automodule:: (\S+)", page))


def test_every_public_package_has_a_page() -> None:
    for name in maskopt._FOLDERS:
        assert documented(API[name]) == {f"maskopt.{name}"}


def test_every_adapter_is_documented() -> None:
    adapters = {module.name for module in pkgutil.iter_modules(importlib.import_module("maskopt.plugins").__path__)}
    assert documented(API["plugins"]) == {"maskopt.plugins", *(f"maskopt.plugins.{name}" for name in adapters)}


def test_no_two_pages_document_the_same_object() -> None:
    owners: dict[int, str] = {}
    for name in maskopt._FOLDERS:
        module = importlib.import_module(f"maskopt.{name}")
        for public in module.__all__:
            value = getattr(module, public)
            if isinstance(value, type):
                assert owners.setdefault(id(value), name) == name, public
