"""Random load on a server for as long as you like: `python -m tests.stress.serving --minutes 10`.

Several servers, each with a scheduler of its own, share one AdapterSlots whose adapters are real
PEFT directories, more than there is room for; another thread loads, unloads, pins, prefetches and
replaces them meanwhile, and half of the steps do not wait for what is not there. Some directories
are damaged: their requests are dropped, and no others. Every layer of every step, also of steps
made long ago, must give what its own requests' adapters give by the reference, or be refused as
stale with y untouched. The first failure ends it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import reference
import sgmv
from reference.bounds import add_lora_bound
from reference.compare import check
from sgmv.errors import PeftError, ServingError, StaleStepError
from sgmv.serving import AdapterSlots, LoRAMixture, LoRARequest, Scheduler, Step, next_step
from sgmv.serving.requests import Asked, members_of

MODULES = {
    "layers.0.q_proj": (96, 96),
    "layers.0.up_proj": (96, 257),
    "layers.1.down_proj": (257, 96),
}
TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
ADAPTERS, VERSIONS, MAX_RANK = 40, 3, 33
MOST = 3  # adapters that a request names


def write_adapters(folder: Path, rng: np.random.Generator) -> dict[LoRARequest, Any]:
    """PEFT directories: three versions of each adapter, and what they hold."""
    written = {}
    for adapter_id in range(1, ADAPTERS + 1):
        for version in range(VERSIONS):
            r, alpha = int(rng.integers(1, MAX_RANK + 1)), float(rng.uniform(-8, 8))
            dtype = rng.choice(TYPES)
            tensors = {}
            for module in rng.permutation(list(MODULES))[: rng.integers(1, len(MODULES) + 1)]:
                h_in, h_out = MODULES[module]
                A, B = rng.standard_normal((r, h_in)), rng.standard_normal((h_out, r))
                name = f"base_model.model.{module}.lora"
                tensors[f"{name}_A.weight"] = (A / h_in**0.5).astype(dtype)
                tensors[f"{name}_B.weight"] = (B / r**0.5).astype(dtype)
            path = folder / f"{adapter_id}-{version}"
            path.mkdir()
            config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha}
            (path / "adapter_config.json").write_text(json.dumps(config))
            save_file(tensors, path / "adapter_model.safetensors")
            lora = LoRARequest(f"{adapter_id}, version {version}", adapter_id, str(path))
            written[lora] = sgmv.load_peft(path)
    return written


def damage(loras: list[LoRARequest]) -> list[str]:
    """Cut short, or remove, the weights of every seventh; their paths."""
    paths = [Path(lora.lora_path) for lora in loras[::7]]
    for number, path in enumerate(paths):
        weights = path / "adapter_model.safetensors"
        if number % 2:
            weights.unlink()
        else:
            weights.write_bytes(weights.read_bytes()[:-8])
    return [str(path) for path in paths]


@dataclass
class Load:
    """What all threads share."""

    slots: AdapterSlots
    adapters: dict[LoRARequest, Any]
    damaged: frozenset[str]  # paths
    deadline: float
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    version: Counter[int] = field(default_factory=Counter)

    def on(self) -> bool:
        return time.monotonic() < self.deadline and not self.failures

    def lora(self, rng: np.random.Generator) -> LoRARequest:
        """A popular one, most often, in the version that is now in use."""
        adapter_id = min(int(rng.zipf(1.3)), ADAPTERS)
        names = {(one.lora_int_id, one.lora_path[-1]): one for one in self.adapters}
        return names[adapter_id, str(self.version[adapter_id] % VERSIONS)]

    def asked(self, rng: np.random.Generator, most: int) -> Asked:
        """The base model, one adapter, or several of other weights."""
        count = int(rng.choice([0, 1, 2, 3], p=[0.15, 0.65, 0.15, 0.05]))
        loras = [self.lora(rng) for _ in range(min(count, most))]
        if len(loras) < 2:
            return loras[0] if loras else None
        return LoRAMixture([(lora, float(rng.uniform(-2, 2))) for lora in loras])


def run_step(
    load: Load, step: Step[int], loras: dict[int, Asked], rng: np.random.Generator
) -> None:
    """Run one step's layers and hold each to the reference; stale ones raise."""
    members = {number: members_of(loras[number]) for number in step.rows}
    ids = np.full((step.n, MOST), -1)
    weights = np.ones((step.n, MOST), np.float32)
    own = {}
    for number, rows in step.rows.items():
        for j, (lora, weight) in enumerate(members[number]):
            ids[rows, j], weights[rows, j] = lora.lora_int_id, weight
            own[lora.lora_int_id] = load.adapters[lora]
    for module, (h_in, h_out) in MODULES.items():
        x, y = (rng.standard_normal((step.n, h)).astype(rng.choice(TYPES)) for h in (h_in, h_out))
        got = y.copy()
        try:
            step.add_lora(module, got, x)
        except StaleStepError:
            np.testing.assert_array_equal(got.view(f"u{y.itemsize}"), y.view(f"u{y.itemsize}"))
            raise
        stack = load.slots.stack(module)
        pairs = {i: stack.fitted(its[module]) if module in its else None for i, its in own.items()}
        exact = reference.add_lora(y, x, pairs, ids, weights=weights)
        bound = add_lora_bound(y, x, pairs, ids, weights=weights, expected=exact)
        check(got, exact, bound, f"{module}, adapters {ids.tolist()}")
        load.counts["layers right"] += 1


def serve(load: Load, seed: int) -> None:
    """One server: requests come, run for some steps, and go; now and then an old step again."""
    rng = np.random.default_rng(seed)
    limits = [int(rng.integers(low, high)) for low, high in ((2, 5), (2, 12), (0, 20))]
    scheduler: Scheduler[int] = Scheduler(*limits)
    left: dict[int, int] = {}
    old: list[tuple[Step[int], dict[int, Asked]]] = []
    number = 0
    while load.on():
        for _ in range(rng.poisson(1.2)):
            try:
                scheduler.add(number, load.asked(rng, min(scheduler.max_loras, MOST)))
            except ServingError:  # another version is in use
                load.counts["refused to mix versions"] += 1
                continue
            left[number] = int(rng.integers(1, 8))
            number += 1
        if rng.random() < 0.05 and scheduler.waiting:
            given_up = int(rng.choice(list(scheduler.waiting)))
            scheduler.finish(given_up)
            del left[given_up]
        try:
            tokens = {i: int(rng.integers(0, 5)) for i in left}
            step = next_step(scheduler, load.slots, tokens, wait=rng.random() < 0.5)
        except ServingError:  # pinned meanwhile: no room for all
            load.counts["refused for pins"] += 1
            for request_id in list(scheduler.running)[:1]:
                scheduler.finish(request_id)
                del left[request_id]
            continue
        for request_id, lora, error in step.failed:
            known = lora.lora_path in load.damaged or "unpin it first" in str(error)
            assert known, f"{lora} failed: {error}"
            load.counts["requests dropped"] += 1
            del left[request_id]
        load.counts["requests that sat out"] += len(step.loading)
        loras = {i: scheduler.running[i] for i in step.rows}
        old = [*old[-20:], (step, loras)]
        try:
            run_step(load, step, loras, rng)
            load.counts["steps"] += 1
            if rng.random() < 0.3:
                load.counts["old steps tried"] += 1
                run_step(load, *old[rng.integers(len(old))], rng)
                load.counts["old steps right"] += 1
        except StaleStepError:
            load.counts["stale steps refused"] += 1
        for i in step.rows:
            left[i] -= 1
            if left[i] <= 0:
                scheduler.finish(i)
                del left[i]


def change(load: Load, seed: int) -> None:
    """The operator: loads, unloads, pins, unpins, deactivates, and puts new versions in place."""
    rng = np.random.default_rng(seed)
    while load.on():
        adapter_id = int(rng.integers(1, ADAPTERS + 1))
        slots = load.slots
        try:
            match rng.integers(0, 8):
                case 0:
                    slots.load(load.lora(rng))
                case 1:
                    slots.unload(adapter_id)
                case 2:
                    slots.deactivate(adapter_id)
                case 3 if len(slots.pinned) < slots.max_loras // 3:
                    slots.pin(adapter_id)
                case 4 | 5 if slots.pinned:
                    slots.unpin(int(rng.choice(sorted(slots.pinned))))
                case 7:
                    slots.prefetch([load.lora(rng)])
                case _:
                    load.version[adapter_id] += 1
                    continue
            load.counts["operations"] += 1
        except (PeftError, ServingError):
            load.counts["operations refused"] += 1
        time.sleep(0.002)


def guarded(work: Any, load: Load, seed: int) -> None:
    try:
        work(load, seed)
    except BaseException as error:
        load.failures.append(f"FAILED: {work.__name__}, seed {seed}: {error!r}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--servers", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(Path(folder), np.random.default_rng(given.seed))
        damaged = frozenset(damage(list(adapters)))
        slots = AdapterSlots(12, 20, MAX_RANK, modules=MODULES, dtype="float32")
        load = Load(slots, adapters, damaged, time.monotonic() + 60 * given.minutes)
        workers = [serve] * given.servers + [change]
        threads = [
            threading.Thread(target=guarded, args=(work, load, given.seed * 1000 + k))
            for k, work in enumerate(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counts = ", ".join(f"{name} {count}" for name, count in sorted(load.counts.items()))
    sys.stdout.write(f"{counts}; {slots.counters}; seed {given.seed}\n")
    sys.stdout.writelines(load.failures)
    return 1 if load.failures else 0


if __name__ == "__main__":
    sys.exit(main())
