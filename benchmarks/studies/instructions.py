"""python -m benchmarks instructions: what the compiler made of the tiles' inner loops.

A profile that no noise disturbs, where the machine gives no counters: in each loop that multiplies,
the fused multiply-adds, all instructions, and the vectors that found no register and went through
the stack. A tile is good where most instructions multiply and no vector spills.

    python -m benchmarks instructions                  this CPU
    python -m benchmarks instructions --arm apple-m1   what an ARM64 CPU would run, from any machine
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from typing import Any, ClassVar

import llvmlite.binding as llvm
import msgspec
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.np import numpy_support

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
    arm: str | None = None  # LLVM's name of the ARM64 CPU they are for, if that is not this one


TRIPLE = "aarch64-unknown-linux-gnu"
# A vector that comes from the stack or goes there: x86's, ARM64's.
STACK = re.compile(r"\(%rsp\).*mm|mm.*\(%rsp\)|q\d.*\[sp")
# numba compiles for this machine; only the tiles, which read no setting later, are for ARM64.
ON_ARM = "import numba, platform; platform.machine = lambda: 'aarch64'; "


def loops(dtype: str, arm: str | None = None) -> list[Loop]:
    """The loops of shrink and expand for x, weights and y of this type, longest first.

    Semantics: compiled anew in a process and a cache of their own, as compiled code that comes from
    a cache has no text.
    arm  LLVM's name of an ARM64 CPU, for which the tiles are compiled instead
    """
    program = f"from benchmarks.studies import instructions; instructions.show({dtype!r})"
    if arm:
        program = ON_ARM + program.replace(".show(", ".show_for_arm(").replace(")", f", {arm!r})")
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        if arm:
            environment.pop("SGMV_VECTOR_BITS", None)
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


def show_for_arm(dtype: str, arm: str) -> None:
    """The same of the tiles alone, as LLVM compiles them for this ARM64 CPU."""
    from sgmv.dtypes import BITS
    from sgmv.kernels import tiles

    like, integer = numpy_support.from_dtype(BITS[dtype]), types.int64
    pair, triple = tiles.PAIR, tiles.TRIPLE
    none = types.none
    shrink = like, like, integer, pair, none, triple, none, pair, pair
    expand = like, like, integer, triple, integer, integer, types.float32, none, pair
    machine = target(arm)
    for name, intrinsic, operands in (
        ("tiles_shrink", tiles.shrink_tiles, shrink), ("tiles_expand", tiles.expand_tiles, expand),
    ):  # fmt: skip
        print(f"=== {name}\n{machine.emit_assembly(compiled(intrinsic, operands, machine))}")


def target(arm: str) -> Any:
    """LLVM's machine of this ARM64 CPU, on Linux."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=arm, opt=3)


def compiled(intrinsic: Any, operands: tuple[Any, ...], machine: Any) -> Any:
    """A function that is this intrinsic, as LLVM's module, optimized for the machine."""
    signature, codegen = intrinsic._defn(cpu_target.typing_context, *operands)
    context = cpu_target.target_context
    module = ir.Module()
    module.triple, module.data_layout = TRIPLE, str(machine.target_data)
    returned, *kinds = (
        context.get_value_type(kind) for kind in (signature.return_type, *signature.args)
    )
    gives = signature.return_type != types.void
    kind = ir.FunctionType(returned if gives else ir.VoidType(), kinds)
    function = ir.Function(module, kind, "intrinsic")
    builder = ir.IRBuilder(function.append_basic_block())
    result = codegen(context, builder, signature, function.args)
    builder.ret(result) if gives else builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return parsed


def parse(kernel: str, assembly: str) -> list[Loop]:
    r"""The blocks that jump to their own start and multiply.

    >>> parse("shrink", ".L1:\n\tvfmadd231ps\t8(%rsp), %ymm2, %ymm3\n\tjl\t.L1\n")
    [Loop(kernel='shrink', multiplies=1, instructions=2, spills=1, masked=False)]
    >>> parse("shrink", ".L1:\n\tldr\tq1, [sp, #16]\n\tfmla\tv0.4s, v1.4s, v2.4s\n\tb.lt\t.L1\n")
    [Loop(kernel='shrink', multiplies=1, instructions=3, spills=1, masked=False)]
    """
    blocks = re.split(r"^(\.L\w+):", assembly, flags=re.M)
    found = []
    for label, body in zip(blocks[1::2], blocks[2::2], strict=True):
        lines = re.findall(r"^\t([a-z].*)", body, flags=re.M)
        multiplies = sum(line.startswith(("vfmadd", "fmla")) for line in lines)
        if multiplies and re.search(rf"^\t(j|b\.)\w+\t{re.escape(label)}$", body, flags=re.M):
            spills = sum(bool(STACK.search(line)) for line in lines)
            masked = any("vmaskmov" in line or "{%k" in line for line in lines)
            found.append(Loop(kernel, multiplies, len(lines), spills, masked))
    return found


def arguments(parser: Parser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument(
        "--arm", metavar="CPU", help="LLVM's name of an ARM64 CPU, such as neoverse-n1 or apple-m1"
    )


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The loops of one float type."""
    return {"dtype": args.dtype, "arm": args.arm, "loops": loops(args.dtype, args.arm)}


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
