"""Pointers of every wrong kind: one that cannot be read must be refused.

In Punica a wrong pointer ends the process.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sgmv import errors
from sgmv.compat import punica
from sgmv.compat.punica import pointers
from tests.help.compat_forms import check, drawn, product
from tests.help.punica_calls import posix

pytestmark = pytest.mark.usefixtures("one_blas_thread")


def test_an_address_is_known_as_long_as_its_array_lives() -> None:
    array = np.zeros((1, 2, 3), "f")
    address = pointers.own(array)
    assert address in pointers._owned
    del array
    gc.collect()
    assert address not in pointers._owned


@pytest.fixture
def fenced() -> Iterator[tuple[int, int]]:
    """The first address of three pages of which the middle one may not be read; and their size."""
    memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    middle, size = ctypes.c_void_p(start + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE)
    assert libc.mprotect(middle, size, 0) == 0
    yield start, mmap.PAGESIZE
    assert libc.mprotect(middle, size, 3) == 0


def sgmv_with(pointer: int, layer_idx: int = 0, width: int = 16) -> np.ndarray:
    """y (2, 1) of ones and weights (layers, 1, width) at this address."""
    y = np.ones((2, 1), "f")
    punica.sgmv(y, np.ones((2, width), "f"), np.array([pointer]), np.array([0, 2]), layer_idx)
    return y


@posix
def test_only_what_can_be_read_is_read(fenced: tuple[int, int]) -> None:
    start, page = fenced
    assert (sgmv_with(start + page - 64) == 1).all()  # to the last byte
    assert (sgmv_with(start + 2 * page) == 1).all()
    refused: dict[int, type] = {
        0: errors.ValueRangeError,
        -64: errors.ValueRangeError,
        2**63 - 8: errors.MemoryLayoutError,  # wraps
        64: errors.MemoryLayoutError,  # nothing is there
        start + 2: errors.MemoryLayoutError,  # not aligned
        start + page - 60: errors.MemoryLayoutError,  # the last four bytes are not
        start + page: errors.MemoryLayoutError,
        start + 2 * page - 4: errors.MemoryLayoutError,
    }
    for pointer, error in refused.items():
        with pytest.raises((error, errors.ValueRangeError), match="w_ptr"):
            sgmv_with(pointer)
    with pytest.raises(errors.MemoryLayoutError):  # both ends can be read, the middle cannot
        sgmv_with(start, width=3 * page // 4)
    with pytest.raises(errors.MemoryLayoutError):
        sgmv_with(start, layer_idx=page // 64)
    with pytest.raises(errors.ValueRangeError):
        sgmv_with(start, layer_idx=2**62)


@posix
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nothing_past_a_weight_is_read(
    rng: np.random.Generator, fenced: tuple[int, int], dtype: Any
) -> None:
    """Weights that end where memory does, of widths that no vector divides."""
    start, page = fenced
    for inputs, outputs in ((5, 200), (17, 60), (1, 129), (33, 7), (16, 64)):
        x, y = drawn(rng, (3, inputs), dtype), drawn(rng, (3, outputs), dtype)
        W = drawn(rng, (outputs, inputs), dtype)
        address = start + page - W.nbytes
        for call, stands in ((punica.sgmv, W), (punica.sgmv_cutlass, np.ascontiguousarray(W.T))):
            ctypes.memmove(address, stands.ctypes.data, W.nbytes)
            out = y.copy()
            call(out, x, np.array([address]), np.array([0, 3]), 0)
            check(out, product(y, x, [W], np.zeros(3, int)), f"{call.__name__} {W.shape}")


@posix
def test_freed_memory_is_refused() -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    gc.collect()
    memory.close()
    with pytest.raises(errors.MemoryLayoutError, match="keep the weights alive"):
        sgmv_with(start)


@posix
def test_every_page_of_many_weights_is_probed(fenced: tuple[int, int]) -> None:
    """More probes than one system call takes, and the bad pointer among good ones is named."""
    start, page = fenced
    good = np.zeros((300, 5 * page), np.uint8)
    where = [int(row.ctypes.data) for row in good]
    assert pointers.readable(where, 5 * page)
    assert not pointers.readable([*where, start + page - 5 * page + 1], 5 * page)
    bad, x, y = start + page, np.ones((3, 16), "f"), np.ones((3, 1), "f")
    with pytest.raises(errors.MemoryLayoutError, match=hex(bad)):
        punica.sgmv(y, x, np.array([where[0], bad, where[1]]), np.array([0, 1, 2, 3]), 0)


@posix
def test_probing_leaves_no_files_open() -> None:
    array = np.zeros(9)
    before = len(os.listdir("/dev/fd"))
    for _ in range(100):
        pointers.readable([array.ctypes.data], 72)
        pointers.readable([8], 72)
    # Fewer than one for each probe: other threads of the process open files of their own.
    assert len(os.listdir("/dev/fd")) - before < 100
