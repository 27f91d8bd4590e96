"""shrink: v in sorted order, each row by its own adapter's A, and nothing past its rank."""

from __future__ import annotations

import numpy as np
import pytest

import sgmv
from reference.workloads import integer
from tests.help.acceptance import backends_of, stack_of


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_v_is_in_sorted_order_and_exact(dtype: str) -> None:
    case = integer("shrink", "another order", [5, -1, 2, 5, 2], {2: 3, 5: 7}, 21, 9, dtype=dtype)
    stack, segments = stack_of(case), sgmv.segment(case.adapter_ids)
    expected = np.zeros((5, 7))
    for p, row in enumerate(segments.rows.tolist()):
        pair = case.adapters.get(case.adapter_ids[row].item())
        if pair is not None:
            expected[p, : len(pair[0])] = case.x[row].astype("f8") @ pair[0].astype("f8").T
    for backend in backends_of(case):
        v = sgmv.shrink(case.x, stack, segments, backend=backend)
        assert v.dtype == (np.float64 if dtype == "float64" else np.float32)
        np.testing.assert_array_equal(v, expected)


def test_no_rows_and_no_rank_are_fine() -> None:
    pair = np.ones((0, 4), "f"), np.ones((3, 0), "f")
    stack = sgmv.AdapterStack.from_adapters([pair])
    assert not sgmv.shrink(np.ones((2, 4), "f"), stack, sgmv.segment([0, 0])).any()
    assert len(sgmv.shrink(np.ones((0, 4), "f"), stack, sgmv.segment([]))) == 0
