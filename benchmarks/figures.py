"""What all pictures share: colours, and the digest that tells a stale one from its record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.record import Head, Times

# Okabe and Ito's colours, which stay apart for colour-blind readers; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
DIGEST_KEY = "Record"


def digest(record: Head) -> str:
    """What ties a figure to its record: SHA-256 over its canonical JSON."""
    text = json.dumps(msgspec.to_builtins(record), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def draw(figures: Mapping[str, Callable[[Any], Any]], record: Head, folder: Path) -> list[Path]:
    """Write each figure and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        metadata = {DIGEST_KEY: digest(record), "Software": None}
        figure(record).savefig(folder / name, dpi=110, metadata=metadata)
    return [folder / name for name in figures]


def band(axis: Any, n: Any, times: list[Times], colour: str, **look: Any) -> None:
    """Medians over n, and the band from the 20 % to the 80 % quantile."""
    axis.fill_between(
        n, [t.q20 for t in times], [t.q80 for t in times], color=colour, alpha=0.2, linewidth=0
    )
    axis.plot(n, [t.q50 for t in times], color=colour, **look)
