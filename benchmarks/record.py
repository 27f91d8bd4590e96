"""The record of a run: its schema, its arithmetic, and how it is saved and read.

`Record` and the types below are the schema; `validate` holds a file to them.
"""

from __future__ import annotations

import json
import math
import time
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import (
    Any,
    TypedDict,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)  # fmt: skip

from benchmarks.console import Console
from benchmarks.grid import label
from benchmarks.machine import Blas, Commit, Machine, commit, machine, versions

T = TypeVar("T")

SCHEMA = 2
QUIET = 0.1  # cores that others may use while a case is timed; beyond, its figures mean nothing


class RecordError(ValueError):
    """A file that does not follow the schema: where, what was expected, what stands there."""


class Head(TypedDict):
    """What the record of a benchmark beside the main one begins with: the run. Units: seconds."""

    schema: int
    date: str
    commit: Commit
    machine: Machine
    versions: dict[str, str]
    threads: int
    seconds: float


class Times(TypedDict):
    """Quantiles over the timed calls. Units: microseconds."""

    q20: float
    q50: float
    q80: float
    calls: int


class CaseRecord(TypedDict):
    """One timed case.

    `names`: the layers of this shape. `S`: segments. `footprint`: bytes touched by one call (the
    weights once per segment, x, y read and written). `flops`: of shrink and expand.
    `checked_rows`: rows held to the reference's elementwise bound before timing; all other rows
    were held to a coarser bound. `times`: by variant; "sgmv@2" is sgmv with 2 threads and segments
    made before, "sgmv@2 ids" the same from adapter ids; the others are baselines. `ratios`: by sgmv
    variant and baseline, baseline time / sgmv time at the median: above 1, sgmv is faster.
    `shares`: by sgmv variant, the roofline's time limit / time. `skipped`: baselines that did not
    run, and why. `foreign_cores`: cores that other processes kept busy meanwhile, on average; None
    where the system does not say.
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


class CeilingsRecord(TypedDict):
    """By number of threads (a string, as JSON has it): [bytes, bytes/s] pairs, and FLOP/s."""

    bandwidth: dict[str, list[list[float]]]
    peak: dict[str, float]


class Gate(TypedDict):
    """What the corpus run before the timings held: cases, by thread counts, and seconds."""

    corpus_cases: int
    threads: list[int]
    first_use_s: float
    seconds: float


class CallTimes(TypedDict):
    """A whole call at n = h_in = r = h_out = 1: what a call costs beyond its kernels.

    Units: microseconds. `segments`: with Segments made before; `ids`: from adapter ids.
    """

    segments: float
    ids: float


class _Later(TypedDict, total=False):
    """What records did not hold from the beginning."""

    noisy: list[str]


class Record(_Later):
    """One run. `threads`: of sgmv, the last is the main one. `untimed`: cases left out, and why.

    `weights`: "hot", each call reads the same weights again. `noisy`: labels of the cases beside
    which other processes ran, also when they were timed again.
    """

    schema: int
    mode: str
    date: str
    seed: int
    commit: Commit
    machine: Machine
    versions: dict[str, str]
    blas: Blas
    threads: list[int]
    weights: str
    seconds: float
    gate: Gate
    ceilings: CeilingsRecord
    call_us: CallTimes
    untimed: dict[str, str]
    cases: list[CaseRecord]


def record_head(schema: int, threads: int, started: float, packages: Iterable[str] = ()) -> Head:
    """The head of a record made now, by a run that began at perf_counter's `started`.

    packages  whose versions it names, beside those that every record names
    """
    return {
        "schema": schema,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(Path(__file__).parent),
        "machine": machine(),
        "versions": {**versions(), **{package: version(package) for package in packages}},
        "threads": threads,
        "seconds": round(time.perf_counter() - started, 1),
    }


def source(record: Head) -> str:
    """Where a table's figures come from, as the pages say it."""
    commit, cpu = record["commit"], record["machine"]["cpu"]
    return (
        f"{cpu}, {record['threads']} threads, {record['date'][:10]}, commit "
        f"`{commit['hash'][:10]}`{' with changes' if commit['dirty'] else ''}"
    )


def main_variant(record: Record) -> str:
    """The name of sgmv's variant with the most threads."""
    return f"sgmv@{max(record['threads'])}"


def geomean(values: Iterable[float]) -> float:
    """Geometric mean: the mean that treats 2x faster and 2x slower as opposites.

    Raises ValueError when there are no values.

    >>> geomean([2.0, 0.5])
    1.0
    """
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("values: expected at least one, got none")
    return math.exp(math.fsum(logs) / len(logs))


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
    baselines = dict.fromkeys(b for case in record["cases"] for b in case["ratios"][variant])
    popularities = dict.fromkeys(case["popularity"] for case in record["cases"])
    for baseline in baselines:
        for popularity in ("all", *popularities):
            found = [
                (case["ratios"][variant][baseline], case_label(case))
                for case in record["cases"]
                if popularity in ("all", case["popularity"]) and baseline in case["ratios"][variant]
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
                        geomean(ratios),
                        *min(found),
                        *max(found),
                    )
                )
    return lines


def by_dtype(record: Record) -> dict[str, Record]:
    """A record for each float type, of its cases alone, float32 first: ratios do not mix types."""
    dtypes = sorted({case["dtype"] for case in record["cases"]}, key=lambda d: (d != "float32", d))
    return {
        dtype: {**record, "cases": [case for case in record["cases"] if case["dtype"] == dtype]}
        for dtype in dtypes
    }


def noisy_cases(record: Record) -> list[str]:
    """Labels of the cases that were timed while other processes ran."""
    return [case_label(case) for case in record["cases"] if not is_quiet(case["foreign_cores"])]


def without_noisy(record: Record) -> Record:
    """The record with its noisy cases among the untimed ones."""
    reason = "other processes ran meanwhile"
    untimed = {**record["untimed"], **dict.fromkeys(noisy_cases(record), reason)}
    quiet = [case for case in record["cases"] if is_quiet(case["foreign_cores"])]
    return {**record, "untimed": untimed, "cases": quiet, "noisy": []}


def is_quiet(foreign_cores: float | None) -> bool:
    """Whether others kept still; taken for granted where the system does not say.

    >>> is_quiet(0.05), is_quiet(0.5), is_quiet(None)
    (True, False, True)
    """
    return foreign_cores is None or foreign_cores <= QUIET


def warn_if_noisy(cases: Iterable[Mapping[str, Any]], console: Console) -> None:
    """Say during how many cases others did not keep still."""
    noisy = sum(not is_quiet(case["foreign_cores"]) for case in cases)
    if noisy:
        console.print(f"WARNING: other processes ran during {noisy} cases", "bold red")


def case_label(case: CaseRecord) -> str:
    """Its name, as `Case.label` has it."""
    shape = case["h_in"], case["h_out"], case["rank"], case["rows"]
    return label(*shape, case["popularity"], case["dtype"])


def ratios(times: dict[str, Times], variants: Sequence[str]) -> dict[str, dict[str, float]]:
    """Baseline median / sgmv median, by sgmv variant and baseline.

    >>> two, one = Times(q20=1, q50=2.0, q80=3, calls=9), Times(q20=1, q50=1.0, q80=1, calls=9)
    >>> ratios({"sgmv@1": one, "by_row": two}, ["sgmv@1"])
    {'sgmv@1': {'by_row': 2.0}}
    """
    baselines = [name for name in times if not name.startswith("sgmv@")]
    return {
        variant: {b: significant(times[b]["q50"] / times[variant]["q50"]) for b in baselines}
        for variant in variants
    }


def significant(value: float, digits: int = 4) -> float:
    """`value` to so many significant digits: what a timing is good for, and a shorter file.

    >>> significant(1234.567)
    1235.0
    """
    return float(f"{value:.{digits}g}")


def validate(record: object) -> None:
    """Raise RecordError unless `record` follows the schema."""
    validate_as(Record, SCHEMA, record)


def save(record: Record, path: Path) -> None:
    """Write the record as JSON. Raises RecordError unless it follows the schema."""
    save_as(Record, SCHEMA, record, path)


def load(path: Path) -> Record:
    """Read and validate a record. Raises RecordError, naming the file."""
    return load_as(Record, SCHEMA, path, "python -m benchmarks")


def save_as(kind: type[T], schema: int, record: T, path: Path) -> None:
    """Write JSON with one case per line, so that two records can be compared with diff."""
    validate_as(kind, schema, record)
    fields = dict(cast(Mapping[str, Any], record))
    head = json.dumps({**fields, "cases": []}, indent=1)
    cases = ",\n".join(json.dumps(case) for case in fields["cases"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head.replace('"cases": []', f'"cases": [\n{cases}\n]') + "\n")


def load_as(kind: type[T], schema: int, path: Path, command: str) -> T:
    """Read and validate a record of any benchmark. Raises RecordError, naming file and command."""
    try:
        record = json.loads(path.read_text())
        validate_as(kind, schema, record)
    except ValueError as error:
        raise RecordError(f"{path}: {error}; make it anew: {command}") from error
    return cast(T, record)


def validate_as(kind: type[T], schema: int, record: object) -> None:
    """Raise RecordError unless `record` is of this kind and schema."""
    check_schema("record", record, kind)
    found = cast(Mapping[str, Any], record)["schema"]
    if found != schema:
        raise RecordError(f"record.schema: expected {schema}, got {found}")


def check_schema(where: str, value: object, expected: Any) -> None:
    """Raise RecordError, naming the place after `where`, unless value has the type `expected`.

    >>> check_schema("record", {"seed": "0"}, dict[str, int])
    Traceback (most recent call last):
    benchmarks.record.RecordError: record['seed']: expected int, got '0'
    """
    origin, args = get_origin(expected), get_args(expected)
    if is_typeddict(expected):
        hints, needed = get_type_hints(expected), expected.__required_keys__
        if not isinstance(value, dict) or not needed <= value.keys() <= hints.keys():
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise RecordError(f"{where}: expected the keys {sorted(hints)}, got {got}")
        for key in value:
            check_schema(f"{where}.{key}", value[key], hints[key])
    elif origin in (Union, types.UnionType):
        if value is not None:
            check_schema(where, value, next(arg for arg in args if arg is not types.NoneType))
    elif origin in (dict, list):
        if not isinstance(value, origin):
            raise RecordError(f"{where}: expected {expected}, got {type(value).__name__}")
        parts = value if isinstance(value, dict) else dict(enumerate(value))
        for index, part in parts.items():
            check_schema(f"{where}[{index!r}]", part, args[-1])
    elif not _is_scalar(value, expected):
        raise RecordError(f"{where}: expected {expected.__name__}, got {value!r}")


def _is_scalar(value: object, expected: type) -> bool:
    if expected is float:
        # NaN and inf are floats, but no measurement.
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    return type(value) is expected
