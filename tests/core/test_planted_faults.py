"""Faults planted in kernels and metadata: the acceptance checks must reject each one.

Each fault is one replacement in one source file of a copy of the package, run as plain Python on a
few small corpus cases and a few random batches: what the suite runs on the real code at full size.
Faults in the tiles, which only the compiler can run, are in kernels/test_tiles.py.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from reference.workloads import corpus
from tests.help import acceptance
from tests.help.planting import SMALL_BLOCKS, Fault, verdict

pytestmark = pytest.mark.once


LARGER = ("subnormal", "base-only bits", "ids far apart")
SMALL_CASES = [
    case
    for dtype in (np.float32, np.float16)
    for most, names in ((2_000, ""), (10_000, LARGER))
    for case in corpus(most, [dtype])
    if len(case.adapter_ids) <= 40 and case.name.startswith(names)
]

# what goes wrong: module, text there, what stands there instead
FAULTS = {
    # shrink
    "the last K block is dropped": Fault(
        "kernels.loops",
        "range(0, table.h_in, K_BLOCK)",
        "range(0, table.h_in - table.h_in % K_BLOCK, K_BLOCK)",
    ),
    "K blocks overwrite instead of adding": Fault(
        "kernels.loops", "v[0] += sums[0]", "v[0] = sums[0]"
    ),
    "the third rank of four is lost": Fault("kernels.loops", "v[2] += sums[2]", "v[2] += sums[1]"),
    "v is not cleared": Fault("kernels.loops", "v[:4] = 0", "pass"),
    "x is read in sorted order": Fault(
        "kernels.loops", "item(call.x_rows, p) * call.x_stride", "p * call.x_stride"
    ),
    "the last row of a task is dropped in shrink": Fault(
        "kernels.loops",
        "for p in range(task.first, task.last):\n",
        "for p in range(task.first, max(task.first + 1, task.last - 1)):\n",
    ),
    "ranks past the end are read": Fault("kernels.loops", "min(j + 1, last) * row", "last * row"),
    "every cut of the ranks is the first": Fault(
        "kernels.loops", "v[j:], sums", "v[j - task.low :], sums"
    ),
    # expand
    "y is overwritten": Fault(
        "kernels.loops", "decode(y[c], scaling) + scaling * sums[c]", "scaling * sums[c]"
    ),
    "the scaling is dropped": Fault("kernels.loops", "+ scaling * sums[c]", "+ sums[c]"),
    "the first slot's scaling for all": Fault(
        "kernels.loops", "table.scalings + 8 * task.slot", "table.scalings"
    ),
    "y is written in sorted order": Fault(
        "kernels.loops", "item(call.y_rows, p + i) * call.y_stride", "(p + i) * call.y_stride"
    ),
    "sums carry over to the next rows": Fault("kernels.loops", "sums[:] = 0", "pass"),
    "the ranks of a full four are added twice": Fault(
        "kernels.loops", "v[i, in_fours:r], wb[in_fours:]", "v[i, :r], wb"
    ),
    "the ranks left over take other weights": Fault(
        "kernels.loops", "v[i, in_fours:r], wb[in_fours:]", "v[i, in_fours:r], wb"
    ),
    "the columns' last panel is read as a whole one": Fault(
        "kernels.loops",
        "width = min(columns, task.high - c)",
        "width = min(columns, task.high - task.low)",
    ),
    "subnormal halves are flushed": Fault(
        "kernels.floats", "half = np.uint32(shifted - ONE_HALF)", "half = np.uint32(0)"
    ),
    # metadata
    "rows are not put in a stable order": Fault(
        "kernels.plan",
        "for p in range(n):\n            i = source[p]\n            d =",
        "for p in range(n - 1, -1, -1):\n            i = source[p]\n            d =",
    ),
    "offsets are off by one": Fault(
        "kernels.plan", "seq_start[S] = p\n", "seq_start[S] = max(p - 1, 0)\n"
    ),
    "the last segment ends early": Fault(
        "kernels.plan", "seq_start[S] = n\n", "seq_start[S] = max(n - 1, 0)\n"
    ),
    "high digits of the ids are not sorted": Fault("kernels.plan", "shift < 64", "shift < 4"),
    "the plan's memory is too near the blocks": Fault(
        "kernels.plan",
        "blocks = records(BLOCK, end_of(bands),",
        "blocks = records(BLOCK, end_of(rows),",
    ),
    # tasks
    "row blocks overlap": Fault(
        "kernels.plan",
        "block.first = start + m * i // pieces",
        "block.first = max(0, start + m * i // pieces - 1)",
    ),
    "a segment's last row has no task": Fault(
        "kernels.plan",
        "block.last = start + m * (i + 1) // pieces",
        "block.last = start + max(1, m * (i + 1) // pieces - 1)",
    ),
    "rank 0 is scheduled": Fault(
        "kernels.plan",
        "if not adds_nothing(slot[s], rank[s], gains):\n            some = seq_start",
        "if True:\n            some = seq_start",
    ),
    "the columns' last block is cut off": Fault(
        "kernels.tasks",
        "min(units * (part + 1) // cuts * unit, extent)",
        "min(units * (part + 1) // cuts * unit, extent - (cuts > 1))",
    ),
    "every cut begins where the block does": Fault(
        "kernels.tasks", "return units * part // cuts * unit,", "return 0,"
    ),
    "ranks are not cut by the rank of their own block": Fault(
        "kernels.tasks",
        "block.r if columns == RANKS",
        "(block.r // 8 * 8 or block.r) if columns == RANKS",
    ),
    "every id is served by the first slot": Fault(
        "kernels.plan",
        "slot[s] = slots[low]\n            rank[s] = ranks[slots[low]]",
        "slot[s] = max(slots[0], 0)\n            rank[s] = ranks[slot[s]]",
    ),
    "base rows get an adapter's delta": Fault(
        "kernels.plan",
        "if adapter_ids[s] == BASE_ONLY:\n            continue",
        "if adapter_ids[s] == BASE_ONLY and ids.shape[0]:\n"
        "            slot[s] = max(slots[-1], 0)\n"
        "            rank[s] = ranks[slot[s]]\n"
        "            continue",
    ),
    "ranks of the wrong slot": Fault(
        "kernels.plan", "rank[s] = ranks[slots[low]]", "rank[s] = min(ranks[slots[low]], ranks[0])"
    ),
    "panels are packed in another order": Fault(
        "table", "for c in range(0, h_out, columns):", "for c in (0,) * (h_out > 0):"
    ),
    "a replaced adapter keeps its scaling": Fault(
        "table",
        "scalings[slot] = 0.0 if stored is None else stored.scaling",
        "scalings[slot] = scalings[slot] or (0.0 if stored is None else stored.scaling)",
    ),
    "one scaling for all": Fault("lora", "scalings[adapter_id])", "next(iter(scalings.values())))"),
    # same row, same bits
    "a row's order of summation depends on its company": Fault(
        "kernels.loops",
        "for k in range(0, table.h_in, K_BLOCK):\n"
        "                width = min(K_BLOCK, table.h_in - k)",
        "K = K_BLOCK + (task.last - task.first) % 3\n"
        "            for k in range(0, table.h_in, K):\n"
        "                width = min(K, table.h_in - k)",
    ),
}


def said(rng: np.random.Generator, *faults: Fault) -> str:
    """What the acceptance checks say of the package with these faults."""
    return verdict(lambda modules: accept(modules["sgmv"], rng), *SMALL_BLOCKS, *faults)


def accept(sgmv: ModuleType, rng: np.random.Generator) -> None:
    acceptance.sgmv = sgmv
    acceptance.VECTOR_BITS = 0  # plain Python has the loops alone
    for case in SMALL_CASES:
        acceptance.check_case(case)
        acceptance.check_applied(case)
    acceptance.check_reused_ids()
    acceptance.check_same_bits(rng, batches=6, threads=(1, 2))


def test_accepted_without_a_fault(rng: np.random.Generator) -> None:
    assert said(rng) == "nothing"


@pytest.mark.parametrize("fault", FAULTS)
def test_rejected(fault: str, rng: np.random.Generator) -> None:
    assert "AssertionError" in said(rng, FAULTS[fault])
