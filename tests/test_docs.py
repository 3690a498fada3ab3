"""The how-to pages are run, block after block, so that they cannot rot."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```python" in page.read_text())


def test_every_how_to_is_here() -> None:
    assert {page.stem for page in PAGES} == {"add-a-set", "add-a-solver", "add-an-objective", "choose-a-solver"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    text = page.read_text()
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        # Line numbers of the page, so that a failure points to its line.
        lines = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines + block[1], str(page), "exec"), names)


def test_keep_per_column_is_short() -> None:
    """A partition matroid of your own takes at most 30 lines, a set of another kind not many more."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "add-a-set.md").read_text(), re.DOTALL)
    assert len(blocks[0].strip().splitlines()) <= 30
