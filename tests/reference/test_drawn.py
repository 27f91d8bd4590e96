"""Random batches: drawn from a seed, and shrunk to the smallest that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reference
from reference import drawn, workloads
from reference.runner import judge
from tests.help.my_kernel import KERNEL, planted

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("one_blas_thread")]
ROOT = Path(__file__).parents[2]


def test_a_random_batch_is_its_seed_and_index_alone() -> None:
    dtype = np.dtype("float32")
    forwards = [drawn.batch(5, index, dtype).fingerprint for index in range(20)]
    backwards = [drawn.batch(5, index, dtype).fingerprint for index in reversed(range(20))]
    assert forwards == backwards[::-1]
    shapes = [[drawn.batch(seed, index, dtype).x.shape for index in range(20)] for seed in (5, 6)]
    assert shapes[0] != shapes[1]


def test_random_batches_are_as_odd_as_they_say() -> None:
    batches = [drawn.batch(0, index, np.dtype("float32")) for index in range(400)]
    used = [[i for i in b.segment_ids.tolist() if b.adapters.get(i) is not None] for b in batches]
    ranks = [{len(b.adapters[i][0]) for i in of} for b, of in zip(batches, used, strict=True)]
    assert any(len(b.x) == 0 for b in batches)
    assert any(-1 in b.adapter_ids for b in batches)
    assert any(0 in r for r in ranks)
    assert any(len(r) > 1 for r in ranks)
    assert any(None in b.adapters.values() for b in batches)
    assert any(not np.isfinite(b.x).all() for b in batches)
    assert any(b.exact for b in batches)
    assert any(not b.exact for b in batches)
    unused = [
        pair
        for b, of in zip(batches, used, strict=True)
        for i, pair in b.adapters.items()
        if pair is not None and i not in of
    ]
    assert any(np.isnan(A).any() for A, _ in unused)


def test_a_failing_batch_shrinks_to_one_that_cannot_be_smaller() -> None:
    case = drawn.batch(0, 4, np.dtype("float32"))
    kernel = planted("scaling dropped")

    def wrong(case: workloads.Workload) -> Any:
        return judge([kernel], case, "reference", torch=False).wrong

    least = drawn.smallest(case, wrong)
    assert (least.x.shape, least.y.shape) == ((1, 1), (1, 1))
    assert (least.adapter_ids.tolist(), list(least.adapters)) == ([0], [0])
    assert least.scalings == {0: 2.0}
    assert (least.x, least.y) == (1, 0)
    A, B = least.adapters[0] or ()
    assert (A.tolist(), B.tolist()) == ([[1.0]], [[1.0]])
    again = drawn.smallest(drawn.batch(0, 4, np.dtype("float32")), wrong)
    assert drawn.snippet(again, "k:k") == drawn.snippet(least, "k:k")


def test_a_fault_between_two_rows_keeps_two() -> None:
    case = drawn.batch(0, 2, np.dtype("float32"))
    assert len(set(case.adapter_ids.tolist()) - {-1}) > 1

    def mixes(y: Any, x: Any, rows: Any, *others: Any) -> None:
        y += len(set(others[1].tolist()) - {-1}) > 1

    def wrong(case: workloads.Workload) -> Any:
        found = judge([mixes], case, "reference", torch=False).wrong
        return found if found and len(set(case.adapter_ids.tolist()) - {-1}) > 1 else None

    least = drawn.smallest(case, wrong)
    assert sorted(least.adapter_ids.tolist()) == [0, 1]


def test_shrinking_keeps_to_the_kind_of_failure() -> None:
    """One row makes the kernel raise, which is another fault than the wrong values of more."""

    def kernel(y: Any, x: Any, *others: Any) -> None:
        assert len(y) > 1, "too few rows"
        y += 1

    def wrong(case: workloads.Workload) -> Any:
        return judge([kernel], case, "reference", torch=False).wrong

    case = workloads.integer("more than one row", "values", [0, 0, 0, 0], {0: 2}, 3, 4)
    least = drawn.smallest(case, wrong)
    assert len(least.x) == 2
    assert wrong(least).kind in ("values", "base only")


def test_a_fault_of_anything_but_the_scaling_keeps_none() -> None:
    case = drawn.batch(0, 4, np.dtype("float32"))
    kernel = planted("rank tail")
    least = drawn.smallest(case, lambda case: judge([kernel], case, "reference", torch=False).wrong)
    assert set(least.scalings.values()) == {1.0}


def test_shrinking_what_passes_is_refused() -> None:
    case = drawn.batch(0, 4, np.dtype("float32"))
    with pytest.raises(ValueError, match="expected one that fails"):
        drawn.smallest(case, lambda case: None)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_snippet_runs_and_fails_until_the_kernel_is_mended(files: Path, dtype: str) -> None:
    [kernel] = reference.load(str(files / "unscaled.py") + ":my_kernel")
    name = str(files / "unscaled.py") + ":my_kernel"
    report = reference.check(kernel, max_elements=0, random=30, dtypes=dtype, name=name)
    script = files / "smallest.py"
    script.write_text(report.smallest)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def done() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    failed = done()
    assert failed.returncode == 1
    assert "AssertionError: the smallest of random batch" in failed.stderr
    (files / "unscaled.py").write_text(KERNEL)
    assert done().returncode == 0, done().stderr
