"""Records: Python and compiled code see the same fields; counters keep cache lines of their own."""

from __future__ import annotations

import numpy as np
import pytest

from sgmv.kernels import records
from sgmv.kernels.jit import jit, record
from sgmv.kernels.records import CACHE_LINE, CALL, POOL, offset, on_cache_lines

pytestmark = pytest.mark.once
KINDS = {name: kind for name, kind in vars(records).items() if isinstance(kind, np.dtype)}


@jit()
def double_rows(address: int) -> int:
    call = record(CALL, address)
    call.x_rows *= 2
    call.members = call.x_rows + 1
    return call.x_rows


def test_fields_are_read_and_written_by_name() -> None:
    call = on_cache_lines(CALL)
    call["x_rows"] = 21
    assert double_rows(int(call.ctypes.data)) == 42
    assert call[0].x_rows == 42
    assert call[0].members == 43
    others = set(CALL.names or ()) - {"x_rows", "members"}
    assert all(call[0][field] == 0 for field in others)


@pytest.mark.parametrize("name", KINDS)
def test_a_record_is_int64s_that_do_not_overlap(name: str) -> None:
    kind = KINDS[name]
    offsets = [offset(kind, field) for field in kind.names or ()]
    assert all(kind[field] == np.int64 for field in kind.names or ())
    assert offsets == sorted(offsets)
    assert (np.diff([*offsets, kind.itemsize]) >= 8).all()


@pytest.mark.parametrize(
    ("kind", "apart"),
    [
        (CALL, ["shrink_next", "shrink_done", "expand_next", "members"]),
        (POOL, ["gate", "inside", "sleepers", "call", "number"]),
    ],
    ids=["CALL", "POOL"],
)
def test_what_threads_write_shares_no_cache_line(kind: np.dtype, apart: list[str]) -> None:
    """With its neighbours, or with other memory: each write would take the line from all cores."""
    lines = [offset(kind, field) // CACHE_LINE for field in kind.names or ()]
    for field in apart:
        assert lines.count(offset(kind, field) // CACHE_LINE) == 1
    assert kind.itemsize % CACHE_LINE == 0
    assert on_cache_lines(kind).ctypes.data % CACHE_LINE == 0
