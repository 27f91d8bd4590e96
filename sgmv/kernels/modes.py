"""The floating-point mode of a thread: rounding, and whether subnormal numbers count as 0.

`torch.set_flush_denormal`, libraries built with -ffast-math and C's fesetround change the mode of
the thread that calls them, for good. A call has one mode on all its threads, whatever the caller's
is: to nearest even, subnormals kept. The caller's own comes back at the end.
"""

from __future__ import annotations

import platform

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from sgmv.kernels.cpu import X86

ARM64 = platform.machine().lower() in ("aarch64", "arm64")
I32, I64 = ir.IntType(32), ir.IntType(64)
# The control word as a process starts with it: MXCSR with every exception masked; FPCR.
DEFAULT = 0x1F80 if X86 else 0


def set_mode(mode):
    """Give this thread a mode and return the one that it had. Plain Python has no say in this."""
    return mode


@intrinsic
def _exchange(typingctx, mode):
    def codegen(context, builder, signature, args):
        if X86:
            return _exchange_mxcsr(builder, args[0])
        if ARM64:
            return _exchange_fpcr(builder, args[0])
        return args[0]

    return types.int64(types.int64), codegen


def _exchange_mxcsr(builder, mode):
    word = builder.alloca(I32)
    pointer = builder.bitcast(word, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type])
    for name in ("stmxcsr", "ldmxcsr"):
        function = builder.module.globals.get(f"llvm.x86.sse.{name}")
        function = function or ir.Function(builder.module, kind, f"llvm.x86.sse.{name}")
        builder.call(function, [pointer])
        if name == "stmxcsr":
            before = builder.load(word)
            builder.store(builder.trunc(mode, I32), word)
    return builder.zext(before, I64)


def _exchange_fpcr(builder, mode):
    before = builder.asm(ir.FunctionType(I64, []), "mrs $0, fpcr", "=r", [], True)
    builder.asm(ir.FunctionType(ir.VoidType(), [I64]), "msr fpcr, $0", "r", [mode], True)
    return before


@overload(set_mode)
def _set_mode_jitted(mode):
    return lambda mode: _exchange(mode)
