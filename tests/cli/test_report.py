"""`maskopt report`: the pages of a pruned model and of other results."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from maskopt.cli import page as page_module
from maskopt.cli import page_parts


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


def checked(path):
    """Return a page that needs nothing from elsewhere, and whose names of parts are its own and differ."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(address.startswith("#") for address in page.addresses)
    assert "script" not in page.tags
    assert "prefers-color-scheme: dark" in text
    identities = re.findall(r'id="([^"]+)"', text)
    assert len(identities) == len(set(identities))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text)) <= set(identities)
    return page


@pytest.fixture
def out(run, model, text, tmp_path):
    """A pruned model."""
    options = ["--calibration", text, "--samples", 2, "--seqlen", 32, "--sparsity", 0.5, "--evaluate", text]
    run("prune", model, tmp_path / "out", *options)
    return tmp_path / "out"


def test_prune_writes_a_page_that_needs_nothing_else(out):
    page, report = checked(out / "report.html"), json.loads((out / "report.json").read_text())
    assert all(layer["name"] in page.text for layer in report["layers"])
    assert all(each["name"] in page.text for each in report["left_dense"])
    pruned = report["perplexity"]["evaluation"]["pruned"]["perplexity"]
    assert f"{pruned:.3f}" in page.text
    assert "50.0 %" in page.text
    assert str(out) in page.text
    assert page.tags.count("svg") == 2
    assert page.addresses  # of clip paths, such as `checked` compares


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
    monkeypatch.setattr(page_parts, "can_draw", lambda: False)
    run("report", out, "--html", tmp_path / "page.html")
    assert "svg" not in Page((tmp_path / "page.html").read_text()).tags


def test_a_comparison_has_a_page(run, layer, tmp_path, read):
    options = ("-p", "per-row", "-p", "2:4", "-s", 0.5, "--solvers", "wanda,one-swap", "--weights", "keep,lsq")
    run("compare", layer, *options, "--json", tmp_path / "compare.json")
    run("report", tmp_path / "compare.json")
    page, figures = checked(tmp_path / "compare.html"), read(tmp_path / "compare.json")
    assert page.tags.count("svg") == 1
    for row in figures["rows"]:
        assert f"{Path(row['instance']).stem}, {row['label']}" in page.text
        for result in row["results"].values():
            assert f"{result['error_ratio']:.4g} ({result['seconds']:.2f} s)" in page.text
    median = figures["summary"]["one-swap + lsq"]["wanda"]["median_error_ratio"]
    assert f"{median:.4g}" in page.text
    # One solver has nothing to be compared with, and none of its cases may lack a number.
    run("compare", layer, "-s", 0.5, "--solvers", "wanda", "--json", tmp_path / "one.json")
    one = json.loads((tmp_path / "one.json").read_text())
    one["rows"][0]["results"]["wanda"]["error_ratio"] = None
    (tmp_path / "one.json").write_text(json.dumps(one))
    run("report", tmp_path / "one.json")
    assert "svg" not in checked(tmp_path / "one.html").tags


def test_trajectories_have_a_page(run, layer, tmp_path, read):
    run("trace", layer, "-s", 0.5, "--solvers", "dicg,one-swap", "--json", tmp_path / "trace.json")
    run("report", tmp_path / "trace.json", "--html", tmp_path / "page.html")
    page, traces = checked(tmp_path / "page.html"), read(tmp_path / "trace.json")["traces"]
    assert page.tags.count("svg") == 1
    for spec, history in traces.items():
        assert spec in page.text
        assert f"{history['incumbent'][-1]:.6f}" in page.text
    assert f"{max(history['bound'][-1] or 0 for history in traces.values()):.4g}" in page.text


def test_recovery_writes_a_page_and_packs(run, model, out, text, tmp_path, read):
    command = ("recover", out, tmp_path / "fit", "--against", model, "--calibration", text, "--samples", 8)
    options = ("--seqlen", 32, "--recover", "block", "--recover-epochs", 1, "--evaluate", text, "--packed")
    said = run(*command, *options, "--json", tmp_path / "fit.json").stdout
    figures, report = read(tmp_path / "fit.json"), read(tmp_path / "fit" / "report.json")
    packed = figures.pop("packed")
    assert figures == report
    assert packed["packed_bytes"] < packed["dense_bytes"]
    assert f"packed: {packed['ratio']:.3f}" in said
    page = checked(tmp_path / "fit" / "report.html")
    assert page.tags.count("svg") == 1
    for record in report["recovery"]:
        assert record["name"] in page.text
        assert f"{record['after']:.4g}" in page.text
    assert f"{report['perplexity']['after']['perplexity']:.4g}" in page.text
    run("report", tmp_path / "fit.json")
    again = checked(tmp_path / "fit.html")
    assert f"{packed['ratio']:.4g}" in again.text
    assert str(tmp_path / "fit") in again.text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_browser_shows_the_page(run, layer, tmp_path):
    """In a light and in a dark browser the page has its ground, and on it letters and lines of the figures' colours."""
    from matplotlib.image import imread

    run("trace", layer, "-s", 0.5, "--solvers", "dicg,one-swap", "--json", tmp_path / "trace.json")
    run("report", tmp_path / "trace.json")
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}")
    for more, ground in ((), (255, 255, 255)), (("--force-dark-mode",), (0x16, 0x18, 0x1C)):
        shot = tmp_path / "shot.png"
        place = (f"--screenshot={shot}", "--window-size=1000,900", (tmp_path / "trace.html").as_uri())
        subprocess.run([BROWSER, *options, *more, *place], check=True, capture_output=True, timeout=120)
        pixels = (255 * imread(shot)[..., :3]).round().astype(int).reshape(-1, 3)
        assert tuple(pixels[0]) == ground
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # of the two solvers
            assert (pixels == colour).all(1).sum() > 100
        shot.unlink()


def test_measured_models_have_a_page(run, fails, model, out, text, tmp_path, read):
    figures = tmp_path / "figures.json"
    run("evaluate", out, "--against", model, "--text", text, "--json", figures)
    run("report", figures)
    both = read(figures)
    assert f"{both['against']['perplexity']:.4g} → {both['perplexity']:.4g}" in checked(tmp_path / "figures.html").text
    score = {"task": "pets", "metric": "acc", "filter": "none", "value": 0.5, "error": 0.1, "examples": 4, "shots": 0}
    both["tasks"], both["against"]["tasks"] = [score], [{**score, "value": 0.75, "error": None}]
    figures.write_text(json.dumps(both))
    run("report", figures, "--html", tmp_path / "tasks.html")
    assert "-0.2500" in checked(tmp_path / "tasks.html").text
    (tmp_path / "solve.json").write_text('{"objective": 1.0, "settings": {}}')
    assert "none of maskopt prune, recover, shrink, compare, trace or evaluate" in fails(
        "report", tmp_path / "solve.json"
    )


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
