"""Random batches for as long as you like: `python -m tests.stress.batches --minutes 10 --seed 0`.

Several Python threads call at once, each with a stack of its own, whose adapters it loads, replaces
and unloads between calls. Everything is drawn: widths, ranks, ids, types, strides, the backend, the
number of threads. Each result is held to the reference's bound, and some of its rows, alone and
shuffled, to the same bits. The first failure ends it, and tells the seed, thread and batch.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np

import sgmv
from reference.batch import Weights, Workload
from sgmv import launch, memory
from tests.help.acceptance import assert_same_bits, backends

TYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
LIKELY = (0.4, 0.25, 0.25, 0.1)
BATCHES_PER_STACK = 25
MOST_ELEMENTS = 400_000  # of x, y and the weights: a batch takes some ms, its reference too


class Layer:
    """A stack, and what it must hold."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.h_in, self.h_out = (self.width() for _ in range(2))
        self.dtype = rng.choice(TYPES, p=LIKELY)
        self.slots = int(rng.choice([1, 2, 8, 40]))
        most = MOST_ELEMENTS // 2 // (self.slots * (self.h_in + self.h_out))
        self.max_rank = max(1, min(int(rng.choice([4, 16, 65, 130])), most))
        self.stack = sgmv.AdapterStack(self.h_in, self.h_out, self.slots, self.max_rank, self.dtype)
        self.adapters: dict[int, Weights | None] = {}
        self.scalings: dict[int, float] = {}
        for _ in range(self.slots):
            self.load()

    def width(self) -> int:
        """Often near the widths at which tiles, panels and blocks of k end."""
        rng = self.rng
        if rng.random() < 0.5:
            return int(rng.integers(1, 300))
        return max(1, int(rng.choice([16, 64, 128, 1024, 2048, 4096]) + rng.integers(-2, 3)))

    def load(self) -> None:
        """Load an adapter, or none, under an id that is new, or held: then it replaces that."""
        held = [i for i, pair in self.adapters.items() if pair is not None]
        full = len(held) == self.slots
        adapter_id = int(self.rng.choice(held)) if full else int(self.rng.integers(0, 100))
        if self.rng.random() < 0.1:
            self.stack.load(adapter_id, None)
            self.adapters[adapter_id], self.scalings[adapter_id] = None, 1.0
            return
        r = int(self.rng.integers(0, self.max_rank + 1))
        A = self.rng.standard_normal((r, self.h_in)) / self.h_in**0.5
        B = self.rng.standard_normal((self.h_out, r)) / max(r, 1) ** 0.5
        pair = A.astype(self.dtype), B.astype(self.dtype)
        scaling = float(self.rng.uniform(-2, 2))
        self.stack.load(adapter_id, sgmv.Adapter(*pair, scaling))
        self.adapters[adapter_id], self.scalings[adapter_id] = pair, scaling

    def unload(self) -> None:
        if self.adapters:
            adapter_id = int(self.rng.choice(list(self.adapters)))
            self.stack.unload(adapter_id)
            del self.adapters[adapter_id], self.scalings[adapter_id]

    def batch(self, name: str) -> Workload:
        rng = self.rng
        most = max(1, MOST_ELEMENTS // 2 // (self.h_in + self.h_out))
        n = int(rng.integers(0, min(most, rng.choice([2, 8, 40, 400])) + 1))
        known = rng.permutation([-1, *self.adapters])[: rng.integers(1, 12)]
        ids = rng.choice(known, n)
        x, y = (
            self.placed(rng.standard_normal((n, h)).astype(rng.choice(TYPES, p=LIKELY)))
            for h in (self.h_in, self.h_out)
        )
        if n and rng.random() < 0.1:
            x[rng.integers(n), rng.integers(self.h_in)] = rng.choice([np.nan, np.inf, -np.inf])
        return Workload(name, "stress", x, y, dict(self.adapters), dict(self.scalings), ids)

    def placed(self, array: np.ndarray) -> np.ndarray:
        """The array, or a view of its values in a wider one."""
        way = self.rng.integers(4)
        n, h = array.shape
        if way == 0:
            wide = np.full((2 * n + 1, h + 9), np.nan, np.float32).astype(array.dtype)
            view = wide[1::2, 4 : 4 + h]
        elif way == 1:
            view = np.empty((h, n), array.dtype).T
        else:
            return array
        view[:] = array
        return view


def check(layer: Layer, case: Workload, backend: str) -> None:
    """The bound, and the same bits for some rows alone, and for all of them shuffled."""
    rng, stack, ids = layer.rng, layer.stack, case.adapter_ids
    batch = sgmv.segment(ids) if rng.random() < 0.5 else ids
    together = case.y.copy(order="K")
    sgmv.add_lora(together, case.x, stack, batch, backend=backend)
    case.check(together)
    if not len(ids):
        return
    if rng.random() < 0.3:
        order = rng.permutation(len(ids))
        shuffled = sgmv.add_lora(case.y[order], case.x[order], stack, ids[order], backend=backend)
        assert_same_bits(shuffled, np.ascontiguousarray(together[order]), "shuffled")
    for i in rng.integers(len(ids), size=3):
        one = slice(i, i + 1)
        alone = sgmv.add_lora(case.y[one].copy(), case.x[one], stack, ids[one], backend=backend)
        assert_same_bits(alone, np.ascontiguousarray(together[one]), "alone")


def call_until(
    deadline: float, seed: int, thread: int, checked: Counter[str], failures: list[str]
) -> None:
    """One Python thread: batch after batch, until the time is over or any thread has failed."""
    rng = np.random.default_rng([seed, thread])
    number, case, backend = 0, None, ""
    try:
        while time.monotonic() < deadline and not failures:
            if number % BATCHES_PER_STACK == 0:
                layer = Layer(rng)
            for change in rng.choice([layer.load, layer.unload], int(rng.integers(0, 3))):
                change()
            case = layer.batch(f"thread {thread}, batch {number}")
            types = case.x.dtype, layer.dtype, case.y.dtype
            backend = str(rng.choice(backends(*types)))
            sgmv.set_num_threads(int(rng.integers(1, 5)))
            check(layer, case, backend)
            checked[backend] += 1
            number += 1
    except BaseException as error:
        shapes = case and (case.x.shape, case.y.shape, case.x.dtype.name, case.y.dtype.name)
        failures.append(
            f"FAILED: seed {seed}, thread {thread}, batch {number}, {backend}, {shapes}, weights "
            f"{np.dtype(layer.dtype).name}: {error!r}\n"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=3, help="Python threads that call at once")
    given = parser.parse_args()
    launch.WORTH_SHARING_NS = 0  # these batches are small
    memory.SLAB = 1 << 18  # so that weights are moved all the while
    started = time.monotonic()
    deadline = started + 60 * given.minutes
    counts = [Counter[str]() for _ in range(given.threads)]
    failures: list[str] = []
    threads = [
        threading.Thread(target=call_until, args=(deadline, given.seed, i, count, failures))
        for i, count in enumerate(counts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total: Counter[Any] = sum(counts, Counter())
    sys.stdout.write(
        f"{sum(total.values())} batches checked in {time.monotonic() - started:.0f} s "
        f"({', '.join(f'{name} {n}' for name, n in sorted(total.items()))}), seed {given.seed}\n"
    )
    sys.stdout.writelines(failures)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
