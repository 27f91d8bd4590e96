"""Weights by address: those of arrays that are alive, and raw ones, which are probed before a call.

Every address that a call will read is checked first. One that `own` returned is looked up, and its
array's shape is held to the call. Any other must be aligned, and readable from the first byte to
the last: one byte of each of its pages is written into a pipe, which the system refuses, without a
signal, where nothing can be read. That costs about 50 ns a page, and again at every call: memory
can be freed between two calls.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from sgmv.dtypes import Array
from sgmv.errors import DtypeError, MemoryLayoutError, ShapeError, ValueRangeError, some
from sgmv.products import Operand, Weights
from sgmv.tensors import as_array

BYTES_AT_ONCE = 1024  # no more than a system takes in one writev, and less than any pipe holds
END = 1 << 63

_owned: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def own(weights: Operand) -> int:
    """The address of weights (layers, rows, columns), known for as long as the array lives."""
    address = int(as_array("weights", weights).ctypes.data)
    _owned[address] = weights
    return address


def weights_at(
    argument: str,
    pointers: Operand,
    used: Any,
    layer_idx: int,
    outputs: int,
    inputs: int,
    dtype: np.dtype[Any],
    *,
    by_input: bool,
    apart_from: Array,
) -> Weights:
    """The weights of one layer behind the pointers.

    pointers    (S,) addresses of (layers, outputs, inputs); if by_input, (layers, inputs, outputs)
    used        (S,) bool: which of them will be read; the others may be anything
    dtype       the type of the weights
    apart_from  the output, which no weight may overlap

    Raises ShapeError, DtypeError, ValueRangeError or MemoryLayoutError for what cannot be read.
    """
    given = np.asarray(pointers) if isinstance(pointers, list) else as_array(argument, pointers)
    if given.shape != used.shape or given.dtype not in (np.int64, np.uint64):
        raise ShapeError(
            argument,
            f"{len(used)} addresses in int64, one per segment of s",
            f"{given.dtype} {given.shape}",
            "give the wa_ptr or wb_ptr of this batch",
        )
    shape = (inputs, outputs) if by_input else (outputs, inputs)
    nbytes = outputs * inputs * dtype.itemsize
    holds, raw = [], []
    for address in np.unique(given[used]).tolist():
        owner = _owned.get(address)
        if owner is None:
            raw.append(address + layer_idx * nbytes)
            _check_number(argument, address, raw[-1] + nbytes, dtype.itemsize)
        else:
            _check_owner(argument, as_array(argument, owner), layer_idx, shape, dtype)
            holds.append(owner)
    if nbytes:
        _check_readable(argument, raw, nbytes)
    addresses = given.astype(np.int64)
    if holds or raw:
        addresses[used] += layer_idx * nbytes
    first, last = _extent(apart_from)
    if ((addresses[used] < last) & (addresses[used] + nbytes > first)).any():
        raise MemoryLayoutError(
            argument, "weights apart from the output", "some that overlap it", "copy one of them"
        )
    return Weights(addresses, outputs, inputs, dtype, by_input, holds)


def _extent(array: Array) -> tuple[int, int]:
    """The first address of an array of any strides, and the first after it."""
    spans = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    start = int(array.ctypes.data)
    if array.size == 0:
        return start, start
    first = start + sum(span for span in spans if span < 0)
    return first, start + sum(span for span in spans if span > 0) + array.itemsize


def _check_number(argument: str, address: int, end: int, alignment: int) -> None:
    if address <= 0 or end > END:
        raise ValueRangeError(
            argument, "an address, not null", hex(address), "pass a live weight's data pointer"
        )
    if address % alignment:
        raise MemoryLayoutError(
            argument,
            f"addresses that are multiples of {alignment}, the size of a weight's elements",
            hex(address),
            "pass weights of x's type",
        )


def _check_owner(
    argument: str, owner: Any, layer_idx: int, shape: tuple[int, int], dtype: np.dtype[Any]
) -> None:
    if owner.dtype != dtype:
        raise DtypeError(
            argument,
            f"weights of x's type, {dtype}",
            str(owner.dtype),
            "make LoraWeight in that dtype",
        )
    if owner.shape[1:] != shape or layer_idx >= len(owner):
        raise ShapeError(
            argument,
            f"weights (more than {layer_idx} layers, {shape[0]}, {shape[1]})",
            str(owner.shape),
            "check layer_idx, lora_rank, and which call takes weights in this order",
        )


def _check_readable(argument: str, addresses: Sequence[int], nbytes: int) -> None:
    """Refuse addresses at which fewer than nbytes can be read."""
    if not addresses or readable(addresses, nbytes):
        return
    broken = [hex(address) for address in addresses if not readable([address], nbytes)]
    raise MemoryLayoutError(
        argument,
        f"{nbytes} readable bytes at every address",
        f"{some(broken)}, where there are fewer",
        "keep the weights alive, and check layer_idx, lora_rank and the dtype",
    )


def readable(addresses: Sequence[int], nbytes: int) -> bool:
    """Whether nbytes, at least one, can be read at each of these addresses.

    >>> array = np.ones(1000)
    >>> readable([array.ctypes.data], array.nbytes), readable([8], 1)
    (True, False)
    """
    if nbytes > mmap.PAGESIZE:  # far beyond the end, say: no list of all pages is needed
        ends = [address + end for address in addresses for end in (0, nbytes - 1)]
        if not readable(ends, 1):
            return False
    steps = np.append(np.arange(0, nbytes, mmap.PAGESIZE), nbytes - 1).astype(np.uint64)
    probes = (np.array(addresses, np.uint64)[:, None] + steps).reshape(-1)
    pieces = np.ones((len(probes), 2), np.uint64)  # of writev: address, length
    pieces[:, 0] = probes
    reading, writing = os.pipe()
    try:
        for start in range(0, len(pieces), BYTES_AT_ONCE):
            some_of_them = pieces[start : start + BYTES_AT_ONCE]
            if _writev(writing, some_of_them.ctypes.data, len(some_of_them)) != len(some_of_them):
                return False
            os.read(reading, len(some_of_them))
    finally:
        os.close(reading)
        os.close(writing)
    return True


def _writev(file: int, pieces: int, count: int) -> int:
    """writev(2): how many bytes were written, -1 if none could be; POSIX systems have it."""
    libc: Any = ctypes.CDLL(None)
    libc.writev.restype = ctypes.c_ssize_t
    return int(libc.writev(ctypes.c_int(file), ctypes.c_void_p(pieces), ctypes.c_int(count)))
