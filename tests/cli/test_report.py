"""`maskopt report`: the page of a pruned model."""

import json
import re
from html.parser import HTMLParser

import pytest

from maskopt.cli import page as page_module


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects text and addresses."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.addresses, self.tags = [], "", [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def out(run, model, text, tmp_path):
    """A pruned model."""
    options = ["--calibration", text, "--samples", 2, "--seqlen", 32, "--sparsity", 0.5, "--evaluate", text]
    run("prune", model, tmp_path / "out", *options)
    return tmp_path / "out"


def test_prune_writes_a_page_that_needs_nothing_else(out):
    text = (out / "report.html").read_text(encoding="utf-8")
    page, report = Page(text), json.loads((out / "report.json").read_text())
    assert all(layer["name"] in page.text for layer in report["layers"])
    assert all(each["name"] in page.text for each in report["left_dense"])
    pruned = report["perplexity"]["evaluation"]["pruned"]["perplexity"]
    assert f"{pruned:.3f}" in page.text
    assert "50.0 %" in page.text
    assert str(out) in page.text
    assert all(address.startswith("#") for address in page.addresses)  # parts of its own figures
    assert "script" not in page.tags
    assert page.tags.count("svg") == 2
    assert "prefers-color-scheme: dark" in text
    identities = re.findall(r'id="([^"]+)"', text)
    assert len(identities) == len(set(identities))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    assert used
    assert used <= set(identities)


def test_a_page_is_written_where_one_says(run, out, tmp_path, read):
    said = run("report", out, "--html", tmp_path / "page.html", "--json", tmp_path / "json").stdout
    assert str(tmp_path / "page.html") in said.replace("\n", "")
    assert (tmp_path / "page.html").read_text() == (out / "report.html").read_text()
    assert read(tmp_path / "json")["report"]["sparsity"] == 0.5


def test_a_page_is_not_overwritten(fails, out):
    before = (out / "report.html").read_bytes()
    assert "report.html" in fails("report", out)
    assert (out / "report.html").read_bytes() == before


def test_names_are_text_and_proofs_are_told(run, out, tmp_path):
    report = json.loads((out / "report.json").read_text())
    report["layers"][0] |= {"name": "<script>alert(1)</script>", "gap_kind": "PROVEN"}
    report["layers"][0]["lower_bound"] = 0.8 * report["layers"][0]["objective"]
    report["perplexity"]["evaluation"]["pruned"]["perplexity"] = None
    (out / "report.json").write_text(json.dumps(report))
    run("report", out, "--html", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "80 %" in page.text


def test_a_page_has_no_figures_without_matplotlib(run, out, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "can_draw", lambda: False)
    run("report", out, "--html", tmp_path / "page.html")
    assert "svg" not in Page((tmp_path / "page.html").read_text()).tags


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"layers": [1], "settings": {}}'])
def test_what_is_no_report_says_so(fails, tmp_path, content):
    assert "cannot be read" in fails("report", tmp_path)
    (tmp_path / "report.json").write_text(content)
    assert "report" in fails("report", tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_fails_loses_no_model(run, model, text, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError

    monkeypatch.setattr(page_module, "page_of", fail)
    run("prune", model, tmp_path / "out", "--calibration", text, "--samples", 2, "--seqlen", 32, "--sparsity", 0.5)
    assert (tmp_path / "out" / "report.json").exists()
    assert not (tmp_path / "out" / "report.html").exists()
