"""Names and numbers as tables and result lines say them."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from maskopt.cli.estimate import Estimate
from maskopt.cli.words import duration, kept_words, named_table, set_words, shortened, solver_words
from maskopt.oracles import NM, Blocks, MaskSet, PerRow, Unstructured
from maskopt.solvers import ContinuationFrankWolfe, OneSwap, SparseFW, Wanda
from maskopt.weights import LeastSquares

LAYERS = [
    f"model.language_model.layers.{block}.{part}"
    for block in range(28)
    for part in (*(f"self_attn.{letter}_proj" for letter in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]
EXPERTS = [
    f"model.layers.{block}.mlp.experts.{expert}.w{part}"
    for block in (0, 11)
    for expert in range(64)
    for part in (1, 2, 3)
]


@pytest.mark.parametrize("names", [LAYERS, EXPERTS])
@pytest.mark.parametrize("width", [12, 16, 20, 40, 200])
def test_short_names_fit_and_differ(names: list[str], width: int) -> None:
    short = shortened(names, width)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= width
    if width == 200:
        assert short == names


@given(st.lists(st.text("ab.0", min_size=1, max_size=12), min_size=1, max_size=6), st.integers(1, 14))
def test_names_that_differ_stay_different_at_any_width(names: list[str], width: int) -> None:
    short = shortened(names, width)
    assert len(short) == len(names)
    assert [short.index(name) for name in short] == [names.index(name) for name in names]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_of_numbers_cut_names_and_no_number(width: int) -> None:
    columns = {"error": ["0.12345"] * len(LAYERS), "seconds": ["12.34"] * len(LAYERS)}
    console = Console(width=width, file=io.StringIO())
    console.print(named_table("", "layer", LAYERS, columns, width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = [line.split() for line in lines if "12.34" in line]
    assert len(rows) == len({name for name, *_ in rows}) == len(LAYERS)
    assert all(row[1:] == ["0.12345", "12.34"] for row in rows)


def test_what_all_names_share_goes_first() -> None:
    names = [f"model.layers.{block}.self_attn.{letter}_proj" for block in (0, 1) for letter in "qk"]
    assert shortened(names, 22) == [
        "0.self_attn.q_proj",
        "0.self_attn.k_proj",
        "1.self_attn.q_proj",
        "1.self_attn.k_proj",
    ]
    assert shortened(["model.layers.0.mlp.up", "model.layers.12.mlp.up"], 5) == ["0", "12"]
    assert shortened(["only.one"], 3) == ["o…e"]


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (OneSwap(), "OneSwap"),
        (OneSwap(max_steps=3), "OneSwap(max_steps=3)"),
        (SparseFW(iterations=7, start=Wanda()), "SparseFW(iterations=7)"),
        (LeastSquares(solver=Wanda()), "LeastSquares(solver=Wanda)"),
        (
            LeastSquares(0.5, ContinuationFrankWolfe(iterations=5)),
            "LeastSquares(ridge=0.5, solver=ContinuationFrankWolfe(iterations=5))",
        ),
    ],
)
def test_solvers_name_what_differs_from_the_defaults(solver: object, words: str) -> None:
    assert solver_words(solver) == words


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (PerRow(0.4), "keeps 154 of 384 per row, rounded up"),
        (PerRow(0.5), ""),
        (PerRow(7), ""),
        (NM(keep=2, group=4), ""),
        (PerRow(1 - 0.7), "keeps 116 of 384 per row, rounded up"),
        (Unstructured(0.4), "keeps 2458 of 6144 in the matrix, rounded up"),
        (Blocks(0.4, (4, 4)), "keeps 7 of 16 per block of 4 x 4, rounded up"),
    ],
)
def test_kept_counts_say_why_the_sparsity_is_not_the_one_asked_for(masks: MaskSet, words: str) -> None:
    assert kept_words(masks, [(16, 384)]) == words


def test_several_widths_are_all_named() -> None:
    assert kept_words(PerRow(0.4), [(8, 64), (8, 20), (8, 172)]) == "keeps 26 of 64, 69 of 172 per row, rounded up"


@pytest.mark.parametrize(
    ("pattern", "sparsity", "words"), [("per-row", 0.6, "per-row 60 %"), ("2:4", None, "2:4"), ("2:4", 0.5, "2:4")]
)
def test_sets_are_named_as_typed(pattern: str, sparsity: float | None, words: str) -> None:
    assert set_words(pattern, sparsity) == words


@pytest.mark.parametrize(("seconds", "words"), [(0.04, "0.0 s"), (119, "119.0 s"), (180, "3.0 min"), (9000, "2.5 h")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_time_left_follows_what_was_measured() -> None:
    now = 0.0
    estimate = Estimate({"run": 10.0, "solve": 100.0}, {"run": 1000.0, "solve": 1000.0}, lambda: now)
    fractions = []
    for block in range(10):
        estimate.reach("run", block)
        fractions.append(estimate.fraction)
        now += 2.0  # a unit takes two seconds
        for step in range(10):
            estimate.reach("solve", 10 * block + step)
            fractions.append(estimate.fraction)
            now += 0.5
    estimate.reach("run", 10)
    estimate.reach("solve", 100)
    assert estimate.left == 0.0
    assert estimate.fraction == 1.0
    assert fractions == sorted(fractions)


def test_guesses_fade_once_the_work_itself_was_measured() -> None:
    now = 0.0
    estimate = Estimate({"solve": 100.0}, {"solve": 1.0}, lambda: now)
    estimate.reach("solve", 0)
    assert estimate.left == pytest.approx(100.0)
    now = 100.0
    estimate.reach("solve", 50)
    assert estimate.left == pytest.approx(100.0, rel=0.05)  # two seconds each, not one
    estimate.plan("solve", 75)
    assert estimate.left == pytest.approx(50.0, rel=0.05)
