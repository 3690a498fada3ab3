"""Plans: their checks, what they make of shapes, their files, and sparsities fixed by patterns of names."""

import json
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt.allocation import Plan, load_plan, overridden
from maskopt.errors import MaskoptError
from maskopt.oracles import PerRow
from tests.helpers import Shape, examples, fractions

SHAPES: dict[str, Shape] = {"up": (8, 4), "down": (4, 8), "gate": (12, 16)}
SPARSITIES = {"up": 0.5, "down": 0.7, "gate": 0.3}
PATTERNS = ["per-row", "unstructured", "columns", "rows", "blocks-2x4", "2:4", "transposable-1:4", "at-most-per-row"]


def size(shape: Shape) -> int:
    return shape[0] * shape[1]


# Checks


@pytest.mark.parametrize(
    ("pattern", "sparsities", "sentence"),
    [
        (None, {"a": 0.5}, "A plan's pattern is a word such as per-row or 2:4; got None"),
        (4, {"a": 0.5}, "A plan's pattern is a word such as per-row or 2:4; got 4"),
        ("per-row", {}, r"A plan needs a sparsity for each layer, by name; got {}"),
        ("per-row", None, "A plan needs a sparsity for each layer, by name; got None"),
        ("per-row", [0.5], r"A plan needs a sparsity for each layer, by name; got \[0\.5\]"),
        ("per-row", 0.5, r"A plan needs a sparsity for each layer, by name; got 0\.5"),
        ("per-row", {"a": 0.5, "b": 1.5}, r"The sparsity of b must lie between 0 and 1; got 1\.5"),
        ("per-row", {"a": -0.1}, r"The sparsity of a must lie between 0 and 1; got -0\.1"),
        ("per-row", {"a": math.nan}, "The sparsity of a must lie between 0 and 1; got nan"),
        ("per-row", {"a": math.inf}, "The sparsity of a must lie between 0 and 1; got inf"),
        ("per-row", {"a": True}, "The sparsity of a must lie between 0 and 1; got True"),
        ("per-row", {"a": "0.5"}, r"The sparsity of a must lie between 0 and 1; got '0\.5'"),
        ("per-row", {"a": None}, "The sparsity of a must lie between 0 and 1; got None"),
        ("per-row", {"a": [0.5]}, r"The sparsity of a must lie between 0 and 1; got \[0\.5\]"),
        ("per-row", {3: 0.5}, "The sparsity of 3 "),
    ],
)
def test_bad_plans_are_refused(pattern: Any, sparsities: Any, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        Plan(pattern, sparsities)


@pytest.mark.parametrize("sparsity", [0, 1, 0.0, 1.0, 5e-324])
def test_the_ends_of_the_range_are_sparsities(sparsity: float) -> None:
    kept = Plan("per-row", {"up": sparsity}).kept({"up": (8, 4)})
    assert kept == (32 if sparsity < 0.5 else 0)


# Shapes


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_keep_what_the_plan_says(pattern: str) -> None:
    plan = Plan(pattern, SPARSITIES)
    masks = plan.masks(SHAPES)
    assert list(masks) == list(SHAPES)
    total = 0
    for name, shape in SHAPES.items():
        scores = torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.1
        kept = int(masks[name].lmo_mask(-scores).sum())
        counts = plan.counts(SHAPES)[name]
        assert kept == Plan(pattern, {name: SPARSITIES[name]}).kept({name: shape})
        assert kept >= (1 - SPARSITIES[name]) * size(shape) * (1 - 1e-12)
        assert kept - counts.step < (1 - SPARSITIES[name]) * size(shape)
        total += kept
    assert plan.kept(SHAPES) == total
    assert plan.sparsity(SHAPES) == 1 - total / sum(map(size, SHAPES.values()))


def test_figures_by_hand() -> None:
    plan = Plan("per-row", SPARSITIES)
    # Of 4, 8 and 16 a row: 2, 3 (from 2.4) and 12 (from 11.2).
    assert {name: masks.keep for name, masks in plan.masks(SHAPES).items()} == {"up": 2, "down": 3, "gate": 12}
    assert plan.kept(SHAPES) == 8 * 2 + 4 * 3 + 12 * 12
    assert plan.sparsity(SHAPES) == 1 - 172 / 256


def test_layers_of_equal_counts_share_a_set() -> None:
    masks = Plan("per-row", {"a": 0.5, "b": 0.51, "c": 0.75}).masks({"a": (2, 8), "b": (3, 8), "c": (2, 16)})
    assert masks["a"] is masks["b"] is masks["c"]  # 4 of 8, 4 of 8, 4 of 16
    other = Plan("per-row", {"a": 0.5, "b": 0.625}).masks({"a": (2, 8), "b": (2, 8)})
    assert (other["a"].keep, other["b"].keep) == (4, 3)


def test_layers_take_the_order_of_shapes() -> None:
    plan = Plan("per-row", {"b": 0.0, "a": 0.5})
    assert list(plan.masks({"a": (2, 4), "b": (2, 8)})) == ["a", "b"]
    assert plan.kept({"a": (2, 4), "b": (2, 8)}) == 4 + 16


@pytest.mark.parametrize("method", ["counts", "masks", "kept", "sparsity"])
@pytest.mark.parametrize(
    ("shapes", "pattern", "sentence"),
    [
        ({**SHAPES, "x": (2, 4), "y": (2, 4)}, "per-row", "The plan has no sparsity for 2 layers to prune, such as x"),
        ({"up": (8, 4)}, "per-row", "The plan names 2 layers that are not to be pruned, such as down"),
        ({}, "per-row", "The plan names 3 layers that are not to be pruned, such as up"),
        (
            {**SHAPES, "gate": (12, 15)},
            "2:4",
            "The masks do not fit the layer gate: .* divisible by 4; this weight has 15",
        ),
        ({**SHAPES, "gate": (13, 16)}, "blocks-2x2", "The masks do not fit the layer gate: .* divisible by 2"),
        (SHAPES, "perrow", "The masks do not fit the layer up: There is no pattern 'perrow'"),
    ],
)
def test_plans_that_do_not_fit_are_refused(method: str, shapes: dict[str, Shape], pattern: str, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        getattr(Plan(pattern, SPARSITIES), method)(shapes)


# Files


@given(
    st.sampled_from(PATTERNS),
    st.dictionaries(st.text(min_size=1), st.one_of(fractions, st.sampled_from([0, 1])), min_size=1, max_size=6),
    st.text(),
    st.dictionaries(
        st.text(), st.recursive(st.none() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=5)
    ),
)
@examples(60)
def test_a_saved_plan_is_read_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    pattern: str,
    sparsities: dict[str, float],
    rule: str,
    details: dict[str, Any],
) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan = Plan(pattern, sparsities, rule, details)
    plan.save(path)
    again = load_plan(path)
    assert again == plan
    assert list(again.sparsities) == list(sparsities)
    assert [number.hex() for number in map(float, again.sparsities.values())] == [
        float(number).hex() for number in sparsities.values()
    ]
    again.save(path.with_name("again.json"))
    assert path.read_bytes() == path.with_name("again.json").read_bytes()


@pytest.mark.parametrize("number", [np.float64(0.3), np.float32(0.3), np.int64(1), Fraction(1, 4)], ids=repr)
def test_any_real_number_can_be_saved(tmp_path: Path, number: Any) -> None:
    Plan("per-row", {"a": number}).save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").sparsities == {"a": float(number)}


def test_a_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text('{"sparsities": {"up": 1, "décode": 0.25}, "pattern": "2:4"}', encoding="utf-8")
    for name in (path, str(path)):
        plan = load_plan(name)
        assert plan == Plan("2:4", {"up": 1, "décode": 0.25})
        assert (plan.rule, plan.details) == ("by hand", {})


def test_the_report_of_a_pruned_model(tmp_path: Path) -> None:
    plan = Plan("per-row", SPARSITIES, "kl", {"seconds": 3.5})
    path = tmp_path / "report.json"
    report = {"pattern": "unstructured", "sparsities": {"other": 0.1}, "maskopt_plan": 7, "plan": plan.to_json()}
    path.write_text(json.dumps(report))
    assert load_plan(path) == plan


def test_a_saved_file_can_be_edited(tmp_path: Path) -> None:
    Plan("per-row", SPARSITIES).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content == {
        "maskopt_plan": 1,
        "rule": "by hand",
        "pattern": "per-row",
        "sparsities": SPARSITIES,
        "details": {},
    }
    content["sparsities"]["up"] = 0.125
    (tmp_path / "edited.json").write_text(json.dumps(content))
    assert load_plan(tmp_path / "edited.json").sparsities == {**SPARSITIES, "up": 0.125}


GOOD = {"pattern": "per-row", "sparsities": {"a": 0.5}}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "cannot be read: Expecting value"),
        ("per-row", "cannot be read: Expecting value"),
        ('{"pattern": "per-row", ', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read: 'utf-8' codec can't decode"),
        ([GOOD], "must have the entries pattern and sparsities"),
        ([], "must have the entries pattern and sparsities"),
        (None, "must have the entries pattern and sparsities"),
        ({}, "must have the entries pattern and sparsities"),
        ({"pattern": "per-row"}, "must have the entries pattern and sparsities"),
        ({"sparsities": {"a": 0.5}}, "must have the entries pattern and sparsities"),
        ({"plan": {"pattern": "per-row"}, **GOOD}, "must have the entries pattern and sparsities"),
        ({"plan": None}, "must have the entries pattern and sparsities"),
        ({"plan": None, "layers": []}, "must have the entries pattern and sparsities"),
        ({**GOOD, "maskopt_plan": 2}, "is of another version than 1, which this program reads"),
        ({**GOOD, "maskopt_plan": "1"}, "is of another version than 1"),
        ({**GOOD, "maskopt_plan": None}, "is of another version than 1"),
        ({**GOOD, "pattern": 4}, "is wrong: A plan's pattern is a word"),
        ({**GOOD, "pattern": None}, "is wrong: A plan's pattern is a word"),
        ({**GOOD, "sparsities": [0.5]}, r"is wrong: A plan needs a sparsity for each layer, by name; got \[0\.5\]"),
        ({**GOOD, "sparsities": {}}, "is wrong: A plan needs a sparsity for each layer"),
        ({**GOOD, "sparsities": None}, "is wrong: A plan needs a sparsity for each layer"),
        ({**GOOD, "sparsities": {"a": "0.5"}}, r"is wrong: The sparsity of a must lie between 0 and 1; got '0\.5'"),
        ({**GOOD, "sparsities": {"a": math.nan}}, "is wrong: The sparsity of a must lie between 0 and 1; got nan"),
        ({**GOOD, "sparsities": {"a": math.inf}}, "is wrong: The sparsity of a must lie between 0 and 1; got inf"),
        ({**GOOD, "sparsities": {"a": -0.1}}, r"is wrong: The sparsity of a must lie between 0 and 1; got -0\.1"),
        ({**GOOD, "sparsities": {"a": True}}, "is wrong: The sparsity of a must lie between 0 and 1; got True"),
        ({**GOOD, "sparsities": {"a": None}}, "is wrong: The sparsity of a must lie between 0 and 1; got None"),
        ({**GOOD, "sparsities": {"a": {}}}, "is wrong: The sparsity of a must lie between 0 and 1; got {}"),
        ({**GOOD, "sparsities": {"a": 10**400}}, "is wrong: The sparsity of a must lie between 0 and 1; got a whole"),
        ({**GOOD, "details": [1]}, "is wrong"),
        ({**GOOD, "details": None}, "is wrong"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: Any, sentence: str) -> None:
    path = tmp_path / "plan.json"
    data = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(MaskoptError, match=rf"The plan {re.escape(str(path))} {sentence}"):
        load_plan(path)


def test_reports_of_runs_without_a_plan_say_so(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"command": {"neurons": 0.5}, "widths": []}))
    with pytest.raises(MaskoptError, match=r"report\.json has no plan, because its run treated all layers alike"):
        load_plan(path)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskoptError, match=r"The plan .*absent\.json cannot be read: No such file or directory\."):
        load_plan(tmp_path / "absent.json")
    with pytest.raises(MaskoptError, match=r"The plan .* cannot be read: Is a directory\."):
        load_plan(tmp_path)


def test_files_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan("per-row", {"a": 0.5}).save(path)
    before = path.read_bytes()
    with pytest.raises(MaskoptError, match=r"The output .*plan\.json exists already"):
        Plan("per-row", {"a": 0.25}).save(path)
    assert path.read_bytes() == before
    with pytest.raises(MaskoptError, match="does not exist"):
        Plan("per-row", {"a": 0.25}).save(tmp_path / "folder" / "plan.json")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Plan("per-row", {"a": 0.5}, details={"masks": PerRow(1)}).save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


# Sparsities fixed by patterns of names

NAMES = ["model.0.up", "model.0.down", "model.1.up", "model.1.down", "head"]


@pytest.mark.parametrize(
    ("overrides", "fixed"),
    [
        ({}, {}),
        ({"head": 0.25}, {"head": 0.25}),
        ({"*.up": 0.5}, {"model.0.up": 0.5, "model.1.up": 0.5}),
        ({"model.?.down": 1, "model.0.*": 0}, {"model.0.up": 0.0, "model.0.down": 0.0, "model.1.down": 1.0}),
        ({"model.0.*": 0, "model.?.down": 1}, {"model.0.up": 0.0, "model.0.down": 1.0, "model.1.down": 1.0}),
        ({"*": 0.5, "head": 0.0}, {**dict.fromkeys(NAMES, 0.5), "head": 0.0}),
        ({"head": 0.0, "*": 0.5}, dict.fromkeys(NAMES, 0.5)),
        ({"model.[01].up": 0.5}, {"model.0.up": 0.5, "model.1.up": 0.5}),
    ],
)
def test_the_last_pattern_that_matches_decides(overrides: Mapping[str, float], fixed: Mapping[str, float]) -> None:
    found = overridden(NAMES, overrides)
    assert found == fixed
    assert all(type(sparsity) is float for sparsity in found.values())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"tail": 0.5}, "The pattern 'tail' matches no layer to prune; names look like 'model.0.up'"),
        ({"up": 0.5}, "The pattern 'up' matches no layer to prune"),  # of full names
        ({"HEAD": 0.5}, "The pattern 'HEAD' matches no layer to prune"),
        ({"": 0.5}, "The pattern '' matches no layer to prune"),
        ({"*": 0.5, "tail": 0.5}, "The pattern 'tail' matches no layer to prune"),
        ({"head": 1.5}, r"The sparsity of 'head' must lie between 0 and 1; got 1\.5"),
        ({"head": -0.1}, r"The sparsity of 'head' must lie between 0 and 1; got -0\.1"),
        ({"head": math.nan}, "The sparsity of 'head' must lie between 0 and 1; got nan"),
        ({"head": True}, "The sparsity of 'head' must lie between 0 and 1; got True"),
        ({"head": "0.5"}, r"The sparsity of 'head' must lie between 0 and 1; got '0\.5'"),
        ({"head": None}, "The sparsity of 'head' must lie between 0 and 1; got None"),
    ],
)
def test_bad_overrides_are_refused(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        overridden(NAMES, overrides)


def test_overrides_of_no_layers_are_refused() -> None:
    with pytest.raises(MaskoptError, match="The pattern 'up' matches no layer to prune"):
        overridden([], {"up": 0.5})
