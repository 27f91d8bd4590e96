"""Seeds and threads for every test.

SGMV_TEST_SEED=k draws other random batches; SGMV_NUM_THREADS=k runs all on k threads.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import settings
from threadpoolctl import threadpool_limits

import sgmv
from sgmv import amx, backend, launch
from tests.help import acceptance

SEED = int(os.environ.get("SGMV_TEST_SEED", "0"))
JITTED = not numba.config.DISABLE_JIT
# Without the jit the loops are Python: the small cases suffice to run every line of them.
MAX_ELEMENTS = None if JITTED else 3_000

# Timings never decide a test, so that none has a deadline.
settings.register_profile("thorough", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=40)
settings.load_profile("quick")

SLOW = {"browser", "compiles", "oracle"}  # marks, see pyproject.toml
LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a page in Chromium, before marks select."""
    for item in items:
        if "page" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count the slow tests that were left out, in this process or for the one that reports."""
    for item in items:
        if SLOW & {mark.name for mark in item.iter_markers()}:
            item.config.stash[LEFT_OUT] = item.config.stash.get(LEFT_OUT, 0) + 1
            getattr(item.config, "workeroutput", {})["left_out"] = item.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker of pytest-xdist leaves out the same tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what `make test` did not run."""
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{left_out} slow tests were left out ({', '.join(sorted(SLOW))}): "
            "`make test-all` runs all"
        )


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator of the test's own: its name and SGMV_TEST_SEED are the seed."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.name.encode())])


@pytest.fixture(scope="module")
def one_blas_thread() -> Iterator[None]:
    """For modules of many small products: BLAS's own threads spin, and took ten times as long."""
    with threadpool_limits(1, "blas"):
        yield


@pytest.fixture(scope="module")
def emulated_amx() -> Iterator[None]:
    """For modules whose calls run on the emulation of tile products, and on no other backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGMV_AMX", "emulate")
        patch.delenv("SGMV_BACKEND", raising=False)
        patch.setattr(acceptance, "BACKENDS", ("amx",))
        patch.setattr(backend, "_shrink", {})
        patch.setattr(backend, "_expand", {})
        patch.setattr(backend, "_kernels", {})
        patch.setattr(backend, "_last", (0, 0, 0, 0, 0, backend.Kernels(0, 0, 0)))
        amx.is_on.cache_clear()
        assert amx.is_on()
        yield
    amx.is_on.cache_clear()


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = sgmv.get_num_threads()
    yield
    sgmv.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _even_small_work_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or tests on several threads would hardly meet a second one."""
    monkeypatch.setattr(launch, "WORTH_SHARING_NS", 0)
