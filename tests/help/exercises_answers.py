"""Model answers to docs/exercises.md. Try yourself first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sgmv.emulator import Device


# 1
def segment(adapter_ids: Sequence[int]) -> tuple[Any, Any, Any]:
    ids = np.asarray(adapter_ids, np.int64)
    rows = np.argsort(ids, kind="stable")
    segment_ids, lengths = np.unique(ids, return_counts=True)
    return rows, np.concatenate([[0], np.cumsum(lengths)]), segment_ids


# 2
def add_lora(
    y: Any,
    x: Any,
    rows: Any,
    seq_start: Any,
    segment_ids: Any,
    adapters: Mapping[int, Any],
    scalings: Mapping[int, float],
) -> None:
    for s, adapter_id in enumerate(segment_ids):
        pair = adapters.get(adapter_id)
        if pair is not None:
            A, B = pair
            p = rows[seq_start[s] : seq_start[s + 1]]
            y[p] += scalings[adapter_id] * ((x[p] @ A.T) @ B.T)


# 3
def kernel_meta(slots: Sequence[int], max_loras: int) -> tuple[list[int], list[int], list[int]]:
    active, counts = np.unique(slots, return_counts=True)
    ends = np.cumsum(counts)
    spare = max_loras + 1 - len(active)
    return (
        [*active.tolist(), *[-1] * spare],
        [*counts.tolist(), *[0] * spare],
        [0, *ends.tolist(), *[0] * spare],
    )


# 4
def chunks(lengths: Sequence[int], max_lora_chunk_size: int = 16) -> list[tuple[int, int]]:
    n = sum(lengths)
    most = max(16, min(max_lora_chunk_size, 128 if n >= 256 else 32 if n >= 64 else 16))
    return [
        (s, min(most, length - first))
        for s, length in enumerate(lengths)
        for first in range(0, length, most)
    ]


# 5
def wasted(lengths: Sequence[int], tile_rows: int) -> float:
    multiplied = sum(-(-length // tile_rows) * tile_rows for length in lengths)
    return 1 - sum(lengths) / multiplied if multiplied else 0.0


# 6
def shared_memory(r: int) -> int:
    return 2 * 128 * (64 + r) * 2  # stages, columns, rows, bytes


# 7
def split_k_segments(h_in: int, r: int, device: Device) -> int:
    fit = device.sms * device.resident_blocks(128, shared_memory(r))
    return fit // -(-h_in // 256)


# 8
def hangs(lengths: Sequence[int], splits_k: bool) -> bool:
    return splits_k and len({-(-length // 64) for length in lengths}) > 1


def smallest_hang() -> list[int]:
    return [1, 65]  # one step and two


# 9
def split_sum(x: Any, w: Any, chunk: int) -> np.float32:
    def in_order(values: Any) -> Any:
        return np.add.accumulate(values, dtype=np.float32)[-1]

    products = x * w
    parts = [in_order(products[k : k + chunk]) for k in range(0, len(products), chunk)]
    return np.float32(in_order(np.array(parts)))


# 10
def intensity(lengths: Sequence[int], k: int, width: int) -> float:
    n, S = sum(lengths), len(lengths)
    return 2 * n * k * width / (2 * (n * (k + width) + S * k * width))


def rows_to_reach(target: float, k: int, width: int) -> int | None:
    """m k w / (m (k + w) + k w) >= t, and no m brings it beyond k w / (k + w)."""
    rest = k * width - target * (k + width)
    return math.ceil(target * k * width / rest) if rest > 0 else None
