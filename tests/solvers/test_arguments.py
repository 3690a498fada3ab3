"""Arguments of `solve`, sets, problems and solvers are checked before any work: one sentence, no traceback."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil

import numpy as np
import pytest
import torch

import maskopt
import maskopt.solvers
import maskopt.weights
from maskopt import (
    NM,
    AtMost,
    Budget,
    LayerReconstruction,
    OneSwap,
    PerRow,
    Protected,
    QuadraticForm,
    Restricted,
    Saliency,
    TransposableNM,
    Units,
    Wanda,
    solve,
    synthetic,
)
from maskopt.errors import MaskoptError
from maskopt.oracles import Blocks, parse_masks
from maskopt.solvers import DirectionRule, FrankWolfe, Solver, StepRule, make_solver

INSTANCE = synthetic(rows=3, d=8)
PROBLEM = INSTANCE.problem()
WEIGHT, GRAM = INSTANCE.weight, INSTANCE.gram


def is_sentence(text: str) -> bool:
    return (
        "\n" not in text and text.endswith((".", "?")) and text[0].isupper() | text.startswith(("solve", "keep", "rec"))
    )


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("layer", PerRow(0.5)), {}, "solve needs a problem"),
        ((WEIGHT, PerRow(0.5)), {}, "solve needs a problem"),
        ((INSTANCE, PerRow(0.5)), {}, r"whose problem\(\) is one"),
        ((PROBLEM, "per-row"), {}, "parse_masks makes one of 'per-row'"),
        ((PROBLEM, 0.5), {}, "set of masks is an object such as PerRow"),
        ((PROBLEM, WEIGHT > 0), {}, "set of masks is an object such as PerRow"),
        ((PROBLEM, PerRow(0.5), "wanda"), {}, "make_solver makes one of 'wanda'"),
        ((PROBLEM, PerRow(0.5), Wanda), {}, r"Wanda\(\), with brackets; got the class Wanda"),
        ((PROBLEM, PerRow(0.5), 3), {}, "solver is an object such as"),
        ((PROBLEM, PerRow(0.5), OneSwap()), {"start": "wanda"}, "start must be a boolean mask"),
        ((PROBLEM, PerRow(0.5), OneSwap()), {"start": Wanda}, "start must be a boolean mask"),
        ((PROBLEM, PerRow(0.5), OneSwap()), {"start": np.ones((3, 8), bool)}, "start must be a boolean mask"),
        ((PROBLEM, PerRow(0.5), OneSwap()), {"start": torch.ones(3, 8)}, "must be a boolean mask"),
        ((PROBLEM, PerRow(0.5)), {"callback": 3}, "callback must be a function"),
        *(
            ((PROBLEM, PerRow(0.5)), {"time_limit": v}, "time limit must be")
            for v in (0, -1, math.nan, "1", True, -math.inf)
        ),
        *(((PROBLEM, PerRow(0.5)), {"memory": v}, "memory must be") for v in (0, -1, 2.5, "1G", True, None, 10**5000)),
        *(
            ((PROBLEM, PerRow(0.5)), {"record": v}, "record must be")
            for v in (-1, 0.5, "often", True, math.nan, 10**5000)
        ),
    ],
)
def test_solve_refuses_what_it_cannot_work_with(arguments, options, words):
    with pytest.raises(MaskoptError, match=words) as caught:
        solve(*arguments, **options)
    assert is_sentence(str(caught.value))


@pytest.mark.parametrize("limit", [math.inf, 1, 1e9, np.float32(5)])
def test_positive_time_limits_are_fine(limit):
    assert solve(PROBLEM, PerRow(0.5), Wanda(), time_limit=limit).mask.shape == (3, 8)


BAD_MATRICES = [
    (WEIGHT.numpy(), "torch.from_numpy"),
    (WEIGHT.tolist(), "must be a torch tensor"),
    (None, "must be a torch tensor"),
    (WEIGHT.to(torch.complex64), "must be floating point"),
    (WEIGHT.int(), "must be floating point"),
    (WEIGHT > 0, "must be floating point"),
    (WEIGHT.to(torch.float8_e4m3fn), "float8_e4m3fn .its scales lie elsewhere"),
    (WEIGHT.to_sparse(), "must be a dense tensor"),
    (WEIGHT.to("meta"), "meta device"),
]


@pytest.mark.parametrize(("matrix", "words"), BAD_MATRICES)
@pytest.mark.parametrize(
    "make",
    [
        lambda matrix: LayerReconstruction(matrix, GRAM),
        lambda matrix: LayerReconstruction(WEIGHT, GRAM, target=matrix) if matrix is not None else Saliency(matrix),
        lambda matrix: LayerReconstruction(WEIGHT, matrix),
        lambda matrix: LayerReconstruction.towards(WEIGHT, GRAM, matrix),
        lambda matrix: QuadraticForm(GRAM, matrix),
        lambda matrix: QuadraticForm(matrix, WEIGHT),
        lambda matrix: Saliency(matrix),
        lambda matrix: Budget(matrix, 1.0),
    ],
)
def test_problems_and_sets_refuse_data_of_other_kinds(make, matrix, words):
    with pytest.raises(MaskoptError, match=words):
        make(matrix)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NM(keep="2", group="4"),
        lambda: NM(keep=2.0, group=4),
        lambda: NM(keep=None, group=4),
        lambda: NM(keep=True, group=True),
        lambda: TransposableNM(keep="2", group=4),
        lambda: TransposableNM(keep=math.nan, group=4),
        lambda: PerRow("0.5"),
        lambda: PerRow(True),
        lambda: PerRow(math.nan),
        lambda: PerRow(-0.1),
        lambda: PerRow(torch.ones(3, dtype=torch.complex64)),
        lambda: PerRow(torch.ones(3, dtype=torch.int64, device="meta")),
        lambda: Blocks(1, "2x2"),
        lambda: Blocks(1, (2.0, 2)),
        lambda: Blocks(1, (2,)),
        lambda: Blocks(1, None),
        lambda: Blocks(1, (True, 2)),
        lambda: AtMost("per-row"),
        lambda: Protected(PerRow(0.5), np.ones((3, 8), bool)),
        lambda: Protected("per-row", WEIGHT > 0),
        lambda: Restricted(PerRow(0.5), WEIGHT),
        lambda: Units(0.5, (1, None)),
        lambda: Units(PerRow(1), "row"),
        lambda: Units(PerRow(1), (0, 1)),
        lambda: Budget(WEIGHT.abs(), "1"),
        lambda: Budget(WEIGHT.abs(), math.nan),
        lambda: Budget(WEIGHT.abs(), True),
        lambda: parse_masks(24),
        lambda: parse_masks("per-row", "0.5"),
        lambda: parse_masks("per-row", True),
        lambda: parse_masks("9" * 5000 + ":4"),
        lambda: parse_masks("4:" + "9" * 5000),
        lambda: parse_masks(f"blocks-{'9' * 5000}x1", 0.5),
    ],
)
def test_sets_refuse_nonsense_in_a_short_sentence(make):
    with pytest.raises(MaskoptError) as caught:
        make()
    assert is_sentence(str(caught.value))
    assert len(str(caught.value)) < 300


def settings_of_everything():
    """Every numeric setting of every solver, method for weights, direction and step, with values that make no sense."""
    for package in (maskopt.solvers, maskopt.weights):
        for module in pkgutil.iter_modules(package.__path__):
            for kind in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
                public = isinstance(kind, type) and dataclasses.is_dataclass(kind) and not kind.__name__.startswith("_")
                if not public or inspect.isabstract(kind) or not issubclass(kind, (Solver, DirectionRule, StepRule)):
                    continue
                for field in dataclasses.fields(kind):
                    if field.init and type(field.default) in (int, float, tuple, bool):
                        yield kind, field.name, field.default
                    elif field.init and field.name in ("nodes", "row_block_seconds", "time_limit", "max_steps"):
                        yield kind, field.name, 1


SETTINGS = sorted({(kind, name, default) for kind, name, default in settings_of_everything()}, key=str)


def test_there_are_settings_to_check():
    assert len(SETTINGS) > 45


@pytest.mark.parametrize(("kind", "name", "default"), SETTINGS)
def test_every_numeric_setting_refuses_nonsense(kind, name, default):
    if isinstance(default, bool):
        wrong = [1, 0, "yes", None, math.nan]
    elif isinstance(default, tuple):
        wrong = [
            1.0,
            "1/2",
            (),
            default[:1],
            (math.nan,) * len(default),
            (-1.0,) * len(default),
            (math.inf,) * len(default),
        ]
    else:
        wrong = [math.nan, -math.inf, -(2**70), "1", True, [1], "", torch.ones(())]
        wrong += [1.5, math.inf, 10**5000] if isinstance(default, int) and name != "row_block_seconds" else []
        if name == "time_limit":
            wrong = [math.nan, -math.inf, -1, "1", True]
    for value in wrong:
        with pytest.raises(MaskoptError, match=rf"^{kind.__name__} needs .*{name}") as caught:
            kind(**{name: value})
        assert is_sentence(str(caught.value))
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("solver", ["wanda", Wanda, 3])
def test_solvers_of_solvers_are_solvers(solver):
    for kind in (OneSwap, maskopt.SparseFW, maskopt.ContinuationFrankWolfe, FrankWolfe):
        with pytest.raises(MaskoptError, match="needs start to be an object such as"):
            kind(start=solver)
    with pytest.raises(MaskoptError, match="needs solver to be an object such as"):
        maskopt.LeastSquares(solver=solver)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("branch-and-bound", {"nodes": -1}),
        ("branch-and-bound", {"row_block_seconds": math.nan}),
        ("ria", {"power": math.nan}),
    ],
)
def test_make_solver_refuses_as_constructors_do(name, settings):
    with pytest.raises(MaskoptError, match="needs"):
        make_solver(name, **settings)


def test_results_do_not_depend_on_what_the_caller_has_set_in_torch():
    problem = synthetic("outliers", rows=6, d=24).problem()
    solvers = (maskopt.ContinuationFrankWolfe(iterations=40), FrankWolfe(iterations=40), maskopt.LeastSquares())
    plain = [solve(problem, PerRow(0.5), solver) for solver in solvers]

    def same() -> None:
        for solver, expected in zip(solvers, plain, strict=True):
            result = solve(problem, PerRow(0.5), solver)
            assert torch.equal(result.mask, expected.mask)
            assert torch.equal(result.objective, expected.objective)
            if expected.lower_bound is not None:
                assert torch.equal(result.lower_bound, expected.lower_bound)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        same()
    with torch.inference_mode():
        same()
    with torch.device("meta"):
        same()
    default = torch.get_default_dtype()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            same()
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(default)


def test_data_that_requires_gradients_is_data():
    weight, gram = WEIGHT.clone().requires_grad_(), GRAM.clone().requires_grad_()
    result = solve(LayerReconstruction(weight, gram), PerRow(0.5))
    assert torch.equal(result.mask, solve(PROBLEM, PerRow(0.5)).mask)
    assert not result.objective.requires_grad
    assert solve(Saliency(weight), PerRow(0.5), FrankWolfe()).mask.sum() == 12
    assert solve(QuadraticForm(gram, weight), PerRow(0.5), FrankWolfe(iterations=5)).mask.sum() == 12
    assert Budget(weight.abs(), 1.0).lmo(-weight.detach().abs()).sum() > 0
