"""Adapters in the order in which a replica evicts them, and heaps of integers.

`links` is (adapters, N) LINK, `ends` (N,) ENDS: one list for each replica r. A change takes the
same time however long the list is.
"""

from __future__ import annotations

from typing import Any

from sgmv.replicas.records import ABSENT, NONE, compiled


@compiled
def has(links: Any, adapter: int, r: int) -> bool:
    """Whether this adapter is in the list."""
    return bool(links[adapter, r].after != ABSENT)


@compiled
def append(links: Any, ends: Any, adapter: int, r: int) -> None:
    """Put it at the end, the last to be evicted."""
    end = ends[r]
    last = end.last
    links[adapter, r].before = last
    links[adapter, r].after = NONE
    if last == NONE:
        end.first = adapter
    else:
        links[last, r].after = adapter
    end.last = adapter
    end.count += 1


@compiled
def remove(links: Any, ends: Any, adapter: int, r: int) -> None:
    """Take it out."""
    end = ends[r]
    before, after = links[adapter, r].before, links[adapter, r].after
    if before == NONE:
        end.first = after
    else:
        links[before, r].after = after
    if after == NONE:
        end.last = before
    else:
        links[after, r].before = before
    links[adapter, r].before = links[adapter, r].after = ABSENT
    end.count -= 1


@compiled
def push(heap: Any, count: int, value: int) -> None:
    """Add a value to a heap of so far `count`."""
    at = count
    while at > 0:
        above = (at - 1) // 2
        if heap[above] <= value:
            break
        heap[at] = heap[above]
        at = above
    heap[at] = value


@compiled
def pop(heap: Any, count: int) -> int:
    """The smallest of `count` values, taken out."""
    smallest, value = heap[0], heap[count - 1]
    at, size = 0, count - 1
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        if below + 1 < size and heap[below + 1] < heap[below]:
            below += 1
        if value <= heap[below]:
            break
        heap[at] = heap[below]
        at = below
    heap[at] = value
    return int(smallest)
