"""The terminal's table and summary: aligned text of at most 100 columns, losses marked."""

from __future__ import annotations

from collections.abc import Container, Sequence

from benchmarks.peers import PEERS
from benchmarks.record import is_quiet
from benchmarks.studies.grid.goals import goals
from benchmarks.studies.grid.records import (
    CaseRecord,
    Record,
    SummaryLine,
    by_dtype,
    case_label,
    main_variant,
    noisy_cases,
    summarise,
)  # fmt: skip
from benchmarks.text import LOSS, UNDECIDED, Console, Span, Table, microseconds, ratio_text

ROOM = 5  # baselines that fit beside the rest of a row
NOISY = "?"
DASH: Span = ("-", "dim")


def print_table(record: Record, console: Console, only: Container[str] | None = None) -> None:
    """One block per shape; the main variant's ratios against the baselines that came closest.

    only  labels of the cases to print: all, if left out
    """
    main = main_variant(record)
    baselines = closest(record, ROOM)
    one = "sgmv@1" if 1 in record.threads else main
    head = ["r", "n", "popularity", "S", f"{main} us", *([f"{one} us"] if one != main else [])]
    head += [*(PEERS[name].short for name in baselines), "limit"]
    groups: dict[tuple[int, int, str, str], list[CaseRecord]] = {}
    for case in record.cases:
        if only is not None and case_label(case) not in only:
            continue
        key = (case.h_in, case.h_out, case.dtype, ", ".join(case.names))
        groups.setdefault(key, []).append(case)
    rows = {key: [_row(c, main, one, baselines) for c in found] for key, found in groups.items()}
    widths = [
        max(len(head[i]), *(len(row[i][0]) for block in rows.values() for row in block))
        for i in range(len(head))
    ]
    for key, block in rows.items():
        console.print()
        console.print(_clip("{} > {} {}: {}".format(*key)), "bold")
        console.spans(_align([(text, "dim") for text in head], widths))
        for case, row in zip(groups[key], block, strict=True):
            mark = "" if is_quiet(case.foreign_cores) else NOISY
            console.spans(_align(row, widths, mark=mark))
    console.print()
    for line in footnotes(record) if only is None else []:
        console.print(line, "dim")
    for line in noise(record):
        console.print(line, "bold yellow")
    if others := set(ran(record)) - set(baselines):
        titles = ", ".join(peer.title for name, peer in PEERS.items() if name in others)
        console.print(f"Only in the summary: {titles}.", "dim")


def ran(record: Record) -> list[str]:
    """The baselines that were timed in any case, in the order of PEERS."""
    return [name for name in PEERS if any(name in case.times for case in record.cases)]


def closest(record: Record, count: int) -> list[str]:
    """So many baselines that took the least time against sgmv, in the order of PEERS."""
    lines = summarise(record, main_variant(record))
    ratio = {line.baseline: line.geomean for line in lines if line.popularity == "all"}
    kept = sorted(ran(record), key=lambda name: ratio[name])[:count]
    return [name for name in PEERS if name in kept]


def print_summary(record: Record, console: Console) -> None:
    """Geometric mean, worst and best ratio per baseline; per popularity for the main variant."""
    main = main_variant(record)
    for dtype, part in by_dtype(record).items():
        noisy = len(noisy_cases(part))
        beside = f" ({noisy} of {len(part.cases)} cases noisy)" if noisy else ""
        for threads in sorted(record.threads, reverse=True):
            variant = f"sgmv@{threads}"
            lines = summarise(part, variant)
            if variant != main:
                lines = [line for line in lines if line.popularity == "all"]
            console.print()
            title = f"{dtype}, sgmv with {threads} thread{'s' * (threads > 1)} against{beside}"
            console.print(title, "bold")
            _print_lines(lines, console)


def _print_lines(lines: Sequence[SummaryLine], console: Console) -> None:
    head = ["", "cases", "lost", "geomean", "worst", "best", "worst case"]
    rows: list[list[Span]] = [[(text, "dim") for text in head]]
    for line in lines:
        first = line.popularity == "all"
        name = PEERS[line.baseline].title if first else f"  {line.popularity}"
        rows.append(
            [
                (name, "bold" if first else ""),
                (str(line.cases), ""),
                (str(line.losses), "red" if line.losses else ""),
                _ratio(line.geomean),
                _ratio(line.worst),
                _ratio(line.best),
                (line.worst_case, "dim"),
            ]
        )
    widths = [max(len(row[i][0]) for row in rows) for i in range(len(head))]
    for row in rows:
        console.spans(_align(row, widths, left=(0, 6)))


def print_goals(record: Record, console: Console) -> None:
    """Every goal with what was found, in green or red."""
    console.print()
    console.print("goals: wanted, found", "bold")
    for goal in goals(record):
        found = goal.text(goal.found) + ("" if goal.met else LOSS)
        cells: list[Span] = [
            (goal.what, ""), (goal.text(goal.wanted), "dim"),
            (found, "green" if goal.met else "bold red"),
        ]  # fmt: skip
        console.spans(_align(cells, [62, 10, 10], left=(0,)))


def print_again(record: Record, console: Console) -> None:
    """The worst cases, each beside its closest baseline, as first timed and by itself again."""
    main = main_variant(record)
    first = {case_label(case): case for case in record.cases}
    rows = []
    for case in record.again:
        name = closest_of(first[case_label(case)], main)
        both = [
            [ratio_text(its.ratios[main][name], spread), "-" if spread is None else _span(spread)]
            for its in (first[case_label(case)], case)
            for spread in [its.interval(main, name)]
        ]
        rows.append([case_label(case), PEERS[name].title, *both[0], *both[1]])
    console.print()
    console.print("the worst cases, timed again by themselves", "bold")
    console.table(Table(["case", "against", "first", "95 %", "again", "95 %"], rows, left=2))


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2f}-{interval[1]:.2f}"


def closest_of(case: CaseRecord, main: str) -> str:
    """The baseline that took the least time."""
    ratios = case.ratios[main]
    return min(ratios, key=lambda name: ratios[name])


def footnotes(record: Record) -> list[str]:
    """What the columns mean, and on what terms the baselines ran."""
    main = main_variant(record)
    blas = record.blas
    return [
        f"Ratios: baseline time / {main} time, at the median; {LOSS} marks a loss; - did not run.",
        f"{UNDECIDED} marks a ratio that is undecided: its 95 % interval over rounds spans 1.",
        "limit: share of the roofline, max(time to read the same bytes, FLOP / FMA peak).",
        "Segments (sgmv), row lists and weights as each baseline wants them made beforehand;",
        "weights hot: each call reads the same ones.",
        f"numpy's BLAS: {blas.name}, threads: {blas.threads or 'its default'}.",
    ]


def noise(record: Record) -> list[str]:
    """Beside which cases other processes ran, if any."""
    noisy = noisy_cases(record)
    if not noisy:
        return []
    return [
        f"WARNING: other processes ran during {len(noisy)} of {len(record.cases)} cases, marked "
        f"{NOISY}: do not trust these.",
        "--patience SECONDS times them again after the table.",
    ]


def _row(case: CaseRecord, main: str, one: str, baselines: Sequence[str]) -> list[Span]:
    found: list[Span] = [
        (str(case.rank), ""),
        (str(case.rows), ""),
        (case.popularity, ""),
        (str(case.S), ""),
        (microseconds(case.times[main].q50), "bold"),
    ]
    if one != main:
        found.append((microseconds(case.times[one].q50), ""))
    for name in baselines:
        ran = name in case.times
        found.append(_ratio(case.ratios[main][name], case.interval(main, name)) if ran else DASH)
    found.append((f"{case.shares[main]:.0%}", ""))
    return found


def _ratio(ratio: float, interval: tuple[float, float] | None = None) -> Span:
    text = ratio_text(ratio, interval)
    styles = {LOSS: "bold red", UNDECIDED: "yellow"}
    return text, styles.get(text[-1], "green")


def _align(
    cells: Sequence[Span], widths: Sequence[int], left: Sequence[int] = (2,), mark: str = ""
) -> list[Span]:
    """Cells padded to their widths, after a mark; those in `left` stand left, the others right.

    A loss mark hangs over the right edge, so that the digits of a column stay in line.
    """
    spans: list[Span] = [(mark.ljust(2), "bold yellow")]
    for i, ((text, style), width) in enumerate(zip(cells, widths, strict=True)):
        if i in left:
            spans.append((text.ljust(width) + "  ", style))
        else:
            hang = "" if text.endswith((LOSS, UNDECIDED)) else " "
            spans.append((f"{text}{hang}".rjust(width + 1) + " ", style))
    return spans


def _clip(text: str, width: int = 98) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
