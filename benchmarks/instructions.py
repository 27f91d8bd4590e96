"""python -m benchmarks instructions: what the compiler made of the tiles' inner loops.

A profile that no noise disturbs, where the machine gives no counters: in each loop that multiplies,
the fused multiply-adds, all instructions, and the vectors that found no register and went through
the stack. A tile is good where most instructions multiply and no vector spills.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.console import Console
from benchmarks.grid import DTYPES
from sgmv.console import Parser


@dataclass(frozen=True)
class Loop:
    """A loop of one compiled kernel. `masked`: it handles the edges of k or of the columns."""

    kernel: str
    multiplies: int
    instructions: int
    spills: int
    masked: bool


def loops(dtype: str) -> list[Loop]:
    """The loops of shrink and expand for x, weights and y of this type, longest first.

    Semantics: compiled anew in a process and a cache of their own, as compiled code that comes from
    a cache has no text.
    """
    program = f"from benchmarks import instructions; instructions.show({dtype!r})"
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    kernels = re.split(r"^=== (\w+)$", done.stdout, flags=re.M)[1:]
    found = [
        loop
        for kernel, assembly in zip(kernels[::2], kernels[1::2], strict=True)
        for loop in parse(kernel, assembly)
    ]
    return sorted(found, key=lambda loop: (loop.kernel, loop.masked, -loop.multiplies))


def show(dtype: str) -> None:
    """Print each kernel's assembly after a line that names it."""
    from benchmarks.batch import dtype_of
    from sgmv import backend
    from sgmv.kernels import jit

    kind = dtype_of(dtype)
    backend.kernels("tiles", kind, kind, kind)
    for kernel in jit._entries.values():
        (assembly,) = kernel.inspect_asm().values()  # type: ignore[attr-defined]  # a dispatcher
        print(f"=== {kernel.py_func.__name__}\n{assembly}")  # type: ignore[attr-defined]


def parse(kernel: str, assembly: str) -> list[Loop]:
    r"""The blocks that jump to their own start and multiply.

    >>> parse("shrink", ".L1:\n\tvfmadd231ps\t8(%rsp), %ymm2, %ymm3\n\tjl\t.L1\n")
    [Loop(kernel='shrink', multiplies=1, instructions=2, spills=1, masked=False)]
    """
    blocks = re.split(r"^(\.L\w+):", assembly, flags=re.M)
    found = []
    for label, body in zip(blocks[1::2], blocks[2::2], strict=True):
        lines = re.findall(r"^\t([a-z].*)", body, flags=re.M)
        multiplies = sum(line.startswith("vfmadd") for line in lines)
        if multiplies and re.search(rf"^\tj\w+\t{re.escape(label)}$", body, flags=re.M):
            spills = sum("(%rsp)" in line and "mm" in line.split("\t")[1] for line in lines)
            masked = any("vmaskmov" in line or "{%k" in line for line in lines)
            found.append(Loop(kernel, multiplies, len(lines), spills, masked))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns 0."""
    parser = Parser(
        prog="python -m benchmarks instructions", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    args = parser.parse_args(argv)
    console = Console()
    console.print(f"{'kernel':14}{'multiplies':>12}{'instructions':>14}{'spills':>8}", "dim")
    for loop in loops(args.dtype):
        console.print(
            f"{loop.kernel:14}{loop.multiplies:12}{loop.instructions:14}{loop.spills:8}"
            f"{'  edge' if loop.masked else ''}"
        )
    return 0
