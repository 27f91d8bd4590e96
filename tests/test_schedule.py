"""Tasks: every row and every rank or column of a segment once, cut where the kernels cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgmv.kernels.loops import COLUMN_BLOCK, RANK_BLOCK
from sgmv.schedule import ROWS_PER_TASK, TASKS_PER_THREAD, expand_tasks, shrink_tasks

segment_lists = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 140)), max_size=8)


@settings(max_examples=80, deadline=None)
@given(segment_lists, st.integers(1, 9), st.sampled_from([1, 5, 1024, 1025, 4096]))
def test_covers_everything_once(segments: list[tuple[int, int]], threads: int, h_out: int) -> None:
    seq_start = np.cumsum([0, *(m for m, _ in segments)])
    rank = np.array([r for _, r in segments], np.int64)
    slot = np.arange(len(segments)) + 10
    for tasks, work, extent, block in (
        (*shrink_tasks(seq_start, slot, rank, threads), rank, RANK_BLOCK),
        (
            *expand_tasks(seq_start, slot, rank, h_out, threads),
            np.full(len(rank), h_out),
            COLUMN_BLOCK,
        ),
    ):
        assert work == sum((m + 1) * r for m, r in segments if r)
        done = [np.zeros((m, e), int) for (m, _), e in zip(segments, extent, strict=True)]
        for at, r, first, last, low, high in tasks:
            s = at - 10
            assert r == rank[s]
            assert 0 < last - first <= ROWS_PER_TASK
            assert low % block == 0
            assert high % block == 0 or high == extent[s]
            done[s][first - seq_start[s] : last - seq_start[s], low:high] += 1
        for s, (_, r) in enumerate(segments):
            assert (done[s] == (1 if r else 0)).all()


@pytest.mark.parametrize("threads", [2, 4])
def test_one_long_segment_gives_every_thread_work(threads: int) -> None:
    one = np.array([0, 40]), np.array([0]), np.array([64])
    assert len(shrink_tasks(*one, threads)[0]) >= threads * TASKS_PER_THREAD
    assert len(expand_tasks(*one, 16384, threads)[0]) >= threads * TASKS_PER_THREAD


def test_one_thread_gets_whole_segments() -> None:
    tasks, _ = shrink_tasks(np.array([0, 40]), np.array([0]), np.array([64]), 1)
    np.testing.assert_array_equal(tasks, [[0, 64, 0, 40, 0, 64]])


def test_cost_follows_the_rows_not_the_slots() -> None:
    tasks, _ = shrink_tasks(np.array([0, 1]), np.array([9_999]), np.array([8]), 2)
    assert len(tasks) == 2
