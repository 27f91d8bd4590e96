"""Thread blocks as coroutines: run in any order that a GPU may take, stopped where they would hang.

    STEP     yielded before an atomic: another block may come first
    BARRIER  yielded at a grid barrier: goes on once every block of the grid is there

Between two yields a block runs alone. Blocks that wait for a block that has returned wait for
ever: nothing on a GPU notices, and the call never comes back. Here it is a `Deadlock`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import TypeAlias

import numpy as np

from sgmv.errors import ValueRangeError

Index: TypeAlias = tuple[int, int, int]  # x, y, z, as in blockIdx
ORDERS = ("in order", "reversed", "random")


class Pause(Enum):
    """Where a block lets others run."""

    STEP = "step"
    BARRIER = "barrier"


STEP, BARRIER = Pause.STEP, Pause.BARRIER
Block: TypeAlias = Iterator[Pause]


@dataclass(frozen=True)
class Deadlock:
    """Which blocks wait for which.

    Semantics: every block of `waiting` waits at the grid's barrier number `barrier`, counted from
    1, for those of `returned`, which passed the ones before it and ended.

    >>> print(Deadlock(2, ((0, 1, 0), (1, 1, 0)), ((0, 0, 0), (1, 0, 0))))
    deadlock: blocks (0..1, 1, 0) wait at grid barrier 2 for blocks (0..1, 0, 0), \
which returned after 1
    """

    barrier: int
    waiting: tuple[Index, ...]
    returned: tuple[Index, ...]

    def __str__(self) -> str:
        return (
            f"deadlock: blocks {_ranges(self.waiting)} wait at grid barrier {self.barrier} for "
            f"blocks {_ranges(self.returned)}, which returned after {self.barrier - 1}"
        )


class DeadlockError(RuntimeError):
    """A launch that would never end; `deadlock` says which blocks wait for which."""

    def __init__(self, deadlock: Deadlock) -> None:
        super().__init__(str(deadlock))
        self.deadlock = deadlock


def execute(
    blocks: Mapping[Index, Block],
    order: str = "in order",
    seed: int = 0,
    opened: Callable[[], None] = lambda: None,
) -> int:
    """Run all blocks to their ends; returns how many grid barriers they passed.

    Semantics: of the blocks that can run, the first, the last or a random one runs to its next
    pause, until all have returned.

    order   "in order", "reversed" or "random", which the seed draws
    opened  called whenever a barrier lets the blocks go on

    Raises DeadlockError where blocks wait for one that has returned, ValueRangeError for another
    order. Source: CUDA C++ Programming Guide, "Grid Synchronization": all blocks must take part.

    >>> seen = []
    >>> def block(name):
    ...     seen.append(name)
    ...     yield BARRIER
    ...     seen.append(name)
    >>> execute({(i, 0, 0): block(i) for i in range(2)}, "reversed"), seen
    (1, [1, 0, 1, 0])
    """
    pick = _picker(order, seed)
    ready = sorted(blocks, key=_launch_order)
    waiting: list[Index] = []
    passed = 0
    while ready:
        position = pick(len(ready))
        pause = next(blocks[ready[position]], None)
        if pause is STEP:
            continue
        index = ready.pop(position)
        if pause is BARRIER:
            waiting.append(index)
        if not ready and waiting:
            if len(waiting) < len(blocks):
                returned = sorted(set(blocks) - set(waiting), key=_launch_order)
                waiting.sort(key=_launch_order)
                raise DeadlockError(Deadlock(passed + 1, tuple(waiting), tuple(returned)))
            ready, waiting = sorted(waiting, key=_launch_order), []
            passed += 1
            opened()
    return passed


class Races:
    """Watches one buffer: a slot read and written by different blocks with no barrier between.

    Semantics: accesses between two grid barriers have no order; two of them race if they are of
    different blocks and one of them writes. `found` holds slot -> (slot, block that writes, other
    block), the first race of each slot.
    """

    def __init__(self) -> None:
        self.found: dict[int, tuple[int, Index, Index]] = {}
        self._writer: dict[int, Index] = {}
        self._readers: dict[int, set[Index]] = {}

    def write(self, slot: int, block: Index) -> None:
        others = {*self._readers.get(slot, ()), self._writer.get(slot, block)} - {block}
        if others:
            self.found.setdefault(slot, (slot, block, min(others)))
        self._writer[slot] = block

    def read(self, slot: int, block: Index) -> None:
        self._readers.setdefault(slot, set()).add(block)
        writer = self._writer.get(slot, block)
        if writer != block:
            self.found.setdefault(slot, (slot, writer, block))

    def barrier(self) -> None:
        """What came before is before all that comes."""
        self._writer.clear()
        self._readers.clear()


def _launch_order(index: Index) -> Index:
    """Blocks are numbered with x running fastest."""
    return index[::-1]


def _picker(order: str, seed: int) -> Callable[[int], int]:
    """A function of the number of ready blocks: which of them runs next."""
    if order not in ORDERS:
        raise ValueRangeError("order", f"one of {ORDERS}", repr(order), "choose one of them")
    if order == "random":
        rng = np.random.default_rng(seed)
        return lambda count: int(rng.integers(count))
    return lambda count: 0 if order == "in order" else count - 1


def _ranges(indices: Sequence[Index], limit: int = 4) -> str:
    """Blocks, in their order, with those of one y and z as a range of x; the first few of these.

    >>> _ranges([(0, 0, 0), (1, 0, 0), (0, 3, 0)])
    '(0..1, 0, 0), (0, 3, 0)'
    """
    shown = []
    for (y, z), group in groupby(indices, key=lambda index: index[1:]):
        x = [index[0] for index in group]
        shown.append(f"({x[0]}..{x[-1]}, {y}, {z})" if len(x) > 1 else f"({x[0]}, {y}, {z})")
    return ", ".join([*shown[:limit], "..."] if len(shown) > limit else shown)
