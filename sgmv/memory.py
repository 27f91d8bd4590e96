"""Where weights stand: pieces of large chunks, which the system can give in pages of 2 MiB.

    chunk 0  [ A of 7 ][ B of 7 ][ free  ][ A of 9 ][ B of 9 ][ free               ]
    chunk 1  [ A of 3          ][ B of 3          ][ free                          ]

One adapter's weights are too small for such pages, and those of 4 KiB end the CPU's prefetching at
every 64th cache line. numpy asks Linux for large ones for each array from 4 MiB on. Measured: cold
weights of 16 adapters took 1.16x as long to read in pages of 4 KiB, 1.08x on two threads
(docs/kernels.md).

A chunk goes back to the system with its last piece, but for the latest, which stays for the next.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import weakref
from bisect import bisect
from collections import deque
from typing import Any

import numpy as np

from sgmv.dtypes import Array

CACHE_LINE = 64
CHUNK = 32 << 20  # bytes; an allocation so large malloc returns to the system as soon as it is free


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An empty array that begins on a cache line, so that no vector of it straddles two.

    Its memory is free again when neither it nor a view of it is left.
    """
    size = math.prod(shape) * dtype.itemsize
    piece = _piece(max(1, -(-size // CACHE_LINE)) * CACHE_LINE)
    return np.asarray(piece)[:size].view(dtype).reshape(shape)


class _Chunk:
    """Memory that pieces are cut from; its own end comes with that of the last piece."""

    def __init__(self, size: int) -> None:
        self._memory = np.empty(size + CACHE_LINE, np.uint8)
        self._address = self._memory.ctypes.data
        start = -self._address % CACHE_LINE
        self._free = [(start, start + size)]  # ascending, and none ends where the next begins
        self.returned: deque[tuple[int, int]] = deque()  # filled by any thread, at any time

    def cut(self, size: int) -> _Piece | None:
        """So many bytes from the first place that has them, if there is one."""
        self._take_back()
        for i, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[i : i + 1] = [(start + size, end)] if start + size < end else []
                return _Piece(self, self._address, start, size)
        return None

    def _take_back(self) -> None:
        while self.returned:
            start, end = self.returned.popleft()
            i = bisect(self._free, (start, end))
            if i < len(self._free) and self._free[i][0] == end:
                end = self._free.pop(i)[1]
            if i > 0 and self._free[i - 1][1] == start:
                i -= 1
                start = self._free.pop(i)[0]
            self._free.insert(i, (start, end))


class _Piece:
    """A part of a chunk, as numpy takes it; the arrays over it keep it alive."""

    def __init__(self, chunk: _Chunk, address: int, start: int, size: int) -> None:
        self._chunk, self._range = chunk, (start, start + size)
        data = address + start, False  # not read-only
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": data}

    def __del__(self) -> None:
        self._chunk.returned.append(self._range)  # takes no lock: this may interrupt `_take_back`


_chunks: weakref.WeakValueDictionary[int, _Chunk] = weakref.WeakValueDictionary()  # oldest first
_number = itertools.count()
_latest: _Chunk | None = None  # kept, so that an adapter loaded for one call at a time is cheap
_cutting = threading.Lock()


def _piece(size: int) -> _Piece:
    with _cutting:
        chunks = itertools.chain(_chunks.values(), map(_new_chunk, [size]))  # made if none has room
        return next(filter(None, (chunk.cut(size) for chunk in chunks)))


def _new_chunk(size: int) -> _Chunk:
    global _latest
    chunk = _Chunk(max(size, CHUNK))
    _chunks[next(_number)] = chunk
    if size <= CHUNK:
        _latest = chunk
    return chunk


def _renew_lock() -> None:
    """In a forked child: another thread of the parent may have held it."""
    global _cutting
    _cutting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
