"""Settings of the documentation site, `make docs`; its source is the checkout, so that pages link to results."""

import re
import warnings

from sphinx.application import Sphinx

import maskopt

project = "maskopt"
author = project_copyright = "the maskopt authors"
version = release = maskopt.__version__

extensions = ["sphinx.ext.autodoc", "numpydoc", "myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/results/*.md", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
myst_heading_anchors = 3

html_theme = "pydata_sphinx_theme"
html_title = "maskopt"
html_copy_source = html_show_sourcelink = False
html_extra_path = ["_root"]  # sends who opens the site's folder to docs/index.html
html_theme_options = {"secondary_sidebar_items": ["page-toc"]}

numpydoc_show_class_members = False
autodoc_typehints = "none"  # the docstrings name the types
autodoc_default_options = {"members": True, "imported-members": True}
autodoc_mock_imports = ["compressed_tensors", "llmcompressor", "modelopt", "pydantic"]  # environments of their own


# numpydoc reads docstrings a second time for signatures, before `_as_numpydoc` has seen them.
warnings.filterwarnings("ignore", "Unknown section Class Attributes", UserWarning)


def _as_numpydoc(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Make a docstring what numpydoc and reStructuredText take: |x| are bars, and there are no class attributes."""
    text = "\n".join(lines)
    text = re.sub(r"^Class attributes\n-+$", "Attributes\n----------", text, flags=re.MULTILINE)
    # Outside of literals and of what is in backticks; bars would name substitutions.
    parts = re.split(r"(``.*?``|`[^`]*`)", text, flags=re.DOTALL)
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def setup(app: Sphinx) -> None:
    """Register what docstrings pass through before numpydoc."""
    app.connect("autodoc-process-docstring", _as_numpydoc, priority=100)
