"""What speed the project set out to reach, beside what a record shows, met or not.

A goal is a figure over some cases of the record; one whose cases were not timed says so. Where the
record has no line for a goal at all (how time grows), it stands in `python -m benchmarks growth`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import geometric_mean

from benchmarks.studies.grid.cases import QUICK_LAYER, QUICK_MODEL
from benchmarks.studies.grid.records import CaseRecord, Record, main_variant
from sgmv.models import MODELS

LARGE = 8 << 20  # bytes of weights beyond which decode should follow their size
LAYER = MODELS[QUICK_MODEL].layer(QUICK_LAYER)


@dataclass(frozen=True)
class Goal:
    """One line: `found` is None where none of the goal's cases was timed.

    `wanted` and `found` are ratios, shares or microseconds, as `unit` ("x", "%", "us") says; times
    are to be at most what is wanted, all others at least.
    """

    what: str
    wanted: float
    found: float | None
    unit: str
    cases: int

    @property
    def met(self) -> bool:
        if self.found is None:
            return False
        return self.found <= self.wanted if self.unit == "us" else self.found >= self.wanted

    def text(self, value: float | None) -> str:
        """A figure in the goal's unit.

        >>> Goal("share", 0.5, 0.753, "%", 1).text(0.753)
        '75 %'
        """
        if value is None:
            return "not timed"
        return f"{value * 100:.0f} %" if self.unit == "%" else f"{value:.2f} {self.unit}"


def goals(record: Record) -> list[Goal]:
    """Every goal, in the order in which they were set."""
    main = main_variant(record)
    single = [case for case in record.cases if case.dtype == "float32"]
    half = [case for case in record.cases if case.dtype == "bfloat16"]
    peak = record.ceilings.peak[str(max(record.threads))]

    def share(case: CaseRecord) -> float:
        return case.shares[main]

    def of_peak(case: CaseRecord) -> float:
        return case.flops / (case.times[main].q50 * 1e-6) / peak

    def against(peer: str) -> Callable[[CaseRecord], float]:
        return lambda case: case.ratios[main][peer]

    def closest(case: CaseRecord) -> float:
        return min(case.ratios[main].values())

    segments = [case for case in single if "by_segment" in case.ratios[main]]
    compared = [case for case in single if case.ratios[main]]
    few = [case for case in single if 2 <= case.rows / case.S <= 8]
    distinct = [case for case in single if case.popularity == "distinct"]
    prefill = [case for case in single if case.rows == 2048]
    halves = [case for case in half if "torch_native" in case.ratios[main]]
    against_single = _pairs(half, single, main)
    return [
        _goal("float32 against numpy's segments", 3.0, "x", segments, against("by_segment")),
        _worst("its worst case", 1.1, segments, against("by_segment")),
        _goal("float32 against the best peer of each case", 2.0, "x", compared, closest),
        _worst("the worst case of these", 1.0, compared, closest),
        _goal(
            "distinct rows, 16 and more, of the read limit", 0.95, "%",
            [case for case in distinct if case.rows >= 16], share,
        ),
        _goal(
            "distinct rows, 4, of the read limit", 0.80, "%",
            [case for case in distinct if case.rows == 4], share,
        ),
        _goal("segments of 2 to 8 rows, of the limit", 0.85, "%", few, share),
        Goal(
            "bfloat16 against float32, distinct, over 8 MiB", 1.9,
            geometric_mean(against_single) if against_single else None, "x", len(against_single),
        ),
        *(
            _goal(
                f"2048 rows, {popularity}, r = {rank}, of the FMA peak", wanted, "%",
                [c for c in prefill if (c.popularity, c.rank) == (popularity, rank)], of_peak,
            )
            for popularity, rank, wanted in (
                ("identical", 64, 0.75), ("identical", 16, 0.57), ("uniform", 16, 0.40),
            )
        ),
        *(
            _goal(
                f"bfloat16, 2048 rows, identical, r = {rank}, against torch's mm",
                1.3 if "amx_bf16" in record.machine.flags else 1.0, "x",
                [
                    c for c in halves
                    if (c.rows, c.popularity, c.rank) == (2048, "identical", rank)
                    and (c.h_in, c.h_out) == LAYER
                ],
                against("torch_native"),
            )
            for rank in (16, 64)
        ),
        Goal("one call beyond its kernels, Segments", 3.0, record.call_us.segments, "us", 1),
        Goal("one call beyond its kernels, from ids", 4.0, record.call_us.ids, "us", 1),
    ]  # fmt: skip


def _pairs(half: Iterable[CaseRecord], single: Iterable[CaseRecord], main: str) -> list[float]:
    """Time in float32 over time in bfloat16, of distinct batches with large weights."""
    times = {_key(case): case.times[main].q50 for case in single}
    return [
        times[_key(case)] / case.times[main].q50
        for case in half
        if case.popularity == "distinct"
        and case.S * case.rank * (case.h_in + case.h_out) * 4 > LARGE
        and _key(case) in times
    ]


def _key(case: CaseRecord) -> tuple[object, ...]:
    return tuple(getattr(case, name) for name in ("h_in", "h_out", "rank", "rows", "popularity"))


def _goal(
    what: str,
    wanted: float,
    unit: str,
    cases: list[CaseRecord],
    figure: Callable[[CaseRecord], float],
) -> Goal:
    """The geometric mean of a figure over cases."""
    found = geometric_mean(map(figure, cases)) if cases else None
    return Goal(what, wanted, found, unit, len(cases))


def _worst(
    what: str, wanted: float, cases: list[CaseRecord], figure: Callable[[CaseRecord], float]
) -> Goal:
    return Goal(what, wanted, min(map(figure, cases), default=None), "x", len(cases))


def page(record: Record, _name: str) -> str:
    """The goals as the table of docs/kernels.md."""
    lines = ["| goal | cases | wanted | found | |", "| --- | ---: | ---: | ---: | --- |"]
    for goal in goals(record):
        cells = (goal.what, str(goal.cases), goal.text(goal.wanted), goal.text(goal.found))
        lines.append(f"| {' | '.join(cells)} | {'met' if goal.met else '**missed**'} |")
    return "\n".join(lines)
