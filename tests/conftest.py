"""One thread per worker, one hypothesis profile, and the selection that `make quick` runs."""

import gc
import os
import zlib

import pytest
import torch
from hypothesis import HealthCheck, settings

gc.disable()  # until all tests are collected: nothing that collection makes goes before

# Several workers run at once; more threads than cores would make them many times slower.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for programs that tests start

# `make test` must give the same answer twice, so examples are derived from the test itself. To look for new
# counterexamples, ten times as many, and in all combinations of parameters: MASKOPT_EXPLORE=10 python -m pytest tests
settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    print_blob=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "one case of every test function, few random examples, nothing marked slow"
    parser.addoption("--quick", action="store_true", help=help)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick"):
        os.environ["MASKOPT_QUICK"] = "1"  # tests.helpers.examples reads it when test files are imported


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    # Of the parameters of a function those whose name has the least checksum: a fixed choice, spread over all values.
    chosen: dict[str, pytest.Item] = {}
    for item in items:
        function = item.nodeid.split("[")[0]
        if item.get_closest_marker("slow") is None:
            chosen[function] = min(chosen.get(function, item), item, key=lambda one: zlib.crc32(one.nodeid.encode()))
    kept = {id(item) for item in chosen.values()}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def pytest_collection_finish() -> None:
    """Leave what collection made out of every later garbage collection: thousands of tests, torch and transformers.

    Later ones are rare: tests make millions of short-lived objects, nearly all of which go without it.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 20)
