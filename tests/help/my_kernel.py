"""The README's kernel, and what is wrong with it once a fault is planted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.help.planting import ROOT, replaced

# The README's kernel. Each fault is one replacement in it, and what the first line has to say.
KERNEL = """
import numpy as np

kept = {}


def my_kernel(y, x, rows, seq_start, segment_ids, adapters, scalings):
    for s, adapter_id in enumerate(segment_ids):
        if adapters.get(adapter_id) is not None:
            A, B = adapters[adapter_id]
            p = rows[seq_start[s] : seq_start[s + 1]]
            y[p] += scalings[adapter_id] * ((x[p] @ A.T) @ B.T)
"""
CONDITION = "if adapters.get(adapter_id) is not None:"
ADDED = "y[p] += scalings[adapter_id] * ((x[p] @ A.T) @ B.T)"
PLANTED = {
    "scaling dropped": (ADDED, "y[p] += (x[p] @ A.T) @ B.T", "the scaling is dropped"),
    "-1 as an index": (
        CONDITION,
        "adapter_id = adapter_id if adapter_id >= 0 or not adapters else max(adapters)\n"
        f"        {CONDITION}",
        "base-only rows, of id -1, get the delta of the last adapter in the list",
    ),
    "y overwritten": (ADDED, ADDED.replace("+=", "="), "y is overwritten"),
    "rows not used": (
        "rows[seq_start[s] : seq_start[s + 1]]",
        "slice(seq_start[s], seq_start[s + 1])",
        "rows is not used",
    ),
    "last row dropped": (
        "seq_start[s + 1]]",
        "seq_start[s + 1] - 1]",
        "the last row of every segment is left out",
    ),
    "rank tail": (
        "A, B = adapters[adapter_id]",
        "A, B = adapters[adapter_id]\n"
        "            A, B = A[: len(A) // 8 * 8], B[:, : len(A) // 8 * 8]",
        "the end of a rank that 8 does not divide is left out",
    ),
    "v in half": (
        "(x[p] @ A.T) @",
        "(x[p] @ A.T).astype(np.float16).astype(x.dtype) @",
        "v, what shrink hands to expand, is rounded to 11 bits, as float16",
    ),
    "metadata cached": (
        "for s, adapter_id in enumerate(segment_ids):",
        "first = kept.setdefault((x.shape, y.shape), (rows, seq_start, segment_ids))\n"
        "    rows, seq_start, segment_ids = first\n"
        "    for s, adapter_id in enumerate(segment_ids):",
        "metadata of an earlier batch is kept",
    ),
    "x spoiled": (ADDED, f"{ADDED}\n            x[p] *= 2", "the kernel changed x"),
    "B spoiled": (
        ADDED,
        f"B *= B.dtype.type(scalings[adapter_id])\n            {ADDED}",
        "the kernel changed B",
    ),
    "scalings twice": (
        ADDED,
        ADDED.replace("scalings[adapter_id]", "scalings[adapter_id] ** 2"),
        "the scaling is applied twice",
    ),
    "a copy of y": (
        "for s, adapter_id",
        "y = y.copy()\n    for s, adapter_id",
        "y is left as it was",
    ),
    "delta returned": (
        "for s, adapter_id",
        "y = np.zeros_like(y)\n    for s, adapter_id",
        "y is left as it was",
    ),
    "B untransposed": (
        ADDED,
        ADDED.replace("B.T", "(B if B.shape[0] == B.shape[1] else B.T)"),
        "B is taken untransposed where it is square",
    ),
    "None unpacked": (
        CONDITION,
        "if adapter_id >= 0:",
        "it raises TypeError: cannot unpack non-iterable NoneType object, where a row is base only "
        "by a None as adapter: in the one such case, and in no other",
    ),
    "ranks above 64 refused": (
        ADDED,
        f"assert len(A) <= 64, 'rank'\n            {ADDED}",
        "it raises AssertionError: rank, where a rank is above 64: in all 4 such cases",
    ),
    "y shifted": (
        "for s, adapter_id",
        "y += 1\n    for s, adapter_id",
        "nearly all rows are wrong, base-only ones as well",
    ),
    "sums in half": (
        ADDED,
        "x16, A16, B16 = (each.astype(np.float16) for each in (x[p], A, B))\n"
        "            y[p] += (scalings[adapter_id] * ((x16 @ A16.T) @ B16.T)).astype(y.dtype)",
        "something is rounded on the way, to fewer bits than the sums have",
    ),
    "segments averaged": (
        "x[p] @",
        "x[p].mean(axis=0, keepdims=True) @",
        "rows of segments of more than one row are wrong",
    ),
    "two faults": (
        ADDED,
        "r = len(A) // 8 * 8\n            y[p] += (x[p] @ A[:r].T) @ B[:, :r].T",
        "no single fault known here explains it; the smallest case that fails is",
    ),
    "arguments forgotten": (
        ", segment_ids, adapters, scalings",
        "",
        "positional arguments but 7 were given, in every case: is its signature",
    ),
}


def planted(fault: str) -> Callable[..., Any]:
    text, instead, _ = PLANTED[fault]
    return function(replaced(KERNEL, text, instead))


def right() -> Callable[..., Any]:
    return function(KERNEL)


def function(source: str) -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(source, names)
    return names["my_kernel"]


def run(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m reference` with these arguments, in this folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-W", "error", "-m", "reference", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
