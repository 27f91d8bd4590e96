"""Memory over a long life: `python -m tests.stress.memory`; a table for each life.

    loads   adapters of ranks 4 to 128 come to 32 layers and go, by id, by rank, the oldest first
    others  a public call, step after step with new arrays: what it keeps of them would add up

Bounds are those of the promises: resident memory at most 1.5 times what is loaded and one slab,
and less for each step than an object in some list. The first that is broken ends it.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import sgmv
from sgmv import layouts, memory
from sgmv.compat import punica, vllm
from sgmv.serving import AdapterSlots, LoRARequest, Scheduler, next_step

STATUS = Path("/proc/self/statm")
MIB = 1 << 20
ENTRY = 24  # bytes: a step that leaves something costs a pointer to it and the smallest object
LAYERS, RANKS = 32, (4, 8, 16, 32, 64, 128)
WIDTH = 1024
MOST_LOADED = 400 * MIB

Step = Callable[[int], object]
Loaded = dict[tuple[int, int], int]  # layer and id, the oldest first, and the rank
CHOICES: dict[str, Callable[[Loaded, np.random.Generator], tuple[int, int]]] = {
    "oldest": lambda loaded, rng: next(iter(loaded)),
    "newest": lambda loaded, rng: next(reversed(loaded)),
    "largest": lambda loaded, rng: max(loaded, key=loaded.__getitem__),
    "any": lambda loaded, rng: list(loaded)[rng.integers(len(loaded))],
}  # which adapter goes next


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(STATUS.read_text().split()[1]) * mmap.PAGESIZE


class Fresh:
    """Arrays at addresses that none before had, until 64 MiB are through."""

    def __init__(self) -> None:
        self._memory = np.ones(16 * MIB, np.float32)
        self._next = 0

    def __call__(self, *shape: int) -> Any:
        size = int(np.prod(shape))
        start = self._next if self._next + size <= len(self._memory) else 0
        self._next = start + -(-size // 16) * 16
        return self._memory[start : start + size].reshape(shape)


def steps() -> dict[str, Callable[[], Step]]:
    """Public calls by name, each a function that makes a step of it."""
    new, rng = Fresh(), np.random.default_rng(0)
    n, h_in, h_out, r = 3, 40, 24, 2

    def ids() -> Any:
        return rng.integers(-1, 2, n)

    def stack() -> sgmv.AdapterStack:
        pair = np.ones((r, h_in), "f"), np.ones((h_out, r), "f")
        return sgmv.AdapterStack.from_adapters([pair, pair])

    def add_lora() -> Step:
        known = stack()
        return lambda i: sgmv.add_lora(new(n, h_out), new(n, h_in), known, ids())

    def two_phases() -> Step:
        known = stack()

        def step(i: int) -> None:
            segments = sgmv.segment(ids())
            v = sgmv.shrink(new(n, h_in), known, segments)
            sgmv.expand(v, known, segments, new(n, h_out))

        return step

    def apply_batched() -> Step:
        def step(i: int) -> None:
            adapters = [(new(r, h_in), new(h_out, r)) for _ in range(2)]
            sgmv.apply_batched(new(n, h_in), new(h_out, h_in), adapters, ids())

        return step

    def load() -> Step:
        known = stack()

        def step(i: int) -> None:
            known.unload(known.ids[0])
            known.load(i + 2, (new(r, h_in), new(h_out, r)))

        return step

    def stacks() -> Step:
        return lambda i: stack()

    def wrapper() -> vllm.PunicaWrapper:
        made = vllm.PunicaWrapper(8, 8)
        made.update_metadata(vllm.LoRAMapping((1, 0, 2), (1, 0, 2)), [1, 2], max_loras=2)
        return made

    def add_lora_linear() -> Step:
        made, stays = wrapper(), new(2, 1, r, h_in)

        def step(i: int) -> None:
            A = stays, new(2, 1, r, h_in), new(2, 1, r, h_in)
            B = tuple(new(2, 1, width, r) for width in (8, 8, 8))
            made.add_lora_linear(new(n, h_out), new(n, h_in), A, B, 1.0, (8, 8, 8))

        return step

    def update_metadata() -> Step:
        made = vllm.PunicaWrapper(8, 8)

        def step(i: int) -> None:
            mapping = vllm.LoRAMapping((i + 1, 0, i + 2), (i + 1, 0, i + 2))
            made.update_metadata(mapping, [i + 1, i + 2], max_loras=2)
            made.add_lora_embedding(new(n, h_out), new(n, r), new(2, 1, h_out, r))

        return step

    def bgmv() -> Step:
        def step(i: int) -> None:
            A, B = new(2, r, h_in), new(2, h_out, r)
            vllm.bgmv_shrink(new(n, h_in), A, v := new(n, r), at := ids())
            width = 1 + i % h_out
            vllm.bgmv_expand(v, B, new(n, width), at)

        return step

    def add_lora_bgmv() -> Step:
        def step(i: int) -> None:
            weights = new(2, 1, r, h_in), new(2, 1, h_out, r)
            punica.add_lora_bgmv(new(n, h_out), new(n, h_in), *weights, ids(), 0, 1.0)

        return step

    def add_lora_sgmv() -> Step:
        def step(i: int) -> None:
            batch = punica.BatchedLoraWeight([punica.LoraWeight(1, h_in, h_out, r, "float32")])
            pointers, s = (batch.wa_ptr, batch.wb_ptr), np.array([0, n])
            y, x = new(n, h_out), new(n, h_in)
            punica.add_lora_sgmv_custom_cutlass(y, x, *pointers, s, 0, r)

        return step

    def every_layout() -> Step:
        known = stack()

        def step(i: int) -> None:
            batch = ids()
            layouts.vllm_v0(batch)
            layouts.vllm_v1(batch, 2)
            layouts.sglang(batch, known)
            layouts.punica(batch, known)

        return step

    def serving() -> Step:
        def read(path: str) -> Any:
            return {"up": sgmv.Adapter(new(r, h_in), new(h_out, r))}

        slots = AdapterSlots(2, 4, 8, modules={"up": (h_in, h_out)}, read=read)
        scheduler: Scheduler[int] = Scheduler(max_loras=2)

        def step(i: int) -> None:
            scheduler.add(i, LoRARequest(str(i), i + 1, str(i)))
            scheduler.add(~i, LoRARequest(str(i + 1), i + 2, str(i + 1)))
            scheduler.finish(~i)  # given up before it ran
            made = next_step(scheduler, slots, {i: n})
            made.add_lora("up", new(n, h_out), new(n, h_in))
            scheduler.finish(i)

        return step

    return {name: make for name, make in locals().items() if name in NAMES}


NAMES = (
    "add_lora", "two_phases", "apply_batched", "load", "stacks", "add_lora_linear",
    "update_metadata", "bgmv", "add_lora_bgmv", "add_lora_sgmv", "every_layout", "serving",
)  # fmt: skip


def grow(step: Step, count: int, measure: Callable[[], int]) -> Iterator[tuple[int, int]]:
    """Steps done, and memory, after each tenth of them."""
    for number in range(count + 1):
        step(number)
        if number and number % (count // 10) == 0:
            gc.collect()
            yield number, measure()


def run_steps(name: str, count: int) -> str:
    """One call's table; what is wrong, if anything."""
    sys.stdout.write(f"\n{name}\n{'steps':>10} {'resident, MiB':>14} {'bytes a step':>13}\n")
    seen: list[tuple[int, int]] = []
    for number, now in grow(steps()[name](), count, resident):
        last, before = seen[-1] if seen else (0, now)
        sys.stdout.write(
            f"{number:10,} {now / MIB:14.1f} {(now - before) / (number - last):13.2f}\n"
        )
        sys.stdout.flush()
        seen.append((number, now))
    (half, before), (last, after) = seen[4], seen[-1]  # caches are full at the half
    slope = (after - before) / (last - half)
    return "" if slope < ENTRY else f"{name}: {slope:.1f} bytes a step"


def run_loads(count: int, seed: int) -> str:
    """The table of loads and unloads; what is wrong, if anything."""
    rng = np.random.default_rng(seed)
    adapters = {r: sgmv.Adapter(np.ones((r, WIDTH), "f"), np.ones((WIDTH, r), "f")) for r in RANKS}
    stacks = [sgmv.AdapterStack(WIDTH, WIDTH, count, max(RANKS)) for _ in range(LAYERS)]
    loaded: Loaded = {}
    size, before, worst, order = 0, resident(), 0.0, ""
    head = ("operations", "loaded", "slabs", "resident", "ratio", "worst ratio")
    sys.stdout.write("\nloads; MiB, and resident less one slab for each byte loaded\n")
    sys.stdout.write(" ".join(f"{name:>12}" for name in head) + "\n")
    for number in range(1, count + 1):
        if number % 500 == 1:
            order = str(rng.choice(list(CHOICES)))
        full = size > rng.uniform(0, 2) * MOST_LOADED
        if loaded and (full or rng.random() < 0.3):
            layer, i = CHOICES[order](loaded, rng)
            stacks[layer].unload(i)
            size -= 8 * WIDTH * loaded.pop((layer, i))
        else:
            layer, r = int(rng.integers(LAYERS)), int(rng.choice(RANKS))
            stacks[layer].load(number, adapters[r])
            loaded[layer, number] = r
            size += 8 * WIDTH * r
        held, now = memory.totals(), resident() - before
        if held.pieces != size or held.slabs > 1.5 * size + memory.SLAB:
            return f"loads: after {number} operations {size} loaded, {held}"
        ratio = (now - memory.SLAB) / max(size, 1)
        worst = max(worst, ratio)
        if number % max(1, count // 20) == 0:
            sizes = size / MIB, held.slabs / MIB, now / MIB
            sys.stdout.write(f"{number:12,}" + "".join(f" {each:12.1f}" for each in sizes))
            sys.stdout.write(f" {ratio:12.2f} {worst:12.2f}\n")
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loads", type=int, default=10_000, help="loads and unloads")
    parser.add_argument("--steps", type=int, default=1_000_000, help="of each call")
    parser.add_argument("--calls", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    begun = time.monotonic()
    lives = [lambda: run_loads(given.loads, given.seed)] if given.loads else []
    lives += [lambda name=name: run_steps(name, given.steps) for name in given.calls]
    for live in lives:
        if wrong := live():
            sys.stdout.write(f"FAILED: {wrong}\n")
            return 1
    sys.stdout.write(f"in bounds, in {time.monotonic() - begun:.0f} s, seed {given.seed}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
