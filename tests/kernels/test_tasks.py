"""Tasks: together they are every rank, and every column, of every block, once."""

from __future__ import annotations

import numpy as np
import pytest

from sgmv.kernels.records import BLOCK, CALL, PANEL, RANK_UNIT, TABLE, on_cache_lines
from sgmv.kernels.tasks import (
    NONE,
    Task,
    all_begun,
    claim_expand,
    claim_shrink,
    finish_shrink,
    leave_undone,
    shrink_is_done,
)

BLOCKS = [(0, 19, 0, 4), (2, 8, 4, 10), (1, 33, 10, 11)]  # slot, r, first, last
H_OUT = 2 * PANEL + 5


class Call:
    """A call of these blocks, each cut into so many tasks."""

    def __init__(self, cuts: int, h_out: int = H_OUT) -> None:
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
        self.address = int(self.call.ctypes.data)


@pytest.mark.parametrize("h_out", [H_OUT, 0])
@pytest.mark.parametrize("cuts", [1, 2, 3, 7])
@pytest.mark.parametrize(("claim", "unit"), [(claim_shrink, RANK_UNIT), (claim_expand, PANEL)])
def test_tasks_are_every_part_of_every_block_once(
    claim: object, unit: int, cuts: int, h_out: int
) -> None:
    call = Call(cuts, h_out)
    tasks: list[Task] = []
    while (task := Task(*claim(call.address))).number != NONE:  # type: ignore[operator]
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
    assert claim(call.address)[0] == NONE  # type: ignore[operator]


def test_v_is_whole_when_every_task_has_ended_and_not_before_all_have_begun() -> None:
    call = Call(cuts=2)
    for number in range(2 * len(BLOCKS)):
        assert not shrink_is_done(call.address)
        assert claim_shrink(call.address)[0] == number
        finish_shrink(call.address)
    assert shrink_is_done(call.address)
    assert not all_begun(call.address)  # expand has not


def test_a_call_that_is_left_has_no_task_and_waits_for_none() -> None:
    call = Call(cuts=2)
    claim_shrink(call.address)
    leave_undone(call.address)
    assert claim_shrink(call.address)[0] == NONE
    assert claim_expand(call.address)[0] == NONE
    assert shrink_is_done(call.address)
    assert all_begun(call.address)
