"""segment: a stable sort into frozen segments; Segments' invariants, table and statistics."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sgmv
from reference.workloads import popularity
from sgmv.segment import Traffic
from tests.help.planting import run_python

IDS = st.one_of(st.integers(-1, 5), st.integers(-1, 2**62), st.sampled_from([-1, 2**63 - 2]))


@given(st.lists(IDS, max_size=60))
def test_equals_numpys_stable_sort(ids: list[int]) -> None:
    segments = sgmv.segment(ids)
    array = np.array(ids, np.int64)
    unique, lengths = np.unique(array, return_counts=True)
    np.testing.assert_array_equal(segments.rows, np.argsort(array, kind="stable"))
    np.testing.assert_array_equal(segments.adapter_ids, unique)
    np.testing.assert_array_equal(segments.seq_start, np.concatenate([[0], np.cumsum(lengths)]))
    np.testing.assert_array_equal(segments.lengths, lengths)
    assert (segments.n, segments.S) == (len(ids), len(unique))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 255, 256, 257, 70_000])
def test_every_digit_width(n: int, rng: np.random.Generator) -> None:
    ids = rng.integers(-1, 3 * n, n)
    segments = sgmv.segment(ids)
    np.testing.assert_array_equal(segments.rows, np.argsort(ids, kind="stable"))


@pytest.mark.parametrize(
    "ids",
    [
        [3, -1, 3],
        (3, -1, 3),
        np.array([3, -1, 3], np.int8),
        np.array([3, -1, 3], np.int32),
        np.array([3, 0, -1, 0, 3, 0])[::2],
        [3, None, 3],
        np.array([3, None, 3], object),
    ],
    ids=["list", "tuple", "int8", "int32", "strided", "None", "object"],
)
def test_any_integers(ids: object) -> None:
    segments = sgmv.segment(ids)
    np.testing.assert_array_equal(segments.rows, [1, 0, 2])
    np.testing.assert_array_equal(segments.adapter_ids, [-1, 3])


def test_unsigned_and_empty() -> None:
    np.testing.assert_array_equal(sgmv.segment(np.array([2, 1], np.uint64)).adapter_ids, [1, 2])
    for empty in ([], np.empty(0), np.empty(0, np.int32)):
        segments = sgmv.segment(empty)
        np.testing.assert_array_equal(segments.seq_start, [0])
        assert (segments.n, segments.S) == (0, 0)


def test_frozen_int64() -> None:
    for segments in (sgmv.segment([1, 0]), pickle.loads(pickle.dumps(sgmv.segment([1, 0])))):
        for field in dataclasses.fields(segments):
            array = getattr(segments, field.name)
            assert array.dtype == np.int64
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 5
        with pytest.raises(dataclasses.FrozenInstanceError):
            segments.rows = np.zeros(2)


def test_made_by_hand_is_copied() -> None:
    rows = np.array([1, 0])
    segments = sgmv.Segments(rows, [0, 2], [4])
    rows[:] = 9
    np.testing.assert_array_equal(segments.rows, [1, 0])


def test_segments_without_rows_change_nothing() -> None:
    """In another process: the plan is written past its memory."""
    program = (
        "import numpy as np, sgmv\n"
        "pair = np.ones((2, 8), 'f'), np.ones((8, 2), 'f')\n"
        "stack = sgmv.AdapterStack.from_adapters([pair] * 300)\n"
        "segments = sgmv.Segments([0, 1], [0] * 299 + [1, 2], range(300))\n"
        "print(sgmv.add_lora(np.zeros((2, 8), 'f'), np.ones((2, 8), 'f'), stack, segments).sum())"
    )
    assert run_python(program).stdout.strip() == str(2.0 * 8 * 8 * 2)


def test_table_of_many_segments_shows_head_tail_and_totals() -> None:
    lines = str(sgmv.segment(np.arange(1000) - 1)).splitlines()
    assert lines[0].split() == ["segment", "adapter", "rows", "offsets"]
    assert lines[1].split() == ["0", "base", "1", "0:1"]
    assert lines[7].split() == ["..."] * 4
    assert lines[-2].split() == ["999", "998", "1", "999:1000"]
    assert lines[-1].split() == ["total", "1000", "1000", "0:1000"]
    assert len(lines) == 15
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("kind", "n", "intensity"),
    # 2*n*h_in*h_out / ((n*(h_in+h_out) + S*h_in*h_out) * 2) at h_in = 16, h_out = 4096
    [("distinct", 1, None), ("distinct", 64, None), ("uniform", 64, 8), ("identical", 64, 1)],
)
def test_expand_intensity_by_the_papers_formula(kind: str, n: int, intensity: int | None) -> None:
    S = intensity or n
    expected = 2 * n * 16 * 4096 / ((n * (16 + 4096) + S * 16 * 4096) * 2)
    stats = sgmv.segment(popularity(kind, n)).stats(4096, 4096, 16)
    assert stats.expand.intensity == pytest.approx(expected, rel=1e-12)


def test_stats_sum_over_segments_of_unequal_rank() -> None:
    segments = sgmv.segment([-1, 5, 5, 9, -1, 7])
    by_mapping = segments.stats(10, 20, {5: 3, 7: 0, 9: 2}, itemsize=4)
    by_segment = segments.stats(10, 20, [99, 3, 0, 2], itemsize=4)
    assert by_mapping == by_segment
    assert by_mapping.shrink == Traffic(
        flops=2 * 10 * (2 * 3 + 1 * 2),
        bytes_read=4 * (3 * 10 + (3 + 2) * 10),
        bytes_written=4 * (2 * 3 + 1 * 2),
    )
    assert by_mapping.expand == Traffic(
        flops=2 * 20 * (2 * 3 + 1 * 2),
        bytes_read=4 * (2 * 3 + 1 * 2 + (3 + 2) * 20),
        bytes_written=4 * 3 * 20,
    )
    assert by_mapping.total.flops == by_mapping.shrink.flops + by_mapping.expand.flops
    assert "FLOP/B" in str(by_mapping)
    assert sgmv.segment([-1]).stats(10, 20, 4).total == Traffic(0, 0, 0)
    assert sgmv.segment([-1]).stats(10, 20, 4).total.intensity == 0.0
