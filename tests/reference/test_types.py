"""Which float types the corpus is made for, and how they are named."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest

import reference
from reference import workloads

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("one_blas_thread")]


def test_one_type_by_name() -> None:
    names = [case.name for case in workloads.corpus(max_elements=3_000, dtypes="float16")]
    assert names
    assert all(name.endswith("float16") for name in names)
    assert {str(dtype) for dtype in workloads.types_of(["float32", np.float64])} == {
        "float32",
        "float64",
    }


@pytest.mark.parametrize("dtypes", ["int64", ["float32", "int8"], "floot32", [None], 5])
def test_other_types_are_refused_by_their_name(dtypes: Any) -> None:
    named = re.escape(str(dtypes[-1] if isinstance(dtypes, list) else dtypes))
    with pytest.raises(ValueError, match=f"dtypes: expected .*float16.*, got {named}"):
        workloads.corpus(dtypes=dtypes)


def test_bfloat16_needs_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ValueError, match="pip install ml_dtypes"):
        workloads.corpus(dtypes="bfloat16")


@pytest.mark.oracle
def test_every_type_of_a_kernel_that_sums_in_float32() -> None:
    def kernel(y: Any, x: Any, rows: Any, seq_start: Any, ids: Any, adapters: Any, s: Any) -> None:
        wide = np.float64 if x.dtype == np.float64 else np.float32
        for at, adapter_id in enumerate(ids):
            if adapters.get(adapter_id) is not None:
                A, B = (weight.astype(wide) for weight in adapters[adapter_id])
                p = rows[seq_start[at] : seq_start[at + 1]]
                delta = wide(s[adapter_id]) * ((x[p].astype(wide) @ A.T) @ B.T)
                y[p] = (y[p].astype(wide) + delta).astype(y.dtype)

    dtypes = ["float16", "bfloat16", "float32", "float64"]
    report = reference.check(kernel, dtypes=dtypes, random=20)
    assert report.ok, str(report)
