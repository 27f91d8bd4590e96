"""What this machine has and what sgmv makes of it: `sgmv.info()`, `python -m sgmv info`."""

from __future__ import annotations

import json
import platform
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import chain

import llvmlite.binding
import numba
import numpy as np

from sgmv import amx, cache, cpu, workers
from sgmv.backend import choose
from sgmv.cpu import VECTOR_BITS
from sgmv.dtypes import BITS
from sgmv.kernels.emit import LANES
from sgmv.kernels.tiles import COLUMN_VECTORS, RANKS
from sgmv.terminal import Terminal

NAMES = " " * 14  # the width of their column


@dataclass(frozen=True)
class Info:
    """The facts that `info` found; `str` sets them one below the other."""

    cpu: str
    features: str
    vectors: str
    amx: str
    backend: Mapping[str, str]
    shrink_tiles: str
    expand_tiles: str
    threads: str
    cache: str
    versions: str

    def __str__(self) -> str:
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mapping):
                value = ", ".join(f"{dtype} {name}" for dtype, name in value.items())
            lines.append(f"{field.name.replace('_', ' '):{len(NAMES)}}{value}")
        return "\n".join(lines)


def info() -> Info:
    """Which CPU features, backend, tiles, threads and cache folder sgmv uses here.

    Semantics: `vectors` is what the tiles are made for, from the CPU or SGMV_VECTOR_BITS, and why;
    `amx` says whether bfloat16 runs on the CPU's tile products, why not, and how to change it;
    `backend` names the kernels of each weight type when x and y have that type too; tiles are
    rows x ranks (shrink) and rows x columns (expand).

    >>> sorted(info().backend) == ["bfloat16", "float16", "float32", "float64"]
    True
    """
    chosen = {
        dtype: choose(None, np.dtype("f8" if dtype == "float64" else "f4"), dtype == "bfloat16")
        for dtype in BITS
    }
    tiled = "tiles" in chosen.values()
    shrink = ", ".join(f"{rows}x{ranks}" for rows, ranks in RANKS.items())
    expand = ", ".join(f"{rows}x{LANES * vectors}" for rows, vectors in COLUMN_VECTORS.items())
    width = f"{VECTOR_BITS} bits, {LANES} float32" if VECTOR_BITS else "none: plain loops"
    sleep = "a futex" if workers.pool.fields[0].syscall else "a semaphore"
    return Info(
        cpu=f"{cpu.name()}, {cpu.cores()} cores",
        features=cpu.used_features(),
        vectors=f"{width}; {cpu.why_vectors()}",
        amx=amx.state(),
        backend=chosen,
        shrink_tiles=shrink if tiled else "none",
        expand_tiles=expand if tiled else "none",
        threads=f"{workers.get_num_threads()}; helpers sleep on {sleep}",
        cache=cache.state(),
        versions=f"Python {platform.python_version()}, numba {numba.__version__}, "
        f"llvmlite {llvmlite.__version__}, numpy {np.__version__}",
    )


def command(parser: ArgumentParser) -> Callable[[Namespace], str]:
    """Add the argument, and return what runs it."""
    parser.add_argument("--json", action="store_true", help="the same for programs")
    return lambda given: json.dumps(asdict(info())) if given.json else _fitted(str(info()))


def _fitted(text: str) -> str:
    """Long lines wrapped under their value, where they are read and not piped."""
    if not sys.stdout.isatty():
        return text
    terminal = Terminal.of_stdout()
    lines = (terminal.note(line, NAMES) for line in text.splitlines())
    return terminal.text(list(chain.from_iterable(lines)))
