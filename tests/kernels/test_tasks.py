"""Tasks: together they are every rank, and every column, of every block, once."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgmv.kernels.records import BLOCK, CALL, PANEL, RANK_UNIT, TABLE, TURN, on_cache_lines
from sgmv.kernels.tasks import (
    NONE,
    Task,
    all_begun,
    apart,
    claim_expand,
    claim_shrink,
    finish_shrink,
    leave_expand,
    leave_undone,
    no_task,
    shrink_is_done,
)

BLOCKS = [(0, 19, 0, 4), (2, 8, 4, 10), (1, 33, 10, 11)]  # slot, r, first, last
H_OUT = 2 * PANEL + 5


class Call:
    """A call of these blocks, each cut into so many tasks."""

    def __init__(self, cuts: int, h_out: int = H_OUT, threads: int = 2) -> None:
        self.blocks = np.array(BLOCKS, BLOCK)
        self.table = np.zeros(1, TABLE)
        self.table["h_out"], self.table["panel_columns"] = h_out, PANEL
        self.call = on_cache_lines(CALL)
        self.call["table"], self.call["blocks"] = (
            array.ctypes.data for array in (self.table, self.blocks)
        )
        self.call["block_count"] = len(BLOCKS)
        self.call["shrink"] = self.call["expand"] = 1  # addresses that nothing here enters
        self.call["shrink_cuts"] = self.call["expand_cuts"] = cuts
        self.call["threads"] = threads
        self.address = int(self.call.ctypes.data)


def claim(call: Call, unit: int) -> Task:
    if unit == RANK_UNIT:
        return Task(*claim_shrink(call.address))
    return Task(*claim_expand(call.address, no_task()))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("h_out", [H_OUT, 0])
@pytest.mark.parametrize("cuts", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("unit", [RANK_UNIT, PANEL])
def test_tasks_are_every_part_of_every_block_once(
    unit: int, cuts: int, h_out: int, threads: int
) -> None:
    call = Call(cuts, h_out, threads)
    tasks: list[Task] = []
    while (task := claim(call, unit)).number != NONE:
        tasks.append(task)
    assert [task.number for task in tasks] == list(range(cuts * len(BLOCKS)))
    for i, (slot, r, first, last) in enumerate(BLOCKS):
        extent = r if unit == RANK_UNIT else h_out
        done = np.zeros(extent, int)
        for task in tasks[i * cuts : (i + 1) * cuts]:
            assert (task.slot, task.r, task.first, task.last) == (slot, r, first, last)
            assert task.low % unit == 0
            assert task.high in (extent, task.high // unit * unit)
            done[task.low : task.high] += 1
        assert (done == 1).all()
    assert claim(call, unit).number == NONE


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_tasks_that_run_at_a_time_are_apart(threads: int) -> None:
    """Two cores that work on neighbouring columns take y's cache lines from each other."""
    cuts = 4 * threads
    order = [apart(part, cuts, threads) for part in range(cuts)]
    assert sorted(order) == list(range(cuts))
    for first in range(0, cuts, threads):
        together = sorted(order[first : first + threads])
        assert min(np.diff(together)) == cuts // threads
    assert [apart(part, 5, 2) for part in range(5)] == list(range(5))


class Several(Call):
    """A call of rows with several adapters: its blocks add to the same rows."""

    def __init__(self, cuts: int, threads: int) -> None:
        super().__init__(cuts, threads=threads)
        self.turns = np.zeros(cuts * TURN, np.int64)
        self.call["turns"] = self.turns.ctypes.data


@settings(max_examples=200)
@given(st.integers(1, 6), st.integers(1, 4), st.randoms(use_true_random=False))
def test_blocks_that_share_rows_are_done_in_order_by_one_thread_at_a_time(
    cuts: int, threads: int, random: Random
) -> None:
    """Threads that come, go on, and leave in the midst of it, in any order."""
    call = Several(cuts, threads)
    at_work: dict[int, Task] = {}
    done: list[tuple[int, int]] = []
    for _ in range(10_000):
        if all_begun(call.address) and not at_work:
            break
        thread = random.randrange(threads)
        before = at_work.pop(thread, None)
        if before is not None:
            done.append((before.number % cuts, before.number // cuts))
            if random.random() < 0.3:
                leave_expand(call.address, before)
                continue
        task = Task(*claim_expand(call.address, no_task() if before is None else before))
        if task.number != NONE:
            held = {other.number % cuts for other in at_work.values()}
            assert task.number % cuts not in held, "two threads on the same columns"
            at_work[thread] = task
    assert sorted(done) == [(cut, block) for cut in range(cuts) for block in range(len(BLOCKS))]
    for cut in range(cuts):
        assert [block for its, block in done if its == cut] == list(range(len(BLOCKS)))


def test_v_is_whole_when_every_task_has_ended_and_not_before_all_have_begun() -> None:
    call = Call(cuts=2)
    for number in range(2 * len(BLOCKS)):
        assert not shrink_is_done(call.address)
        assert claim_shrink(call.address)[0] == number
        finish_shrink(call.address, no_task(), np.float32(0))
    assert shrink_is_done(call.address)
    assert not all_begun(call.address)  # expand has not


def test_a_call_that_is_left_begins_no_block_of_a_cut_that_is_held() -> None:
    call = Several(cuts=2, threads=2)
    first = claim_expand(call.address, no_task())
    leave_undone(call.address)
    assert claim_expand(call.address, first)[0] == NONE
    assert claim_expand(call.address, no_task())[0] == NONE


def test_a_call_that_is_left_has_no_task_and_waits_for_none() -> None:
    call = Call(cuts=2)
    claim_shrink(call.address)
    leave_undone(call.address)
    assert claim_shrink(call.address)[0] == NONE
    assert claim_expand(call.address, no_task())[0] == NONE
    assert shrink_is_done(call.address)
    assert all_begun(call.address)
