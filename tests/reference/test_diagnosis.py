"""The first line of a report names the likeliest fault."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import reference
from reference.diagnosis import Evidence, likeliest
from reference.runner import judge
from tests.help.my_kernel import PLANTED, planted, right
from tests.help.wrong_kernels import CASES, FAULTS, steps_of_the_first_segment

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("one_blas_thread")]

FLOAT32 = [case for case in CASES if case.x.dtype == np.float32]
FLOAT16 = [case for case in CASES if case.x.dtype == np.float16]


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
    assert set(NAMED) == set(FAULTS) - {"input changed"}  # it puts x back: see "x spoiled"


@pytest.mark.oracle
@pytest.mark.parametrize("fault", NAMED)
def test_the_corpus_names_its_own_planted_faults(fault: str) -> None:
    make_kernel, hunter = FAULTS[fault]
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
    kernel = steps_of_the_first_segment
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
