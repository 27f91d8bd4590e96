"""What every form of add_lora must pass: the corpus, and same row, same bits, on every backend.

The suite runs it on sgmv; core/test_planted_faults.py runs it on sgmv with a fault planted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import sgmv
from reference.batch import Scaled
from reference.workloads import Workload, corpus
from sgmv import amx
from sgmv.backend import BACKENDS, flushes
from sgmv.cpu import VECTOR_BITS


def backends(*dtypes: Any) -> list[str]:
    """The backends that can run on this machine for these types of x, weights and y."""
    tiles = VECTOR_BITS > 0 and np.dtype(np.float64) not in [np.dtype(d) for d in dtypes]
    bfloat16 = all(np.dtype(dtype).name == "bfloat16" for dtype in dtypes[:2])
    can = {"amx": tiles and bfloat16 and amx.is_on(), "tiles": tiles, "loops": True}
    return [name for name in BACKENDS if can[name]]


def type_mixes(types: Iterable[str]) -> list[Any]:
    """Types of x, weights and y: a Latin square has every pair of them; the rest is `oracle`."""
    order = list(types)
    return [
        pytest.param(
            mix,
            id="-".join(mix),
            marks=[] if sum(map(order.index, mix)) % len(order) == 0 else pytest.mark.oracle,
        )
        for mix in itertools.product(order, repeat=3)
    ]


def backends_of(case: Workload) -> list[str]:
    return backends(case.x.dtype, weight_dtype(case), case.y.dtype)


def stack_of(case: Workload) -> sgmv.AdapterStack:
    """The case's adapters, loaded: all of them, also those that no row uses."""
    dora = case.dora or Scaled({}, None)
    adapters = {
        i: pair and sgmv.Adapter(*pair, case.scalings[i], dora.magnitudes.get(i))
        for i, pair in case.adapters.items()
    }
    return sgmv.AdapterStack.from_adapters(
        adapters, h_in=case.x.shape[1], h_out=case.y.shape[1], dtype=weight_dtype(case),
        W=dora.W, bias=dora.bias,
    )  # fmt: skip


def weight_dtype(case: Workload) -> np.dtype[Any]:
    pairs = [pair for pair in case.adapters.values() if pair is not None]
    return pairs[0][0].dtype if pairs else case.x.dtype


def check_case(case: Workload) -> None:
    """add_lora's y is right; so is y made by shrink and expand, with NaN where v is not read."""
    stack = stack_of(case)
    segments = sgmv.segment(case.adapter_ids)
    np.testing.assert_array_equal(segments.rows, case.rows)
    np.testing.assert_array_equal(segments.seq_start, case.seq_start)
    np.testing.assert_array_equal(segments.adapter_ids, case.segment_ids)
    for backend in backends_of(case):
        y = case.y.copy()
        assert sgmv.add_lora(y, case.x, stack, case.adapter_ids, backend=backend) is y
        check(case, y, backend)
        check(case, in_two_steps(case, stack, segments, backend), backend, ", in two steps")


def in_two_steps(
    case: Workload, stack: sgmv.AdapterStack, segments: sgmv.Segments, backend: str
) -> np.ndarray:
    v = sgmv.shrink(case.x, stack, segments, backend=backend)
    for s, adapter_id in enumerate(segments.adapter_ids.tolist()):
        adapter = None if adapter_id == -1 else stack[adapter_id]
        past_rank = v[
            segments.seq_start[s] : segments.seq_start[s + 1], adapter.r if adapter else 0 :
        ]
        assert not past_rank.any(), f"{case.name}: v is not 0 past the rank of adapter {adapter_id}"
        past_rank[:] = np.nan
    return sgmv.expand(v, stack, segments, case.y.copy(), backend=backend)


def check(case: Workload, y: np.ndarray, backend: str, how: str = "") -> None:
    """The case's own verdict on y, and which way y was made."""
    try:
        case.check(y, flushes=flushes(backend, case.x.dtype, weight_dtype(case)))
    except AssertionError as error:
        raise AssertionError(f"{backend}{how}: {error}") from None


def check_applied(case: Workload) -> None:
    """apply_batched's y is right, with scalings apart from the adapters."""
    pairs = {adapter_id: pair and sgmv.Adapter(*pair) for adapter_id, pair in case.adapters.items()}
    result = sgmv.apply_batched(case.x, case.W, pairs, case.adapter_ids, case.scalings)
    case.check_applied(result, flushes=flushes(None, case.x.dtype, weight_dtype(case)))


def check_reused_ids() -> None:
    """Two tenants, one after the other, under the same ids: each gets its own weights."""
    tenants = [case for case in corpus(10_000) if case.name.startswith("reused ids")]
    assert len(tenants) == 2
    other_scalings = {adapter_id: -scaling for adapter_id, scaling in tenants[1].scalings.items()}
    tenants[1] = replace(tenants[1], scalings=other_scalings)
    stack = sgmv.AdapterStack(tenants[0].x.shape[1], tenants[0].y.shape[1], slots=3, max_rank=8)
    for case in tenants:
        for adapter_id, pair in case.adapters.items():
            stack.load(adapter_id, sgmv.Adapter(*pair, case.scalings[adapter_id]))
        for backend in backends_of(case):
            y = sgmv.add_lora(case.y.copy(), case.x, stack, case.adapter_ids, backend=backend)
            check(case, y, backend)
        stack.unload(0)
        stack.load(0, None)


def check_same_bits(
    rng: np.random.Generator, batches: int, threads: tuple[int, ...], wide: bool = False
) -> None:
    """Random batches: each row's bits equal that row's alone, shuffled, and in other company."""
    for batch in range(batches):
        # Every tenth batch is wide enough for several K and column blocks.
        h_in, h_out = rng.integers(1, 2500 if wide and batch % 10 == 0 else 90, 2)
        ranks = rng.integers(0, 20, rng.integers(1, 6))
        dtype = (np.float32, np.float16, np.float64)[batch % 3]
        stack = sgmv.AdapterStack.from_adapters(
            [_adapter(rng, r, h_in, h_out) for r in ranks], h_in=h_in, h_out=h_out
        )
        n = int(rng.integers(1, 24))
        ids = rng.integers(-1, len(ranks), n)
        x = rng.standard_normal((n, h_in)).astype(dtype)
        y = rng.standard_normal((n, h_out)).astype(dtype)
        for backend in backends(dtype):
            check_rows_keep_their_bits(rng, y, x, stack, ids, threads, backend)


def check_rows_keep_their_bits(
    rng: np.random.Generator,
    y: np.ndarray,
    x: np.ndarray,
    stack: sgmv.AdapterStack,
    ids: np.ndarray,
    threads: tuple[int, ...],
    backend: str,
) -> None:
    n = len(ids)
    together = sgmv.add_lora(y.copy(), x, stack, ids, backend=backend)
    for count in threads:
        sgmv.set_num_threads(count)
        order = rng.permutation(n)
        shuffled = sgmv.add_lora(y[order], x[order], stack, ids[order], backend=backend)
        assert_same_bits(shuffled, together[order], f"{backend}, shuffled")
        company = rng.permutation(np.concatenate([np.arange(n), rng.integers(0, n, 70)]))
        crowded = sgmv.add_lora(y[company], x[company], stack, ids[company], backend=backend)
        assert_same_bits(crowded, together[company], f"{backend}, in other company")
        for i in range(n):
            one = slice(i, i + 1)
            alone = sgmv.add_lora(y[one].copy(), x[one], stack, ids[one], backend=backend)
            assert_same_bits(alone, together[one], f"{backend}, alone")


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, how: str) -> None:
    bits = f"u{actual.itemsize}"
    different = np.argwhere(actual.view(bits) != expected.view(bits))
    assert not len(different), f"{how}: other bits at {different[:3].tolist()}"


def _adapter(rng: np.random.Generator, r: int, h_in: int, h_out: int) -> sgmv.Adapter:
    A = rng.standard_normal((r, h_in), np.float32)
    return sgmv.Adapter(A, rng.standard_normal((h_out, r), np.float32), rng.uniform(0.1, 2))
