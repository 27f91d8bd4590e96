"""python -m benchmarks report: one HTML page of the records, to look at and to filter.

    python -m benchmarks report                                the committed records
    python -m benchmarks report --records benchmarks/records bench-out      and your own

The page needs no network and no other file; its address keeps what you chose.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import record
from benchmarks.machine import Machine
from benchmarks.peers import PEERS, table
from benchmarks.record import Head, RecordError, Times
from benchmarks.registry import DEFAULT, STUDIES
from benchmarks.studies import growth
from benchmarks.studies.grid import figures
from benchmarks.studies.grid.records import CaseRecord, Record
from benchmarks.study import OUTPUT, Study, cases_of
from sgmv.console import Parser
from sgmv.html import assembled, presented

FOLDER = Path(__file__).parent
PAGE = OUTPUT / "report.html"


def found_in(folders: Iterable[Path]) -> dict[str, tuple[Study[Any], Head]]:
    """The records of these folders by name, each with its study.

    Semantics: a record's study is named at the beginning of its file's name; all others are the
    grid's. A name that two folders have is told apart by its folder. Raises RecordError.
    """
    records: dict[str, tuple[Study[Any], Head]] = {}
    for folder in folders:
        paths = sorted(folder.glob("*.json"))
        if not paths:
            raise RecordError(
                f"--records: expected a folder of records (*.json), got {folder}; make one: "
                "python -m benchmarks"
            )
        for path in paths:
            study = STUDIES.get(path.stem.partition("-")[0], DEFAULT)
            name = f"{folder}/{path.stem}" if path.stem in records else path.stem
            records[name] = study, record.load(study.record, path)
    return records


def data(records: dict[str, tuple[Study[Any], Head]]) -> dict[str, Any]:
    """All that the page knows, as JSON has it."""
    machines: list[Machine] = []
    for _, found in records.values():
        if found.machine not in machines:
            machines.append(found.machine)
    return {
        "quiet": record.QUIET,
        "peers": {name: peer.title for name, peer in PEERS.items()},
        "peers_table": msgspec.to_builtins(table()),
        "studies": {name: study.about.partition("\n\n")[0] for name, study in STUDIES.items()},
        "machines": [msgspec.structs.asdict(machine) for machine in machines],
        "records": [
            {
                "name": name,
                "study": study.name,
                "machine": machines.index(found.machine),
                "date": found.date,
                "commit": record.commit_text(found).replace("`", ""),
                "seconds": found.seconds,
                "versions": found.versions,
                "threads": getattr(found, "threads", None),
                "busy": [getattr(case, "foreign_cores", None) for case in cases_of(found)],
                "tables": [msgspec.to_builtins(each) for each in study.tables(found)],
                "grid": grid(found) if isinstance(found, Record) else None,
                "growth": curves(found) if isinstance(found, growth.GrowthRecord) else None,
            }
            for name, (study, found) in records.items()
        ],
    }


def grid(found: Record) -> dict[str, Any]:
    """The grid's record. A case is a list, in the order in which records.js reads it."""
    variants = list(dict.fromkeys(name for case in found.cases for name in case.times))
    names = list(dict.fromkeys(tuple(case.names) for case in found.cases))
    reasons = list(dict.fromkeys(why for case in found.cases for why in case.skipped.values()))

    def packed(case: CaseRecord) -> list[Any]:
        return [
            case.h_in, case.h_out, names.index(tuple(case.names)), case.rank, case.rows,
            case.popularity, case.dtype, case.S, case.footprint, case.flops, case.foreign_cores,
            case.shares,
            [_quantiles(case.times.get(name)) for name in variants],
            {
                variant: {
                    peer: [ratio, *(case.interval(variant, peer) or ())]
                    for peer, ratio in ratios.items()
                }
                for variant, ratios in case.ratios.items()
            },
            {peer: reasons.index(why) for peer, why in case.skipped.items()},
        ]  # fmt: skip

    return {
        "threads": found.threads,
        "untimed": found.untimed,
        "blas": found.blas.name,
        "variants": variants,
        "names": names,
        "reasons": reasons,
        "peak": found.ceilings.peak,
        "roofs": {count: figures.roofs(found, count) for count in found.ceilings.bandwidth},
        "cases": [packed(case) for case in found.cases],
    }


def curves(found: growth.GrowthRecord) -> dict[str, Any]:
    """Growth's curves, each with the line through it."""
    layer = f"{found.h_in} → {found.rank} → {found.h_out}, {found.dtype}, weights {found.weights}"
    return {
        "layer": layer,
        "series": [
            {
                "name": series.name,
                "axis": series.axis,
                "points": [[point.n, *_quantiles(point.times)] for point in series.points],
                "fit": [line.a, line.b],
            }
            for series in found.series
            for line in [growth.fitted(series)]
        ],
    }


def _quantiles(times: Times | None) -> list[float]:
    return [] if times is None else [times.q20, times.q50, times.q80]


def write(path: Path, folders: Sequence[Path]) -> Path:
    """Write the page; returns its path. Raises RecordError."""
    page = assembled(lambda name: (FOLDER / name).read_text("utf-8"), data(found_in(folders)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and open it; return the exit status."""
    parser = Parser(
        prog="python -m benchmarks report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "path", nargs="?", type=Path, default=PAGE, metavar="PATH",
        help="file to write (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--records", nargs="+", type=Path, default=[record.RECORDS], metavar="FOLDER",
        help="where the records are (benchmarks/records)",
    )  # fmt: skip
    parser.add_argument("--no-open", action="store_true", help="only write it")
    given = parser.parse_args(argv)
    try:
        print(presented(write(given.path, given.records), given.no_open))
    except RecordError as error:
        raise SystemExit(str(error)) from error
    except OSError as error:
        raise SystemExit(
            f"PATH: expected a file that can be written, got {error}; name another place"
        ) from error
    return 0
