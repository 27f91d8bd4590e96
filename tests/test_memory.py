"""Memory for weights: pieces are apart, come back, and stand in the system's large pages."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sgmv import memory
from tests.planting import Fault, imported, outcome, plant

pytestmark = pytest.mark.once

BYTE = np.dtype("u1")
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = {
    "neighbour not joined before": Fault("memory", "self._free[i - 1][1] == start", "False"),
    "neighbour not joined after": Fault("memory", "self._free[i][0] == end", "False"),
    "never returned": Fault("memory", "self._chunk.returned.append(self._range)", "pass"),
    "returned too early": Fault("memory", "return np.asarray(piece)[:size]", """\
return np.lib.stride_tricks.as_strided(np.frombuffer(
        (__import__("ctypes").c_char * size).from_address(piece.__array_interface__["data"][0]),
        "u1"))"""),
    "twice the same": Fault("memory", "[(start + size, end)] if", "[(start, end)] if"),
    "one line short": Fault("memory", "(start, start + size)\n", "(start, start + size - 64)\n"),
    "off the line": Fault("memory", "start = -self._address % CACHE_LINE", "start = 8"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of the test's own, small ones, whatever else has weights in this process."""
    use_small_chunks(memory, monkeypatch)
    yield
    gc.collect()


def use_small_chunks(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_chunks", type(module._chunks)())
    monkeypatch.setattr(module, "_latest", None)
    monkeypatch.setattr(module, "CHUNK", 1 << 16)


def piece(size: int, module: Any = memory) -> Any:
    return module.aligned((size,), BYTE)


def check_random_life(module: Any, seed: int = 0) -> None:
    """Pieces come and go; each keeps what was written to it, and what is free is one range."""
    rng = np.random.default_rng(seed)
    alive: list[tuple[Any, int]] = []
    for step in range(600):
        if alive and rng.random() < 0.48:
            array, value = alive.pop(rng.integers(len(alive)))
            assert (array == value).all(), "another piece was written here"
        else:
            array = piece(int(rng.integers(1, 9000)), module)
            assert array.ctypes.data % module.CACHE_LINE == 0
            array[:] = value = step % 251
            alive.append((array.reshape(1, -1)[:, ::-1], value))  # a view keeps it
    assert all((array == value).all() for array, value in alive)
    most, kept = len(module._chunks), module._latest
    alive.clear()
    del array
    assert list(module._chunks.values()) == [kept], "a chunk outlived its pieces"
    for order in (0, -1):  # the first freed first, or the last
        pieces = [piece(module.CHUNK // 4, module) for _ in range(4)]
        while pieces:
            pieces.pop(order)
        piece(module.CHUNK, module)
        assert module._latest is kept, "what is free is not one range"
    assert most > 1


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_apart_and_come_back(seed: int) -> None:
    check_random_life(memory, seed)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_bookkeeping_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = imported(plant(tmp_path, FAULTS[name]), monkeypatch, "sgmv.memory")["sgmv.memory"]
    use_small_chunks(module, monkeypatch)
    assert outcome(lambda: check_random_life(module)) != "nothing"


def test_an_array_has_its_shape_and_type() -> None:
    for shape in ((3, 5), (0, 4), (7,), (0,)):
        array = memory.aligned(shape, np.dtype("float64"))
        assert (array.shape, array.dtype, array.flags.writeable) == (shape, np.float64, True)
        assert array.flags.c_contiguous


def test_what_was_freed_is_used_again() -> None:
    first, second = piece(1000), piece(1000)
    address = first.ctypes.data
    del first
    assert piece(1000).ctypes.data == address
    assert piece(1001).ctypes.data == address
    assert second.ctypes.data - address == 1024


def test_more_than_a_chunk_has_one_of_its_own() -> None:
    few = piece(100)
    large = piece(3 * memory.CHUNK)
    large[:] = 1
    assert len(memory._chunks) == 2
    assert few.size == 100
    del large
    assert len(memory._chunks) == 1


def test_the_latest_chunk_stays_for_the_next_call() -> None:
    piece(100)
    (kept,) = memory._chunks.values()
    piece(100)
    assert list(memory._chunks.values()) == [kept]


def test_threads_get_pieces_apart() -> None:
    def work(value: int) -> None:
        for size in range(1, 300):
            array = piece(size)
            array[:] = value
            assert (array == value).all(), f"{value}, {size}"

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(work, range(6))) == [None] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_lock_of_its_own() -> None:
    with memory._cutting:
        assert outcome(lambda: piece(10)) == "nothing"


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(),
    reason="this system has no transparent huge pages",
)
def test_weights_ask_for_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("NUMPY_MADVISE_HUGEPAGE") == "0":
        pytest.skip("switched off in numpy")
    monkeypatch.setattr(memory, "CHUNK", 32 << 20)
    array = piece(1000)
    middle = array.ctypes.data + memory.CHUNK // 2
    mapped = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            mapped = start <= middle < end
        elif mapped and head == "VmFlags:":
            assert "hg" in line.split()
            return
    pytest.fail("no mapping holds the chunk")
