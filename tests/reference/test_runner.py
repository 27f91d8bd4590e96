"""The report: what failed, grouped by what it hunts; as text, as JSON, and while it is made."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import numpy as np
import pytest

import reference
from reference import workloads
from reference.runner import judge
from tests.help.my_kernel import KERNEL, planted, right

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("one_blas_thread")]


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
