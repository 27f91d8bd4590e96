"""Where weights are stored: pieces of large slabs, which the system can give in pages of 2 MiB.

    slab 0  [ A of 7 ][ B of 7 ][ free  ][ A of 9 ][ B of 9 ][ free               ]
    slab 1  [ A of 3          ][ B of 3          ][ free                          ]
    slab 2  [ A of a rank that takes more than a third of a slab ]

One adapter's weights are too small for such pages, and those of 4 KiB end the CPU's prefetching at
every 64th cache line. numpy asks Linux for large ones for each array from 4 MiB on. Measured: cold
weights of 16 adapters took 1.16x as long to read in pages of 4 KiB, 1.08x on two threads
(docs/kernels.md).

A slab goes back to the system with its last piece, but for the latest, which stays for the next.
One small piece would keep all of a slab, so that `sparse` names the slabs that are to be emptied:
AdapterStack copies their weights to other slabs. Afterwards all slabs together have at most 1.5
times what their pieces have, and one slab, whatever came and went in whatever order. The way not
taken is to give back the free pages inside a slab: that takes the large pages apart, the system
puts them together again, free ones included, and an adapter smaller than a page still keeps one.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import weakref
from bisect import bisect
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from sgmv.dtypes import Array

CACHE_LINE = 64
SLAB = 32 << 20  # bytes; malloc gives an allocation of this size back as soon as it is free
# More than a third of a slab has one of its own. So a slab in which the next piece has no room is
# filled to two thirds or more, and `sparse` comes to an end.
PIECES_PER_SLAB = 3
MOST = 1.5  # bytes of slabs for each byte of their pieces, and one slab


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An empty array that begins on a cache line, so that no vector of it straddles two.

    Its memory is free again when neither it nor a view of it is left.
    """
    size = math.prod(shape) * dtype.itemsize
    piece = _piece(max(1, -(-size // CACHE_LINE)) * CACHE_LINE)
    return np.asarray(piece)[:size].view(dtype).reshape(shape)


class Totals(NamedTuple):
    """Bytes of all slabs, and of the pieces that they hold."""

    slabs: int
    pieces: int


def totals() -> Totals:
    """What is held of the system at the moment, and what of it is in use."""
    with _cutting:
        return _totals(list(_slabs.values()))


def sparse() -> Iterator[tuple[int, int]]:
    """The ends of the slabs to be emptied, one after the other, until there is no need.

    Nothing is cut from such a slab any more. The caller puts what it has there elsewhere; what
    others have there, as a call in flight may, stays until they let go.
    """
    seen: set[int] = set()
    while (number := _sparsest(seen)) is not None:
        seen.add(number)
        if (slab := _slabs.get(number)) is not None:
            ends = slab.ends
            del slab  # or it would outlive its pieces
            yield ends


class _Slab:
    """Memory that pieces are cut from; its own end comes with that of the last piece."""

    def __init__(self, size: int) -> None:
        # Of more than is asked for, the rest is never written: the system gives no memory for it.
        self._memory = np.empty(max(size, SLAB) + CACHE_LINE, np.uint8)
        self._address = self._memory.ctypes.data
        start = -self._address % CACHE_LINE
        self._free = [(start, start + size)]  # ascending, and none ends where the next begins
        self.size, self.used, self.is_leaving = size, 0, False
        self.ends = self._address, self._address + len(self._memory)
        self.returned: deque[tuple[int, int]] = deque()  # filled by any thread, at any time

    def cut(self, size: int) -> _Piece | None:
        """A piece of `size` bytes, from the first free range that has them, if there is one."""
        self.take_back()
        for i, (start, end) in enumerate([] if self.is_leaving else self._free):
            if end - start >= size:
                self._free[i : i + 1] = [(start + size, end)] if start + size < end else []
                self.used += size
                return _Piece(self, self._address, start, size)
        return None

    def take_back(self) -> None:
        """Have free what pieces have left."""
        while self.returned:
            start, end = self.returned.popleft()
            self.used -= end - start
            i = bisect(self._free, (start, end))
            if i < len(self._free) and self._free[i][0] == end:
                end = self._free.pop(i)[1]
            if i > 0 and self._free[i - 1][1] == start:
                i -= 1
                start = self._free.pop(i)[0]
            self._free.insert(i, (start, end))


class _Piece:
    """A part of a slab, as numpy takes it; the arrays over it keep it alive."""

    def __init__(self, slab: _Slab, address: int, start: int, size: int) -> None:
        self._slab, self._range = slab, (start, start + size)
        data = address + start, False  # not read-only
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": data}

    def __del__(self) -> None:
        self._slab.returned.append(self._range)  # takes no lock: this may interrupt `_take_back`


_slabs: weakref.WeakValueDictionary[int, _Slab] = weakref.WeakValueDictionary()  # oldest first
_number = itertools.count()
_latest: _Slab | None = None  # kept, so that an adapter loaded for one call at a time is cheap
_cutting = threading.Lock()


def _piece(size: int) -> _Piece:
    with _cutting:
        slabs = itertools.chain(_slabs.values(), map(_new_slab, [size]))  # made if none has room
        return next(filter(None, (slab.cut(size) for slab in slabs)))


def _new_slab(size: int) -> _Slab:
    global _latest
    is_shared = size <= SLAB // PIECES_PER_SLAB
    slab = _Slab(SLAB if is_shared else size)
    _slabs[next(_number)] = slab
    if is_shared:
        _latest = slab
    return slab


def _sparsest(but: Collection[int]) -> int | None:
    """The number of the slab to be emptied next, which leaves; None if memory is in bounds."""
    with _cutting:
        slabs = dict(_slabs.items())
        held = _totals(list(slabs.values()))
        if held.slabs <= MOST * held.pieces + SLAB:
            return None
        shares = {
            number: slab.used / slab.size
            for number, slab in slabs.items()
            if slab is not _latest and number not in but
        }
        found = min(shares, key=shares.__getitem__, default=None)
        if found is None or shares[found] * MOST >= 1:
            return None
        slabs[found].is_leaving = True
        return found


def _totals(slabs: list[_Slab]) -> Totals:
    for slab in slabs:
        slab.take_back()
    return Totals(sum(slab.size for slab in slabs), sum(slab.used for slab in slabs))


def _renew_lock() -> None:
    """In a forked child: another thread of the parent may have held it."""
    global _cutting
    _cutting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
