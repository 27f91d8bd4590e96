"""Vector code for numba: a few words over LLVM's builder, for the tiles.

A tile is a numba intrinsic: numba calls its `codegen` with an open LLVM function, and the words of
`Emit` append instructions to it. Python's own loops run now, while the code is written, so they
unroll: `for m in range(MR)` writes MR instructions. `Emit.loop` writes a loop of the machine.

    address   an int64: the machine adds to it what Python adds to it
    vector    LANES float32, the width of the CPU's registers: 16 in 512 bits, 8 in 256, 4 in 128
    stored    what is in memory: float32, or 16-bit floats as bits (see sgmv/dtypes.py):
              uint16 is float16, int16 is bfloat16. `load` widens, exactly; `store` rounds, once

A `mask`, where given, names the lanes that exist: no other is read or written, and others read 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from sgmv.kernels.cpu import (
    CONVERTS_FLOAT16,
    FUSES,
    HALVES_BFLOAT16,
    ROUNDS_BFLOAT16,
    SUMS_BFLOAT16,
    VECTOR_BITS,
)
from sgmv.kernels.floats import (
    HALF_NORMAL,
    HALF_OVERFLOWS,
    INFINITY,
    MAGNITUDE,
    ONE_HALF,
    REBIAS,
    REBIAS_FACTOR,
)
from sgmv.kernels.jit import INT64
from sgmv.kernels.records import offset

LANES = (VECTOR_BITS or 512) // 32

F32, F16 = ir.FloatType(), ir.HalfType()
I8, I16, I32 = (ir.IntType(bits) for bits in (8, 16, 32))
STORED = {types.float32: F32, types.uint16: I16, types.int16: I16}


def lanes(element):
    return ir.VectorType(element, LANES)


VECTOR = lanes(F32)
SUBNORMAL = 0x20  # of VFPCLASSPS
ODD, EVEN = 1, 0  # k, and the parts of products that have them
ZERO = ir.Constant(VECTOR, [0.0] * LANES)


def numbers(values):
    """A vector of int32 constants: lane numbers, or the same number in every lane."""
    values = [values] * LANES if isinstance(values, int) else list(values)
    return ir.Constant(ir.VectorType(I32, len(values)), values)


def size(stored):
    """Bytes of one stored element."""
    return 4 if stored == types.float32 else 2


def in_halves(x_like, w_like):
    """Whether products of x and w take the odd k before the even ones, each in a vector."""
    return HALVES_BFLOAT16 and x_like == w_like == types.int16


class Products(NamedTuple):
    """How products of x and w are summed along k: `step` of them at a time, part after part.

    read(address, stored, mask, parts)  what is multiplied of the `step` k at this address, a vector
                                        for each of these parts
    multiply(a, b, sums)                adds a * b to the sums
    """

    read: Callable[..., Any]
    multiply: Callable[..., Any]
    parts: list[int]
    step: int


class Emit:
    """Appends instructions to the LLVM function that `builder` writes."""

    def __init__(self, builder):
        self.builder = builder

    def add(self, *values):
        total, constant = None, 0
        for value in values:
            if isinstance(value, int):
                constant += value
            else:
                total = value if total is None else self.builder.add(total, value)
        if total is None or constant:
            offset = ir.Constant(INT64, constant)
            total = offset if total is None else self.builder.add(total, offset)
        return total

    def multiply(self, value, factor):
        if isinstance(factor, int):
            factor = ir.Constant(INT64, factor)
        return self.builder.mul(value, factor)

    def at_most(self, value, limit):
        """min(value, limit); limit is an int64 of the machine."""
        if isinstance(value, int):
            value = ir.Constant(INT64, value)
        return self.builder.select(self.builder.icmp_signed("<", value, limit), value, limit)

    def at_least(self, value, limit):
        """max(value, limit) of int64s of the machine."""
        return self.builder.select(self.builder.icmp_signed(">", value, limit), value, limit)

    def integer(self, address):
        """The int64 at this address."""
        return self.builder.load(self._pointer(address, INT64), align=8)

    def numbers(self, value):
        """The numbers of a tuple."""
        return [self.builder.extract_value(value, i) for i in range(value.type.count)]

    def fields(self, kind, address, *names):
        """These fields of the record of this kind at the address."""
        return [self.integer(self.add(address, offset(kind, name))) for name in names]

    def below(self, count, width=LANES):
        """A mask: the lanes whose number is below the int64 `count`."""
        narrow = self.builder.trunc(count, I32)
        limit = self.everywhere(narrow, ir.VectorType(I32, width))
        return self.builder.icmp_signed("<", numbers(range(width)), limit)

    def load(self, address, stored=types.float32, mask=None, vector=None):
        """The stored elements at this address as float32."""
        found = self.read(address, vector or lanes(STORED[stored]), size(stored), mask)
        if stored == types.uint16:
            if not CONVERTS_FLOAT16:
                return self._from_float16_by_integers(found)
            return self.builder.fpext(self.builder.bitcast(found, lanes(F16)), VECTOR)
        if stored == types.int16:
            bits = self.builder.shl(self.builder.zext(found, lanes(I32)), numbers(16))
            return self.builder.bitcast(bits, VECTOR)
        return found

    def read(self, address, vector, align, mask=None):
        """The elements of a vector as they are stored at this address."""
        pointer = self._pointer(address, vector)
        if mask is None:
            return self.builder.load(pointer, align=align)
        zero = ir.Constant(vector, None)
        name = f"llvm.masked.load.{self._name(vector)}.{self._name(pointer.type)}"
        return self._call(name, vector, [pointer, ir.Constant(I32, align), mask, zero])

    def store(self, value, address, stored=types.float32, mask=None):
        """Round float32 to the stored type, to nearest even, and store it at this address."""
        if stored == types.uint16 and CONVERTS_FLOAT16:
            value = self.builder.bitcast(self.builder.fptrunc(value, lanes(F16)), lanes(I16))
        elif stored == types.uint16:
            value = self._float16_by_integers(value)
        elif stored == types.int16:
            value = self._bfloat16(value)
        self.store_as(value, address, size(stored), mask)

    def store_as(self, value, address, align, mask=None):
        """Store the elements at this address as they are."""
        pointer = self._pointer(address, value.type)
        if mask is None:
            self.builder.store(value, pointer, align=align)
            return
        name = f"llvm.masked.store.{self._name(value.type)}.{self._name(pointer.type)}"
        self._call(name, ir.VoidType(), [value, pointer, ir.Constant(I32, align), mask])

    def _bfloat16(self, value):
        if not ROUNDS_BFLOAT16:
            return self._bfloat16_by_integers(value)
        b, vector = self.builder, lanes(I16)
        name = f"llvm.x86.avx512bf16.cvtneps2bf16.{VECTOR_BITS}"
        rounded = self._call(name, vector, [value])
        # It takes subnormal numbers for zero.
        flags = lanes(ir.IntType(1)), [value, ir.Constant(I32, SUBNORMAL)]
        subnormal = self._call(f"llvm.x86.avx512.fpclass.ps.{VECTOR_BITS}", *flags)
        none = ir.Constant(ir.IntType(LANES), 0)
        before = b.block
        with b.if_then(b.icmp_unsigned("!=", b.bitcast(subnormal, none.type), none), likely=False):
            kept, there = self._bfloat16_by_integers(value), b.block
        result = b.phi(vector)
        result.add_incoming(rounded, before)
        result.add_incoming(kept, there)
        return result

    def _bfloat16_by_integers(self, value):
        b = self.builder
        bits = b.bitcast(value, lanes(I32))
        odd = b.and_(b.lshr(bits, numbers(16)), numbers(1))
        rounded = b.add(b.add(bits, numbers(0x7FFF)), odd)
        quiet = b.or_(bits, numbers(0x400000))
        upper = b.select(b.fcmp_unordered("uno", value, value), quiet, rounded)
        return b.trunc(b.lshr(upper, numbers(16)), lanes(I16))

    def _from_float16_by_integers(self, found):
        """As floats.float16_to_float32 does."""
        b = self.builder
        bits = b.zext(found, lanes(I32))
        magnitude = b.shl(b.and_(bits, numbers(0x7FFF)), numbers(13))
        rebias = ir.Constant(VECTOR, [float(REBIAS_FACTOR)] * LANES)
        value = b.bitcast(b.fmul(b.bitcast(magnitude, VECTOR), rebias), lanes(I32))
        special = b.icmp_unsigned(">=", magnitude, numbers(0x7C00 << 13))
        value = b.select(special, b.or_(magnitude, numbers(int(INFINITY))), value)
        sign = b.shl(b.and_(bits, numbers(0x8000)), numbers(16))
        return b.bitcast(b.or_(value, sign), VECTOR)

    def _float16_by_integers(self, value):
        """As floats.float32_to_float16 does."""
        b = self.builder
        bits = b.bitcast(value, lanes(I32))
        magnitude = b.and_(bits, numbers(int(MAGNITUDE)))
        odd = b.and_(b.lshr(magnitude, numbers(13)), numbers(1))
        rounded = b.add(b.sub(magnitude, numbers(int(REBIAS))), b.add(odd, numbers(0xFFF)))
        half = b.lshr(rounded, numbers(13))
        moved = b.fadd(b.bitcast(magnitude, VECTOR), ir.Constant(VECTOR, [0.5] * LANES))
        subnormal = b.sub(b.bitcast(moved, lanes(I32)), numbers(int(ONE_HALF)))
        half = b.select(b.icmp_signed("<", magnitude, numbers(int(HALF_NORMAL))), subnormal, half)
        is_nan = b.icmp_signed(">", magnitude, numbers(int(INFINITY)))
        large = b.icmp_signed(">=", magnitude, numbers(int(HALF_OVERFLOWS)))
        half = b.select(large, b.select(is_nan, numbers(0x7E00), numbers(0x7C00)), half)
        sign = b.lshr(b.sub(bits, magnitude), numbers(16))
        return b.trunc(b.or_(half, sign), lanes(I16))

    def products(self, x_like, w_like):
        """How to sum products of x and w.

        Of bfloat16 lane i gets those of k = 2i + 1 and 2i, in this order, each rounded once, by
        the CPU's own instruction or by two. For the first, subnormal numbers, read or made,
        count as 0.
        """
        if x_like == w_like == types.int16 and SUMS_BFLOAT16:
            return Products(self._pairs, self._add_pairs, [0], 2 * LANES)
        if in_halves(x_like, w_like):
            return Products(self._halves, self.fma, [ODD, EVEN], 2 * LANES)
        return Products(self._whole, self.fma, [0], LANES)

    def _whole(self, address, stored, mask, _parts):
        return [self.load(address, stored, mask)]

    def _halves(self, address, stored, mask, parts):
        """The odd of 2 * LANES bfloat16 as float32, the even ones, or both."""
        b, vector = self.builder, ir.VectorType(I16, 2 * LANES)
        if parts == [ODD]:  # each is the upper half of a float32: the lower halves are not read
            odd = ir.Constant(ir.VectorType(ir.IntType(1), 2 * LANES), [0, 1] * LANES)
            odd = odd if mask is None else b.and_(mask, odd)
            return [b.bitcast(self.read(address, vector, size(stored), odd), VECTOR)]
        both = b.bitcast(self.read(address, vector, size(stored), mask), lanes(I32))
        halves = {ODD: b.and_(both, numbers(-1 << 16)), EVEN: b.shl(both, numbers(16))}
        return [b.bitcast(halves[part], VECTOR) for part in parts]

    def even_and_odd(self, address):
        """Of 2 * LANES bfloat16 the even ones, and the odd ones, as float32."""
        return self._halves(address, types.int16, None, [EVEN, ODD])

    def in_turn(self, even, odd):
        """Two vectors of which these are the even and the odd lanes."""
        single = [[lane] for lane in range(LANES)]
        halves = single[: LANES // 2], single[LANES // 2 :]
        return [self._interleave(even, odd, half) for half in halves]

    def _pairs(self, address, stored, mask, _parts):
        read = self.read(address, ir.VectorType(I16, 2 * LANES), size(stored), mask)
        return [self.builder.bitcast(read, lanes(I32))]

    def _add_pairs(self, a, b, sums):
        return self._call(f"llvm.x86.avx512bf16.dpbf16ps.{VECTOR_BITS}", VECTOR, [sums, a, b])

    def broadcast(self, address):
        """The one float32 at this address, in every lane."""
        return self.everywhere(self.builder.load(self._pointer(address, F32), align=4))

    def everywhere(self, number, vector=VECTOR):
        """The number in every lane."""
        undefined = ir.Constant(vector, ir.Undefined)
        single = self.builder.insert_element(undefined, number, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(single, undefined, numbers([0] * vector.count))

    def fma(self, a, b, c):
        """A * b + c, rounded once; twice on a CPU that does not fuse them."""
        if not FUSES:
            return self.builder.fadd(self.builder.fmul(a, b), c)
        return self._call(f"llvm.fma.{self._name(VECTOR)}", VECTOR, [a, b, c])

    def prefetch(self, address, write=False):
        """Begin to bring the cache line at this address near; any address will do."""
        pointer = self._pointer(address, I8)
        near, data = ir.Constant(I32, 3), ir.Constant(I32, 1)
        name = f"llvm.prefetch.{self._name(pointer.type)}"
        self._call(name, ir.VoidType(), [pointer, ir.Constant(I32, int(write)), near, data])

    def loop(self, start, stop, step, carried, body):
        """`for i in range(start, stop, step): carried = body(i, carried)`; returns the last."""
        b = self.builder
        before, inside, after = b.block, b.append_basic_block(), b.append_basic_block()
        b.cbranch(b.icmp_signed("<", start, stop), inside, after)
        b.position_at_end(inside)
        i = b.phi(INT64)
        phis = [b.phi(value.type) for value in carried]
        results = body(i, phis)
        following = self.add(i, step)
        end = b.block
        for phi, first, last in zip([i, *phis], [start, *carried], [following, *results]):  # noqa: B905
            phi.add_incoming(first, before)
            phi.add_incoming(last, end)
        b.cbranch(b.icmp_signed("<", following, stop), inside, after)
        b.position_at_end(after)
        finals = [b.phi(value.type) for value in carried]
        for phi, first, last in zip(finals, carried, results):  # noqa: B905
            phi.add_incoming(first, before)
            phi.add_incoming(last, end)
        return finals

    def when(self, condition, values, body):
        """`values = body(values)` where the condition holds; returns them."""
        b = self.builder
        before, inside, after = b.block, b.append_basic_block(), b.append_basic_block()
        b.cbranch(condition, inside, after)
        b.position_at_end(inside)
        changed = body(values)
        end = b.block
        b.branch(after)
        b.position_at_end(after)
        finals = [b.phi(value.type) for value in values]
        for phi, value, other in zip(finals, values, changed):  # noqa: B905
            phi.add_incoming(value, before)
            phi.add_incoming(other, end)
        return finals

    def is_there(self, address):
        """Whether this address is not 0."""
        return self.builder.icmp_signed("!=", address, ir.Constant(INT64, 0))

    def switch(self, value, cases, body):
        """`body(case)` for the case that equals the int64 `value`; others do nothing."""
        b = self.builder
        after = b.append_basic_block()
        choice = b.switch(value, after)
        for case in cases:
            block = b.append_basic_block()
            choice.add_case(ir.Constant(INT64, case), block)
            b.position_at_end(block)
            body(case)
            b.branch(after)
        b.position_at_end(after)

    def sums(self, vectors):
        """One vector whose lane q is the sum of the lanes of vectors[q]; of LANES lanes, or twice.

        Each sum is a tree over neighbouring lanes, ((0+1)+(2+3))+..., whatever its company: at each
        step two vectors become one that holds half as many, twice as large parts of both.

            a0 a1 a2 a3     b0 b1 b2 b3   ->   a01 b01 a23 b23   ->   a0123 b0123 ...
        """
        if len(vectors) > LANES:
            halves = self.sums(vectors[:LANES]), self.sums(vectors[LANES:])
            return self.builder.shuffle_vector(*halves, numbers(range(2 * LANES)))
        step = 1
        while step < LANES:
            if len(vectors) % 2:
                vectors = [*vectors, ZERO]
            parts = [range(c, c + step) for c in range(0, LANES, step)]
            even, odd = parts[0::2], parts[1::2]
            vectors = [
                self.builder.fadd(self._interleave(a, b, even), self._interleave(a, b, odd))
                for a, b in zip(vectors[0::2], vectors[1::2])  # noqa: B905
            ]
            step *= 2
        return vectors[0]

    def transposed(self, rows):
        """The columns of a square, LANES vectors, given as its rows.

        At each step two rows swap every other part, of one lane, then of two, and so on.

            a0 a1 a2 a3     b0 b1 b2 b3   ->   a0 b0 a2 b2     a1 b1 a3 b3   -> ...
        """
        rows = list(rows)
        step = 1
        while step < LANES:
            parts = [range(c, c + step) for c in range(0, LANES, step)]
            for i in (i for i in range(LANES) if not i & step):
                a, b = rows[i], rows[i + step]
                rows[i] = self._interleave(a, b, parts[0::2])
                rows[i + step] = self._interleave(a, b, parts[1::2])
            step *= 2
        return rows

    def _interleave(self, a, b, parts):
        """These parts of a and of b in turn."""
        chosen = [c + lane for part in parts for c in (0, LANES) for lane in part]
        return self.builder.shuffle_vector(a, b, numbers(chosen))

    def part(self, vector, first, count):
        """The lanes first:first + count as a shorter vector."""
        nothing = ir.Constant(vector.type, ir.Undefined)
        return self.builder.shuffle_vector(vector, nothing, numbers(range(first, first + count)))

    def _pointer(self, address, kind):
        return self.builder.inttoptr(address, kind.as_pointer())

    def _call(self, name, result, arguments):
        module = self.builder.module
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(
            module.globals.get(name) or ir.Function(module, kind, name), arguments
        )

    def _name(self, kind):
        """LLVM's short name of a type, as overloaded intrinsics carry it."""
        if isinstance(kind, ir.VectorType):
            return f"v{kind.count}{self._name(kind.element)}"
        if isinstance(kind, ir.PointerType):
            typed = not str(kind).startswith("ptr")
            return "p0" + (self._name(kind.pointee) if typed else "")
        return {"float": "f32", "half": "f16"}.get(str(kind), str(kind))
