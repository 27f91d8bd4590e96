"""Faults planted in kernels and metadata: the acceptance checks must reject each one.

Each fault is one replacement in one source file, run without the jit on a few small corpus cases
and a few random batches: what the suite runs on the real code at full size.
"""

from __future__ import annotations

import re
import sys
from types import ModuleType

import numpy as np
import pytest

from reference.workloads import corpus
from tests.acceptance import check_applied, check_case, check_reused_ids, check_same_bits

CASES = [
    case
    for dtype in (np.float32, np.float16)
    for case in corpus(2_000, [dtype])
    if len(case.adapter_ids) <= 40
] + [case for case in corpus(10_000, [np.float16]) if case.name.startswith("subnormal")]

# what goes wrong: module, text there, what stands there instead
FAULTS = {
    # shrink
    "the last K block is dropped": (
        "kernels.loops",
        "range(0, h_in, K_BLOCK)",
        "range(0, h_in - h_in % K_BLOCK, K_BLOCK)",
    ),
    "K blocks overwrite instead of adding": ("kernels.loops", "v[p, j] += s0", "v[p, j] = s0"),
    "the third rank of four is lost": ("kernels.loops", "v[p, j + 2] += s2", "v[p, j + 2] += s1"),
    "v is not cleared": ("kernels.loops", "v[first:last, low:high] = zero", "pass"),
    "x is read in sorted order": (
        "kernels.loops",
        "vector(x_row[p] +",
        "vector(x_row[len(x_row) - 1 - p] +",
    ),
    "the last row of a task is dropped in shrink": (
        "kernels.loops",
        "for p in range(first, last):\n",
        "for p in range(first, max(first + 1, last - 1)):\n",
    ),
    "ranks past the end are read": ("kernels.loops", "min(a + row_bytes, last_a)", "last_a"),
    # expand
    "y is overwritten": (
        "kernels.loops",
        "decode(y[c], scaling) + scaling * sums[c]",
        "scaling * sums[c]",
    ),
    "the scaling is dropped": ("kernels.loops", "+ scaling * sums[c]", "+ sums[c]"),
    "the first slot's scaling for all": ("kernels.loops", "scalings[slot]", "scalings[0]"),
    "y is written in sorted order": (
        "kernels.loops",
        "vector(y_row[p + i] +",
        "vector(y_row[len(y_row) - 1 - p - i] +",
    ),
    "sums carry over to the next rows": (
        "kernels.loops",
        "scratch[: together * width] = v.dtype.type(0)",
        "scratch[: together * width] *= p == first",
    ),
    "the ranks of a full four are added twice": (
        "kernels.loops",
        "v[p + i, in_fours:r], wb[in_fours:]",
        "v[p + i, :r], wb",
    ),
    "subnormal halves are flushed": (
        "kernels.floats",
        "half = np.uint32(shifted - ONE_HALF)",
        "half = np.uint32(0)",
    ),
    # metadata
    "rows are not put in a stable order": (
        "segment",
        "for p in range(n):\n            i = source[p]\n            d =",
        "for p in range(n - 1, -1, -1):\n            i = source[p]\n            d =",
    ),
    "offsets are off by one": ("segment", "seq_start[S] = p\n", "seq_start[S] = max(p - 1, 0)\n"),
    "the last segment ends early": (
        "segment",
        "seq_start[S] = n\n",
        "seq_start[S] = max(n - 1, 0)\n",
    ),
    # schedule
    "row blocks overlap": (
        "schedule",
        "first = start + m * i // pieces",
        "first = max(seq_start[0], start + m * i // pieces - 1)",
    ),
    "a segment's last row has no task": (
        "schedule",
        "last = start + m * (i + 1) // pieces",
        "last = start + max(1, m * (i + 1) // pieces - 1)",
    ),
    "rank 0 is scheduled": ("schedule", "if rank[s] == 0:\n            continue", "pass"),
    "the columns' last block is cut off": (
        "schedule",
        "high = min(blocks * (q + 1) // cuts * block, extent[s])",
        "high = min(blocks * (q + 1) // cuts * block, extent[s] - extent[s] % 2)",
    ),
    "every slot takes the smallest rank": (
        "kernels.loops",
        "scaling = v.dtype",
        "r = min(tasks[:, 1]); scaling = v.dtype",
    ),
    "the ranks left over take other columns": (
        "kernels.loops",
        "wb[in_fours:], c)",
        "wb[in_fours:], low)",
    ),
    "every id is served by the first slot": (
        "adapters",
        "slot[s] = slots[low]\n            rank[s] = ranks[slots[low]]",
        "slot[s] = max(slots[0], 0)\n            rank[s] = ranks[slot[s]]",
    ),
    "base rows get an adapter's delta": (
        "adapters",
        "if adapter_ids[s] == BASE_ONLY:\n            continue",
        "if adapter_ids[s] == BASE_ONLY and ids.shape[0]:\n"
        "            slot[s] = max(slots[-1], 0)\n"
        "            rank[s] = ranks[slot[s]]\n"
        "            continue",
    ),
    "ranks of the wrong slot": (
        "adapters",
        "rank[s] = ranks[slots[low]]",
        "rank[s] = min(ranks[slots[low]], ranks[0])",
    ),
    "a replaced adapter keeps its scaling": (
        "adapters",
        "scalings[slot] = 0.0 if stored is None else stored.scaling",
        "scalings[slot] = scalings[slot] or (0.0 if stored is None else stored.scaling)",
    ),
    "one scaling for all": (
        "lora",
        "scalings[adapter_id])",
        "next(iter(scalings.values())))",
    ),
    # same row, same bits
    "a row's order of summation depends on its company": (
        "kernels.loops",
        "for k in range(0, h_in, K_BLOCK):\n            width = min(K_BLOCK, h_in - k)",
        "K = K_BLOCK + (last - first) % 3\n"
        "        for k in range(0, h_in, K):\n            width = min(K, h_in - k)",
    ),
}
# Without the jit this one writes past the end of the task list before any result is wrong.
CRASHES = {"rank 0 is scheduled": IndexError}
# What each file offers to the rest of the package, so that a planted file takes its place.
OFFERED = {
    "kernels.loops": ["shrink", "expand"],
    "segment": ["_sort"],
    "adapters": ["_find"],
    "lora": ["_scaling"],
}


def planted(module: str, text: str = "", instead: str = "") -> dict[str, object]:
    """The module's names, after one replacement if one is given, with no jit and small blocks."""
    original: ModuleType = sys.modules[f"sgmv.{module}"]
    with open(original.__file__) as file:
        source = file.read()
    if text:
        assert source.count(text) == 1, f"{text!r} stands {source.count(text)} times in {module}"
        source = source.replace(text, instead)
    source = re.sub(r"@jit\([A-Z_]*\)", "", source)
    source = source.replace("K_BLOCK = 1024", "K_BLOCK = 16")
    source = source.replace("COLUMN_BLOCK = 1024", "COLUMN_BLOCK = 8")
    names = {"__name__": original.__name__}
    exec(compile(source, f"planted {module}", "exec"), names)
    return names


def install(monkeypatch: pytest.MonkeyPatch, module: str, names: dict[str, object]) -> None:
    """Let the package use the planted names wherever it uses the module's own."""
    if module == "kernels.floats":
        loops = planted_loops(names)
        return install(monkeypatch, "kernels.loops", loops)
    if module == "schedule":
        monkeypatch.setattr(sys.modules["sgmv.shrink"], "shrink_tasks", names["shrink_tasks"])
        monkeypatch.setattr(sys.modules["sgmv.expand"], "expand_tasks", names["expand_tasks"])
        return None
    if module == "adapters":
        table = sys.modules["sgmv.adapters"].SlotTable
        monkeypatch.setattr(table, "with_changes", names["SlotTable"].with_changes)
    for name in OFFERED[module]:
        monkeypatch.setattr(sys.modules[f"sgmv.{module}"], name, names[name])
    return None


def planted_loops(floats: dict[str, object]) -> dict[str, object]:
    loops = planted("kernels.loops")
    loops["decode"], loops["encode"] = floats["decode"], floats["encode"]
    return loops


def accept(rng: np.random.Generator) -> None:
    for case in CASES:
        check_case(case)
        check_applied(case)
    check_reused_ids()
    check_same_bits(rng, batches=6, threads=(1, 2))


@pytest.fixture(autouse=True)
def _without_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python kernels with small blocks everywhere, so that a case of 40 columns has several."""
    for module in ("kernels.loops", "schedule"):
        install(monkeypatch, module, planted(module))


def test_accepted_without_a_fault(rng: np.random.Generator) -> None:
    accept(rng)


@pytest.mark.parametrize("fault", FAULTS)
def test_rejected(fault: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    module, text, instead = FAULTS[fault]
    install(monkeypatch, module, planted(module, text, instead))
    with pytest.raises(CRASHES.get(fault, AssertionError)):
        accept(rng)
