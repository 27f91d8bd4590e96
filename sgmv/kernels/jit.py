"""The only place with numba flags, and the three things that numba lacks.

`jit`      every kernel's decorator
`claim`    take the next task number, atomically
`vector`   the elements behind a bare address

`claim` and `vector` are also plain Python, so that the loops run under NUMBA_DISABLE_JIT=1.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, overload

# `contract` allows fused multiply-add. No nnan or ninf: NaN and inf must pass through.
IN_ORDER = frozenset({"contract"})
# `reassoc` lets a sum run in vector lanes. It fixes the order per compiled loop, not per source
# line, so only a loop that computes every element of its output may use it (see loops.py).
ANY_ORDER = frozenset({"contract", "reassoc"})


def _digest_of_kernels() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


KERNELS = _digest_of_kernels()


def jit(fastmath: frozenset[str] = IN_ORDER) -> Callable[[Callable[..., Any]], Any]:
    """Compile without the GIL, cached on disk wherever there is a place that can be written."""
    flags: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            compiled = numba.njit(cache=True, **flags)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache is writable
            return numba.njit(**flags)(function)
        # numba's cache notices an edit of the function's own file only, but a kernel also holds
        # the code of what it calls in the others. No jit, or another numba: no such attribute.
        with contextlib.suppress(AttributeError):
            index = compiled._cache._cache_file
            index._source_stamp = (index._source_stamp, KERNELS)
        return compiled

    return decorate


_claiming = threading.Lock()


def claim(next_task):
    """Semantics: `next_task[0] += 1` and return the old value, one thread at a time."""
    with _claiming:
        task = int(next_task[0])
        next_task[0] += 1
        return task


@intrinsic
def _fetch_add_one(typingctx, address):
    def codegen(context, builder, signature, args):
        int64 = context.get_value_type(types.int64)
        pointer = builder.inttoptr(args[0], int64.as_pointer())
        return builder.atomic_rmw("add", pointer, int64(1), "monotonic")

    return types.int64(types.uintp), codegen


@overload(claim)
def _claim(next_task):
    return lambda next_task: _fetch_add_one(next_task.ctypes.data)


def vector(address, size, like):
    """The `size` elements of `like`'s type that stand contiguously at `address`."""
    if size == 0:
        return like[:0]
    buffer = (ctypes.c_char * (int(size) * like.itemsize)).from_address(int(address))
    return np.frombuffer(buffer, like.dtype)


@intrinsic
def _pointer(typingctx, address, like):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.intp, like), codegen


@overload(vector)
def _vector(address, size, like):
    return lambda address, size, like: numba.carray(_pointer(address, like), size)
