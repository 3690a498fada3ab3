"""Independent tasks on several processes, threads or a cluster, through joblib."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer

from maskopt.errors import MaskoptError, RankLostError
from maskopt.files import first_line

__all__ = ["Backend", "BackendOption", "JobsOption", "Workers", "on_workers", "open_workers"]

_CONNECT = 30.0  # seconds in which a scheduler must answer
_WAIT = 300.0  # seconds in which a cluster must have its first worker


class Backend(StrEnum):
    """Where joblib runs tasks."""

    LOKY = "loky"
    THREADING = "threading"
    DASK = "dask"
    RAY = "ray"


BackendOption = Annotated[
    Backend,
    typer.Option(
        "--backend",
        help="Where joblib runs the jobs: in processes (loky) or threads of this machine, on the dask cluster whose "
        "scheduler DASK_SCHEDULER_ADDRESS names, or on the ray cluster of RAY_ADDRESS.",
    ),
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        min=1,
        help="Pieces of the work that are done at the same time.",
        show_default="1, or as many as the cluster has workers",
    ),
]


class _Threads:
    """Tasks in threads, which end with the command: Python cannot exit while one of them computes."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._idle = threading.Condition()
        self._running = 0

    def check(self, *_: object) -> None:
        """Raise an exception, which nobody sees, in tasks that go on after the command has ended."""
        if self._ended.is_set():
            raise InterruptedError

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._idle:
            self._running += 1
        try:
            self.check()
            return function(*arguments)
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def end(self) -> None:
        """End all tasks, and wait for it."""
        self._ended.set()
        with self._idle:
            self._idle.wait_for(lambda: not self._running)


@dataclass(frozen=True)
class Workers:
    """What `open_workers` has opened.

    Parameters
    ----------
    count : int
        Tasks that run at the same time.
    elsewhere : bool
        Whether they run on a cluster, however many there are.
    threads : _Threads, optional
        Where they run in threads.
    """

    count: int
    elsewhere: bool
    threads: _Threads | None = None

    @property
    def check(self) -> Callable[..., None] | None:
        """What tasks call now and then, with any arguments, so that they can be ended; None where they need not."""
        return None if self.threads is None else self.threads.check

    def here(self, tasks: int) -> bool:
        """Whether so many tasks are best done one after the other in this thread."""
        return not self.elsewhere and min(self.count, tasks) == 1


@contextmanager
def open_workers(backend: Backend, jobs: int | None) -> Iterator[Workers]:
    """Make a backend joblib's default within the block, connected to its cluster if it has one.

    Parameters
    ----------
    backend : Backend
    jobs : int, optional
        Tasks at the same time; by default one, or as many as the cluster has workers.

    Yields
    ------
    Workers

    Raises
    ------
    MaskoptError
        If the package of the backend is missing, or the cluster cannot be reached or has no workers.
    """
    import joblib

    from maskopt.threads import sized_threads

    with ExitStack() as stack:
        cluster: Any = backend.value
        threads = None
        if backend is Backend.DASK:
            cluster = stack.enter_context(_dask())
        elif backend is Backend.RAY:
            stack.enter_context(_ray())
        elif backend is Backend.THREADING and jobs not in (None, 1):
            # Otherwise every thread would compute on all cores, and change the number of threads under the others.
            stack.enter_context(sized_threads(0))
            threads = _Threads()
            stack.callback(threads.end)
        stack.enter_context(joblib.parallel_config(backend=cluster))
        elsewhere = backend in (Backend.DASK, Backend.RAY)
        yield Workers(jobs or (_workers_of_cluster() if elsewhere else 1), elsewhere, threads)


def on_workers(
    function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], workers: Workers, tell: Callable[[int], object]
) -> list[Any]:
    """Return a function's results for tuples of arguments, in their order, from within `open_workers`.

    A task is taken from the iterable when a worker is free for it, and no earlier. Arguments that are numpy arrays are
    sent once if several tasks have the same one.

    Parameters
    ----------
    function : callable
        At the top of a module, which workers import.
    tasks : iterable of tuple
    workers : Workers
    tell : callable
        Called with the number of tasks that are done, from any thread.

    Raises
    ------
    MaskoptError
        If a worker has another version of maskopt or torch.
    RankLostError
        If a worker ends before its task is done.
    """
    import joblib

    class Telling(joblib.Parallel):  # type: ignore[misc]  # joblib has no types
        """Tells the progress: not all backends return results one by one."""

        def print_progress(self) -> None:
            tell(self.n_completed_tasks)

    # Clusters ignore the number of jobs or know it best; what limits them is how many tasks are sent ahead.
    number = -1 if workers.elsewhere else workers.count
    run = Telling(n_jobs=number, pre_dispatch=workers.count, batch_size=1)
    before = (_versions(), function) if workers.threads is None else (_versions(), workers.threads.run, function)
    try:
        found: list[Any] = run(joblib.delayed(_checked)(*before, *task) for task in tasks)
    except BrokenExecutor as error:
        raise RankLostError(
            f"A worker or its cluster has ended, perhaps because memory did not suffice: {first_line(error)}."
        ) from error
    return found


def _versions() -> dict[str, str]:
    import torch

    import maskopt

    return {"maskopt": maskopt.__version__, "torch": torch.__version__}


def _checked(versions: dict[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on a worker whose versions are those that the output will name."""
    for name, version in _versions().items():
        if version != versions[name]:
            raise MaskoptError(f"A worker has {name} {version}, but this program {versions[name]}; install the same.")
    return function(*arguments)


def _workers_of_cluster() -> int:
    import joblib

    try:
        count: int = joblib.effective_n_jobs(-1)
        return count
    except TimeoutError as error:
        raise MaskoptError(f"The cluster has no worker after {_WAIT:g} s; start some, or wait for them.") from error


def _require(package: str, backend: Backend) -> None:
    if importlib.util.find_spec(package) is None:
        raise MaskoptError(f"The {backend.value} backend needs {package}, which is missing: pip install {package}.")


@contextmanager
def _dask() -> Iterator[Any]:
    """Yield joblib's backend for the dask cluster that the settings of dask name."""
    _require("distributed", Backend.DASK)
    import dask
    from distributed import Client
    from joblib._dask import DaskDistributedBackend

    class Dask(DaskDistributedBackend):  # type: ignore[misc]  # joblib has no types
        """Runs tasks elsewhere even if there is one worker, and ends where a task ends its workers."""

        def configure(self, n_jobs: int = 1, parallel: Any = None, **settings: Any) -> int:
            count: int = super().configure(n_jobs, parallel, **settings)
            return max(2, count)  # joblib does single jobs itself

        def submit(self, func: Any, callback: Any = None) -> Any:
            future = super().submit(func, callback)
            # joblib would wait for it forever.
            future.add_done_callback(lambda done: callback(done.exception()) if done.exception() else None)
            return future

        def retrieve_result_callback(self, out: Any) -> Any:
            if isinstance(out, BaseException):
                raise BrokenExecutor(first_line(out))
            return super().retrieve_result_callback(out)

    address = dask.config.get("scheduler-address", None)
    if address is None:
        raise MaskoptError(
            "The dask backend needs the address of a scheduler in the variable DASK_SCHEDULER_ADDRESS, such as "
            "tcp://node1:8786."
        )
    # What it logs of lost connections, with tracebacks, is said in one sentence.
    logger = logging.getLogger("distributed.client")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        try:
            client = Client(address, timeout=_CONNECT, set_as_default=False)
        except (OSError, ValueError) as error:
            raise MaskoptError(f"The dask scheduler at {address} cannot be reached: {first_line(error)}.") from error
        with client:
            yield Dask(client=client, wait_for_workers_timeout=_WAIT)
    finally:
        logger.setLevel(level)


@contextmanager
def _ray() -> Iterator[None]:
    """Connect to a ray cluster and tell joblib of it."""
    _require("ray", Backend.RAY)
    import ray
    from ray.util.joblib import register_ray

    register_ray()
    connected = ray.is_initialized()
    if not connected:
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            said = first_line(error).partition(". ")[0]
            raise MaskoptError(
                "The ray backend needs a running cluster, such as ray start --head makes, or its address in the "
                f"variable RAY_ADDRESS: {said}."
            ) from error
    try:
        yield
    finally:
        if not connected:
            ray.shutdown()
