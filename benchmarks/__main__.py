"""python -m benchmarks: gate, ceilings, timings, table, summary, record, figures, in that order."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

import sgmv
from benchmarks import (
    compat,
    figures,
    gate,
    growth,
    instructions,
    layer,
    machine,
    paper,
    peft,
    readme,
    run,
    table,
)
from benchmarks.batch import dtype_of
from benchmarks.ceilings import Ceilings, probe
from benchmarks.console import Console
from benchmarks.grid import DTYPES, QUICK_ROWS, RANKS, Filters, cases
from benchmarks.models import LAYERS, MODELS
from benchmarks.record import (
    SCHEMA,
    CeilingsRecord,
    Record,
    noisy_cases,
    save,
    significant,
    validate,
    without_noisy,
)  # fmt: skip
from benchmarks.timing import Budget
from reference.workloads import POPULARITIES
from sgmv.console import Parser, at_least
from sgmv.workers import cores

OUTPUT = Path("bench-out")
RED = 1
OTHERS = {
    "compat": compat.main,
    "growth": growth.main,
    "instructions": instructions.main,
    "layer": layer.main,
    "paper": paper.main,
    "peft": peft.main,
}
TOLERATED = 0.01  # share of noisy cases that a committed record may leave out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status: 0, or 1 when a gate is red."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] and words[0] in OTHERS:
        return OTHERS[words[0]](words[1:])
    args = parser().parse_args(words)
    console = Console()
    started = time.perf_counter()
    facts = machine.machine()
    threads = sorted(set(args.threads or [1, cores()]))
    if args.record and (args.adapters or _filters(args).any() or args.threads):
        raise SystemExit("--record: expected the whole grid of its mode; leave the filters out")
    console.print(machine_line(facts, threads), "bold")

    try:
        groups, untimed = _groups(args)
    except sgmv.SgmvError as error:
        raise SystemExit(f"--adapters: {error}") from error
    first_use_s = run.first_use_s()
    gate_start = time.perf_counter()
    named = {case.dtype for group in groups for case, _ids in group.cases}
    dtypes = [dtype_of(name) for name in DTYPES if name in named]
    count, failures = gate.corpus_failures(gate.sgmv_kernel, dtypes, threads)
    gate_s = time.perf_counter() - gate_start
    if failures or not count:
        console.print(f"gate: RED, {len(failures)} failures in {count} cases", "bold red")
        for failure in failures or ["the corpus is empty"]:
            console.print(f"  {failure}")
        console.print("nothing was timed", "bold red")
        return RED
    console.print(
        f"gate: green, {count} corpus cases with {' and '.join(map(str, threads))} threads in "
        f"{gate_s:.1f} s; first use (compiling) {first_use_s:.1f} s",
        "green",
    )

    ceilings = probe(threads, repeats=10 if args.mode == "full" else 3)
    for line in ceiling_lines(ceilings):
        console.print(line)
    terms = run.Terms(threads, budget(args), args.seed, ceilings)
    try:
        with console.progress(sum(len(group.cases) for group in groups)) as step:
            records = run.measure_all(groups, terms, step)
    except gate.GateError as error:
        console.print("gate: RED, not timed", "bold red")
        console.print(f"  {error}")
        return RED
    for label, why in untimed.items():
        console.print(f"not timed: {label}: {why}", "yellow")
    if not records:
        console.print("no case was left to time", "bold red")
        return RED

    record: Record = {
        "schema": SCHEMA,
        "mode": "adapters" if args.adapters else args.mode,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": args.seed,
        "commit": machine.commit(readme.ROOT),
        "machine": facts,
        "versions": machine.versions(),
        "blas": machine.blas(),
        "threads": threads,
        "weights": "hot",
        "seconds": round(time.perf_counter() - started, 1),
        "gate": {
            "corpus_cases": count,
            "threads": threads,
            "first_use_s": significant(first_use_s),
            "seconds": significant(gate_s),
        },
        "ceilings": ceilings_record(ceilings),
        "call_us": run.call_us(),
        "untimed": untimed,
        "cases": records,
    }
    validate(record)
    table.print_table(record, console)
    table.print_summary(record, console)
    if args.mode == "full":
        table.print_goals(record, console)
    _write(record, args, console)
    return 0


def parser() -> Parser:
    """The command line."""
    found = Parser(
        prog="python -m benchmarks",
        description="Time sgmv against numpy, torch and MKL; nothing is timed until it is correct.",
        epilog="Others, each with a --help: "
        + ", ".join(f"python -m benchmarks {name}" for name in OTHERS),
    )
    mode = found.add_mutually_exclusive_group()
    mode.add_argument(
        "--quick", dest="mode", action="store_const", const="quick", default="quick",
        help="about a minute (the default)",
    )  # fmt: skip
    mode.add_argument(
        "--full", dest="mode", action="store_const", const="full",
        help="every layer, rank, row count and popularity: about 25 minutes",
    )  # fmt: skip
    axes = found.add_argument_group("filters: the values to time on an axis")
    axes.add_argument("--model", nargs="+", choices=MODELS)
    axes.add_argument("--layer", nargs="+", choices=LAYERS)
    axes.add_argument("--rank", nargs="+", type=at_least(1), help=f"any; --full has {RANKS}")
    axes.add_argument("--rows", nargs="+", type=at_least(1), help="rows n in the batch")
    axes.add_argument("--popularity", nargs="+", choices=POPULARITIES)
    axes.add_argument("--dtype", nargs="+", choices=DTYPES, help="of x, weights and y")
    axes.add_argument(
        "--threads", nargs="+", type=at_least(1), help="of sgmv (default: 1, and all cores)"
    )
    found.add_argument(
        "--adapters", nargs="+", type=Path, metavar="DIR",
        help="time these PEFT adapters, the batch mixed over them, one module per shape",
    )  # fmt: skip
    found.add_argument("--seed", type=int, default=0)
    found.add_argument(
        "--memory-gib", type=float,
        default=round(min(4.0, machine.available_memory() / 2**30 / 2), 1),
        help="weights that a case may hold, both copies (default: %(default)s)",
    )  # fmt: skip
    saving = found.add_mutually_exclusive_group()
    saving.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s/")
    saving.add_argument("--no-save", action="store_true", help="print only")
    saving.add_argument(
        "--record", action="store_true", help="write the record to benchmarks/records/, to commit"
    )
    found.add_argument(
        "--figures", action=argparse.BooleanOptionalAction,
        default=find_spec("matplotlib") is not None,
        help="draw PNG figures beside the record (default: if matplotlib is installed)",
    )  # fmt: skip
    return found


def budget(args: argparse.Namespace) -> Budget:
    """--full has twenty times the cases of --quick, so each gets a little less."""
    return Budget(rounds=3, turn_s=0.015) if args.mode == "full" else Budget()


def machine_line(facts: machine.Machine, threads: Sequence[int]) -> str:
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in facts["caches"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores ({caches}; {' '.join(facts['flags'])}), "
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
    return {
        "bandwidth": {
            str(count): [[size, significant(rate)] for size, rate in measured]
            for count, measured in ceilings.bandwidth.items()
        },
        "peak": {str(count): significant(peak) for count, peak in ceilings.peak.items()},
    }


def record_name(record: Record) -> str:
    """File name from mode and processor: a new run on one machine replaces its old record."""
    return f"{record['mode']}-{machine.slug(record['machine'])}.json"


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


def _write(record: Record, args: argparse.Namespace, console: Console) -> None:
    if args.no_save:
        return
    directory, name = args.output, f"{record['mode']}.json"
    if args.record:
        noisy = noisy_cases(record)
        if len(noisy) > TOLERATED * len(record["cases"]):
            console.print(
                f"not recorded: other processes ran during {len(noisy)} cases; run again on a "
                "quiet machine",
                "bold red",
            )
        else:
            record = without_noisy(record)
            directory, name = readme.RECORDS, record_name(record)
    save(record, directory / name)
    written = [directory / name]
    if args.figures:
        written += figures.draw(record, directory)
    console.print()
    console.print(f"written: {', '.join(map(str, written))}")
    if directory == readme.RECORDS:
        console.print("now: python -m benchmarks.readme", "bold")


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as ended:
        if not isinstance(ended.code, str):
            raise
        print(f"benchmarks: error: {ended.code}", file=sys.stderr)
        status = 2
    raise SystemExit(status)
