"""Lists and heaps of the compiled loop, against OrderedDict and heapq."""

from __future__ import annotations

import heapq
from collections import OrderedDict

import numpy as np
import pytest

from sgmv.replicas.lists import append, has, pop, push, remove
from sgmv.replicas.records import ABSENT, ENDS, LINK, NONE

pytestmark = pytest.mark.once


def in_order(links: np.ndarray, ends: np.ndarray, r: int) -> list[int]:
    found, at = [], int(ends[r].first)
    while at != NONE:
        found.append(at)
        at = int(links[at, r].after)
    return found


def test_a_list_keeps_its_order() -> None:
    rng = np.random.default_rng(0)
    links, ends = np.zeros((9, 2), LINK), np.zeros(2, ENDS)
    links["before"] = links["after"] = ABSENT
    ends["first"] = ends["last"] = NONE
    plain: OrderedDict[int, None] = OrderedDict()
    for adapter in rng.integers(0, 9, 400).tolist():
        assert has(links, adapter, 1) == (adapter in plain)
        if adapter in plain:
            del plain[adapter]
            remove(links, ends, adapter, 1)
        else:
            plain[adapter] = None
            append(links, ends, adapter, 1)
        assert in_order(links, ends, 1) == list(plain)
        assert ends[1].count == len(plain)
    assert in_order(links, ends, 0) == []


def test_a_heap_gives_the_smallest() -> None:
    rng = np.random.default_rng(1)
    heap, plain = np.zeros(64, np.int64), list[int]()
    for value in rng.integers(0, 50, 2000).tolist():
        if plain and (value % 2 or len(plain) == 64):
            assert pop(heap, len(plain)) == heapq.heappop(plain)
        else:
            push(heap, len(plain), value)
            heapq.heappush(plain, value)
