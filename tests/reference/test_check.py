"""`python -m reference check`: diagnosis, report, random batches, signatures, the command."""

from __future__ import annotations

import ctypes
import json
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reference
from reference import drawn, workloads
from reference.__main__ import main
from reference.diagnosis import Evidence, likeliest
from reference.runner import judge
from reference.signatures import SIGNATURES
from tests.reference import test_corpus

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("one_blas_thread")]
ROOT = Path(__file__).parents[2]

FLOAT32 = [case for case in test_corpus.CASES if case.x.dtype == np.float32]
FLOAT16 = [case for case in test_corpus.CASES if case.x.dtype == np.float16]

# The README's kernel. Each fault is one replacement in it, and what the first line has to say.
KERNEL = """
import numpy as np

kept = {}


def my_kernel(y, x, rows, seq_start, segment_ids, adapters, scalings):
    for s, adapter_id in enumerate(segment_ids):
        if adapters.get(adapter_id) is not None:
            A, B = adapters[adapter_id]
            p = rows[seq_start[s] : seq_start[s + 1]]
            y[p] += scalings[adapter_id] * ((x[p] @ A.T) @ B.T)
"""
CONDITION = "if adapters.get(adapter_id) is not None:"
ADDED = "y[p] += scalings[adapter_id] * ((x[p] @ A.T) @ B.T)"
PLANTED = {
    "scaling dropped": (ADDED, "y[p] += (x[p] @ A.T) @ B.T", "the scaling is dropped"),
    "-1 as an index": (
        CONDITION,
        "adapter_id = adapter_id if adapter_id >= 0 or not adapters else max(adapters)\n"
        f"        {CONDITION}",
        "base-only rows, of id -1, get the delta of the last adapter in the list",
    ),
    "y overwritten": (ADDED, ADDED.replace("+=", "="), "y is overwritten"),
    "rows not used": (
        "rows[seq_start[s] : seq_start[s + 1]]",
        "slice(seq_start[s], seq_start[s + 1])",
        "rows is not used",
    ),
    "last row dropped": (
        "seq_start[s + 1]]",
        "seq_start[s + 1] - 1]",
        "the last row of every segment is left out",
    ),
    "rank tail": (
        "A, B = adapters[adapter_id]",
        "A, B = adapters[adapter_id]\n"
        "            A, B = A[: len(A) // 8 * 8], B[:, : len(A) // 8 * 8]",
        "the end of a rank that 8 does not divide is left out",
    ),
    "v in half": (
        "(x[p] @ A.T) @",
        "(x[p] @ A.T).astype(np.float16).astype(x.dtype) @",
        "v, what shrink hands to expand, is rounded to 11 bits, as float16",
    ),
    "metadata cached": (
        "for s, adapter_id in enumerate(segment_ids):",
        "first = kept.setdefault((x.shape, y.shape), (rows, seq_start, segment_ids))\n"
        "    rows, seq_start, segment_ids = first\n"
        "    for s, adapter_id in enumerate(segment_ids):",
        "metadata of an earlier batch is kept",
    ),
    "x spoiled": (ADDED, f"{ADDED}\n            x[p] *= 2", "the kernel changed x"),
    "B spoiled": (
        ADDED,
        f"B *= B.dtype.type(scalings[adapter_id])\n            {ADDED}",
        "the kernel changed B",
    ),
    "scalings twice": (
        ADDED,
        ADDED.replace("scalings[adapter_id]", "scalings[adapter_id] ** 2"),
        "the scaling is applied twice",
    ),
    "a copy of y": (
        "for s, adapter_id",
        "y = y.copy()\n    for s, adapter_id",
        "y is left as it was",
    ),
    "delta returned": (
        "for s, adapter_id",
        "y = np.zeros_like(y)\n    for s, adapter_id",
        "y is left as it was",
    ),
    "B untransposed": (
        ADDED,
        ADDED.replace("B.T", "(B if B.shape[0] == B.shape[1] else B.T)"),
        "B is taken untransposed where it is square",
    ),
    "None unpacked": (
        CONDITION,
        "if adapter_id >= 0:",
        "it raises TypeError: cannot unpack non-iterable NoneType object, where a row is base only "
        "by a None as adapter: in the one such case, and in no other",
    ),
    "ranks above 64 refused": (
        ADDED,
        f"assert len(A) <= 64, 'rank'\n            {ADDED}",
        "it raises AssertionError: rank, where a rank is above 64: in all 4 such cases",
    ),
    "y shifted": (
        "for s, adapter_id",
        "y += 1\n    for s, adapter_id",
        "nearly all rows are wrong, base-only ones as well",
    ),
    "sums in half": (
        ADDED,
        "x16, A16, B16 = (each.astype(np.float16) for each in (x[p], A, B))\n"
        "            y[p] += (scalings[adapter_id] * ((x16 @ A16.T) @ B16.T)).astype(y.dtype)",
        "something is rounded on the way, to fewer bits than the sums have",
    ),
    "segments averaged": (
        "x[p] @",
        "x[p].mean(axis=0, keepdims=True) @",
        "rows of segments of more than one row are wrong",
    ),
    "two faults": (
        ADDED,
        "r = len(A) // 8 * 8\n            y[p] += (x[p] @ A[:r].T) @ B[:, :r].T",
        "no single fault known here explains it; the smallest case that fails is",
    ),
    "arguments forgotten": (
        ", segment_ids, adapters, scalings",
        "",
        "positional arguments but 7 were given, in every case: is its signature",
    ),
}


def planted(fault: str) -> Callable[..., Any]:
    text, instead, _ = PLANTED[fault]
    assert KERNEL.count(text) == 1, text
    names: dict[str, Any] = {}
    exec(KERNEL.replace(text, instead), names)
    return names["my_kernel"]


def right() -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(KERNEL, names)
    return names["my_kernel"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two kernels in a file."""
    text, instead, _ = PLANTED["scaling dropped"]
    (tmp_path / "right.py").write_text(KERNEL)
    (tmp_path / "unscaled.py").write_text(KERNEL.replace(text, instead))
    return tmp_path


def run(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-W", "error", "-m", "reference", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


# The diagnosis


@pytest.mark.parametrize("fault", PLANTED)
def test_the_first_line_names_the_fault(fault: str) -> None:
    kernel = planted(fault)
    said = likeliest([judge([kernel], case, "reference", torch=False) for case in FLOAT32])
    assert said.startswith("likeliest: ")
    assert PLANTED[fault][2] in said


def test_the_report_begins_with_it() -> None:
    report = reference.check(planted("rank tail"))
    first = str(report).replace("\n    ", " ").splitlines()[0]
    assert first == report.diagnosis
    assert "the end of a rank that 8 does not divide is left out" in first


# What the first line says of the corpus's own planted faults.
NAMED = {
    "swapped adapters": "adapters are swapped: each segment gets the next one's weights",
    "last row dropped": "the last row of every segment is left out",
    "first row dropped": "the first row of every segment is left out",
    "last segment dropped": "the last segment is left out",
    "offset by one": "rows are offset by one",
    "unscaled B": "the scaling is dropped",
    "sign of scaling lost": "the scaling's sign is lost",
    "scaling squared": "the scaling is applied twice",
    "one scaling for all": "one scaling for all: that of the batch's first adapter",
    "scaling kept by weights": "scaling kept by weights instead of by id",
    "delta added twice": "the delta is added twice",
    "y overwritten": "y is overwritten",
    "y rounded twice": "the delta is rounded, before it is added to y, to 11 bits",
    "last adapter on base-only rows": "base-only rows, of id -1, get the last adapter's delta",
    "base-only rows rewritten": "base-only rows are rewritten",
    "garbage past the rank": "garbage past a slot's own rank is read",
    "computed at the largest rank": "every adapter is computed at the batch's largest rank",
    "one rank for all": "one rank for all: that of the batch's second adapter",
    "rank 0 divides": "rows of rank 0 are wrong: is something divided by the rank?",
    "rank tail of 8 dropped": "the end of a rank that 8 does not divide is left out",
    "rank tail of 2 dropped": "the end of a rank that 2 does not divide is left out",
    "K tail of 16 dropped": "the end of h_in that 16 does not divide is left out",
    "K tail of 256 dropped": "the end of h_in that 256 does not divide is left out",
    "column tail dropped": "the end of h_out that 16 does not divide is left out",
    "v rounded to float16": "v, what shrink hands to expand, is rounded to 11 bits, as float16",
    "sums kept in 16 bits": "sums are kept in 16 bits",
    "subnormals flushed": "subnormal numbers flushed to zero",
    "store saturates": "a result too large for y saturates instead of becoming inf",
    "NaN through a mask": "every adapter is computed on every row, times 0 or 1",
    "NaN from an unused adapter": "adapters that no row uses are computed",
    "rows not put back": "rows are not put back",
    "steps of the first segment": "every segment takes as many steps of 64 rows as the first",
    "ids taken for slots": "ids are taken for places in the list of adapters",
    "ids in a byte": "ids are kept in a byte",
    "eight slots only": "adapters of a batch beyond the first 8 are left out",
    "stale metadata": "metadata of an earlier batch is kept: that of the first of these shapes",
    "stale weights": "weights of an earlier batch are kept",
    "contiguous x assumed": "wrong where x is not contiguous: in all 2 such cases",
    "32-bit offsets": "32-bit offsets into x",
    "result in the wrong type": "what it returns is no y",
}


def test_every_fault_of_the_corpus_has_a_name() -> None:
    assert set(NAMED) == set(test_corpus.FAULTS) - {
        "input changed"
    }  # it puts x back: see "x spoiled"


@pytest.mark.oracle
@pytest.mark.parametrize("fault", NAMED)
def test_the_corpus_names_its_own_planted_faults(fault: str) -> None:
    make_kernel, hunter = test_corpus.FAULTS[fault]
    dtype = "float16" if hunter.endswith("float16") else "float32"
    kernel, evidence = make_kernel(), []
    with np.errstate(all="ignore"):
        for case in FLOAT16 if dtype == "float16" else FLOAT32:
            actual = kernel(case)
            evidence.append(Evidence(case, actual, case.wrong(actual)))
    if fault in ("32-bit offsets", "contiguous x assumed") and not any(
        e.case.name.startswith("far rows") for e in evidence
    ):
        pytest.skip("the system refused the address space of 'far rows'")
    assert NAMED[fault] in likeliest(evidence)


def test_a_question_must_also_pass_where_the_kernel_passed() -> None:
    """ "Rows from 64 on" would explain what fails of "as many steps as the first" as well."""
    kernel = test_corpus.steps_of_the_first_segment
    evidence = []
    for case in FLOAT32:
        with np.errstate(all="ignore"):
            actual = kernel(case)
        evidence.append(Evidence(case, actual, case.wrong(actual)))
    said = likeliest(evidence)
    failed_only = likeliest([e for e in evidence if e.wrong is not None])
    assert "a segment's rows from 64 on are left out" in failed_only
    assert "a segment's rows from 64 on are left out" not in said


def test_failures_of_another_kind_are_counted() -> None:
    kernel = right()

    def refuses_rank_0(*operands: Any) -> None:
        adapters = operands[5]
        assert all(pair is None or len(pair[0]) for pair in adapters.values()), "rank 0"
        kernel(*operands[:6], dict.fromkeys(adapters, 1.0))

    said = reference.check(refuses_rank_0).diagnosis
    assert "the scaling is dropped" in said
    assert "other failed cases are of another kind" in said


# The report


def test_the_right_kernel_passes_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = reference.check(right(), random=50, seed=3)
    assert report.ok, str(report)
    assert report.diagnosis == report.smallest == ""
    cases = sum(1 for _ in workloads.corpus()) + 50
    assert str(report) == f"passed: all {cases} cases"


def test_numpys_warnings_are_off_for_the_kernels_calls_alone() -> None:
    before = np.geterr()
    reference.check(right(), max_elements=3_000)
    assert np.geterr() == before


@pytest.mark.oracle
def test_the_table_groups_failures_by_what_they_hunt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    report = reference.check(planted("rank tail"))
    failed = {failure.case for failure in report.failures}
    everything = " ".join(report.text(None).split())
    for hunts in {failure.hunts for failure in report.failures}:
        of = [case for case in workloads.corpus() if case.why == hunts]
        count = f"{len([c for c in of if c.name in failed])}/{len(of)} {hunts}"
        assert count in everything
    worst = {f.case: f.wrong.worst for f in report.failures}["rank 5, float32"]
    assert worst is not None
    assert f"error {worst.error:.6g}, bound {worst.bound:.6g}" in str(worst)
    assert re.search(r"\d+ of 75 cases failed, \d+ passed", str(report))
    assert report.passed + len(report.failures) == sum(report.checked.values())
    assert "more, which hunt" in str(report)
    assert "more, which hunt" not in report.text(None)


@pytest.mark.parametrize("columns", [40, 60, 100, 200])
def test_the_report_follows_the_width(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = reference.check(planted("scaling dropped"), max_elements=10_000).text(None)
    assert max(map(len, text.splitlines())) <= min(max(columns, 60), 120)


def test_a_group_that_failed_in_one_way_is_told_once() -> None:
    text = str(reference.check(planted("x spoiled")))
    assert text.count("write to y alone") == 2  # the first line, and the table


def test_json_holds_all_of_it_and_no_nan() -> None:
    text = reference.check(planted("rank tail")).as_json()
    told = json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
    assert not told["ok"]
    assert told["diagnosis"].startswith("likeliest: the end of a rank that 8")
    assert told["failed"] == len(told["failures"]) > 10
    assert told["passed"] + told["failed"] == sum(told["checked"].values())
    first = told["failures"][0]
    assert set(first) == {"case", "hunts", "kind", "what", "worst"}
    assert set(first["worst"]) == {
        "wrong", "size", "row", "column", "got", "expected", "error", "bound"
    }  # fmt: skip


def test_progress_is_told_after_each_case() -> None:
    told: list[tuple[int, int]] = []
    report = reference.check(
        planted("rank tail"), max_elements=5_000, progress=lambda *counts: told.append(counts)
    )
    assert [checked for checked, _ in told] == list(range(1, sum(report.checked.values()) + 1))
    assert told[-1][1] == len(report.failures)


@pytest.mark.parametrize(
    ("operand", "statement"),
    [("x", "x[...] = 0"), ("A", "A[...] = 0"), ("B", "B[...] = 0"), ("rows", "rows[...] = 0")],
)
def test_a_spoiled_operand_is_named_and_put_back(operand: str, statement: str) -> None:
    names: dict[str, Any] = {}
    exec(KERNEL + f"            {statement}\n", names)
    case = workloads.integer("spoiled", "an operand", [0, 1, 0], {0: 2, 1: 3}, 5, 6)
    wrong = judge([names["my_kernel"]], case, "reference", torch=False).wrong
    assert wrong is not None
    assert wrong[:2] == ("spoiled", f"the kernel changed {operand}; write to y alone")
    assert judge([right()], case, "reference", torch=False).wrong is None


# Types


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


# Random batches


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


# Signatures


def at_address(address: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.array((ctypes.c_float * count).from_address(int(address)), "f").reshape(shape)


def punica(y: Any, x: Any, wa_ptr: Any, wb_ptr: Any, s: Any, layer_idx: int, r: int) -> None:
    for i in range(len(s) - 1):
        A = at_address(wa_ptr[i], (1, r, x.shape[1]))[layer_idx]
        B = at_address(wb_ptr[i], (1, y.shape[1], r))[layer_idx]
        y[s[i] : s[i + 1]] += (x[s[i] : s[i + 1]] @ A.T) @ B.T


def punica_sgmv(y: Any, x: Any, w_ptr: Any, s: Any, layer_idx: int) -> None:
    for i in range(len(s) - 1):
        W = at_address(w_ptr[i], (1, y.shape[1], x.shape[1]))[layer_idx]
        y[s[i] : s[i + 1]] += x[s[i] : s[i + 1]] @ W.T


def bgmv_shrink(x: Any, weights: Any, out: Any, indices: Any, scaling: float) -> None:
    for row, i in enumerate(indices):
        out[row] = 0 if i < 0 else scaling * (x[row] @ weights[i].T)


def bgmv_expand(v: Any, weights: Any, out: Any, indices: Any, add_inputs: bool) -> None:
    for row, i in enumerate(indices):
        if i >= 0:
            out[row] += v[row] @ weights[i].T


def exploded(start: Any, length: Any, indices: Any, batches: int, longest: int, n: int) -> Any:
    assert (len(start), int(length.max(initial=0)), int(length.sum())) == (batches, longest, n)
    return np.repeat(indices, length)


def sgmv_shrink(x: Any, weights: Any, out: Any, *rest: Any) -> None:
    bgmv_shrink(x, weights, out, exploded(*rest[:-1]), rest[-1])


def sgmv_expand(v: Any, weights: Any, out: Any, *rest: Any) -> None:
    bgmv_expand(v, weights, out, exploded(*rest[:-1]), rest[-1])


def segments_of(info: Any) -> Any:
    for i in range(info.num_segments):
        w, start = int(info.weight_indices[i]), int(info.seg_indptr[i])
        assert info.seg_lens[i] <= info.max_len
        yield w, int(info.lora_ranks[w]), slice(start, start + int(info.seg_lens[i]))


def sgemm_lora_a_fwd(x: Any, weights: Any, info: Any) -> Any:
    v = np.zeros((len(x), weights.shape[1]), x.dtype)
    for w, r, rows in segments_of(info):
        v[rows, :r] = x[rows] @ weights[w, :r].T
    return v


def sgemm_lora_b_fwd(v: Any, weights: Any, info: Any, base_output: Any) -> Any:
    for w, r, rows in segments_of(info):
        if r:
            base_output[rows] += info.scalings[w] * (v[rows, :r] @ weights[w, :, :r].T)
    return base_output


LIKE: dict[str, tuple[Any, ...]] = {
    "punica": (punica,),
    "punica-sgmv": (punica_sgmv,),
    "vllm-bgmv": (bgmv_shrink, bgmv_expand),
    "vllm-sgmv": (sgmv_shrink, sgmv_expand),
    "sglang": (sgemm_lora_a_fwd, sgemm_lora_b_fwd),
}


def test_each_signature_is_tried() -> None:
    assert {"reference", *LIKE} == set(SIGNATURES)


@pytest.mark.parametrize("like", LIKE)
def test_a_right_kernel_of_each_signature_passes(like: str) -> None:
    report = reference.check(LIKE[like], like=like, random=100)
    assert report.ok, str(report)


def unscaled_expand(v: Any, weights: Any, info: Any, base_output: Any) -> Any:
    info.scalings = np.ones_like(info.scalings)
    return sgemm_lora_b_fwd(v, weights, info, base_output)


def overwriting(y: Any, *others: Any) -> None:
    y[...] = 0
    punica(y, *others)


WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "punica": ((overwriting,), "y is overwritten"),
    "punica-sgmv": ((lambda *operands: None,), "y is left as it was"),
    "vllm-bgmv": (
        (lambda x, w, out, i, s: bgmv_shrink(x, w, out, i, 1.0), bgmv_expand),
        "the scaling is dropped",
    ),
    "vllm-sgmv": (
        (sgmv_shrink, lambda v, w, out, *rest: sgmv_expand(2 * v, w, out, *rest)),
        "the delta is added twice",
    ),
    "sglang": ((sgemm_lora_a_fwd, unscaled_expand), "the scaling is dropped"),
}


@pytest.mark.parametrize("like", LIKE)
def test_a_wrong_kernel_of_each_signature_is_named(like: str) -> None:
    kernels, said = WRONG[like]
    report = reference.check(kernels, like=like)
    assert said in report.diagnosis


def test_the_package_that_this_repository_makes_passes() -> None:
    from sgmv.compat import punica, vllm

    for like, kernels in {
        "punica": (punica.add_lora_sgmv,),
        "punica-sgmv": (punica.sgmv,),
        "vllm-bgmv": (vllm.bgmv_shrink, vllm.bgmv_expand),
        "vllm-sgmv": (vllm.sgmv_shrink, vllm.sgmv_expand),
    }.items():
        report = reference.check(kernels, like=like, random=20)
        assert report.ok, str(report)


@pytest.mark.parametrize(
    ("kernels", "like", "said"),
    [
        ((bgmv_shrink,), "vllm-bgmv", "expected 2 for vllm-bgmv .* got 1; name both halves"),
        ((punica, punica), "punica", "expected 1 for punica .* got 2; name one function"),
        ((punica,), "cuda", "like: expected one of reference, punica"),
    ],
)
def test_another_number_of_functions_is_refused(kernels: Any, like: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reference.check(kernels, like=like)


TORCH_KERNEL = """
import torch


def my_kernel(y, x, rows, seq_start, segment_ids, adapters, scalings):
    assert isinstance(y, torch.Tensor) and isinstance(rows, torch.Tensor)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for s, adapter_id in enumerate(segment_ids):
        if adapters.get(adapter_id) is not None:
            A, B = (weight.to(wide) for weight in adapters[adapter_id])
            p = rows[seq_start[s] : seq_start[s + 1]]
            delta = scalings[adapter_id] * ((x[p].to(wide) @ A.T) @ B.T)
            y[p] = (y[p].to(wide) + delta).to(y.dtype)


def spoils(y, x, *others):
    my_kernel(y, x, *others)
    x.zero_()


def bgmv_shrink(x, weights, out, indices, scaling):
    kept = indices >= 0
    w = weights[indices[kept]].to(out.dtype)
    out[kept] = scaling * torch.einsum("nk,nrk->nr", x[kept].to(out.dtype), w)


def bgmv_expand(v, weights, out, indices, add_inputs):
    kept = indices >= 0
    w = weights[indices[kept]].to(v.dtype)
    out[kept] = (out[kept].to(v.dtype) + torch.einsum("nr,nkr->nk", v[kept], w)).to(out.dtype)


def returned(y, *others):
    out = y.clone()
    my_kernel(out, *others)
    return out
"""


def test_torchs_tensors_share_the_memory(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "torched.py").write_text(TORCH_KERNEL)
    dtypes = "float16,bfloat16,float32,float64"
    for name in ("my_kernel", "returned"):
        done = run("check", f"torched.py:{name}", "--torch", "--dtypes", dtypes, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    done = run("check", "torched.py:spoils", "--torch", folder=tmp_path)
    assert done.stdout.startswith("likeliest: the kernel changed x;")
    halves = "torched.py:bgmv_shrink,bgmv_expand"
    done = run("check", halves, "--like", "vllm-bgmv", "--torch", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


# The command


def test_a_right_kernel_leaves_with_0(files: Path) -> None:
    done = run("check", "right.py:my_kernel", folder=files)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"passed: all \d+ cases\n", done.stdout)
    assert run("check", "right:my_kernel", folder=files).returncode == 0


def test_a_wrong_kernel_leaves_with_1_and_its_likeliest_fault_first(files: Path) -> None:
    done = run("check", "unscaled.py:my_kernel", "--random", "20", "--seed", "7", folder=files)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("likeliest: the scaling is dropped")
    assert "of seed 7, float32" in done.stdout
    assert 'load("unscaled.py:my_kernel")' in done.stdout


def test_json_on_the_command_line(files: Path) -> None:
    done = run("check", "unscaled.py:my_kernel", "--json", "--random", "5", folder=files)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["failed"] == len(told["failures"])
    assert "from reference import Workload, call, load" in told["smallest"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.py:f"], "kernel: expected a file, got nowhere.py"),
        (["right.py:g"], "kernel: expected a function of right.py, got g; it has my_kernel"),
        (["right.py"], "kernel: expected FILE:FUNCTION or MODULE:FUNCTION, got right.py"),
        (["no_such_module:f"], "kernel: expected no_such_module to be importable, got ModuleNot"),
        (["broken.py:f"], "kernel: expected broken.py to be importable, got SyntaxError"),
        (["right.py:my_kernel", "--dtypes", "int8"], "--dtypes: expected some of float16, "),
        (["right.py:my_kernel", "--random", "-1"], "--random: expected 0 or more, got -1"),
        (["right.py:my_kernel", "--random", "many"], "--random: expected an integer, got many"),
        (["right.py:my_kernel", "--seed", "-1"], "--seed: expected 0 or more, got -1"),
        (["right.py:my_kernel", "--like", "cuda"], "--like: expected one of reference, punica"),
        (["right.py:my_kernel", "--torch"], "--torch: expected a kernel whose file imports torch"),
        (["right.py:my_kernel", "--like", "vllm-bgmv"], "kernel: expected 2 for vllm-bgmv"),
        ([], "FILE:FUNCTION"),
    ],
)
def test_a_wrong_command_leaves_with_2(
    files: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (files / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "path", list(sys.path))  # `load` adds the file's folder
    for optional in ("torch", "right", "broken"):
        monkeypatch.delitem(sys.modules, optional, raising=False)
    try:
        status = main(["check", *arguments])
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.startswith("reference: error: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_a_wrong_command_shows_no_traceback(files: Path) -> None:
    done = run("check", "nowhere.py:f", folder=files)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"reference: error: kernel: expected a file, got .+\n", done.stderr)


def test_a_kernel_that_ends_the_process_fails(files: Path) -> None:
    (files / "ends.py").write_text("import sys\n\n\ndef my_kernel(*operands):\n    sys.exit(0)\n")
    done = run("check", "ends.py:my_kernel", folder=files)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("likeliest: it raises SystemExit: 0, in every case")
    (files / "ends.py").write_text("raise SystemExit\n")
    done = run("check", "ends.py:my_kernel", folder=files)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected ends.py to be importable, got SystemExit" in done.stderr


def test_an_interrupt_ends_without_a_traceback(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "interrupted.py").write_text(
        "def my_kernel(*operands):\n    raise KeyboardInterrupt\n"
    )
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "interrupted", raising=False)
    assert main(["check", "interrupted.py:my_kernel"]) == 130


def test_the_core_of_reference_imports_numpy_alone(files: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from reference.__main__ import main
        status = main(["check", "right.py:my_kernel"])
        optional = {"sgmv", "numba", "torch", "ml_dtypes", "hypothesis", "rich"}
        print(status, sorted(optional & set(sys.modules)))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=files,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.oracle
def test_progress_appears_on_a_terminal_after_two_seconds(files: Path) -> None:
    slow = KERNEL.replace(
        "for s, adapter_id", "import time; time.sleep(0.035)\n    for s, adapter_id"
    )
    (files / "slow.py").write_text(slow)
    ours, theirs = pty.openpty()
    seen = b""

    def read() -> None:
        nonlocal seen
        try:
            while chunk := os.read(ours, 4096):
                seen += chunk
        except OSError:  # Linux's end of a terminal
            pass

    reader = threading.Thread(target=read)
    reader.start()
    command = [sys.executable, "-m", "reference", "check", "slow.py:my_kernel"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, cwd=files, env=environment
    )
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert done.returncode == 0
    assert re.search(rb"\r\x1b\[K\d+ cases checked, 0 failed, [2-9] s", seen)
    assert seen.endswith(b"\r\x1b[K")  # and is gone at the end
