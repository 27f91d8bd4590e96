"""AMX's tile instructions as words of `Emit`: the CPU's own, or each one computed by vectors.

A tile register holds 16 rows of 64 bytes. A configuration says how much of each of the eight is in
use; `state` is the address of 64 bytes for it, and of the registers where they are emulated:

    state + 0    uint8         1, or 0 where nothing is configured
          + 16   uint16 (8,)   bytes in use of a register's rows
          + 48   uint8 (8,)    rows in use
          + 64   (8, 16, 64)   the emulated registers

`multiply(c, a, b)`, TDPBF16PS, adds to c (M, N), float32, the product of a (M, 32) and b (32, N),
bfloat16. b holds two k next to each other, (16, N, 2), as do the rows of a anyhow:

         a  k ->                            b  n ->
    m   [ 0 1 | 2 3 | 4 5 | ... ]          [ 0 1 | 0 1 | 0 1 | ... ]
    |   [ 0 1 | 2 3 | 4 5 | ... ]          [ 2 3 | 2 3 | 2 3 | ... ]
    v     ...                                ...

    c[m, n] += (sum over even k of a[m, k] * b[k, n]) + (sum over odd k of the same)

Both sums begin at 0 and add k in ascending order, fused; each of the operations rounds to nearest
even. A number below 2**-126, read or made, counts as 0. So an element's bits depend on a row of a
and a column of b, and on nothing that stands beside them.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: TDPBF16PS,
LDTILECFG, TILELOADD, TILESTORED. The registers are named, not chosen by the compiler, which breaks
down over loops that carry tiles.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from sgmv.kernels.emit import F32, I8, I16, I32, Emit, numbers
from sgmv.kernels.jit import INT64

# Who computes, told to compiled code by type, as the float types are.
CPU, EMULATION = np.uint8(0), np.int8(0)

SIDE = 16  # the most rows of a tile, and the most float32 in one
STATE_BYTES = 64 + 8 * 1024
NONE = ir.VoidType()
NUMBERS, PAIRS = ir.VectorType(F32, SIDE), ir.VectorType(I32, SIDE)


class Tiles(Emit):
    """The CPU's instructions. A tile is its register's number, 0 to 7."""

    def __init__(self, builder, state):
        super().__init__(builder)
        self.state = state

    def configure(self):
        """Use the registers as the configuration at `state` says."""
        self._call("llvm.x86.ldtilecfg", NONE, [self._pointer(self.state, I8)])

    def release(self):
        """Use no tile any more."""
        self._call("llvm.x86.tilerelease", NONE, [])

    def zero_tile(self, tile):
        self._call("llvm.x86.tilezero", NONE, [ir.Constant(I8, tile)])

    def load_tile(self, tile, address, stride):
        """Read the rows of a tile, `stride` bytes apart."""
        self._move("llvm.x86.tileloadd64", tile, address, stride)

    def store_tile(self, tile, address, stride):
        """Write the rows of a tile, `stride` bytes apart."""
        self._move("llvm.x86.tilestored64", tile, address, stride)

    def multiply_tiles(self, c, a, b):
        """The drawing above."""
        self._call("llvm.x86.tdpbf16ps", NONE, [ir.Constant(I8, tile) for tile in (c, a, b)])

    def _move(self, name, tile, address, stride):
        self._call(name, NONE, [ir.Constant(I8, tile), self._pointer(address, I8), stride])


class EmulatedTiles(Tiles):
    """The same words without AMX; shapes that the CPU refuses to multiply make NaN."""

    def configure(self):
        pass  # the state is read where it stands

    def release(self):
        self.store(ir.Constant(PAIRS, None), self.state)

    def zero_tile(self, tile):
        self._each_row(tile, lambda _m, row, _used: self.store(ir.Constant(PAIRS, None), row))

    def load_tile(self, tile, address, stride):
        def load(m, row, used):
            memory = self.add(address, self.multiply(stride, m))
            self.store(self.read(memory, PAIRS, 2, used), row)

        self._each_row(tile, load)

    def store_tile(self, tile, address, stride):
        def store(m, row, used):
            memory = self.add(address, self.multiply(stride, m))
            self.store(self.read(row, PAIRS, 4), memory, mask=used)

        self._each_row(tile, store)

    def multiply_tiles(self, c, a, b):
        first = self.builder.select(self._fit(c, a, b), self._number(0.0), self._number(np.nan))

        def multiply(m, row, used):
            pairs = self.add(self._register(a), self.multiply(m, 64))

            def step(k, sums):
                pair = self.everywhere(self._load(self.add(pairs, self.multiply(k, 4)), I32), PAIRS)
                other = self.read(self.add(self._register(b), self.multiply(k, 64)), PAIRS, 4, used)
                each = zip(self._numbers(pair), self._numbers(other), sums)  # noqa: B905
                return [self._flush(self._fused(p, q, total)) for p, q, total in each]

            even, odd = self.loop(ir.Constant(INT64, 0), self._pairs(a), 1, [first] * 2, step)
            total = self._flush(self.builder.fadd(even, odd))
            total = self.builder.fadd(self._flush(self.read(row, NUMBERS, 4)), total)
            self.store(self._flush(total), row)

        self._each_row(c, multiply)

    def _each_row(self, tile, body):
        """`body(m, row, used)` for every row in use: where it stands, a mask of its pairs."""
        used = self.below(self._pairs(tile), SIDE)

        def row(m, nothing):
            body(m, self.add(self._register(tile), self.multiply(m, 64)), used)
            return nothing

        self.loop(ir.Constant(INT64, 0), self._rows(tile), 1, [], row)

    def _fit(self, c, a, b):
        """Whether c (M, N) += a (M, K) @ b (K, N) in the configuration's M, N and K."""
        same = [
            (self._rows(c), self._rows(a)),
            (self._pairs(c), self._pairs(b)),
            (self._pairs(a), self._rows(b)),
        ]
        fit = [self.builder.icmp_signed("==", *two) for two in same]
        return self.builder.and_(self.builder.and_(fit[0], fit[1]), fit[2])

    def _register(self, tile):
        return self.add(self.state, 64 + 1024 * tile)

    def _rows(self, tile):
        return self.builder.zext(self._load(self.add(self.state, 48 + tile), I8), INT64)

    def _pairs(self, tile):
        """Pairs of bfloat16, or float32, in use in every row."""
        size = self._load(self.add(self.state, 16 + 2 * tile), I16)
        return self.builder.zext(self.builder.lshr(size, ir.Constant(I16, 2)), INT64)

    def _load(self, address, kind):
        return self.builder.load(self._pointer(address, kind), align=1)

    def _number(self, value):
        return ir.Constant(NUMBERS, [value] * SIDE)

    def _numbers(self, pairs):
        """Pairs of bfloat16 as float32: the even ones, and the odd ones."""
        even = self.builder.shl(pairs, numbers([16] * SIDE))
        odd = self.builder.and_(pairs, numbers([-0x10000] * SIDE))
        return [self._flush(self.builder.bitcast(bits, NUMBERS)) for bits in (even, odd)]

    def _fused(self, a, b, c):
        return self._call(f"llvm.fma.{self._name(NUMBERS)}", NUMBERS, [a, b, c])

    def _flush(self, values):
        """Subnormal numbers as 0 of their sign."""
        b = self.builder
        bits = b.bitcast(values, PAIRS)
        exponent = b.and_(bits, numbers([0x7F800000] * SIDE))
        tiny = b.icmp_unsigned("==", exponent, numbers([0] * SIDE))
        sign = b.and_(bits, numbers([-0x80000000] * SIDE))
        return b.bitcast(b.select(tiny, sign, bits), NUMBERS)


WORDS = {types.uint8: Tiles, types.int8: EmulatedTiles}
