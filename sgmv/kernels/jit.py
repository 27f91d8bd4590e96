"""The only place with numba flags, and what numba lacks to work with bare addresses.

`jit`         every kernel's decorator
`address_of`  the address of an array's first element, an int64 like every integer here
`vector`      the numbers at an address; `size_of` one of them
`record`      the record at an address, `records` several: structured numpy types, fields by name
`entry`       a function of integers, compiled now, as an address that C could call; `enter` calls
              a kernel's. A kernel is compiled once for each mix of float types; the code that runs
              its tasks needs to know nothing of types

All of it is also plain Python, so that the loops run under NUMBA_DISABLE_JIT=1.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import event
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic, overload

from sgmv.kernels.cpu import (
    ASKS_AHEAD,
    CONVERTS_FLOAT16,
    FUSES,
    HALVES_BFLOAT16,
    JITTED,
    SUMS_BFLOAT16,
    VECTOR_BITS,
    WIDENS,
)
from sgmv.kernels.disk import KernelCache, logger

# `contract` allows fused multiply-add. No nnan or ninf: NaN and inf must pass through.
IN_ORDER = frozenset({"contract"})
# `reassoc` lets a sum run in vector lanes. It fixes the order per compiled loop, not per source
# line, so only a loop that computes every element of its output may use it (see loops.py).
ANY_ORDER = frozenset({"contract", "reassoc"})


# What compiled code depends on beside its sources and what numba knows of the CPU.
CHOICES = (
    *(VECTOR_BITS, FUSES, CONVERTS_FLOAT16, SUMS_BFLOAT16, HALVES_BFLOAT16),
    *(ASKS_AHEAD, WIDENS),
)


def digest_of(folder: Path) -> str:
    """The same for the same sources in a folder of compiled code."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


DIGEST = digest_of(Path(__file__).parent)


def jit(
    fastmath: frozenset[str] = IN_ORDER, digest: str = DIGEST
) -> Callable[[Callable[..., Any]], Any]:
    """Compile without the GIL, cached on disk wherever there is a place that can be written."""
    flags: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = numba.njit(**flags)(function)
        # An edit of the function's own file is not all: it also holds the code of what it calls.
        if JITTED:
            with contextlib.suppress(RuntimeError):  # there is no folder that can be written
                compiled._cache = KernelCache(function, digest, CHOICES)
        return compiled

    return decorate


NOTICE_AFTER_S = 0.5  # of compiling: a kernel or two, where a cached one takes milliseconds


class Notice(event.Listener):
    """Says once that a call is slow because it compiles, unless that is expected.

    seconds  spent compiling sgmv's functions so far; loading them from the cache is not compiling
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.given = self.expected = False
        self._depth = 0
        self._begun = 0.0

    def on_start(self, event: Any) -> None:
        """Of numba, when it begins to compile a function, perhaps inside another."""
        if not _is_ours(event):
            return
        if self._depth == 0:
            self._begun = time.perf_counter()
            if self.seconds > NOTICE_AFTER_S and not (self.given or self.expected):
                self.given = True
                logger.warning(
                    "sgmv: compiling kernels for this machine; they are kept, so that this happens "
                    "once. To have it done before the first call: sgmv.warm_up()"
                )
        self._depth += 1

    def on_end(self, event: Any) -> None:
        """Of numba, when it has compiled a function."""
        if _is_ours(event):
            self._depth -= 1
            if self._depth == 0:
                self.seconds += time.perf_counter() - self._begun


def _is_ours(event: Any) -> bool:
    return str(event.data["dispatcher"].py_func.__module__).startswith("sgmv.")


notice = Notice()
event.register("numba:compile", notice)


def _hold_compiler() -> None:
    """Before a fork: a child would wait for ever for a lock that another thread holds.

    numba's first, as a thread that compiles takes them.
    """
    global_compiler_lock.acquire()
    _llvm_lock.__enter__()


def _let_compiler_go() -> None:
    _llvm_lock.__exit__(None, None, None)
    global_compiler_lock.release()


_llvm_lock: Any = llvmlite.binding.ffi.lib._lock
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_hold_compiler,
        after_in_parent=_let_compiler_go,
        after_in_child=_let_compiler_go,
    )


_entries: dict[int, Callable[..., None]] = {}


def entry(function: Callable[..., None], integers: int = 2) -> int:
    """A function of this number of int64s, such as a kernel `(call, limit) -> None`, as an address.

    It is compiled, or loaded from the cache, here and now.
    """
    if not JITTED:
        _entries[id(function)] = function
        return id(function)
    compiled: Any = jit()(function)
    signature = (types.int64,) * integers
    compiled.compile(types.void(*signature))
    found = compiled.overloads[signature]
    _entries[id(compiled)] = compiled  # keeps the code at the address alive
    address = found.library.get_pointer_to_function(found.fndesc.llvm_cfunc_wrapper_name)
    return int(address)


def enter(address: int, call: int, limit: int) -> None:
    """Call the kernel at this address."""
    _entries[address](call, limit)


def address_of(array: Any) -> Any:
    """The address of the array's first element."""
    return array.ctypes.data


def size_of(like: Any) -> Any:
    """Bytes of a number of this type."""
    return like.itemsize


def vector(address: int, size: int, like: Any) -> Any:
    """The `size` numbers of `like`'s type that are stored contiguously at `address`."""
    buffer = (ctypes.c_char * (int(size) * like.itemsize)).from_address(int(address))
    return np.frombuffer(buffer, like.dtype, int(size))


def records(kind: Any, address: int, count: int) -> Any:
    """The `count` records of this kind that are stored contiguously at `address`."""
    buffer = (ctypes.c_char * (int(count) * kind.itemsize)).from_address(int(address))
    return np.frombuffer(buffer, kind, int(count))


def record(kind: Any, address: int) -> Any:
    """The record of this kind at `address`; its fields are read and written there."""
    return records(kind, address, 1)[0]


INT64 = ir.IntType(64)


@intrinsic
def _pointer(typingctx, address, like):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    pointed = like.dtype if isinstance(like, types.DType) else like
    return types.CPointer(pointed)(types.int64, like), codegen


@intrinsic
def _enter(typingctx, address, call, limit):
    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [INT64, INT64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@overload(enter)
def _enter_jitted(address, call, limit):
    return lambda address, call, limit: _enter(address, call, limit)


@overload(address_of)
def _address_of_jitted(array):
    return lambda array: types.int64(array.ctypes.data)


@overload(size_of)
def _size_of_jitted(like):
    size = like.bitwidth // 8
    return lambda like: size


@overload(vector)
def _vector_jitted(address, size, like):
    return lambda address, size, like: numba.carray(_pointer(address, like), size)


@overload(records)
def _records_jitted(kind, address, count):
    return lambda kind, address, count: numba.carray(_pointer(address, kind), count)


@overload(record)
def _record_jitted(kind, address):
    return lambda kind, address: numba.carray(_pointer(address, kind), 1)[0]
