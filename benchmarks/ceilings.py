"""What this machine can do at most: read bandwidth by footprint, and float32 FMA peak.

Measured in each run and never cached. What other tenants of a host leave of its last cache and its
memory changes within minutes: so the very bytes of a case are read in turn with it (`reading`), and
its share of the limit is of those times. The probes are the only jitted code outside the library.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from sgmv.kernels.jit import vector
from sgmv.kernels.records import INTEGER

FOOTPRINTS = tuple(1 << shift for shift in range(15, 30, 2))  # 32 KiB .. 512 MiB
SLOWEST = 2e9  # bytes/s, less than any memory gives
ACCUMULATORS = 12  # two FMA pipes of latency 4 need 8; 12 still fit 16 registers


def vector_lanes() -> int:
    """float32 lanes of the widest vector register."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx") else 4


@intrinsic
def _fma_loop(typingctx: Any, count: Any) -> Any:
    """Run ACCUMULATORS independent chains of vector FMAs `count` times; return their sum.

    Written in IR because a loop in Python syntax leaves the choice of vector width, and whether
    the accumulators stay in registers, to the optimiser; then it would be its ceiling.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), vector_lanes())
        fma = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]  # numba's
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{vector.count}f32"
        )
        factor = ir.Constant(vector, [0.75] * vector.count)
        term = ir.Constant(vector, [0.25] * vector.count)
        before = builder.block
        loop = builder.append_basic_block("fma_loop")
        after = builder.append_basic_block("fma_end")
        builder.branch(loop)

        builder.position_at_end(loop)
        index = builder.phi(ir.IntType(64))
        index.add_incoming(ir.Constant(ir.IntType(64), 0), before)
        sums = [builder.phi(vector) for _ in range(ACCUMULATORS)]
        # Each chain starts elsewhere: equal chains would be merged into one.
        for start, chain in enumerate(sums):
            chain.add_incoming(ir.Constant(vector, [float(start)] * vector.count), before)
            chain.add_incoming(builder.call(fma, [chain, factor, term]), loop)
        following = builder.add(index, ir.Constant(ir.IntType(64), 1))
        index.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, args[0]), loop, after)

        builder.position_at_end(after)
        total = sums[0]
        for chain in sums[1:]:
            total = builder.fadd(total, chain)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.int64), codegen


@njit(nogil=True)
def _fma(count: int) -> float:
    return _fma_loop(count)  # type: ignore[call-arg]  # numba passes the context


@njit(nogil=True)
def _read(addresses: NDArray[np.int64], words: NDArray[np.int64], passes: int) -> int:
    """OR of all words there, `passes` times: one load per word, and no chain of arithmetic."""
    found = 0
    for _ in range(passes):
        # The result of a pass enters the next, so that no pass can be left out.
        found += 1
        for part in range(addresses.shape[0]):
            a = vector(addresses[part], words[part], INTEGER)
            for i in range(words[part]):
                found |= a[i]
    return found


@njit(nogil=True)
def _read_streams(addresses: NDArray[np.int64], words: NDArray[np.int64], passes: int) -> int:
    """The same of each part's eighths side by side, as a kernel reads eight ranks of wa."""
    found = 0
    for _ in range(passes):
        found += 1
        for part in range(addresses.shape[0]):
            size, at = words[part] // 8, addresses[part]
            a, b = vector(at, size, INTEGER), vector(at + 8 * size, size, INTEGER)
            c, d = vector(at + 16 * size, size, INTEGER), vector(at + 24 * size, size, INTEGER)
            e, f = vector(at + 32 * size, size, INTEGER), vector(at + 40 * size, size, INTEGER)
            g, h = vector(at + 48 * size, size, INTEGER), vector(at + 56 * size, size, INTEGER)
            for i in range(size):
                found |= a[i] | b[i] | c[i] | d[i] | e[i] | f[i] | g[i] | h[i]
    return found


@dataclass(frozen=True)
class Reading:
    """Some memory that is read again and again, by threads side by side.

    nbytes  of one pass
    once    measures, and returns the seconds of one pass
    """

    nbytes: int
    once: Callable[[], float]


def reading(arrays: Sequence[NDArray[Any]], threads: int, pass_s: float) -> Reading:
    """How these arrays are read fastest: each thread its part of each, in one stream or eight.

    Which is faster depends on the CPU: beyond the caches of a Sapphire Rapids eight streams read
    1.3 times as fast as one; in those of an EPYC Zen 4 one reads 1.2 times as fast as eight.
    Units: `pass_s` is the seconds of one measurement, about.
    """
    addresses = np.array([array.ctypes.data for array in arrays], np.int64)
    sizes = np.array([array.nbytes // 8 for array in arrays], np.int64)
    nbytes = 8 * int(sizes.sum())
    parts = []
    for t in range(threads):
        first, last = sizes * t // threads, sizes * (t + 1) // threads
        parts.append((addresses + 8 * first, last - first))

    def reader(kernel: Callable[..., int]) -> Callable[[], float]:
        def run(passes: int) -> float:
            return _concurrent([partial(kernel, *part, passes) for part in parts])

        passes = _calibrate(run, pass_s, 1 + int(pass_s * SLOWEST / nbytes))
        return lambda: run(passes) / passes

    best = min(
        (reader(kernel) for kernel in (_read, _read_streams)),
        key=lambda once: min(once() for _ in range(3)),
    )
    return Reading(nbytes, best)


@dataclass(frozen=True)
class Ceilings:
    """Measured limits, by number of threads. Units: bytes/s by footprint in bytes; FLOP/s."""

    bandwidth: dict[int, list[tuple[int, float]]]
    peak: dict[int, float]


def probe(threads: Sequence[int], *, pass_s: float = 0.03, repeats: int = 3) -> Ceilings:
    """Measure with each number of threads; the best of `repeats` counts, as for a peak.

    Units: `pass_s` is the seconds of one measurement.
    """
    if config.DISABLE_JIT:  # type: ignore[attr-defined]  # numba sets it from the environment
        raise RuntimeError("NUMBA_DISABLE_JIT: expected unset, got 1; timings need the compiler")
    counts = sorted(set(threads))
    # Touched, not only reserved: untouched pages all map to one page of zeros, which is cached.
    words = np.arange(max(FOOTPRINTS) // 8, dtype=np.int64)

    def bandwidth(size: int, threads: int) -> float:
        found = reading([words[: size // 8]], threads, pass_s)
        return found.nbytes / min(found.once() for _ in range(repeats))

    return Ceilings(
        bandwidth={
            count: [(size, bandwidth(size, count)) for size in FOOTPRINTS] for count in counts
        },
        peak={count: _peak(count, pass_s, repeats) for count in counts},
    )


def _peak(threads: int, pass_s: float, repeats: int) -> float:
    def run(count: int) -> float:
        return _concurrent([partial(_fma, count)] * threads)

    count = _calibrate(run, pass_s)
    flops = 2 * count * ACCUMULATORS * vector_lanes() * threads
    return flops / min(run(count) for _ in range(repeats))


def _calibrate(run: Callable[[int], float], pass_s: float, count: int = 1) -> int:
    """The count for which `run` takes about `pass_s`, from a low guess on; a first run compiles."""
    run(1)
    # The best of three: one stall taken for the whole would end in a count far too small.
    while (took := min(run(count) for _ in range(3))) < pass_s / 4:
        count *= 4
    return max(1, round(count * pass_s / took))


def _concurrent(calls: list[Callable[[], object]]) -> float:
    """Seconds from the common start of all calls, one thread each, to the end of the last."""
    barrier = threading.Barrier(len(calls))

    def work(call: Callable[[], object]) -> tuple[float, float]:
        barrier.wait()
        start = time.perf_counter()
        call()
        return start, time.perf_counter()

    with ThreadPoolExecutor(len(calls)) as pool:
        spans = list(pool.map(work, calls))
    return max(end for _, end in spans) - min(start for start, _ in spans)
