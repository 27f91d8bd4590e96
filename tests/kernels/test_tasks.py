"""Tasks: together they are every rank, and every column, of every block, once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgmv.kernels.records import BLOCK, CALL, PANEL, RANK_UNIT, TABLE, on_cache_lines
from sgmv.kernels.tasks import (
    NONE,
    Part,
    Task,
    all_begun,
    apart,
    claim_expand,
    claim_shrink,
    finish_shrink,
    leave_undone,
    no_task,
    shrink_is_done,
    task_in_part,
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
        self.call["block_count"] = self.call["band_count"] = len(BLOCKS)
        self.call["shrink"] = self.call["expand"] = 1  # addresses that nothing here enters
        self.call["shrink_cuts"] = self.call["expand_cuts"] = cuts
        self.call["threads"] = threads
        self.address = int(self.call.ctypes.data)


def parts(call: Call) -> Iterator[tuple[Part, list[Task]]]:
    """All parts of expand that are left, and the tasks of each."""
    while (part := Part(*claim_expand(call.address))).number != NONE:
        blocks = range(part.first, part.last)
        yield part, [Task(*task_in_part(call.address, part, block)) for block in blocks]


def tasks_of(call: Call, unit: int) -> list[Task]:
    """All tasks of shrink, or of expand."""
    if unit == PANEL:
        return [task for _, tasks in parts(call) for task in tasks]
    return list(iter(lambda: Task(*claim_shrink(call.address)), Task(*no_task())))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("h_out", [H_OUT, 0])
@pytest.mark.parametrize("cuts", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("unit", [RANK_UNIT, PANEL])
def test_tasks_are_every_part_of_every_block_once(
    unit: int, cuts: int, h_out: int, threads: int
) -> None:
    call = Call(cuts, h_out, threads)
    tasks = tasks_of(call, unit)
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
    assert tasks_of(call, unit) == []


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
    """A call of rows with several adapters: blocks of a band add to the same rows."""

    def __init__(self, cuts: int, bands: list[int]) -> None:
        super().__init__(cuts)
        self.bands = np.array(bands)
        self.call["bands"], self.call["band_count"] = self.bands.ctypes.data, len(bands) - 1


@given(st.integers(1, 6), st.lists(st.integers(0, len(BLOCKS)), max_size=4).map(sorted))
def test_a_part_is_a_cut_of_all_blocks_of_a_band_in_their_order(cuts: int, ends: list[int]) -> None:
    bands = [0, *ends, len(BLOCKS)]
    call = Several(cuts, bands)
    assert not all_begun(call.address)
    found = []
    for part, tasks in parts(call):
        band, cut = divmod(part.number, cuts)
        assert [task.number for task in tasks] == [
            block * cuts + cut for block in range(bands[band], bands[band + 1])
        ]
        found.append((band, cut))
    assert found == [(band, cut) for band in range(len(bands) - 1) for cut in range(cuts)]
    assert all_begun(call.address)


def test_v_is_whole_when_every_task_has_ended_and_not_before_all_have_begun() -> None:
    call = Call(cuts=2)
    for number in range(2 * len(BLOCKS)):
        assert not shrink_is_done(call.address)
        assert claim_shrink(call.address)[0] == number
        finish_shrink(call.address, no_task(), np.float32(0))
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
