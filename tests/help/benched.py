"""Batches, wrong kernels and records that the tests of several benchmarks use."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import msgspec
import numpy as np
import pytest

import sgmv
from benchmarks import machine
from benchmarks.batch import Batch, Pool, dtype_of, make_batch, pool_from_adapters, popularity_ids
from benchmarks.ceilings import Ceilings
from benchmarks.clock import Budget, Deadline
from benchmarks.peers import PEERS
from benchmarks.record import Times
from benchmarks.studies.grid.records import Record
from reference import workloads

ONE_CALL = Budget(rounds=1, turn_s=0.0)
FLAT = Ceilings({1: [(1 << 10, 1e9), (1 << 30, 1e9)]}, {1: 1e9})


def small_pool(dtype: str = "float32", *, h_in: int = 48, h_out: int = 33) -> Pool:
    """Mixed ranks and a slot without an adapter, as real batches have them."""
    rng = np.random.default_rng(7)
    adapters: list[sgmv.Adapter | None] = [
        sgmv.Adapter(
            rng.standard_normal((rank, h_in)).astype(dtype_of(dtype)),
            rng.standard_normal((h_out, rank)).astype(dtype_of(dtype)),
            scaling=scaling,
        )
        for rank, scaling in ((1, 2.0), (8, 0.5), (16, 1.0))
    ]
    return pool_from_adapters([*adapters, None], dtype_of(dtype))


def small_batch(popularity: str = "uniform", dtype: str = "float32", n: int = 16) -> Batch:
    return make_batch(small_pool(dtype), popularity_ids(popularity, n, seed=3) % 4, seed=5)


def unscaled(y: Any, x: Any, batch: Batch) -> None:
    pool = batch.pool
    for i, slot in enumerate(batch.adapter_ids):
        y[i] += (x[i] @ pool.A[slot].T) @ pool.wb[slot]


def last_row_dropped(y: Any, x: Any, batch: Batch) -> None:
    kept = y[-1].copy()
    PEERS["by_row"].run(y, x, batch)
    y[-1] = kept


def one_element_off(y: Any, x: Any, batch: Batch) -> None:
    PEERS["by_row"].run(y, x, batch)
    y[5, 7] += 1.0


def nan(y: Any, x: Any, batch: Batch) -> None:
    PEERS["by_row"].run(y, x, batch)
    y[5, 7] = np.nan


def twice(y: Any, x: Any, batch: Batch) -> None:
    PEERS["by_row"].run(y, x, batch)
    PEERS["by_row"].run(y, x, batch)


def few_corpus_cases(**options: Any) -> Any:
    # The library's own tests run the whole corpus; here it is the gate that is under test.
    return itertools.islice(workloads_corpus(**options), 3)


workloads_corpus = workloads.corpus


def must_not_run(*args: Any, **kwargs: Any) -> None:
    pytest.fail("something was timed behind a red gate")


class Clock:
    """A clock that stands still until something takes time."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def until(self, seconds: float) -> Deadline:
        return Deadline(self.seconds + seconds, self)


def synthetic_record() -> Record:
    """Two cases: a win of 2x and a loss of 0.5x against by_segment, and torch not there."""
    times = {
        "sgmv@2": {"q20": 9.0, "q50": 10.0, "q80": 11.0, "calls": 7},
        "sgmv@1": {"q20": 19.0, "q50": 20.0, "q80": 21.0, "calls": 7},
        "by_segment": {"q20": 19.0, "q50": 20.0, "q80": 21.0, "calls": 7},
    }
    win: Any = {
        "h_in": 4096, "h_out": 14336, "names": ["Llama-3-8B gate/up", "Mistral-7B gate/up"],
        "rank": 16, "rows": 64, "popularity": "uniform", "dtype": "float32", "S": 8,
        "footprint": 10**7, "flops": 10**7, "checked_rows": 64, "times": times,
        "ratios": {"sgmv@2": {"by_segment": 2.0}, "sgmv@1": {"by_segment": 1.0}},
        "shares": {"sgmv@2": 0.5, "sgmv@1": 0.4}, "foreign_cores": 0.02,
        "skipped": {"torch": "torch is not installed"},
    }  # fmt: skip
    loss: Any = copy.deepcopy(win) | {"popularity": "identical", "S": 1, "rows": 256}
    loss["times"]["by_segment"]["q50"] = 5.0
    loss["ratios"] = {"sgmv@2": {"by_segment": 0.5}, "sgmv@1": {"by_segment": 0.25}}
    bandwidth = [[1 << 15, 5e11], [1 << 20, 2e11], [1 << 29, 5e10]]
    found: Any = {
        "schema": 2, "mode": "quick", "date": "2025-01-01T00:00:00+00:00", "seed": 0,
        "commit": {"hash": "0" * 40, "dirty": False}, "machine": machine.machine(),
        "versions": machine.versions(), "blas": machine.blas(), "threads": [1, 2],
        "weights": "hot", "seconds": 1.0,
        "gate": {"corpus_cases": 3, "threads": [1, 2], "first_use_s": 0.1, "seconds": 1.0},
        "ceilings": {"bandwidth": {"1": bandwidth, "2": bandwidth}, "peak": {"1": 3e11, "2": 5e11}},
        "call_us": {"segments": 2.0, "ids": 6.0}, "untimed": {}, "cases": [win, loss],
    }  # fmt: skip
    return msgspec.convert(msgspec.to_builtins(found), Record)


def times(q50: float) -> Times:
    """Of one call."""
    return Times(q50, q50, q50, 1)


MARKED = (
    "# x\n<!-- bench:summary:begin -->\nold\n<!-- bench:summary:end -->\nbetween\n"
    "<!-- bench:cases:begin -->\n<!-- bench:cases:end -->\nafter\n"
)
