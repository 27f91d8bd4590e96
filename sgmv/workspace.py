"""The memory that a call needs beside its operands, and the next call reuses: record, plan, v.

The plan's integers are some 120 bytes a row.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from sgmv.kernels.call import begin
from sgmv.kernels.jit import entry
from sgmv.kernels.plan import scratch_size
from sgmv.kernels.records import CALL, on_cache_lines


class Workspace:
    """The memory of one call at a time."""

    def __init__(self) -> None:
        self.call = on_cache_lines(CALL)
        self.address = int(self.call.ctypes.data)
        self.call["begin"] = _begin()
        self._rows = self._v_bytes = self._threads = 0

    def prepare(self, n: int, v_bytes: int, threads: int) -> None:
        """Have room for the plan of n rows and for v, and note how many threads may take part."""
        if n > self._rows:
            self._scratch = np.empty(scratch_size(n), np.uint8)
            self.call["scratch"], self._rows = self._scratch.ctypes.data, n
        if v_bytes > self._v_bytes:
            self._v = np.empty(v_bytes // 4, np.float32)
            self.call["v_room"], self._v_bytes = self._v.ctypes.data, v_bytes
        if threads != self._threads:
            self.call["threads"] = self._threads = threads


@cache
def _begin() -> int:
    return entry(begin)


_idle: list[Workspace] = []  # as many as calls have run at once


def take() -> Workspace:
    """A workspace for one call."""
    try:
        return _idle.pop()
    except IndexError:
        return Workspace()


def give_back(space: Workspace) -> None:
    """The call is over, and no thread works in the workspace any more."""
    _idle.append(space)
