"""Several processes prune as one does, bit by bit."""

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from maskopt import PerRow, Wanda, solve, synthetic
from maskopt.errors import MaskoptError
from maskopt.models import jobs
from maskopt.models.batches import Batch, in_parts, share
from maskopt.models.jobs import jobs_of
from maskopt.models.layers import LinearLayer
from maskopt.models.ranks import Ranks, joined, local_device
from maskopt.models.sums import PARTS, OrderedSum
from maskopt.solvers import Result
from maskopt.weights import LeastSquares
from tests.models import ranks_script


def tree_sum(leaves, start=0, size=PARTS):
    """The sum by its definition: four children from left to right, without those that are missing."""
    if size == 1:
        return leaves[start] if start < len(leaves) else None
    children = (tree_sum(leaves, start + child * size // 4, size // 4) for child in range(4))
    total = None
    for child in children:
        total = child if total is None else total if child is None else total + child
    return total


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.9])
def test_sums_do_not_depend_on_who_adds(missing):
    draw = random.Random(0)
    torch.manual_seed(0)
    orders = 0
    for count in (1, 2, 3, 5, 7, 11, 13, 15, PARTS):
        leaves = [
            None if draw.random() < missing else torch.randn(3, 3) * 10 ** draw.uniform(-9, 9) for _ in range(count)
        ]
        expected = tree_sum(leaves)
        for ranks in (1, 2, 3, 7, 20):
            total = OrderedSum()
            for rank in range(ranks):
                parts = range(count * rank // ranks, count * (rank + 1) // ranks)
                own = OrderedSum(parts.start)
                for number in parts:
                    if leaves[number] is not None:
                        own.part(number, (3, 3), torch.device("cpu")).add_(leaves[number])
                    waiting = sum(matrix is not None for *_, matrix in own.pieces)
                    assert ranks > 1 or waiting <= 2
                own.close(parts.stop)
                for piece in own.pieces:
                    total.add(*piece)
            found = total.total()
            assert (found is None) == (expected is None)
            assert expected is None or torch.equal(found, expected)
        present = [leaf for leaf in leaves if leaf is not None]
        orders += expected is not None and not torch.equal(sum(present), expected)
    assert missing == 0.9 or orders > 0  # the order of additions matters in these examples


def test_ranks_have_consecutive_batches_of_their_own():
    for count in (1, 2, 3, PARTS - 1, PARTS, PARTS + 1, 300):
        batches = in_parts([Batch({}, (1, 1)) for _ in range(count)])
        assert [batch.part for batch in batches] == sorted(batch.part for batch in batches)
        assert {batch.part for batch in batches} == set(range(min(count, PARTS)))
        for ranks in (1, 2, 3, 8, 100):
            shares = [share(batches, rank, ranks) for rank in range(ranks)]
            assert [index for own in shares for index in own] == list(range(count))
            parts = [{batches[index].part for index in own} for own in shares]
            assert sum(map(len, parts)) == min(count, PARTS)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_held_out_batches_change_no_part_of_the_others():
    used = [Batch({}, (1, 1)) for _ in range(PARTS + 5)]
    held_out = [Batch({}, (1, 1), purpose="held out") for _ in range(7)]
    together = in_parts([*used, *held_out])
    assert [batch.part for batch in together[: len(used)]] == [batch.part for batch in in_parts(used)]
    assert [batch.part for batch in together[len(used) :]] == list(range(7))
    shares = [share(together, rank, 3) for rank in range(3)]
    assert sorted(index for own in shares for index in own) == list(range(len(together)))


def test_jobs_are_spread_by_cost():
    ranks = Ranks()
    ranks.count = 3
    assert ranks.spread([1.0, 9.0, 4.0, 4.0, 1.0]) == [1, 0, 1, 2, 2]
    assert ranks.spread([]) == []


def test_jobs_are_cut_where_rows_are_apart_and_enough_work():
    layers = [LinearLayer(name, nn.Linear(2048, 3000, device="meta")) for name in "abc"]
    several = jobs_of(layers, apart=True)
    assert [(job.rows.start, job.rows.stop, job.whole) for job in several] == [
        (9000 * edge // 8, 9000 * (edge + 1) // 8, False) for edge in range(8)
    ]
    (whole,) = jobs_of(layers, apart=False)
    assert (whole.rows, whole.whole, whole.layers) == (slice(0, 9000), True, tuple(layers))
    assert 8 * several[0].cost > whole.cost > several[0].cost  # each job factorises
    for inputs, rows in ((64, 1000), (8192, 4096)):  # little work, and few rows for a factorisation
        (whole,) = jobs_of([LinearLayer("d", nn.Linear(inputs, rows, device="meta"))], apart=True)
        assert whole.whole


def test_results_of_rows_are_joined():
    problem, masks = synthetic(rows=10, d=16).problem(), PerRow(0.5)
    whole = solve(problem, masks, LeastSquares(solver=Wanda()))
    parts = [solve(problem.rows(index), masks, LeastSquares(solver=Wanda())) for index in (slice(0, 3), slice(3, 10))]
    joined = Result.joined(parts)
    assert torch.equal(joined.mask, whole.mask)
    for name in ("weight", "objective", "scale", "kept_objective"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name))
    assert (joined.status, joined.gap_kind, joined.lower_bound) == (whole.status, whole.gap_kind, None)
    assert joined.seconds == sum(part.seconds for part in parts)
    bounds = [dataclasses.replace(part, lower_bound=part.objective / 2) for part in parts]
    assert torch.equal(Result.joined(bounds).lower_bound, joined.objective / 2)
    assert Result.joined([bounds[0], parts[1]]).lower_bound is None
    assert Result.joined(parts[:1]) is parts[0]


def test_settings_of_ranks_are_checked(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (local_device("cpu"), local_device("cuda")) == ("cpu", "cuda:1")
    with pytest.raises(MaskoptError, match=r"^The device cuda:0 is a single one, and each of .* use cuda\.$"):
        local_device("cuda:0")
    monkeypatch.setenv("MASKOPT_RANK_SECONDS", "soon")
    with pytest.raises(MaskoptError, match=r"^MASKOPT_RANK_SECONDS must be a number of seconds"), joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert local_device("cuda:0") == "cuda:0"
    with joined() as ranks:
        assert (ranks.number, ranks.count, ranks.first) == (0, 1, True)


COUNTS = [2, 3] if "MASKOPT_EXPLORE" in os.environ else [3]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What several processes found, by task and number of ranks."""
    place = tmp_path_factory.mktemp("ranks") / "found"
    tasks = [*(("outcomes", count) for count in COUNTS), ("recovered", 2)]
    done = subprocess.run(
        [sys.executable, ranks_script.__file__, str(place), *(f"{name}:{count}" for name, count in tasks)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        (name, count): [torch.load(f"{place}-{name}-{count}-{rank}", weights_only=False) for rank in range(count)]
        for name, count in tasks
    }


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_ranks_choose_what_one_process_chooses(count, found, monkeypatch):
    monkeypatch.setattr(jobs, "_LEAST", jobs._LEAST)  # which `outcomes` changes
    expected = ranks_script.outcomes()
    for outcome in found["outcomes", count]:
        for name, one in expected.items():
            for kind in ("masks", "weights"):
                assert one[kind].keys() == outcome[name][kind].keys()
                assert all(torch.equal(outcome[name][kind][key], one[kind][key]) for key in one[kind]), (name, kind)
            assert outcome[name]["records"] == one["records"], name
    assert any(record["pooled"] for record in expected["experts with few tokens"]["records"])


@pytest.mark.slow
def test_ranks_recover_together(found):
    # The same steps as of one process whose micro-batches are those of both ranks, up to rounding.
    alone = ranks_script.recovered(between=2)
    first, second = found["recovered", 2]
    for name, outcome in first.items():
        assert any(record["accepted"] for record in outcome["records"]), name
        assert second[name]["records"] == outcome["records"]
        for kind in ("masks", "weights"):
            assert all(torch.equal(second[name][kind][key], outcome[kind][key]) for key in outcome[kind])
        for record, expected in zip(outcome["records"], alone[name]["records"], strict=True):
            assert record["after"] == pytest.approx(expected["after"], rel=1e-4), name
            assert (record["steps"], record["step_size"]) == (expected["steps"], expected["step_size"])
