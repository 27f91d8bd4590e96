"""One run: pools, gate, timings, in that order for each group of cases that shares weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks import clock
from benchmarks.batch import (
    Batch,
    Pool,
    dtype_of,
    make_batch,
    make_pool,
    pool_bytes,
    pool_from_adapters,
    popularity_ids,
)  # fmt: skip
from benchmarks.ceilings import Ceilings, reading
from benchmarks.clock import NEVER, Budget, Deadline, Variant, quietly, time_quietly
from benchmarks.gate import GateError, check_case
from benchmarks.peers import PEERS, TURNS, left_out, rests
from benchmarks.record import Times, is_quiet, significant
from benchmarks.studies.grid.cases import Case
from benchmarks.studies.grid.records import CallTimes, CaseRecord, ratios

# From ids, sgmv also sorts: timed apart up to here, where sorting could be seen.
IDS_ROWS = 64
MIXED = "mixed"
READ_S = 0.004  # of one measurement of reading a case's bytes
PREPARING_S = 0.35  # a case's arrays, its gate, and how its bytes are read fastest, roughly


@dataclass(frozen=True)
class Group:
    """Cases over one pool; the pool is made when its turn comes, and freed after it."""

    make: Callable[[], Pool]
    cases: list[tuple[Case, NDArray[np.int64]]]


@dataclass(frozen=True)
class Terms:
    """On what terms cases are timed."""

    threads: Sequence[int]
    budget: Budget
    seed: int
    ceilings: Ceilings


def synthetic_groups(
    cases: Sequence[Case], seed: int, memory: int
) -> tuple[list[Group], dict[str, str]]:
    """Groups of cases with random weights, and the cases left out for want of memory, with why.

    Units: `memory` in bytes, for both copies of a pool's weights.
    """
    groups: dict[tuple[int, int, int, str], list[tuple[Case, NDArray[np.int64]]]] = {}
    untimed = {}
    for case in cases:
        ids = popularity_ids(case.popularity, case.rows, seed)
        slots = int(ids.max()) + 1
        need = pool_bytes(slots, case.rank, case.h_in, case.h_out, dtype_of(case.dtype))
        if need > memory:
            untimed[case.label()] = (
                f"{slots} adapters need {need / 2**30:.1f} GiB, cap {memory / 2**30:.1f} GiB "
                "(--memory-gib)"
            )
        else:
            key = (case.h_in, case.h_out, case.rank, case.dtype)
            groups.setdefault(key, []).append((case, ids))
    return [
        Group(partial(_synthetic_pool, *key, _slots(members), seed), members)
        for key, members in groups.items()
    ], untimed


def adapter_groups(
    directories: Sequence[Path], rows: Sequence[int], dtype: str, seed: int
) -> list[Group]:
    """Groups of real PEFT adapters: one per distinct layer shape, the batch mixed over them.

    Semantics: rows take the directories in turn, those that hold the module first, then shuffled;
    a directory without the module is base only on it. Modules whose shapes are equal in all
    directories are timed once.
    """
    loaded = [sgmv.load_peft(directory) for directory in directories]
    modules = dict.fromkeys(module for found in loaded for module in found)
    shared: dict[tuple[object, ...], list[str]] = {}
    for module in modules:
        found = [adapters.get(module) for adapters in loaded]
        key = tuple(a if a is None else (a.A.shape, a.B.shape, a.A.dtype) for a in found)
        shared.setdefault(key, []).append(module)
    groups = []
    rng = np.random.default_rng(seed)
    for names in shared.values():
        adapters = [each.get(names[0]) for each in loaded]
        given = [adapter for adapter in adapters if adapter is not None]
        _check_mixable(names[0], given)
        h_in, h_out, rank = given[0].h_in, given[0].h_out, max(adapter.r for adapter in given)
        turns = np.argsort([adapter is None for adapter in adapters], kind="stable")
        cases = []
        for n in rows:
            case = Case(h_in, h_out, rank, n, MIXED, dtype, tuple(names))
            cases.append((case, rng.permutation(turns[np.arange(n) % len(turns)])))
        make = partial(pool_from_adapters, adapters, dtype_of(dtype))
        groups.append(Group(make, cases))
    return groups


def _check_mixable(module: str, adapters: Sequence[sgmv.Adapter]) -> None:
    """Refuse adapters that no one layer could hold, and those that the baselines would round."""
    widths = sorted({(adapter.h_in, adapter.h_out) for adapter in adapters})
    if len(widths) > 1:
        raise SystemExit(f"--adapters: {module}: expected one (h_in, h_out), got {widths}")
    if any(adapter.dtype == np.float64 for adapter in adapters):
        raise SystemExit(f"--adapters: {module}: expected float32 or 16 bits, got float64")


def time_cases(
    groups: Sequence[Group],
    records: dict[Case, CaseRecord],
    terms: Terms,
    until: Deadline,
    step: Callable[[str], None],
) -> None:
    """Gate and time each case once, while there is time; what it gives goes into `records`.

    Semantics: every case gets an equal share of the time left, and one round at least; the first
    case is timed in any case. A case timed before keeps the quieter of its two timings.
    Raises GateError, which names the case.
    """
    waiting = sum(len(group.cases) for group in groups)
    begun = 0
    for group in groups:
        pool: Pool | None = None
        for case, ids in group.cases:
            if begun and until.left() <= 0:
                return
            step(case.label())
            pool = pool or group.make()
            try:
                found = measure(case, pool, ids, terms, until.share(of=waiting - begun))
            except GateError as error:
                raise GateError(f"{case.label()}: {error}") from error
            begun += 1
            before = records.get(case)
            if before is None or _noise(found) < _noise(before):
                records[case] = found


def smallest_first(groups: Sequence[Group]) -> list[Group]:
    """Groups with large batches last: on a busy machine these take most of the time."""
    return sorted(groups, key=lambda group: max(case.rows for case, _ids in group.cases))


def unsettled(groups: Sequence[Group], records: dict[Case, CaseRecord]) -> list[Group]:
    """Groups of the cases that are not timed yet; then of those timed beside other processes."""
    untimed = those(groups, lambda case: case not in records)
    noisy = those(groups, lambda case: case in records and not is_quiet(_noise(records[case])))
    return untimed + noisy


def those(groups: Sequence[Group], wanted: Callable[[Case], bool]) -> list[Group]:
    """The groups with their wanted cases, but for those without any."""
    found = [
        Group(group.make, [(case, ids) for case, ids in group.cases if wanted(case)])
        for group in groups
    ]
    return [group for group in found if group.cases]


def _noise(record: CaseRecord) -> float:
    return record.foreign_cores or 0.0


def about_s(cases: int, threads: int, budget: Budget) -> float:
    """Seconds that so many cases take on a quiet machine with the baselines installed, roughly."""
    absent = left_out()
    pools = [PEERS[name].library for name in TURNS if PEERS[name].library not in absent]
    pools = ["sgmv"] * (2 * threads + 1) + pools  # reads and calls; once more from ids
    turn_s = budget.turn_s + Variant("", lambda: None).settle_s
    return cases * (budget.rounds * (len(pools) * turn_s + sum(rests(pools))) + PREPARING_S)


def measure(
    case: Case, pool: Pool, ids: NDArray[np.int64], terms: Terms, until: Deadline = NEVER
) -> CaseRecord:
    """Gate and time one case, once. Raises GateError; then nothing of this case was timed."""
    batch = make_batch(pool, ids, terms.seed)
    skipped = {name: why for name, peer in PEERS.items() if (why := peer.refuses(batch))}
    variants = _variants(batch, terms.threads)
    for name in TURNS:
        if name not in skipped:
            PEERS[name].prepare(batch)
            variants[name] = (PEERS[name].run, lambda: None)

    roundings = {name: peer.roundings for name, peer in PEERS.items()}
    checked = check_case(batch, _gated(variants), terms.seed, roundings)
    y = batch.y.copy()
    turns = [
        *(
            Variant(f"read@{count}", _reader(batch, count), returns_seconds=True)
            for count in terms.threads
        ),
        *(
            Variant(name, partial(update, y, batch.x, batch), before)
            for name, (update, before) in variants.items()
        ),
    ]
    pools = [PEERS[turn.name].library if turn.name in PEERS else "sgmv" for turn in turns]
    turns = [
        replace(turn, settle_s=max(turn.settle_s, rest))
        for turn, rest in zip(turns, rests(pools), strict=True)
    ]
    # y grows with every call and leaves float16's range in the end: no news, and no matter to time.
    with np.errstate(over="ignore", invalid="ignore"):
        times, foreign = quietly(partial(clock.alternate, turns, terms.budget, until), attempts=1)
    return _case_record(case, batch, checked, times, skipped, foreign, terms)


def _reader(batch: Batch, threads: int) -> Callable[[], float]:
    """What reads as many bytes as one call does, and returns the seconds of it."""
    found = reading(batch.operands(), threads, READ_S)
    again = batch.footprint() / found.nbytes  # y is written, too
    return lambda: again * found.once()


def add_lora_with_segments(y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """Call sgmv as a server does: segments made once per step serve every layer."""
    sgmv.add_lora(y, x, batch.pool.stack, batch.segments)


def add_lora_from_ids(y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """Call sgmv with adapter ids: it sorts in each call."""
    sgmv.add_lora(y, x, batch.pool.stack, batch.adapter_ids)


Updates = dict[str, tuple[Callable[[Any, Any, Batch], None], Callable[[], object]]]


def _variants(batch: Batch, threads: Sequence[int]) -> Updates:
    """List sgmv's variants, each with what sets its number of threads."""
    found: Updates = {}
    for count in sorted(threads, reverse=True):
        found[f"sgmv@{count}"] = (add_lora_with_segments, partial(sgmv.set_num_threads, count))
    if len(batch.adapter_ids) <= IDS_ROWS:
        most = max(threads)
        found[f"sgmv@{most} ids"] = (add_lora_from_ids, partial(sgmv.set_num_threads, most))
    return found


def _gated(variants: Updates) -> dict[str, Callable[[Any, Any, Batch], None]]:
    """Variants as the gate calls them one by one: sgmv's set their own number of threads."""

    def run(name: str, y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
        update, before = variants[name]
        before()
        update(y, x, batch)

    return {
        name: update if name in PEERS else partial(run, name)
        for name, (update, _before) in variants.items()
    }


def _case_record(
    case: Case,
    batch: Batch,
    checked: int,
    times: dict[str, Times],
    skipped: dict[str, str],
    foreign: float | None,
    terms: Terms,
) -> CaseRecord:
    variants = [f"sgmv@{count}" for count in terms.threads]
    reads = {f"sgmv@{count}": times.pop(f"read@{count}") for count in terms.threads}
    shares = {}
    for count, name in zip(terms.threads, variants, strict=True):
        limit_us = max(reads[name].q50, batch.flops() / terms.ceilings.peak[count] * 1e6)
        shares[name] = significant(limit_us / times[name].q50)
    return CaseRecord(
        case.h_in, case.h_out, list(case.names), case.rank, case.rows, case.popularity, case.dtype,
        len(batch.slots), batch.footprint(), batch.flops(), checked, times,
        ratios(times, variants), shares, skipped, foreign, reads,
    )  # fmt: skip


def _slots(members: list[tuple[Case, NDArray[np.int64]]]) -> int:
    return 1 + max(int(ids.max()) for _, ids in members)


def _synthetic_pool(h_in: int, h_out: int, rank: int, dtype: str, slots: int, seed: int) -> Pool:
    return make_pool(h_in, h_out, rank, slots, dtype_of(dtype), seed)


def call_us() -> CallTimes:
    """Median microseconds of a whole call whose kernels have next to nothing to do."""
    pool = make_pool(1, 1, 1, 1, np.dtype(np.float32), seed=0)
    batch = make_batch(pool, np.array([0]), seed=0)
    calls = {"segments": add_lora_with_segments, "ids": add_lora_from_ids}
    turns = [Variant(name, partial(call, batch.y, batch.x, batch)) for name, call in calls.items()]
    times, _foreign = time_quietly(turns, Budget())
    return CallTimes(times["segments"].q50, times["ids"].q50)


def first_use_s() -> float:
    """Seconds of the process's first stack, segments and add_lora, on tiny arrays.

    It is what compiling costs, or loading compiled code.
    """
    start = time.perf_counter()
    pool = make_pool(64, 64, 8, 2, np.dtype(np.float32), seed=0)
    batch = make_batch(pool, np.array([0, 1, 0, 1]), seed=0)
    add_lora_with_segments(batch.y, batch.x, batch)
    return time.perf_counter() - start
