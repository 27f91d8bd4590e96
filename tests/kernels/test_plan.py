"""The plan: every row in one block, every rank or column in one cut, cut where the kernels cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgmv
from sgmv.ids import NO_SLOT
from sgmv.kernels.plan import (
    FEWEST_ROWS_PER_BLOCK,
    PRODUCTS_PER_NS,
    ROWS_PER_BAND,
    ROWS_PER_BLOCK,
    TASKS_PER_THREAD,
    UNKNOWN,
    WEIGHTS_PER_NS,
    blocks_in_bands,
    cost,
    cuts,
    find,
    most_blocks,
    most_rows,
    row_blocks,
    rows_per_band,
    scratch_size,
    views,
)
from sgmv.kernels.records import BLOCK, PANEL, RANK_UNIT
from sgmv.kernels.tasks import cut

GUARD = -99


def blocks_of(segments: list[tuple[int, int]], threads: int) -> np.ndarray:
    """The row blocks of segments (rows, rank), whose slots are 10, 11, 12, ..."""
    seq_start = np.cumsum([0, *(m for m, _ in segments)])
    rank = np.array([r for _, r in segments], np.int64)
    room = np.zeros(most_blocks(int(seq_start[-1])) + 1, BLOCK)
    for field in BLOCK.names:
        room[field] = GUARD
    slot, no_gains = np.arange(len(segments)) + 10, np.empty(0, np.int64)
    count = row_blocks(seq_start, slot, rank, no_gains, threads, room)
    assert all((room[count:][field] == GUARD).all() for field in BLOCK.names)
    assert count < len(room)
    return room[:count]


segment_lists = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 140)), max_size=8)


@settings(max_examples=80)
@given(segment_lists, st.integers(1, 9))
def test_blocks_hold_every_row_of_a_rank_once(
    segments: list[tuple[int, int]], threads: int
) -> None:
    seq_start = np.cumsum([0, *(m for m, _ in segments)])
    done = np.zeros(seq_start[-1], int)
    for slot, r, first, last in blocks_of(segments, threads).tolist():
        s = slot - 10
        assert r == segments[s][1] > 0
        assert seq_start[s] <= first < last <= seq_start[s + 1]
        assert last - first <= most_rows(r)
        done[first:last] += 1
    np.testing.assert_array_equal(done, [int(r > 0) for m, r in segments for _ in range(m)])


@settings(max_examples=150)
@given(
    st.integers(1, 60).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(-1, 5), min_size=3, max_size=3), min_size=n, max_size=n
        )
    ),
    st.integers(FEWEST_ROWS_PER_BLOCK, 70),
    st.integers(1, 96),
)
def test_bands_hold_every_pair_once_in_the_order_of_segments(
    ids: list[list[int]], band: int, most: int
) -> None:
    """Of adapter 5 there is none: its rank is 0."""
    segments = sgmv.segment(ids)
    m, S = len(segments.rows), segments.S
    rank = np.where((segments.adapter_ids == -1) | (segments.adapter_ids == 5), 0, 4)
    memory = np.full(scratch_size(m) // 8 + 1, GUARD)
    found = views(memory.ctypes.data, m)
    operands = segments.seq_start, np.arange(S), rank, np.empty(0, np.int64), segments.rows
    count = blocks_in_bands(*operands, band, most, found)
    assert count == -(-len(ids) // band)
    bands, done = found.bands.tolist(), np.zeros(m, int)
    assert bands[0] == 0
    for q in range(count):
        blocks = found.blocks[bands[q] : bands[q + 1]].tolist()
        assert [slot for slot, *_ in blocks] == sorted(slot for slot, *_ in blocks)
        for slot, r, first, last in blocks:
            assert r == rank[slot] > 0
            assert segments.seq_start[slot] <= first < last <= segments.seq_start[slot + 1]
            assert last - first <= ROWS_PER_BLOCK
            assert (segments.rows[first:last] // band == q).all()
            done[first:last] += 1
    np.testing.assert_array_equal(done, np.repeat(rank > 0, segments.lengths))


def band_of(segments: sgmv.Segments, rank: int, k: int) -> int:
    ranks = np.where(segments.adapter_ids == -1, 0, rank)
    return int(rows_per_band(segments.seq_start, ranks, segments.rows, k, 2))


def test_bands_have_few_rows_where_rows_share_their_adapters() -> None:
    """Else each band would read all weights for a few rows of each segment."""
    shared = sgmv.segment(np.tile(np.arange(4), (256, 1)))
    drawn = sgmv.segment(np.arange(4 * 256).reshape(256, 4) % 17)
    assert band_of(shared, 16, 4) == 256 // (2 * TASKS_PER_THREAD)
    assert band_of(drawn, 16, 4) == ROWS_PER_BAND
    assert band_of(shared, 300, 4) == ROWS_PER_BAND, "weights are read again for each band"
    assert band_of(sgmv.segment(np.full((9, 2), -1)), 16, 2) == ROWS_PER_BAND


def test_rows_that_do_not_ascend_are_one_band() -> None:
    """Segments made by hand: a band would not find all its rows of a segment."""
    its = sgmv.segment(np.tile(np.arange(2), (256, 1)))
    pairs = its.pairs.reshape(2, 256)[:, ::-1].reshape(-1)
    turned = sgmv.Segments(pairs // 2, its.seq_start, its.adapter_ids, pairs)
    assert band_of(turned, 4, 2) == 512
    memory = np.zeros(scratch_size(512) // 8 + 1, np.int64)
    operands = turned.seq_start, np.arange(2), np.full(2, 4), np.empty(0, np.int64), turned.rows
    assert blocks_in_bands(*operands, 512, 96, views(memory.ctypes.data, 512)) == 1


def test_blocks_of_single_rows_fit_their_memory() -> None:
    assert len(blocks_of([(1, 3)] * 50, 8)) == 50
    assert len(blocks_of([(1, 3), (10_000, 3), (1, 0)], 64)) <= most_blocks(10_002)


@settings(max_examples=80)
@given(st.integers(0, 40), st.sampled_from([1, 2, 4, 7, 8]), st.integers(1, 9))
def test_cuts_hold_every_rank_and_column_once(blocks: int, unit: int, threads: int) -> None:
    """The blocks' ranks may differ: cuts are as many as the widest block takes."""
    for extent, widest in ((1, 1), (5, 17), (64, 64), (65, 65), (130, 140), (4096, 4096)):
        parts = cuts(blocks, -(-widest // unit), threads)
        done = np.zeros(extent, int)
        for part in range(parts):
            low, high = cut(part, parts, extent, unit)
            assert low % unit == 0
            assert high % unit == 0 or high == extent or low >= high
            done[low:high] += 1
        assert (done == 1).all()


@pytest.mark.parametrize("threads", [2, 4])
def test_one_long_segment_gives_every_thread_work(threads: int) -> None:
    blocks = blocks_of([(40, 64)], threads)
    for extent, unit in ((64, RANK_UNIT), (16384, PANEL)):
        parts = cuts(len(blocks), extent // unit, threads)
        assert len(blocks) * parts >= threads * TASKS_PER_THREAD


@pytest.mark.parametrize("threads", [2, 4])
def test_many_rows_need_no_cuts(threads: int) -> None:
    blocks = blocks_of([(1000, 64), (500, 8)], threads)
    assert len(blocks) >= threads * TASKS_PER_THREAD
    assert cuts(len(blocks), 64, threads) == 1


def test_wide_weights_are_read_for_many_rows_at_a_time() -> None:
    """They are cut along ranks anyway, so that threads need no small blocks."""
    for threads in (1, 2):
        assert [b[3] - b[2] for b in blocks_of([(384, 1024)], threads).tolist()] == [384]
    assert len(blocks_of([(384, 64)], 1)) == 4


def test_one_thread_gets_whole_segments() -> None:
    blocks = blocks_of([(40, 64), (9, 3)], 1)
    assert blocks.tolist() == [(10, 64, 0, 40), (11, 3, 40, 49)]
    assert cuts(2, 8, 1) == 1


def test_there_is_always_one_cut_at_least() -> None:
    """Tasks are numbered by cuts: none would divide by zero."""
    assert cuts(0, 8, 4) == 1
    assert cuts(3, 0, 4) == 1


@given(segment_lists, st.integers(1, 9), st.sampled_from([1, 65, 8192]))
def test_the_cost_is_that_of_the_segments(
    segments: list[tuple[int, int]], threads: int, widths: int
) -> None:
    blocks = blocks_of(segments, threads)
    cost_ns, rank = cost(blocks, widths)
    products = widths * sum(m * r for m, r in segments)
    weights = widths * sum(r for _, r, _, _ in blocks.tolist())
    assert cost_ns == products // PRODUCTS_PER_NS + weights // WEIGHTS_PER_NS
    assert rank == max((r for _, r in segments), default=0)


@given(
    st.dictionaries(st.integers(0, 20) | st.integers(0, 2**62), st.integers(0, 9), max_size=9),
    st.lists(st.integers(-1, 20) | st.integers(-1, 2**62), max_size=12),
)
def test_find_equals_a_dict(ranks: dict[int, int], asked: list[int]) -> None:
    """The ids' slots descend; ids of rank 0 here are base only, without a slot."""
    loaded = [i for i, r in ranks.items() if r]
    slot_of = {i: len(loaded) - 1 - s for s, i in enumerate(loaded)}
    by_slot = np.array([ranks[i] for i in reversed(loaded)], np.int64)
    ids = np.array(sorted(ranks), np.int64)
    slots = np.array([slot_of.get(i, NO_SLOT) for i in sorted(ranks)], np.int64)
    asked += list(ranks)
    slot, rank = np.full((2, len(asked)), GUARD)
    unknown = find(ids, slots, by_slot, np.array(asked, np.int64), slot, rank)
    missing = [i for i in asked if i not in ranks and i != -1]
    assert unknown == len(missing)
    for i, found, r in zip(asked, slot, rank, strict=True):
        assert found == (UNKNOWN if i in missing else slot_of.get(i, NO_SLOT))
        assert r == ranks.get(i, 0)
