"""The floating-point mode of a thread: rounding, and whether subnormal numbers count as 0.

`torch.set_flush_denormal`, libraries built with -ffast-math and C's fesetround change the mode of
the thread that calls them, for good. A call has one mode on all its threads, whatever the caller's
is: to nearest even, subnormals kept. The caller's own comes back at the end.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from sgmv.kernels.cpu import ARM64, X86

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
    for name in ("stmxcsr", "ldmxcsr"):
        _call(builder, f"llvm.x86.sse.{name}", ir.VoidType(), [pointer])
        if name == "stmxcsr":
            before = builder.load(word)
            builder.store(builder.trunc(mode, I32), word)
    return builder.zext(before, I64)


def _exchange_fpcr(builder, mode):
    # Not inline assembly: over that the compiler ends the process, as numba starts no parser of it.
    before = _call(builder, "llvm.aarch64.get.fpcr", I64, [])
    _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), [mode])
    return before


def _call(builder, name, result, arguments):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


@overload(set_mode)
def _set_mode_jitted(mode):
    return lambda mode: _exchange(mode)
