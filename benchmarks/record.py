"""Records: what all of them begin with, and how one is saved and read.

A study's record is a struct below `Head`; its fields are the schema, which msgspec holds a file to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec

from benchmarks.machine import Commit, Machine, commit, machine, versions

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
QUIET = 0.1  # cores that others may use while a case is timed; beyond, its figures mean nothing


class RecordError(ValueError):
    """A file that does not follow the schema: where, what was expected, what it has."""


class Times(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Quantiles over the timed calls, and each round's median; older records have no rounds.

    Units: microseconds.
    """

    q20: float
    q50: float
    q80: float
    calls: int
    rounds: list[float] = msgspec.field(default_factory=list)


class Head(msgspec.Struct, forbid_unknown_fields=True):
    """What every record begins with: the run. Units: seconds.

    `SCHEMA` changes with the meaning of a field. `STUDY` is the command that makes such a record.
    """

    SCHEMA: ClassVar[int] = 1
    STUDY: ClassVar[str] = ""
    schema: int
    date: str
    commit: Commit
    machine: Machine
    versions: dict[str, str]
    seconds: float


R = TypeVar("R", bound=Head)


def made(kind: type[R], started: float, packages: Iterable[str], fields: dict[str, Any]) -> R:
    """A record with these fields, made now by a run that began at perf_counter's `started`.

    packages  whose versions it names, beside those that every record names
    """
    head = {
        "schema": kind.SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(ROOT),
        "machine": machine(),
        "versions": {**versions(), **{package: version(package) for package in packages}},
        "seconds": round(time.perf_counter() - started, 1),
    }
    record = kind(**{**head, **fields})
    check(record)
    return record


def source(record: Any) -> str:
    """Where a table's figures come from, as the pages say it."""
    return (
        f"{record.machine.cpu}, {record.threads} threads, {record.date[:10]}, commit "
        f"{commit_text(record)}"
    )


def commit_text(record: Head) -> str:
    return f"`{record.commit.hash[:10]}`{' with changes' if record.commit.dirty else ''}"


def significant(value: float, digits: int = 4) -> float:
    """`value` to so many significant digits: what a timing is good for, and a shorter file.

    >>> significant(1234.567)
    1235.0
    """
    return float(f"{value:.{digits}g}")


def is_quiet(foreign_cores: float | None) -> bool:
    """Whether others kept still; taken for granted where the system does not say.

    >>> is_quiet(0.05), is_quiet(0.5), is_quiet(None)
    (True, False, True)
    """
    return foreign_cores is None or foreign_cores <= QUIET


def noisy(cases: Sequence[Any]) -> list[Any]:
    """Those that were timed while other processes ran."""
    return [case for case in cases if not is_quiet(case.foreign_cores)]


def check(record: Head) -> None:
    """Raise RecordError unless the record follows its schema."""
    # A struct is not checked when it is made; NaN and inf, which are no measurements, become null.
    _decoded(type(record), msgspec.json.encode(record))


def save(record: Head, path: Path) -> None:
    """Write JSON with one case per line, so that two records can be compared with diff.

    Raises RecordError unless it follows the schema.
    """
    check(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(msgspec.to_builtins(record)) + "\n")


def load(kind: type[R], path: Path) -> R:
    """Read a record. Raises RecordError, naming the file and the command that makes it anew."""
    try:
        return _decoded(kind, path.read_bytes())
    except RecordError as error:
        command = " ".join(["python -m benchmarks", kind.STUDY]).rstrip()
        raise RecordError(f"{path}: {error}; make it anew: {command}") from error


class _Schema(msgspec.Struct):
    schema: int


def _decoded(kind: type[R], text: bytes) -> R:
    try:
        found = msgspec.json.decode(text, type=_Schema).schema
        if found != kind.SCHEMA:
            raise RecordError(f"record.schema: expected {kind.SCHEMA}, got {found}")
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        raise RecordError(f"record: {error}") from error


def _lines(value: Any) -> str:
    """JSON in which each object of a list has a line, and each field of an object with such."""
    if _objects(value):
        return "[\n" + ",\n".join(map(_lines, value)) + "\n]"
    if isinstance(value, dict) and any(map(_objects, value.values())):
        return "{" + ",\n".join(f'"{name}": {_lines(part)}' for name, part in value.items()) + "}"
    return json.dumps(value)


def _objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
