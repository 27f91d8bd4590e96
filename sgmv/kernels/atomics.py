"""How threads in compiled code meet: atomic int64s, system calls, OpenMP's parallel region.

Each is sequentially consistent, and plain Python under NUMBA_DISABLE_JIT=1.
"""

from __future__ import annotations

import ctypes
import threading

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from sgmv.kernels.cpu import ARM64, X86
from sgmv.kernels.jit import INT64

_atomic = threading.Lock()


def add_atomic(address, amount):
    """Semantics: add to the int64 at this address and return its old value, one at a time."""
    with _atomic:
        cell = ctypes.c_int64.from_address(int(address))
        old = cell.value
        cell.value += int(amount)
        return old


def load_atomic(address):
    """The int64 at this address, as another thread stored it last."""
    return add_atomic(address, 0)


def store_atomic(address, value):
    """Store an int64 so that a thread which sees it also sees all that was written before."""
    add_atomic(address, int(value) - ctypes.c_int64.from_address(int(address)).value)


def pause():
    """Tell the core that this is a waiting loop."""


def system_call(syscall, number, one, two, three):
    """Linux's, by number, with three integers; through libc's syscall(2), at address `syscall`."""


def parallel(region, member, argument):
    """Call `member(argument)` on every thread of OpenMP's team, and wait for all: GOMP_parallel."""


@intrinsic
def _add(typingctx, address, amount):
    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _load(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], INT64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store(typingctx, address, value):
    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], INT64.as_pointer())
        builder.store_atomic(args[1], pointer, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx):
    def codegen(context, builder, signature, args):
        if X86 or ARM64:
            # ARM's own hint takes no time on most cores; ISB about as long as x86's pause.
            name = "llvm.x86.sse2.pause" if X86 else "llvm.aarch64.isb"
            arguments = [] if X86 else [ir.Constant(ir.IntType(32), 15)]
            kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
            known = builder.module.globals.get(name)
            builder.call(known or ir.Function(builder.module, kind, name), arguments)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _system_call(typingctx, syscall, number, one, two, three):
    """syscall(2) has six arguments after the number, three of them unused here."""

    def codegen(context, builder, signature, args):
        unused = ir.Constant(INT64, 0)
        function = builder.inttoptr(args[0], ir.FunctionType(INT64, [INT64] * 7).as_pointer())
        return builder.call(function, [*args[1:], unused, unused, unused])

    return types.int64(*[types.int64] * 5), codegen


@intrinsic
def _parallel(typingctx, region, member, argument):
    """`void GOMP_parallel(fn, data, num_threads, flags)`; 0 threads are as many as OpenMP's own."""

    def codegen(context, builder, signature, args):
        unsigned = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [INT64, INT64, unsigned, unsigned])
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, [*args[1:], ir.Constant(unsigned, 0), ir.Constant(unsigned, 0)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@overload(add_atomic)
def _add_jitted(address, amount):
    return lambda address, amount: _add(address, amount)


@overload(load_atomic)
def _load_jitted(address):
    return lambda address: _load(address)


@overload(store_atomic)
def _store_jitted(address, value):
    return lambda address, value: _store(address, value)


@overload(pause)
def _pause_jitted():
    return lambda: _pause()


@overload(system_call)
def _system_call_jitted(syscall, number, one, two, three):
    return lambda syscall, number, one, two, three: _system_call(syscall, number, one, two, three)


@overload(parallel)
def _parallel_jitted(region, member, argument):
    return lambda region, member, argument: _parallel(region, member, argument)
