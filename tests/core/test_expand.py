"""expand: adds scaling * v @ B.T to each row's own place in y, and touches no other row."""

from __future__ import annotations

import numpy as np
import pytest

import sgmv
from reference.workloads import integer
from tests.help.acceptance import backends_of, stack_of


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_adds_to_each_rows_own_place(dtype: str) -> None:
    case = integer("expand", "another row", [5, -1, 2, 5, 2], {2: 3, 5: 7}, 21, 9, dtype=dtype)
    stack, segments = stack_of(case), sgmv.segment(case.adapter_ids)
    wide = np.float64 if dtype == "float64" else np.float32
    v = np.full((5, 7), np.nan, wide)  # past a rank it is not read
    expected = case.y.astype(np.float64)
    for p, row in enumerate(segments.rows.tolist()):
        adapter_id = case.adapter_ids[row].item()
        if (pair := case.adapters.get(adapter_id)) is not None:
            B = pair[1].astype(np.float64)
            v[p, : B.shape[1]] = np.arange(B.shape[1]) - 2
            scaling = case.scalings[adapter_id]
            expected[row] += scaling * (v[p, : B.shape[1]].astype(np.float64) @ B.T)
    for backend in backends_of(case):
        y = case.y.copy()
        assert sgmv.expand(v, stack, segments, y, backend=backend) is y
        np.testing.assert_array_equal(y.astype(np.float64), expected)
        assert y[1].tobytes() == case.y[1].tobytes()  # base only
