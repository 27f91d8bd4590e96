"""Adapters of a store: what reading them costs the steps beside it, and how soon a cold one runs.

    python -m benchmarks store            check, timings, tables; minutes, the first time some more
    python -m benchmarks store --record   the same, into benchmarks/records/, to commit

A step is one row for each of 16 requests, each with an adapter of its own of rank 32, through the
linear layers of a small Llama: base products by numpy, then add_lora. Cold adapters are in neither
host memory nor the system's page cache. The four kinds of steps take turns:

    still    all adapters are in slots, and nothing is read
    beside   the same rows, while the loading thread reads a cold adapter every few steps: prefetch
    joins    every few steps a request ends and one for a cold adapter comes: next_step(wait=False)
    stalls   the same with next_step alone, which reads the adapter itself

The index is of --adapters tiny adapters, which are written to a folder that stays for the next run.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks.clock import quietly
from benchmarks.engine import Llama, drawn, put_out_of_cache, write_adapter
from benchmarks.gate import check_rows
from benchmarks.record import Head, significant, source
from benchmarks.study import OUTPUT, Red, Study
from benchmarks.text import Console, Table
from sgmv.console import Parser, at_least
from sgmv.serving import AdapterSlots, AdapterStore, LoRARequest, Scheduler, Step, next_step

SHAPE = Llama(2048, 5632, heads=32, kv_heads=4, head_dim=64, layers=1, vocabulary=32000)
RANK, REQUESTS, HOSTED, POOL = 32, 16, 24, 64
EVERY = 4  # steps from one cold adapter to the next
ROUNDS, STEPS = 12, 50
ADAPTERS = 100_000
KINDS = ("still", "beside", "joins", "stalls")


class StoreCase(msgspec.Struct, forbid_unknown_fields=True):
    """Steps of one kind. Units: milliseconds. `first_row`: quantiles from a request to its row."""

    name: str
    steps: int
    loaded: int
    p50: float
    p99: float
    rounds: list[float]  # p99 of each
    first_row: list[float]  # p50, p99; empty where no request comes
    foreign_cores: float | None


class Index(msgspec.Struct, forbid_unknown_fields=True):
    """An index made, and read again. Units: seconds, bytes."""

    adapters: int
    made: float
    again: float
    file: int
    resident: int


class StoreRecord(Head):
    """One run of this file. `resident`: bytes after as many adapters were read."""

    STUDY: ClassVar[str] = "store"
    threads: int
    adapter_bytes: int
    index: Index
    resident: dict[str, int]
    cases: list[StoreCase]


class Server:
    """A model's linear layers, and the requests for its adapters."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.modules = SHAPE.modules()
        self.W = {name: drawn(rng, h_out, h_in) for name, (h_in, h_out) in self.modules.items()}
        widths = {h_in for h_in, _ in self.modules.values()}
        self.x = {h: rng.standard_normal((REQUESTS, h), np.float32) for h in widths}
        for number in range(POOL):
            write_adapter(folder / f"a{number}", self.modules, RANK, number)
        self.store = AdapterStore(folder)
        sizes = {module: (RANK, *widths) for module, widths in self.modules.items()}
        self.adapter_bytes = sum(4 * r * (h_in + h_out) for r, h_in, h_out in sizes.values())
        self.slots = AdapterSlots(
            REQUESTS, HOSTED, RANK, modules=self.modules, read=self.store.read
        )
        self.scheduler: Scheduler[int] = Scheduler(REQUESTS, REQUESTS)
        self.came: dict[int, int] = {}  # request -> when; of those that have had no row
        self.first_rows: list[int] = []
        self.number = 0

    def next_cold(self) -> LoRARequest:
        """An adapter that was used least recently, out of the page cache."""
        request = self.store.request(f"a{self.number % POOL}")
        put_out_of_cache(Path(request.lora_path))
        return request

    def add(self) -> None:
        """Let a request for a cold adapter come."""
        request = self.next_cold()
        self.came[self.number] = time.perf_counter_ns()
        self.scheduler.add(self.number, request)
        self.number += 1

    def step(
        self, wait: bool, seen: Callable[[Step[int], str, Any, Any], None] | None = None
    ) -> None:
        """One step through all layers."""
        step = next_step(self.scheduler, self.slots, wait=wait)
        if step.failed:
            raise Red("an adapter cannot be read", step.failed[0][2])
        for module, W in self.W.items():
            x = self.x[W.shape[1]][: step.n]
            y = x @ W.T
            if seen is not None:
                seen(step, module, y, x)
            step.add_lora(module, y, x)
        now = time.perf_counter_ns()
        for request_id in step.rows.keys() & self.came.keys():
            self.first_rows.append(now - self.came.pop(request_id))

    def run(self, kind: str, steps: int) -> tuple[list[int], list[int]]:
        """Nanoseconds of each step, and of the first row of each request that came."""
        while self.came or len(self.scheduler.running) < REQUESTS:  # as still as the first kind
            if len(self.scheduler.running) + len(self.scheduler.waiting) < REQUESTS:
                self.add()
            self.step(wait=True)
        self.first_rows = []
        times = []
        for count in range(steps):
            if count % EVERY == 0 and kind == "beside":
                self.slots.prefetch([self.next_cold()])
                self.number += 1
            if count % EVERY == 0 and kind in ("joins", "stalls"):
                oldest = min(self.scheduler.running)
                self.scheduler.finish(oldest)
                self.came.pop(oldest, None)
                self.add()
            start = time.perf_counter_ns()
            self.step(wait=kind != "joins")
            times.append(time.perf_counter_ns() - start)
        return times, self.first_rows


def check(server: Server) -> None:
    """Hold a step to the reference, and slots to the adapters' files, as joins and as stalls."""
    weights = cache(lambda name: sgmv.load_peft(f"{server.store.directory}/{name}"))

    def seen(step: Step[int], module: str, y: NDArray[Any], x: NDArray[Any]) -> None:
        stack, ids = server.slots.stack(module), np.empty(step.n, np.int64)
        starts, segments = step.segments.seq_start, step.segments
        for s, generation in enumerate(segments.adapter_ids.tolist()):
            ids[segments.rows[starts[s] : starts[s + 1]]] = generation
            held, file = stack[generation], weights(step.adapters[generation].lora_name)[module]
            if held is None or not np.array_equal(held.A, file.A):
                raise AssertionError(f"{step.adapters[generation]} is another in its slot")
        check_rows(y, x, stack, ids)

    try:
        for kind in KINDS:
            server.run(kind, EVERY)
            server.step(kind != "joins", seen)
    except AssertionError as error:
        raise Red("gate: RED, nothing was timed", error) from error


def measure(folder: Path, console: Console) -> tuple[int, dict[str, int], list[StoreCase]]:
    """An adapter's bytes, resident memory, and the steps of each kind."""
    server = Server(folder)
    check(server)
    resident = {str(server.slots.counters.host_misses): resident_bytes()}

    def turns() -> dict[str, list[tuple[list[int], list[int], int]]]:
        found: dict[str, list[tuple[list[int], list[int], int]]] = {kind: [] for kind in KINDS}
        for _ in range(ROUNDS):
            for kind in KINDS:
                before = server.slots.counters.host_misses
                gc.collect()  # not in the midst of a step, as the clock of the other studies does
                gc.disable()
                try:
                    times, first = server.run(kind, STEPS)
                finally:
                    gc.enable()
                found[kind].append((times, first, server.slots.counters.host_misses - before))
            resident[str(server.slots.counters.host_misses)] = resident_bytes()
        return found

    found, foreign = quietly(turns, attempts=1)
    return server.adapter_bytes, resident, [case(kind, found[kind], foreign) for kind in KINDS]


def case(
    kind: str, rounds: Sequence[tuple[list[int], list[int], int]], foreign: float | None
) -> StoreCase:
    """The quantiles of all rounds' steps."""

    def quantile(values: Sequence[int], q: float) -> float:
        return significant(float(np.quantile(values, q)) / 1e6)

    times = [ns for ns_of_round, _, _ in rounds for ns in ns_of_round]
    first = [ns for _, ns_of_round, _ in rounds for ns in ns_of_round]
    return StoreCase(
        kind, len(times), sum(loaded for _, _, loaded in rounds), quantile(times, 0.5),
        quantile(times, 0.99), [quantile(ns, 0.99) for ns, _, _ in rounds],
        [quantile(first, q) for q in (0.5, 0.99)] if first else [], foreign,
    )  # fmt: skip


def resident_bytes() -> int:
    """Memory of this process that is not on disk."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_tiny(folder: Path, count: int, console: Console) -> None:
    """As many adapters of one small layer as there are not yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_adapter(Path(scratch), {"model.layers.0.self_attn.q_proj": (8, 8)}, 2, 0)
        files = {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
    made = sum(entry.is_dir() for entry in os.scandir(folder))
    if made < count:
        console.print(f"  writing {count - made:,} tiny adapters to {folder}")
    for number in range(made, count):
        (folder / f"a{number}").mkdir()
        for name, data in files.items():
            (folder / f"a{number}" / name).write_bytes(data)


def index_of(folder: Path, count: int, console: Console) -> Index:
    """The index of `count` tiny adapters, made and made again."""
    write_tiny(folder, count, console)
    file = folder.parent / f"{folder.name}-index.json"
    file.unlink(missing_ok=True)
    before, start = resident_bytes(), time.perf_counter()
    AdapterStore(folder, index=file)
    middle = time.perf_counter()
    store = AdapterStore(folder, index=file)
    end, after = time.perf_counter(), resident_bytes()
    if len(store) != count or store.damaged:
        raise Red(f"the index has {len(store)} adapters, {len(store.damaged)} damaged")
    found = significant(middle - start), significant(end - middle)
    return Index(count, *found, file.stat().st_size, after - before)


def tables(record: StoreRecord) -> list[Table]:
    """Steps of each kind; the index; memory."""
    still = record.cases[0]
    rows = []
    for one in record.cases:
        first = [f"{ms:.1f}" for ms in one.first_row] or ["-", "-"]
        rows.append(
            [one.name, str(one.steps), str(one.loaded), f"{one.p50:.2f}", f"{one.p99:.2f}",
             f"{one.p50 / still.p50:.2f}x", f"{one.p99 / still.p99:.2f}x", *first]
        )  # fmt: skip
    head = ["steps", "n", "read", "p50 ms", "p99 ms", "p50 / still", "p99 / still",
            "first row p50 ms", "p99 ms"]  # fmt: skip
    index = record.index
    words = (
        f"Index of {index.adapters:,} tiny adapters: made in {index.made:.3g} s, again in "
        f"{index.again:.2g} s; {index.file / 1e6:.3g} MB on disk, {index.resident / 1e6:.3g} MB "
        "in memory."
    )
    (count, start), *rest = record.resident.items()
    later = [resident / 1e6 for _, resident in rest]
    memory = (
        f"Resident: {start / 1e6:,.0f} MB after {count} adapters were read, "
        f"{min(later):,.0f} to {max(later):,.0f} MB after {rest[0][0]} to {rest[-1][0]}."
    )
    return [Table(head, rows, 1, [words, memory])]


def page(record: StoreRecord, name: str) -> str:
    """The table of docs/serving.md, and where it comes from."""
    [table] = tables(record)
    head = (
        f"Adapters of {record.adapter_bytes / 1e6:.1f} MB, one cold every {EVERY} steps; "
        f"{source(record)}; record: `benchmarks/records/{name}`."
    )
    notes = "\n".join(table.notes)
    return f"{head}\n\n{table.markdown()}\n\n{notes}"


def arguments(parser: Parser) -> None:
    """Add those of the index."""
    parser.add_argument(
        "--adapters", type=at_least(1), default=ADAPTERS, metavar="N",
        help="tiny adapters in the index (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tiny", type=Path, default=OUTPUT / "tiny", metavar="FOLDER",
        help="where these are, or are written (%(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Index first, while the process is small; then the steps."""
    sgmv.set_num_threads(args.threads)
    index = index_of(args.tiny, args.adapters, console)
    folder = Path(tempfile.mkdtemp(prefix="sgmv-store-", dir=args.tiny.parent))
    try:
        adapter_bytes, resident, cases = measure(folder, console)
    finally:
        shutil.rmtree(folder)
    return {
        "threads": args.threads, "adapter_bytes": adapter_bytes, "index": index,
        "resident": resident, "cases": cases,
    }  # fmt: skip


STUDY = Study(
    "store",
    __doc__,
    StoreRecord,
    run,
    tables,
    arguments,
    whole=lambda args: args.adapters == ADAPTERS,
    pages={("docs/serving.md", "store"): page},
)
