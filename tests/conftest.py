"""Seeds and threads for every test.

SGMV_TEST_SEED=k draws other random batches; SGMV_NUM_THREADS=k runs all on k threads.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import numba
import numpy as np
import pytest
from hypothesis import settings
from threadpoolctl import threadpool_limits

import sgmv
from sgmv import launch

SEED = int(os.environ.get("SGMV_TEST_SEED", "0"))
JITTED = not numba.config.DISABLE_JIT
# Without the jit the loops are Python: the small cases suffice to run every line of them.
MAX_ELEMENTS = None if JITTED else 3_000

settings.register_profile("shared machine", deadline=None)  # timings never decide a test
settings.load_profile("shared machine")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator of the test's own: its name and SGMV_TEST_SEED are the seed."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.name.encode())])


@pytest.fixture(scope="module")
def one_blas_thread() -> Iterator[None]:
    """For modules of many small products: BLAS's own threads spin, and took ten times as long."""
    with threadpool_limits(1, "blas"):
        yield


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = sgmv.get_num_threads()
    yield
    sgmv.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _even_small_work_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or tests on several threads would hardly meet a second one."""
    monkeypatch.setattr(launch, "WORTH_SHARING_NS", 0)
