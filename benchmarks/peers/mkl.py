"""MKL's `cblas_sgemm_batch`: shrink of all segments in one call, expand in another.

`pip install mkl` brings it; it is called through ctypes. It takes an address per segment, so rows
that are consecutive, and in float32, are used where they are; others are gathered into a buffer and
put back, inside the clock.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.batch import Batch, consecutive
from sgmv.cpu import cores

ROW_MAJOR, NO_TRANSPOSE, TRANSPOSE = 101, 111, 112  # cblas.h
INTEL_THREADS, GNU_THREADS, LP64 = 0, 3, 0  # mkl_service.h; LP64: integers of 32 bits
# Intel's threads spin after a call, 200 ms unless told otherwise, which would reach far into the
# turns of others. Told 10, no call in a row of calls took longer.
SPIN_MS = 10


@dataclass(frozen=True)
class _Side:
    """The rows of x, or of y: where each segment's begin, in the array itself or in `buffer`.

    `starts` are addresses as if all lay in the buffer; those of `in_place` (1, else 0) are moved to
    the array when it is known. `addresses` is what MKL reads.
    """

    buffer: NDArray[np.float32]
    starts: NDArray[np.int64]
    in_place: NDArray[np.int64]
    addresses: NDArray[np.int64]

    def point_to(self, array: NDArray[Any]) -> None:
        distance = array.ctypes.data - self.buffer.ctypes.data
        np.multiply(self.in_place, distance, out=self.addresses)
        np.add(self.addresses, self.starts, out=self.addresses)

    def gather(self, array: NDArray[Any], rows: slice | NDArray[np.int64]) -> None:
        if isinstance(rows, slice) or array.dtype != np.float32:
            self.buffer[...] = array[rows]
        else:
            np.take(array, rows, axis=0, out=self.buffer, mode="clip")  # "raise" copies once more


@dataclass(frozen=True)
class _Plan:
    """Both calls' arguments, and what they point to. `gathered`: rows that go by the buffers."""

    call: Callable[..., None]
    gathered: slice | NDArray[np.int64]
    any_gathered: bool
    x: _Side
    y: _Side
    shrink: list[int]
    expand: list[int]
    pointed_to: list[NDArray[Any]]


def missing() -> str:
    """Why it is not here. Where it is, it takes any widths."""
    return "" if _path() else "mkl is not installed"


def prepare(batch: Batch) -> None:
    """Sizes and addresses of every segment that has an adapter."""
    pool = batch.pool
    used = [i for i, slot in enumerate(batch.slots) if pool.ranks[slot]]
    slots, rows = [batch.slots[i] for i in used], [batch.rows[i] for i in used]
    float32 = batch.x.dtype == np.float32
    in_place = np.array([float32 and isinstance(batch.takes[i], slice) for i in used], np.int64)
    lengths = np.array([len(part) for part in rows], np.int64)

    buffered = lengths * (1 - in_place)
    first = np.array([part[0] for part in rows], np.int64)
    start = np.where(in_place, first, np.cumsum(buffered) - buffered)
    parts = [part for part, here in zip(rows, in_place, strict=True) if not here]
    order = np.concatenate([*parts, np.zeros(0, np.int64)])
    (max_rank, h_in), h_out = pool.A.shape[1:], pool.wb.shape[2]
    x, y = _side(order, h_in, start, in_place), _side(order, h_out, start, in_place)
    v = np.empty((int(lengths.sum()), max_rank), np.float32)
    v_at = _addresses(v, np.cumsum(lengths) - lengths)

    m, r = lengths.astype(np.int32), pool.ranks[slots].astype(np.int32)
    each = np.ones(len(used), np.int32)
    one, zero = each.astype(np.float32), np.zeros(len(used), np.float32)
    shrink = [
        each * NO_TRANSPOSE, each * TRANSPOSE, m, r, each * h_in, one, x.addresses, each * h_in,
        _addresses(pool.A, slots), each * h_in, zero, v_at, each * max_rank,
    ]  # fmt: skip
    expand = [
        each * NO_TRANSPOSE, each * NO_TRANSPOSE, m, each * h_out, r, pool.scalings[slots], v_at,
        each * max_rank, _addresses(pool.wb, slots), each * h_out, one, y.addresses, each * h_out,
    ]  # fmt: skip
    batch.prepared["mkl"] = _Plan(
        _library().cblas_sgemm_batch, consecutive(order), bool(len(order)), x, y,
        _arguments(shrink, each), _arguments(expand, each), [*shrink, *expand, each, v],
    )  # fmt: skip


def sgemm_batch(y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """Gather what is not in place, both products of all segments, put back."""
    plan: _Plan = batch.prepared["mkl"]
    plan.x.point_to(x)
    plan.y.point_to(y)
    if plan.any_gathered:
        plan.x.gather(x, plan.gathered)
        plan.y.gather(y, plan.gathered)
    plan.call(*plan.shrink)
    plan.call(*plan.expand)
    if plan.any_gathered:
        y[plan.gathered] = plan.y.buffer


@cache
def _path() -> str:
    """Where pip put the library, "" if it did not."""
    try:
        found = files("mkl") or []
    except PackageNotFoundError:
        return ""
    return next((str(path.locate()) for path in found if path.name.startswith("libmkl_rt.")), "")


@cache
def _library() -> Any:
    """MKL with all cores; on torch's OpenMP where there is torch, else on Intel's.

    Intel's beside torch gave wrong deltas for one segment of rank 4: once torch has loaded GNU's,
    MKL finds that one's `omp_get_num_threads`. On GNU's it was as fast.
    """
    if find_spec("torch"):
        import torch  # noqa: F401  # it must have loaded the OpenMP that MKL is to find

        threads = GNU_THREADS
    else:
        os.environ.setdefault("KMP_BLOCKTIME", str(SPIN_MS))  # read when that OpenMP starts
        threads = INTEL_THREADS
    library = ctypes.CDLL(_path())
    library.MKL_Set_Threading_Layer(threads)
    library.MKL_Set_Interface_Layer(LP64)
    library.MKL_Set_Num_Threads(cores())
    library.cblas_sgemm_batch.restype = None
    pointers = [ctypes.c_void_p] * 13
    library.cblas_sgemm_batch.argtypes = [
        ctypes.c_int, *pointers, ctypes.c_int, ctypes.c_void_p
    ]  # fmt: skip
    return library


def _side(
    order: NDArray[np.int64], width: int, start: NDArray[np.int64], in_place: NDArray[np.int64]
) -> _Side:
    buffer = np.empty((len(order), width), np.float32)
    return _Side(buffer, _addresses(buffer, start), in_place, np.empty_like(start))


def _addresses(array: NDArray[np.float32], index: Any) -> NDArray[np.int64]:
    """The address of array[i], for each i, in bounds or not; the array is contiguous."""
    step = math.prod(array.shape[1:]) * array.itemsize  # strides are 0 where there are no rows
    return np.asarray(index, np.int64) * step + array.ctypes.data


def _arguments(arrays: list[NDArray[Any]], each: NDArray[np.int32]) -> list[int]:
    """As cblas.h orders them: every segment is a group of one product."""
    return [ROW_MAJOR, *(array.ctypes.data for array in arrays), len(each), each.ctypes.data]
