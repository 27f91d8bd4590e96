"""The grid's two tables of README.md."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from benchmarks.peers import PEERS
from benchmarks.record import commit_text
from benchmarks.studies.grid.figures import hub_cases
from benchmarks.studies.grid.records import CaseRecord, Record, by_dtype, main_variant, summarise
from benchmarks.studies.grid.table import ran
from benchmarks.text import LOSS, Table, microseconds, ratio_text


def summary_table(record: Record, name: str) -> str:
    """Where the record comes from; then a table for each float type."""
    machine = record.machine
    lines = [
        f"{len(record.cases)} cases, {machine.cpu}, {machine.cores} cores, "
        f"numpy {record.versions['numpy']} ({record.blas.name}), "
        f"numba {record.versions['numba']}, {record.date[:10]}, commit {commit_text(record)}; "
        f"{len(record.untimed)} more were left out (mostly for want of memory, see the record); "
        f"record: `benchmarks/records/{name}`.",
    ]
    for dtype, part in by_dtype(record).items():
        lines += ["", *_ratio_lines(dtype, part)]
    return "\n".join(lines)


def _ratio_lines(dtype: str, record: Record) -> list[str]:
    """Ratios per baseline over all cases, and per popularity; for all threads and for one."""
    popularities = list(dict.fromkeys(case.popularity for case in record.cases))
    head = [f"{dtype}: baseline / sgmv", "threads", "geomean", "worst", "best", "lost"]
    rows = []
    for threads in sorted(record.threads, reverse=True):
        found = summarise(record, f"sgmv@{threads}")
        by_key = {(line.baseline, line.popularity): line for line in found}
        for baseline in dict.fromkeys(line.baseline for line in found):
            line = by_key[baseline, "all"]
            cells = [
                PEERS[baseline].title,
                str(threads),
                f"**{ratio_text(line.geomean)}**",
                ratio_text(line.worst),
                ratio_text(line.best),
                f"{line.losses} of {line.cases}",
            ]
            for popularity in popularities:
                part = by_key.get((baseline, popularity))
                cells.append(ratio_text(part.geomean) if part else "-")
            rows.append(cells)
    return Table([*head, *popularities], rows, left=1).markdown().splitlines()


def cases_table(record: Record, _name: str) -> str:
    """Every row count and popularity of one layer; the other cases are in the record."""
    main = main_variant(record)
    cases = hub_cases(record)
    baselines = ran(msgspec.structs.replace(record, cases=cases))
    first = cases[0]
    head = ["n", "popularity", "S", f"sgmv, {max(record.threads)} threads, µs"]
    head += [PEERS[name].title for name in baselines] + ["share of limit"]
    about = (
        f"{first.h_in} → {first.rank} → {first.h_out} ({first.names[0]}), "
        f"{first.dtype}; ratios as above, {LOSS} marks a loss, - did not run."
    )
    rows = [_cells(case, main, baselines) for case in cases]
    rule = "| ---: | --- " + "| ---: " * (len(head) - 2) + "|"  # the second column is of words
    heads, _, *lines = Table(head, rows).markdown().splitlines()
    return "\n".join([about, "", heads, rule, *lines])


def _cells(case: CaseRecord, main: str, baselines: Sequence[str]) -> list[str]:
    ratios = case.ratios[main]
    return [
        str(case.rows),
        case.popularity,
        str(case.S),
        microseconds(case.times[main].q50),
        *(
            ratio_text(ratios[name], case.interval(main, name)) if name in ratios else "-"
            for name in baselines
        ),
        f"{case.shares[main]:.0%}",
    ]
