"""Where `maskopt verify` and `maskopt certify` run: the same figures everywhere, and what can go wrong."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import LocalCluster

from maskopt import save_instance, synthetic
from maskopt.cli import pool
from maskopt.cli.output import Bar
from maskopt.cli.pool import Backend, on_workers, open_workers
from maskopt.errors import MaskoptError, RankLostError
from tests.helpers import without_seconds

Run = Callable[..., Any]
ROOT = Path(__file__).parents[2]

# dask warns when a disk is slow.
pytestmark = pytest.mark.filterwarnings("ignore:Creating scratch directories is taking")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A dask cluster of two workers, which are threads of this process and listen on ports of this machine."""
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0"
    ) as made:
        yield made


@pytest.fixture
def scheduler(cluster: LocalCluster) -> Iterator[str]:
    """The cluster's address, as dask reads it from DASK_SCHEDULER_ADDRESS when it is imported."""
    with dask.config.set({"scheduler-address": cluster.scheduler_address}):
        yield cluster.scheduler_address


@pytest.fixture
def commands(run: Run, tmp_path: Path) -> dict[str, tuple[object, ...]]:
    """Commands whose work has several pieces."""
    layer, mask = tmp_path / "layer.safetensors", tmp_path / "mask.safetensors"
    save_instance(layer, synthetic(rows=70, d=16))
    run("solve", layer, "-p", "2:4", "--solver", "wanda", "--out", mask)
    return {
        "verify": ("verify", layer, "--rows", "5:9", "--columns", 8, "-p", "2:4", "--exact", "brute-force"),
        "gap": ("certify", layer, "--mask", mask, "-p", "2:4"),
        "sdp": ("certify", layer, "--mask", mask, "-p", "2:4", "--bound", "sdp", "--rows", "20:"),
    }


def results(run: Run, read: Any, out: Path, *arguments: object) -> Any:
    """The figures of a command, apart from seconds and from where it ran."""
    run(*arguments, "--json", out)
    figures: Any = without_seconds(read(out))
    where = [figures["settings"].pop(name) for name in ("jobs", "backend")]
    return figures, where


@pytest.mark.parametrize("name", ["verify", "gap", "sdp"])
def test_dask_gives_the_same_figures(
    run: Run, read: Any, tmp_path: Path, commands: Any, scheduler: str, name: str
) -> None:
    expected, here = results(run, read, tmp_path / "here", *commands[name])
    figures, there = results(run, read, tmp_path / "there", *commands[name], "--backend", "dask")
    assert figures == expected
    assert (here, there) == ([1, "loky"], [2, "dask"])


@pytest.mark.parametrize("name", ["verify", "gap"])
def test_threads_give_the_same_figures(run: Run, read: Any, tmp_path: Path, commands: Any, name: str) -> None:
    expected, _ = results(run, read, tmp_path / "here", *commands[name])
    figures, where = results(run, read, tmp_path / "there", *commands[name], "--backend", "threading", "--jobs", 3)
    assert figures == expected
    assert where == [3, "threading"]


@pytest.mark.slow
def test_processes_give_the_same_figures(run: Run, read: Any, tmp_path: Path, commands: Any) -> None:
    expected, _ = results(run, read, tmp_path / "here", *commands["gap"])
    figures, where = results(run, read, tmp_path / "there", *commands["gap"], "--jobs", 2)
    assert figures == expected
    assert where == [2, "loky"]


@pytest.mark.slow
def test_the_address_comes_from_the_variable_that_dask_users_know(
    run: Run, read: Any, tmp_path: Path, commands: Any, scheduler: str
) -> None:
    expected, _ = results(run, read, tmp_path / "here", *commands["verify"])
    arguments = [*map(str, commands["verify"]), "--backend", "dask", "--json", str(tmp_path / "there")]
    environment = {**os.environ, "DASK_SCHEDULER_ADDRESS": scheduler, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "maskopt", *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    figures: Any = without_seconds(read(tmp_path / "there"))
    assert figures["rows"] == expected["rows"]
    assert figures["settings"]["jobs"] == 2


@pytest.mark.parametrize("backend", [Backend.DASK, Backend.THREADING])
def test_progress_is_told_and_results_are_in_order(scheduler: str, backend: Backend) -> None:
    told: list[int] = []
    with open_workers(backend, 2) as workers:
        found = on_workers(divmod, ((number, 3) for number in range(7)), workers, told.append)
    assert found == [divmod(number, 3) for number in range(7)]
    assert sorted(told) == told
    assert {1, 7} <= set(told)


@pytest.mark.parametrize("name", ["verify", "gap"])
def test_the_bar_follows_the_workers(
    run: Run, commands: Any, scheduler: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shown: list[float] = []
    monkeypatch.setattr(Bar, "tell", lambda _, what, fraction, left=None: shown.append(fraction))
    run(*commands[name], "--backend", "dask")
    assert shown == sorted(shown)
    assert (shown[0], shown[-1]) == (0.0, 1.0)
    assert len(set(shown)) > 2


def test_tasks_begin_when_a_worker_is_free() -> None:
    """The time that is left to a task is known only then."""
    running = threading.Semaphore(2)

    def tasks() -> Iterator[tuple[object]]:
        for _ in range(6):
            assert running.acquire(blocking=False)
            yield (running.release,)

    with open_workers(Backend.THREADING, 2) as workers:
        assert on_workers(lambda release: release(), tasks(), workers, lambda done: None) == [None] * 6


def test_threads_end_with_the_command() -> None:
    """Python cannot exit while they compute."""
    begun, ended = threading.Event(), threading.Event()

    def task(number: int, check: Callable[[], None]) -> None:
        if number == 0:
            begun.wait()
            raise MaskoptError("This task fails.")
        try:
            while not ended.wait(0.001):
                begun.set()
                check()
        finally:
            ended.set()

    with pytest.raises(MaskoptError, match="This task fails"), open_workers(Backend.THREADING, 2) as workers:
        on_workers(task, [(number, workers.check) for number in range(2)], workers, lambda done: None)
    assert ended.is_set()


def test_errors_of_tasks_are_those_of_the_function(scheduler: str) -> None:
    with open_workers(Backend.DASK, None) as workers, pytest.raises(MaskoptError, match="no such row"):
        on_workers(_refuse, [(number,) for number in range(3)], workers, lambda done: None)


def _refuse(number: int) -> None:
    raise MaskoptError(f"There is no such row as {number}.")


@pytest.mark.slow
def test_a_task_that_ends_its_workers_ends_the_run() -> None:
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0") as made,
        dask.config.set({"scheduler-address": made.scheduler_address}),
        open_workers(Backend.DASK, None) as workers,
        pytest.raises(RankLostError, match="A worker or its cluster has ended"),
    ):
        on_workers(os._exit, [(1,)], workers, lambda done: None)


@pytest.mark.slow
def test_a_process_that_ends_ends_the_run() -> None:
    with (
        open_workers(Backend.LOKY, 2) as workers,
        pytest.raises(RankLostError, match="A worker or its cluster has ended") as raised,
    ):
        on_workers(os._exit, [(1,), (1,)], workers, lambda done: None)
    assert isinstance(raised.value.__cause__, BrokenExecutor)


@pytest.mark.parametrize("name", ["maskopt", "torch"])
def test_workers_with_other_versions_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = pool._versions()
    answers = iter([{**here, name: "0.0.1"}])
    monkeypatch.setattr(pool, "_versions", lambda: next(answers, here))
    with (
        open_workers(Backend.THREADING, 2) as workers,
        pytest.raises(MaskoptError, match=r"this program 0\.0\.1") as said,
    ):
        on_workers(divmod, [(7, 3), (8, 3)], workers, lambda done: None)
    assert f"A worker has {name} {here[name]}" in str(said.value)


def test_missing_packages_are_named(fails: Callable[..., str], commands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs distributed, which is missing: pip install distributed" in fails(
        *commands["verify"], "--backend", "dask"
    )
    assert "needs ray, which is missing: pip install ray" in fails(*commands["gap"], "--backend", "ray")


def test_clusters_that_are_not_there_are_named(
    fails: Callable[..., str], commands: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "DASK_SCHEDULER_ADDRESS, such as tcp://" in fails(*commands["verify"], "--backend", "dask")
    monkeypatch.setattr(pool, "_CONNECT", 0.2)
    with dask.config.set({"scheduler-address": "tcp://127.0.0.1:9"}):
        assert "scheduler at tcp://127.0.0.1:9 cannot be reached" in fails(*commands["verify"], "--backend", "dask")
    with dask.config.set({"scheduler-address": "nonsense://x"}):
        assert "scheduler at nonsense://x cannot be reached" in fails(*commands["verify"], "--backend", "dask")
    assert "'slurm' is not one of 'loky', 'threading', 'dask', 'ray'" in fails(
        *commands["verify"], "--backend", "slurm"
    )


def test_a_cluster_without_workers_is_named(
    fails: Callable[..., str], commands: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_WAIT", 0.2)
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as empty,
        dask.config.set({"scheduler-address": empty.scheduler_address}),
    ):
        assert "no worker after 0.2 s" in fails(*commands["verify"], "--backend", "dask")
