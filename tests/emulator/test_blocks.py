"""Thread blocks: their orders, their barriers, their races."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from sgmv.emulator.blocks import BARRIER, STEP, Races, execute

pytestmark = pytest.mark.once


def test_a_race_is_seen_whatever_the_order_of_its_accesses() -> None:
    for order in (("read", "write"), ("write", "read")):
        races = Races()
        for access in order:
            getattr(races, access)(7, (0, 0, 0) if access == "read" else (1, 0, 0))
        races.write(8, (0, 0, 0))
        races.read(8, (0, 0, 0))  # its own
        races.write(8, (0, 0, 0))
        races.write(9, (1, 0, 0))
        races.barrier()
        races.read(9, (0, 0, 0))  # after it
        assert races.found == {7: (7, (1, 0, 0), (0, 0, 0))}
        races.write(9, (0, 0, 0))
        races.write(9, (1, 0, 0))
        assert races.found[9] == (9, (1, 0, 0), (0, 0, 0))


def test_orders_are_all_and_legal() -> None:
    """In every order, no block passes a barrier before all have come to it."""
    for order, seed in (("in order", 0), ("reversed", 0), *(("random", s) for s in range(20))):
        log: list[tuple[int, str]] = []

        def block(i: int, log: list[tuple[int, str]] = log) -> Iterator[Any]:
            for step in "abc":
                log.append((i, step))
                yield STEP
                yield BARRIER

        assert execute({(i % 2, i // 2, 0): block(i) for i in range(6)}, order, seed) == 3
        assert [step for _, step in log] == sorted(step for _, step in log)
        assert Counter(log) == Counter((i, step) for i in range(6) for step in "abc")
        if order == "in order":
            assert [i for i, step in log if step == "a"] == [0, 1, 2, 3, 4, 5]
