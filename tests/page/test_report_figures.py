"""Every figure that the report's page derives, against benchmarks' in Python."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from benchmarks import record
from benchmarks.batch import ONE_ROW
from benchmarks.peers import PEERS
from benchmarks.report import write
from benchmarks.studies.grid.figures import hub_cases
from benchmarks.studies.grid.goals import goals
from benchmarks.studies.grid.records import (
    Record,
    by_dtype,
    case_label,
    main_variant,
    noisy_cases,
    summarise,
)
from benchmarks.text import microseconds, ratio_text
from reference.workloads import POPULARITIES
from tests.help.explored import Javascript
from tests.help.planting import replaced
from tests.help.reported import SCRIPT, other_machine

pytestmark = pytest.mark.once


@cache
def records() -> list[Record]:
    """The committed ones, the cases of one float type alone, and one with intervals."""
    paths = [path for name in ("full-", "quick-") for path in record.RECORDS.glob(f"{name}*.json")]
    found = [record.load(Record, path) for path in paths]
    return [*found, list(by_dtype(found[0]).values())[-1], other_machine()]


@cache
def packed() -> list[Any]:
    """These records as the page has them."""
    return [write.grid(found) for found in records()]


def grids() -> str:
    """JavaScript: a list of them."""
    return f"({json.dumps(packed())}).map(unpacked)"


PEERS_TOLD = json.dumps(list(PEERS))


def summaries(javascript: Javascript, script: str = SCRIPT) -> list[Any]:
    expression = (
        f"{grids()}.map((grid) => grid.threads.map((threads) => "
        f"summary(grid.cases, variant_of(grid, threads), {PEERS_TOLD})))"
    )
    found: list[Any] = javascript(script, expression)
    return found


@cache
def expected_summaries() -> list[Any]:
    """As `summarise` has them: (peer, cases, losses, worst, where, best, where), and the means."""
    peers = list(PEERS)
    return [
        [
            [
                (
                    line.baseline, line.cases, line.losses, line.worst, line.worst_case,
                    line.best, line.best_case, pytest.approx(line.geomean, rel=1e-12),
                )
                for line in sorted(
                    (line for line in summarise(found, f"sgmv@{threads}")
                     if line.popularity == "all" and line.baseline in PEERS),
                    key=lambda line: peers.index(line.baseline),
                )
            ]
            for threads in found.threads
        ]
        for found in records()
    ]  # fmt: skip


def plain(summary: list[Any]) -> list[Any]:
    return [
        (
            peer, sums["cases"], sums["losses"], sums["worst"][0], sums["worst"][1]["name"],
            sums["best"][0], sums["best"][1]["name"], sums["geomean"],
        )
        for peer, sums in summary
    ]  # fmt: skip


def test_sums_are_those_of_the_terminal(javascript: Javascript) -> None:
    got = [[plain(each) for each in by_threads] for by_threads in summaries(javascript)]
    assert got == expected_summaries()


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("ratio < 1).length", "ratio <= 1.01).length"),
        ("a[0] - b[0] || (", "b[0] - a[0] || ("),
        ("sum + Math.log(value), 0)", "sum + Math.log2(value), 0)"),
        ("Number(threads)) ? threads : most", "Number(threads)) ? most : most"),
        ('dtype === "float32" ? name', 'dtype === "float16" ? name'),
    ],
)  # fmt: skip
def test_a_fault_in_the_page_is_found(javascript: Javascript, text: str, instead: str) -> None:
    got = summaries(javascript, replaced(SCRIPT, text, instead))
    assert [[plain(each) for each in by_threads] for by_threads in got] != expected_summaries()


def test_cases_come_out_as_they_were_packed(javascript: Javascript) -> None:
    got = javascript(SCRIPT, f"{grids()}.map(({{cases}}) => cases)")
    for found, cases in zip(records(), got, strict=True):
        for case, each in zip(found.cases, cases, strict=True):
            assert each["name"] == case_label(case)
            same = (
                "h_in", "h_out", "names", "rank", "rows", "popularity", "dtype", "S", "footprint",
                "flops", "shares", "skipped",
            )  # fmt: skip
            assert {name: each[name] for name in same} == {n: getattr(case, n) for n in same}
            assert each["foreign"] == case.foreign_cores
            assert each["times"] == {
                variant: [times.q20, times.q50, times.q80] for variant, times in case.times.items()
            }


def test_the_closest_peer_is_the_one_of_the_goals(javascript: Javascript) -> None:
    got = javascript(
        SCRIPT,
        f"{grids()}.map((grid) => against_closest(grid.cases.filter((c) => c.dtype === 'float32'), "
        "variant_of(grid, '')))",
    )
    for found, sums in zip(records(), got, strict=True):
        by_name = {goal.what: goal for goal in goals(found)}
        mean = by_name["float32 against the best peer of each case"]
        worst = by_name["the worst case of these"]
        if sums is None:
            assert mean.found is None
        else:
            assert sums["geomean"] == pytest.approx(mean.found, rel=1e-12)
            assert sums["worst"][0] == worst.found
            assert sums["cases"] == mean.cases


def test_marks_and_numbers_are_written_as_in_the_terminal(javascript: Javascript) -> None:
    """Ties, too, which JavaScript rounds away from zero."""
    values = [round(step / 8, 3) for step in range(1, 900)]
    values += np.geomspace(0.01, 1e4, 999).tolist()
    got = javascript(SCRIPT, f"{values}.map((value) => [ratio_text([value]), microseconds(value)])")
    assert got == [[ratio_text(value), microseconds(value)] for value in values]
    shares = [step / 200 for step in range(400)]
    assert javascript(SCRIPT, f"{shares}.map(percent)") == [f"{share:.0%}" for share in shares]
    found = other_machine()
    with_intervals = [
        (ratio, *(case.interval(main_variant(found), peer) or ()))
        for case in found.cases
        for peer, ratio in case.ratios[main_variant(found)].items()
    ]
    texts = javascript(SCRIPT, f"{json.dumps(with_intervals)}.map(ratio_text)")
    assert texts == [ratio_text(ratio, (low, high)) for ratio, low, high in with_intervals]
    assert {text[-1] for text in texts} == {"x", "!", "~"}


def test_undecided_ratios_are_counted(javascript: Javascript) -> None:
    found = other_machine()
    main = main_variant(found)
    for peer, sums in summaries(javascript)[-1][-1]:
        texts = [
            ratio_text(case.ratios[main][peer], case.interval(main, peer))
            for case in found.cases
            if peer in case.ratios[main]
        ]
        assert sums["undecided"] == sum(text.endswith("~") for text in texts)
        ratios = [case.ratios[main][peer] for case in found.cases if peer in case.ratios[main]]
        assert sums["quarters"] == pytest.approx(np.percentile(ratios, [25, 75]).tolist())
    older = "spread([[1.5, {name: 'a'}], [0.5, {name: 'b'}]]).undecided"  # without an interval
    assert javascript(SCRIPT, older) is None


def test_latency_shows_the_cases_of_the_figure(javascript: Javascript) -> None:
    got = javascript(SCRIPT, f"{grids()}.map(({{cases}}) => hub(cases).map(({{name}}) => name))")
    assert got == [[case_label(case) for case in hub_cases(found)] for found in records()]


def test_popularities_have_one_order_in_every_record(javascript: Javascript) -> None:
    """That of the paper, so that colours mean the same; one row first, unknown ones last."""
    kinds = [ONE_ROW, *POPULARITIES]
    assert javascript(SCRIPT, "KINDS") == kinds
    for order in (kinds, kinds[::-1]):
        cases = [{"popularity": kind} for kind in ("mixed", *order)]
        assert javascript(SCRIPT, f"popularities_of({json.dumps(cases)})") == [*kinds, "mixed"]


def test_noisy_cases_are_those_of_the_record(javascript: Javascript) -> None:
    for found in records():
        busy = [case.foreign_cores for case in found.cases] + [None]
        got = javascript(SCRIPT, f"noisy({json.dumps(busy)}, {record.QUIET})")
        assert got == len(noisy_cases(found))


def test_cases_of_both_records_are_set_side_by_side(javascript: Javascript) -> None:
    one, other = records()[0], records()[-1]
    two = json.dumps([packed()[0], packed()[-1]])
    variants = [main_variant(one), main_variant(other)]
    pairs, sums = javascript(
        SCRIPT,
        f"(() => {{ const [one, two] = ({two}).map(unpacked); const pairs = in_both(one.cases, "
        "two.cases); return [pairs.map((pair) => pair.map(({name}) => name)), "
        f"beside_sums(pairs, ...{json.dumps(variants)})] }})()",
    )
    known = {case_label(case): case for case in other.cases}
    both = [(case, known[case_label(case)]) for case in one.cases if case_label(case) in known]
    assert pairs == [[case_label(case) for case in pair] for pair in both]
    assert len(both) > 20
    ratios = [b.times[variants[1]].q50 / a.times[variants[0]].q50 for a, b in both]
    assert sums["geomean"] == pytest.approx(np.exp(np.mean(np.log(ratios))))
    assert (sums["worst"][0], sums["best"][0]) == (min(ratios), max(ratios))


def test_a_record_beside_itself_is_equal(javascript: Javascript) -> None:
    found = records()[-1]
    grid, variants = json.dumps(packed()[-1]), json.dumps([main_variant(found)] * 2)
    sums = javascript(
        SCRIPT,
        f"(() => {{ const {{cases}} = unpacked({grid}); "
        f"return beside_sums(in_both(cases, cases), ...{variants}) }})()",
    )
    assert (sums["geomean"], sums["losses"], sums["cases"]) == (1, 0, len(found.cases))
