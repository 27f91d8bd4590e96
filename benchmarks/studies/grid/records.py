"""The grid's record: its cases, its sums, and which of them other processes disturbed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import ClassVar

import msgspec

from benchmarks.clock import interval
from benchmarks.machine import Blas
from benchmarks.record import Head, Times, is_quiet, noisy, significant
from benchmarks.studies.grid.cases import label


class CaseRecord(msgspec.Struct, forbid_unknown_fields=True):
    """One timed case.

    `names`: the layers of this shape. `S`: segments. `footprint`: bytes touched by one call (the
    weights once per segment, x, y read and written). `flops`: of shrink and expand. `checked_rows`:
    rows held to the reference's elementwise bound before timing; all other rows were held to a
    coarser bound. `times`: by variant; "sgmv@2" is sgmv with 2 threads and segments made before,
    "sgmv@2 ids" the same from adapter ids; the others are baselines. `ratios`: by sgmv variant and
    baseline, baseline time / sgmv time at the median: above 1, sgmv is faster. `reads`: by sgmv
    variant, how long as many threads took to read the footprint, timed in turn with the others.
    `shares`: by sgmv variant, the roofline's time limit / time; in records without `reads`, that of
    `ceilings`. `skipped`: baselines that did not run, and why.
    `foreign_cores`: cores that other processes kept busy meanwhile, on average; None where the
    system does not say.
    """

    h_in: int
    h_out: int
    names: list[str]
    rank: int
    rows: int
    popularity: str
    dtype: str
    S: int
    footprint: int
    flops: int
    checked_rows: int
    times: dict[str, Times]
    ratios: dict[str, dict[str, float]]
    shares: dict[str, float]
    skipped: dict[str, str]
    foreign_cores: float | None
    reads: dict[str, Times] = msgspec.field(default_factory=dict)

    def interval(self, variant: str, baseline: str) -> tuple[float, float] | None:
        """Of this ratio, over rounds; older records have none."""
        return interval((self.times[variant], self.times[baseline]))


class CeilingsRecord(msgspec.Struct, forbid_unknown_fields=True):
    """By number of threads (a string, as JSON has it): [bytes, bytes/s] pairs, and FLOP/s."""

    bandwidth: dict[str, list[tuple[int, float]]]
    peak: dict[str, float]


class Gate(msgspec.Struct, forbid_unknown_fields=True):
    """What the corpus run before the timings held: cases, by thread counts, and seconds."""

    corpus_cases: int
    threads: list[int]
    first_use_s: float
    seconds: float


class CallTimes(msgspec.Struct, forbid_unknown_fields=True):
    """A whole call at n = h_in = r = h_out = 1: what a call costs beyond its kernels.

    Units: microseconds. `segments`: with Segments made before; `ids`: from adapter ids.
    """

    segments: float
    ids: float


class Record(Head, omit_defaults=True):
    """One run. `threads`: of sgmv, the last is the main one. `untimed`: cases left out, and why.

    `weights`: "hot", each call reads the same weights again. `noisy`: labels of the cases beside
    which other processes ran, also when they were timed again. `again`: the worst cases, timed by
    themselves.
    """

    SCHEMA: ClassVar[int] = 2
    mode: str
    seed: int
    blas: Blas
    threads: list[int]
    weights: str
    gate: Gate
    ceilings: CeilingsRecord
    call_us: CallTimes
    untimed: dict[str, str]
    cases: list[CaseRecord]
    noisy: list[str] = msgspec.field(default_factory=list)
    again: list[CaseRecord] = msgspec.field(default_factory=list)


def main_variant(record: Record) -> str:
    """The name of sgmv's variant with the most threads."""
    return f"sgmv@{max(record.threads)}"


@dataclass(frozen=True)
class SummaryLine:
    """Ratios of one baseline over the cases of one popularity ("all": over all cases)."""

    variant: str
    baseline: str
    popularity: str
    cases: int
    losses: int
    geomean: float
    worst: float
    worst_case: str
    best: float
    best_case: str


def summarise(record: Record, variant: str) -> list[SummaryLine]:
    """One line per baseline and popularity; a case that a baseline skipped does not count."""
    lines = []
    baselines = dict.fromkeys(b for case in record.cases for b in case.ratios[variant])
    popularities = dict.fromkeys(case.popularity for case in record.cases)
    for baseline in baselines:
        for popularity in ("all", *popularities):
            found = [
                (case.ratios[variant][baseline], case_label(case))
                for case in record.cases
                if popularity in ("all", case.popularity) and baseline in case.ratios[variant]
            ]
            if found:
                ratios = [ratio for ratio, _ in found]
                lines.append(
                    SummaryLine(
                        variant,
                        baseline,
                        popularity,
                        len(found),
                        sum(ratio < 1 for ratio in ratios),
                        geometric_mean(ratios),
                        *min(found),
                        *max(found),
                    )
                )
    return lines


def by_dtype(record: Record) -> dict[str, Record]:
    """A record for each float type, of its cases alone, float32 first: ratios do not mix types."""
    dtypes = sorted({case.dtype for case in record.cases}, key=lambda d: (d != "float32", d))
    return {
        dtype: msgspec.structs.replace(record, cases=[c for c in record.cases if c.dtype == dtype])
        for dtype in dtypes
    }


def noisy_cases(record: Record) -> list[str]:
    """Labels of the cases that were timed while other processes ran."""
    return [case_label(case) for case in noisy(record.cases)]


def without_noisy(record: Record) -> Record:
    """The record with its noisy cases among the untimed ones."""
    reason = "other processes ran meanwhile"
    untimed = {**record.untimed, **dict.fromkeys(noisy_cases(record), reason)}
    quiet = [case for case in record.cases if is_quiet(case.foreign_cores)]
    return msgspec.structs.replace(record, untimed=untimed, cases=quiet, noisy=[])


def case_label(case: CaseRecord) -> str:
    """Its name, as `Case.label` has it."""
    shape = case.h_in, case.h_out, case.rank, case.rows
    return label(*shape, case.popularity, case.dtype)


def ratios(times: dict[str, Times], variants: Sequence[str]) -> dict[str, dict[str, float]]:
    """Baseline median / sgmv median, by sgmv variant and baseline.

    >>> two, one = Times(1.0, 2.0, 3.0, 9), Times(1.0, 1.0, 1.0, 9)
    >>> ratios({"sgmv@1": one, "by_row": two}, ["sgmv@1"])
    {'sgmv@1': {'by_row': 2.0}}
    """
    baselines = [name for name in times if not name.startswith("sgmv@")]
    return {
        variant: {b: significant(times[b].q50 / times[variant].q50) for b in baselines}
        for variant in variants
    }
