"""AMX's tile instructions as words of `Emit`: the CPU's own, or each computed by vectors.

A tile register holds 16 rows of 64 bytes. A configuration says how much of each of the eight is in
use; `state` is the address of its 64 bytes, and of the registers where they are emulated:

    state + 0    uint8         1, or 0 where nothing is configured
          + 16   uint16 (8,)   bytes in use of a register's rows
          + 48   uint8 (8,)    rows in use
          + 64   (8, 16, 64)   the emulated registers

TDPBF16PS adds to c (M, N), float32, the product of a (M, 32) and b (32, N), bfloat16. b keeps two k
next to each other, (16, N, 2), as the rows of a do anyhow:

         a  k ->                          b  n ->
    m   [ 0 1 | 2 3 | 4 5 | .. ]         [ 0 1 | 0 1 | 0 1 | .. ]
    |   [ 0 1 | 2 3 | 4 5 | .. ]         [ 2 3 | 2 3 | 2 3 | .. ]
    v     ..                               ..

    c[m, n] += (sum over even k of a[m, k] * b[k, n]) + (sum over odd k of the same)

Both sums begin at 0 and add k in ascending order, fused; each operation rounds to nearest even, and
what is below 2**-126, read or made, counts as 0. So an element's bits depend on one row of a and
one column of b, and on nothing beside them.

`write_configuration`, `configure` and `release` are what the kernels call around their products.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: TDPBF16PS,
LDTILECFG, TILELOADD, TILESTORED. The registers are named here, not chosen by the compiler, which
crashed over loops that carry tiles.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sgmv.kernels.emit import F32, I8, I16, I32, Emit, numbers
from sgmv.kernels.jit import INT64, jit, vector

SIDE = 16  # rows of a register, and numbers of 32 bits in a row
STEP = 2 * SIDE  # k of one product
TILE_BYTES = SIDE * 64
SUMS, IN_PLACE, PANELS = (0, 1, 2, 3), (4, 5), (6, 7)  # what the kernels keep in the registers
NUMBERS, PAIRS = ir.VectorType(F32, SIDE), ir.VectorType(I32, SIDE)
START = ir.Constant(INT64, 0)
STATE_BYTES = 64 + 8 * 1024


class Tiles(Emit):
    """The CPU's instructions. A tile is its register's number, 0 to 7."""

    def __init__(self, builder, state):
        super().__init__(builder)
        self.state = state

    def configure(self):
        self._do("ldtilecfg", self._pointer(self.state, I8))

    def release(self):
        self._do("tilerelease")

    def zero_tile(self, tile):
        self._do("tilezero", tile)

    def load_tile(self, tile, address, stride):
        """Read the tile's rows, `stride` bytes apart."""
        self._do("tileloadd64", tile, self._pointer(address, I8), stride)

    def store_tile(self, tile, address, stride):
        """Write the tile's rows, `stride` bytes apart."""
        self._do("tilestored64", tile, self._pointer(address, I8), stride)

    def multiply_tiles(self, c, a, b):
        """The drawing above."""
        self._do("tdpbf16ps", c, a, b)

    def _do(self, name, *operands):
        values = [ir.Constant(I8, value) if isinstance(value, int) else value for value in operands]
        self._call(f"llvm.x86.{name}", ir.VoidType(), values)


class EmulatedTiles(Tiles):
    """The same without AMX. Where the CPU would refuse the tiles' shapes, products are NaN."""

    def configure(self):
        pass  # the configuration is read from memory

    def release(self):
        self.store(ir.Constant(PAIRS, None), self.state)

    def zero_tile(self, tile):
        self._each_row(tile, lambda m, row: self.store(ir.Constant(PAIRS, None), row))

    def load_tile(self, tile, address, stride):
        used = self.below(self._pairs(tile), SIDE)

        def load(m, row):
            memory = self.add(address, self.multiply(stride, m))
            self.store(self.read(memory, PAIRS, 2, used), row)

        self._each_row(tile, load)

    def store_tile(self, tile, address, stride):
        used = self.below(self._pairs(tile), SIDE)

        def store(m, row):
            memory = self.add(address, self.multiply(stride, m))
            self.store(self.read(row, PAIRS, 4), memory, mask=used)

        self._each_row(tile, store)

    def multiply_tiles(self, c, a, b):
        same = [(self._rows(c), self._rows(a)), (self._pairs(c), self._pairs(b))]
        same.append((self._pairs(a), self._rows(b)))
        first = ir.Constant(NUMBERS, [0.0] * SIDE)
        for one, other in same:
            fits = self.builder.icmp_signed("==", one, other)
            first = self.builder.select(fits, first, ir.Constant(NUMBERS, [np.nan] * SIDE))

        def multiply(m, row):
            def step(k, sums):
                pair = self._element(self._register(a), self.add(self.multiply(m, 16), k), I32)
                column = self.read(self.add(self._register(b), self.multiply(k, 64)), PAIRS, 4)
                operands = zip(self._halves(self.everywhere(pair, PAIRS)), self._halves(column))  # noqa: B905
                return [self._fused(*each, sums[i]) for i, each in enumerate(operands)]

            even, odd = self.loop(START, self._pairs(a), 1, [first] * 2, step)
            both = self._flush(self.builder.fadd(even, odd))
            self.store(self._flush(self.builder.fadd(self.read(row, NUMBERS, 4), both)), row)

        self._each_row(c, multiply)

    def _each_row(self, tile, body):
        """`body(m, address)` for every row in use."""

        def row(m, _):
            body(m, self.add(self._register(tile), self.multiply(m, 64)))
            return []

        self.loop(START, self._rows(tile), 1, [], row)

    def _register(self, tile):
        return self.add(self.state, 64 + 1024 * tile)

    def _rows(self, tile):
        rows = self._element(self.add(self.state, 48), ir.Constant(INT64, tile), I8)
        return self.builder.zext(rows, INT64)

    def _pairs(self, tile):
        """Pairs of bfloat16, or float32, in use of every row."""
        size = self._element(self.add(self.state, 16), ir.Constant(INT64, tile), I16)
        return self.builder.zext(self.builder.lshr(size, ir.Constant(I16, 2)), INT64)

    def _element(self, address, index, kind):
        address = self.add(address, self.multiply(index, kind.width // 8))
        return self.builder.load(self._pointer(address, kind), align=1)

    def _halves(self, pairs):
        """Pairs of bfloat16 as float32: the even k, and the odd ones."""
        even = self.builder.shl(pairs, numbers([16] * SIDE))
        odd = self.builder.and_(pairs, numbers([-0x10000] * SIDE))
        return [self._flush(self.builder.bitcast(bits, NUMBERS)) for bits in (even, odd)]

    def _fused(self, a, b, c):
        return self._flush(self._call(f"llvm.fma.{self._name(NUMBERS)}", NUMBERS, [a, b, c]))

    def _flush(self, values):
        """Subnormal numbers as 0 of their sign."""
        b = self.builder
        bits = b.bitcast(values, PAIRS)
        exponent = b.and_(bits, numbers([0x7F800000] * SIDE))
        tiny = b.icmp_unsigned("==", exponent, numbers([0] * SIDE))
        return b.bitcast(b.select(tiny, b.and_(bits, numbers([-0x80000000] * SIDE)), bits), NUMBERS)


# Compiled code is told by a number's type which of them computes, as it is told float types.
CPU, EMULATION = np.uint8(0), np.int8(0)
WORDS = {types.uint8: Tiles, types.int8: EmulatedTiles}


def on_the_stack(size):
    """An intrinsic: the address of `size` bytes on the stack, at the start of a cache line."""

    @intrinsic
    def task_memory(typingctx):
        def codegen(context, builder, signature, args):
            with builder.goto_entry_block():
                memory = builder.alloca(ir.ArrayType(I8, size))
                memory.align = 64
            return builder.ptrtoint(memory, INT64)

        return types.int64(), codegen

    return task_memory


@jit()
def write_configuration(memory, rows, columns):
    """Tiles in place (rows, 16 pairs), panels (16 pairs, columns), sums (rows, columns)."""
    configuration = vector(memory, 64, np.uint8(0))
    configuration[:] = 0
    configuration[0] = 1
    for tile in range(8):
        configuration[16 + 2 * tile] = 4 * (SIDE if tile in IN_PLACE else columns)
        configuration[48 + tile] = SIDE if tile in PANELS else rows


@intrinsic
def configure(typingctx, unit, memory):
    """Put the configuration at `memory` in force."""

    def codegen(context, builder, signature, args):
        WORDS[unit](builder, args[1]).configure()
        return context.get_dummy_value()

    return types.void(unit, types.int64), codegen


@intrinsic
def release(typingctx, unit, memory):
    """Leave the tiles as other code expects them, empty."""

    def codegen(context, builder, signature, args):
        WORDS[unit](builder, args[1]).release()
        return context.get_dummy_value()

    return types.void(unit, types.int64), codegen
