"""sgmv and numpy on one layer, four mixes of 64 rows: which is faster, and by how much?

python examples/compare_timings.py

`make bench` does it with care: a correctness gate, settled clocks, more layers and more peers.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np

import sgmv
from sgmv.popularity import POPULARITIES, popularity

n, h_in, r, h_out = 64, 2048, 16, 2048
rng = np.random.default_rng(0)
x = rng.standard_normal((n, h_in), "float32")
A, wb = (rng.standard_normal((n, r, width), "float32") for width in (h_in, h_out))
stack = sgmv.AdapterStack.from_adapters([sgmv.Adapter(A[i], wb[i].T) for i in range(n)])
y = np.zeros((n, h_out), "float32")


def numpy_per_segment(segments: sgmv.Segments) -> None:
    """One pair of products per adapter, as BLAS does them."""
    for s, adapter_id in enumerate(segments.adapter_ids):
        rows = segments.rows[segments.seq_start[s] : segments.seq_start[s + 1]]
        y[rows] += (x[rows] @ A[adapter_id].T) @ wb[adapter_id]


def time_us(*calls: Callable[[], object]) -> list[float]:
    """The best of each call, in turns, so that a slow moment of the machine hits all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(50):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [1e6 * min(own) for own in times]


print(f"{n} rows, {h_in} -> {r} -> {h_out}, float32, {sgmv.get_num_threads()} threads")
print("popularity  adapters  sgmv us  numpy us  numpy / sgmv")
for kind in POPULARITIES:
    segments = sgmv.segment(popularity(kind, n))
    ours, numpys = time_us(
        partial(sgmv.add_lora, y, x, stack, segments), partial(numpy_per_segment, segments)
    )
    print(f"{kind:10}  {segments.S:8}  {ours:7.0f}  {numpys:8.0f}  {numpys / ours:11.1f}x")
