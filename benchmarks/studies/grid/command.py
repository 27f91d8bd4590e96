"""Time sgmv against numpy, torch and MKL; nothing is timed until it is correct.

python -m benchmarks            about a minute: gate, ceilings, timings, table, record
python -m benchmarks --full     every layer, rank, row count and popularity
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

import sgmv
from benchmarks import gate, machine, peers
from benchmarks.batch import DTYPES, dtype_of
from benchmarks.ceilings import Ceilings, probe
from benchmarks.clock import NEVER, Budget, Deadline
from benchmarks.peers import PEERS, TURNS, left_out
from benchmarks.record import check, made, noisy, significant
from benchmarks.studies.grid import figures, goals, readme, run, table
from benchmarks.studies.grid.cases import FULL_ROWS, QUICK_ROWS, RANKS, Case, Filters, cases
from benchmarks.studies.grid.records import (
    CaseRecord,
    CeilingsRecord,
    Gate,
    Record,
    noisy_cases,
    without_noisy,
)  # fmt: skip
from benchmarks.study import Red, Study
from benchmarks.text import Console
from reference.workloads import POPULARITIES
from sgmv.console import Parser, at_least, number
from sgmv.cpu import cores
from sgmv.models import LAYERS, MODELS

# The first pass over the cases ends this long after the start; each case beyond so many adds to it.
# .venv is made before: on a busy machine in 40 s, and the table has to be there within two minutes.
FIRST_PASS_S, FIRST_PASS_CASES, MORE_S = 65.0, 50, 1.8
PATIENCE_S = {"quick": 30.0, "full": 600.0}
NO_TIME = "no time was left"
TOLERATED = 0.01  # share of noisy cases that a committed record may leave out


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Gate, ceilings, timings, table; then the noisy cases again."""
    now = args.now
    started, clock = now(), time.perf_counter()
    facts = machine.machine()
    threads = sorted(set(args.threads or [1, cores()]))
    console.print(machine_line(facts, threads), "bold")

    try:
        groups, untimed = _groups(args)
    except sgmv.SgmvError as error:
        raise SystemExit(f"--adapters: {error}") from error
    grid = [case for group in groups for case, _ids in group.cases]
    first_pass = Deadline(started + (math.inf if args.record else first_pass_s(len(grid))), now)
    patience_s = PATIENCE_S[args.mode] if args.patience is None else args.patience
    for line in plan_lines(len(grid), threads, budget(args), first_pass, patience_s):
        console.print(line)
    held = _corpus(grid, threads, console)
    ceilings = probe(threads, repeats=10 if args.mode == "full" else 3)
    for line in ceiling_lines(ceilings):
        console.print(line)
    terms = run.Terms(threads, budget(args), args.seed, ceilings)
    for label, why in untimed.items():
        console.print(f"not timed: {label}: {why}", "yellow")
    if not grid:
        raise Red("no case was left to time")
    timing = Timing(run.smallest_first(groups), terms, console)
    records = timing.time(timing.groups, first_pass)
    fields = {
        "mode": "adapters" if args.adapters else args.mode,
        "seed": args.seed,
        "blas": machine.blas(),
        "threads": threads,
        "weights": "hot",
        "gate": held,
        "ceilings": ceilings_record(ceilings),
        "call_us": run.call_us(),
        "untimed": untimed,
        "cases": [],
    }
    blank = made(Record, clock, (), fields)
    record = filled(blank, grid, records)
    _print(record, console)

    if patience_s and run.unsettled(timing.groups, records):
        before = dict(records)
        timing.again(Deadline(now() + patience_s, now))
        record = filled(blank, grid, records)
        changed = [case.label() for case in grid if records.get(case) is not before.get(case)]
        still = f"{len(record.noisy)} of {len(records)} cases are noisy now"
        console.print(f"timed again: {len(changed)} rows changed, {still}", "bold")
        if changed:
            _print(record, console, changed)
    if args.repeat_worst:
        record.again = timing.worst(args.repeat_worst)
        table.print_again(record, console)
    console.print()
    return {name: getattr(record, name) for name in [*fields, "noisy", "again"]}


def _corpus(grid: Sequence[Case], threads: Sequence[int], console: Console) -> Gate:
    """Hold the library to the corpus in the grid's float types. Raises Red."""
    first_use_s = run.first_use_s()
    start = time.perf_counter()
    dtypes = [dtype_of(name) for name in DTYPES if name in {case.dtype for case in grid}]
    count, failures = gate.corpus_failures(gate.sgmv_kernel, dtypes, threads)
    spent = time.perf_counter() - start
    if failures or not count:
        told = failures or ["the corpus is empty"]
        raise Red(f"gate: RED, {len(failures)} failures in {count} cases; nothing was timed", *told)
    console.print(
        f"gate: green, {count} corpus cases with {' and '.join(map(str, threads))} threads in "
        f"{spent:.1f} s; first use (compiling) {first_use_s:.1f} s",
        "green",
    )
    return Gate(count, list(threads), significant(first_use_s), significant(spent))


def filled(blank: Record, grid: Sequence[Case], records: Mapping[Case, CaseRecord]) -> Record:
    """The record with these cases, in the grid's order; the grid's others are untimed."""
    late = {case.label(): NO_TIME for case in grid if case not in records}
    record = msgspec.structs.replace(
        blank,
        untimed={**blank.untimed, **late},
        cases=[records[case] for case in grid if case in records],
    )
    record.noisy = noisy_cases(record)
    check(record)
    return record


@dataclass
class Timing:
    """The cases of a run, by group, and the records of those that are timed."""

    groups: Sequence[run.Group]
    terms: run.Terms
    console: Console
    records: dict[Case, CaseRecord] = field(default_factory=dict)

    def time(self, groups: Sequence[run.Group], until: Deadline) -> dict[Case, CaseRecord]:
        """Time these, under a bar. Raises Red if one of them is wrong."""
        try:
            with self.console.progress(sum(len(group.cases) for group in groups)) as step:
                run.time_cases(groups, self.records, self.terms, until, step)
        except gate.GateError as error:
            raise Red("gate: RED, not timed", error) from error
        return self.records

    def again(self, until: Deadline) -> None:
        """Time those without a time, then the noisy ones, over and over while there is time."""
        self.console.print()
        self.console.print(
            f"noisy cases again, for at most {until.left():.0f} s; Ctrl-C ends it", "bold"
        )
        try:
            while (waiting := run.unsettled(self.groups, self.records)) and until.left() > 0:
                self.time(waiting, until)
        except KeyboardInterrupt:
            self.console.print("interrupted", "yellow")

    def worst(self, count: int) -> list[CaseRecord]:
        """The `count` cases with the lowest ratios, timed by themselves for twice the rounds."""
        main = f"sgmv@{max(self.terms.threads)}"
        lowest = {case: min(its.values()) for case, found in self.records.items()
                  if (its := found.ratios[main])}  # fmt: skip
        worst = sorted(lowest, key=lambda case: lowest[case])[:count]
        budget = replace(self.terms.budget, rounds=2 * self.terms.budget.rounds)
        alone = Timing(self.groups, replace(self.terms, budget=budget), self.console)
        again = alone.time(run.those(self.groups, worst.__contains__), NEVER)
        return [again[case] for case in worst]


def _print(record: Record, console: Console, only: Sequence[str] | None = None) -> None:
    """The table, or its rows of these cases; the summary; what found no time; the goals."""
    table.print_table(record, console, only)
    table.print_summary(record, console)
    late = [label for label, why in record.untimed.items() if why == NO_TIME]
    if late:
        console.print()
        console.print(f"no time was left for {len(late)} cases; --patience SECONDS gives more:")
        console.print(f"  {', '.join(late)}", "yellow")
    if record.mode == "full":
        table.print_goals(record, console)


def arguments(parser: Parser) -> None:
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--quick", dest="mode", action="store_const", const="quick", default="quick",
        help=f"one model's layers: about a minute, at most {FIRST_PASS_S:.0f} s (the default)",
    )  # fmt: skip
    mode.add_argument(
        "--full", dest="mode", action="store_const", const="full",
        help="every layer, rank, row count and popularity: about 25 minutes",
    )  # fmt: skip
    axes = parser.add_argument_group("filters: the values to time on an axis")
    for name, choices, about in (
        ("model", MODELS, ""), ("layer", LAYERS, ""), ("popularity", POPULARITIES, ""),
        ("dtype", DTYPES, "of x, weights and y: "),
    ):  # fmt: skip
        axes.add_argument(
            f"--{name}", nargs="+", choices=choices, metavar=name.upper(),
            help=about + ", ".join(choices),
        )  # fmt: skip
    for name, about in (
        ("rank", f"r of the adapters; --full has {', '.join(map(str, RANKS))}"),
        ("rows", f"n of the batch; --full has {', '.join(map(str, FULL_ROWS))}"),
        ("threads", "of sgmv (default: 1, and all cores)"),
    ):
        axes.add_argument(f"--{name}", nargs="+", type=at_least(1), metavar="N", help=about)
    parser.add_argument(
        "--adapters", nargs="+", type=Path, metavar="DIR",
        help="time these PEFT adapters, the batch mixed over them, one module per shape",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights, x, y and adapter ids"
    )
    parser.add_argument(
        "--patience", type=seconds, metavar="SECONDS",
        help="after the table, time again the cases beside which other processes ran, so long; "
        f"0 = none (default: {PATIENCE_S['quick']:.0f}, with --full {PATIENCE_S['full']:.0f})",
    )  # fmt: skip
    parser.add_argument(
        "--repeat-worst", type=at_least(1), metavar="K",
        help="time the K cases of the lowest ratios again by themselves, and show both figures",
    )  # fmt: skip
    parser.add_argument(
        "--memory-gib", type=float, metavar="GIB",
        default=round(min(4.0, machine.available_memory() / 2**30 / 2), 1),
        help="weights that a case may hold, both copies (default: %(default)s)",
    )  # fmt: skip


def seconds(text: str) -> float:
    """A number of seconds, as argparse wants it said."""
    value = number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text}")
    return value


def first_pass_s(cases: int) -> float:
    """Seconds from the start to the end of the first pass at the latest.

    >>> first_pass_s(41), first_pass_s(60)
    (65.0, 83.0)
    """
    return FIRST_PASS_S + MORE_S * max(0, cases - FIRST_PASS_CASES)


def plan_lines(
    cases: int, threads: Sequence[int], budget: Budget, first_pass: Deadline, patience_s: float
) -> list[str]:
    """What will be timed, against what, and for how long."""
    absent = left_out()
    titles = [PEERS[name].title for name in TURNS if PEERS[name].library not in absent]
    about = round(run.about_s(cases, len(threads), budget) + 10, -1)
    left = first_pass.left()
    latest = f"{left:.0f} s at the most" if left < math.inf else "longer on a busy machine"
    again = f"; then noisy cases again, for {patience_s:.0f} s (--patience)" if patience_s else ""
    return [
        f"to time: {cases} cases, sgmv against {', '.join(titles)}"
        + (f" ({', '.join(absent.values())})" if absent else ""),
        f"about {min(about, left):.0f} s to the table, {latest}{again}",
    ]


def budget(args: argparse.Namespace) -> Budget:
    """--full has twenty times the cases of --quick, so each gets a little less."""
    return Budget(rounds=3, turn_s=0.015) if args.mode == "full" else Budget()


def machine_line(facts: machine.Machine, threads: Sequence[int]) -> str:
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in facts.caches.items())
    return (
        f"{facts.cpu}, {facts.cores} cores ({caches}; {' '.join(facts.flags)}), "
        f"sgmv with {' and '.join(map(str, threads))} threads"
    )


def ceiling_lines(ceilings: Ceilings) -> list[str]:
    """The measured limits, one line per number of threads."""
    lines = []
    for count, measured in ceilings.bandwidth.items():
        reads = ", ".join(f"{size >> 10}K {rate / 1e9:.0f}" for size, rate in measured)
        lines.append(
            f"ceiling, {count} thread{'s' * (count > 1)}: f32 FMA "
            f"{ceilings.peak[count] / 1e9:.0f} GFLOP/s; reads in GB/s by bytes: {reads}"
        )
    return lines


def ceilings_record(ceilings: Ceilings) -> CeilingsRecord:
    return CeilingsRecord(
        bandwidth={
            str(count): [(size, significant(rate)) for size, rate in measured]
            for count, measured in ceilings.bandwidth.items()
        },
        peak={str(count): significant(peak) for count, peak in ceilings.peak.items()},
    )


def _groups(args: argparse.Namespace) -> tuple[list[run.Group], dict[str, str]]:
    if args.adapters:
        if args.model or args.layer or args.rank or args.popularity or len(args.dtype or []) > 1:
            raise SystemExit(
                "--adapters: expected --rows and one --dtype at most; they have the rest"
            )
        rows = args.rows or QUICK_ROWS
        dtype = (args.dtype or DTYPES)[0]
        return run.adapter_groups(args.adapters, rows, dtype, args.seed), {}
    memory = int(args.memory_gib * 2**30)
    return run.synthetic_groups(cases(args.mode, _filters(args)), args.seed, memory)


def _filters(args: argparse.Namespace) -> Filters:
    return Filters(args.model, args.layer, args.rank, args.rows, args.popularity, args.dtype)


def quiet(record: Record) -> Record | None:
    """The record without its noisy cases, if they are few."""
    if len(noisy(record.cases)) > TOLERATED * len(record.cases):
        return None
    return without_noisy(record)


class _Grid(Study[Record]):
    def show(self, found: Record, console: Console) -> None:
        """Nothing more: the table was printed before the noisy cases were timed again."""


STUDY = _Grid(
    "grid", __doc__, Record, measure, lambda record: (), arguments, threads=False,
    whole=lambda args: not (args.adapters or _filters(args).any() or args.threads),
    pages={
        ("README.md", "summary"): readme.summary_table,
        ("README.md", "cases"): readme.cases_table,
        ("docs/kernels.md", "goals"): goals.page,
        ("docs/kernels.md", "peers"): lambda _record, _name: peers.table().markdown(),
    },
    figures={"latency.png": figures.latency, "roofline.png": figures.roofline},
    files=("full-", "quick-"),
    quiet=quiet,
)  # fmt: skip
