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
from typing import Any, ClassVar

import msgspec

from benchmarks.batch import DTYPES
from benchmarks.record import Head
from benchmarks.study import Study
from benchmarks.text import Console, Table
from sgmv.console import Parser


class Loop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A loop of one compiled kernel. `masked`: it handles the edges of k or of the columns."""

    kernel: str
    multiplies: int
    instructions: int
    spills: int
    masked: bool


class InstructionsRecord(Head):
    """One run of this file."""

    STUDY: ClassVar[str] = "instructions"
    dtype: str
    loops: list[Loop]


def loops(dtype: str) -> list[Loop]:
    """The loops of shrink and expand for x, weights and y of this type, longest first.

    Semantics: compiled anew in a process and a cache of their own, as compiled code that comes from
    a cache has no text.
    """
    program = f"from benchmarks.studies import instructions; instructions.show({dtype!r})"
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


def arguments(parser: Parser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The loops of one float type."""
    return {"dtype": args.dtype, "loops": loops(args.dtype)}


def tables(record: InstructionsRecord) -> list[Table]:
    rows = [
        [loop.kernel, str(loop.multiplies), str(loop.instructions), str(loop.spills),
         "edge" if loop.masked else ""]
        for loop in record.loops
    ]  # fmt: skip
    return [Table(["kernel", "multiplies", "instructions", "spills", ""], rows, left=1)]


STUDY = Study(
    "instructions", __doc__, InstructionsRecord, measure, tables, arguments, threads=False
)
