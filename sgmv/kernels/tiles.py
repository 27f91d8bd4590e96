"""The fast kernels: register tiles of vectors, of 512, 256 or 128 bits.

A tile is a small block of the result that stays in registers while the sums run. MR is its rows;
LANES is a register's float32: 16, or 8 in 256 bits, 4 in 128. Shrink and expand form their sums
differently.

shrink    v[p, j] = sum over k of x[rows[p], k] * wa[j, k]. x and wa both run along k: a register
          holds LANES consecutive k of one row, and every (row, rank) has a register of partial
          sums, one per lane. MR rows and NR ranks load MR + NR registers for MR * NR fused
          multiply-adds:

                         k ->                               rank j  j+1  j+2  j+3
              x row p    [################]           row p   [ s ][ s ][ s ][ s ]
              x row p+1  [################]     =>    row p+1 [ s ][ s ][ s ][ s ]      6 x 4 tile:
              wa rank j  [################]            ...                              24 registers
              wa j+1     [################]

          At the end of a K block a register's lanes are added up, neighbours first, and the sum is
          added to v. Weights are stored as Punica has them, wa (r, h_in).

expand    y[rows[p], c] += scaling * sum over j of v[p, j] * wb[j, c]. wb and y both run along c, so
          a register holds LANES columns of one row's sum, and each v[p, j] is spread over a whole
          register. 6 rows x 64 columns are 24 registers. wb (r, h_out) would be read in leaps of a
          whole row, so it is packed when loaded, in panels of 64 columns:

              wb     j=0 [ panel 0 | panel 1 | panel 2 ]        in memory, each panel (r, 64):
                     j=1 [         |         |         ]
                     j=2 [         |         |         ]        panel 0 j=0 j=1 j=2, panel 1 j=0 ...

          Other engines' weights are not packed: a task packs what it is about to read (panels.py).
          With DoRA y is multiplied by the gains of its columns before it is stored.

Same row, same bits. In shrink, lane k % LANES adds the k of its own in ascending order, K is cut
every K_BLOCK whatever the tile, and blocks are added in ascending order (for bfloat16 in vectors of
512 bits, lane k // 2 % LANES, an odd k before the even one below it; K cut every PAIRS_BLOCK where
the CPU's own products do both); in expand, every element adds j = 0, 1, 2, ... in one register.
Neither depends on MR or NR: a row's tile may have any shape.

Edge rules as in loops.py: nothing past a rank, a row or a column is read or written. The last
k of a row, the last ranks and the last columns are masked, not padded.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sgmv.kernels.cpu import ASKS_AHEAD, FUSES, REGISTERS
from sgmv.kernels.emit import F32, LANES, ZERO, Emit, size
from sgmv.kernels.jit import INT64
from sgmv.kernels.records import CALL, PANEL

# The other registers are for what the sums are made of, and for products that are not fused.
SUMS = REGISTERS * 3 // 4 if FUSES else REGISTERS // 2
MOST_ROWS = SUMS // 4


def _as_many(rows: int, most: int) -> int:
    """The most sums of a row, a power of two, that there are registers for; at most `most`."""
    return next((n for n in (16, 8, 4) if n <= most and n * rows <= SUMS), 1)


# A tile of few rows takes more ranks at once, for fewer reads of x; and more vectors of columns,
# since a single row needs eight sums and more to hide a FMA's latency.
RANKS = {rows: _as_many(rows, 8) for rows in range(1, MOST_ROWS + 1)}
COLUMN_VECTORS = {rows: _as_many(rows, PANEL // LANES) for rows in range(1, MOST_ROWS + 1)}
Y_AHEAD = 512  # bytes before its use that y is asked for
W_AHEAD = 512  # and wa, where that is worth while
PAIR, TRIPLE = (types.UniTuple(types.int64, count) for count in (2, 3))


def _shrink_tile(e, x_rows, w_at, copies, ranks, width, targets, fresh, x_like, w_like):
    """targets[m][:ranks] (+)= x_rows[m][:width] @ w[:ranks, :width].T: the drawing above.

    copies  (address, bytes from rank to rank) where the vectors of w go that are multiplied; or
            None
    """
    mr, nr = len(x_rows), RANKS[len(x_rows)]
    w, w_stride, after = w_at
    # Past the last rank the last one is read again, and its sum is dropped.
    last = e.add(ranks, -1)
    places = [e.at_most(q, last) for q in range(nr)]
    steps = [e.multiply(w_stride, place) for place in places]
    w_rows = [e.add(w, step) for step in steps]
    if copies:
        copies = [e.add(copies[0], e.multiply(copies[1], place)) for place in places]

    products = e.products(x_like, w_like)
    per_vector = products.step
    copied_size = len(products.parts) * LANES * 4 // per_vector  # of a k, in bytes
    # Parts of one read, where all of x's find registers beside the sums; or a read for each part.
    fits = mr * (nr + len(products.parts)) <= REGISTERS - 6
    turns = [products.parts] if fits else [[part] for part in products.parts]

    def step(k, sums, mask=None, ahead=None):
        sums = list(sums)
        kx, kw = e.multiply(k, size(x_like)), e.multiply(k, size(w_like))
        for parts in turns:
            values = [products.read(e.add(row, kx), x_like, mask, parts) for row in x_rows]
            for q in range(nr):
                place = e.add(w_rows[q], kw)
                for line in range(0, per_vector * size(w_like) if ahead else 0, 64):
                    e.prefetch(e.add(ahead[q], kw, line))
                for i, weight in enumerate(products.read(place, w_like, mask, parts)):
                    if copies:  # a masked part is stored with zeros behind it
                        vector = products.parts.index(parts[i]) * LANES * 4
                        there = e.add(copies[q], e.multiply(k, copied_size), vector)
                        e.store_as(weight, there, 4)
                    for m in range(mr):
                        sum_ = sums[m * nr + q]
                        sums[m * nr + q] = products.multiply(values[m][i], weight, sum_)
        return sums

    def masked_step(k, sums):
        return step(k, sums, e.below(e.builder.sub(width, k), per_vector))

    zero = ir.Constant(INT64, 0)
    whole = e.builder.and_(width, ir.Constant(INT64, -per_vector))
    sums, start = [ZERO] * (mr * nr), zero
    if mr == 1 and ASKS_AHEAD:  # one row waits for weights alone: these, then what comes after
        start = e.at_least(e.add(whole, -(W_AHEAD // size(w_like))), zero)
        here = [e.add(row, W_AHEAD) for row in w_rows]
        sums = e.loop(zero, start, per_vector, sums, lambda k, sums: step(k, sums, ahead=here))
        there = [e.add(after, step, e.multiply(start, -size(w_like))) for step in steps]
        sums = e.loop(start, whole, per_vector, sums, lambda k, sums: step(k, sums, ahead=there))
    else:
        sums = e.loop(zero, whole, per_vector, sums, step)
    sums = e.loop(whole, width, per_vector, sums, masked_step)

    _add_totals(e, sums, targets, ranks, fresh)


def _add_totals(e, sums, targets, ranks, fresh):
    """targets[m][:ranks] (+)= the lanes of the row's sums added up."""
    mr, nr = len(targets), len(sums) // len(targets)
    row = ir.VectorType(F32, nr)
    present = e.below(ranks, nr)
    together = max(1, LANES // nr)
    for m in range(mr):
        if m % together == 0:
            totals = e.sums(sums[m * nr : (m + together) * nr])
        old = e.load(targets[m], types.float32, present, row)
        old = e.builder.select(fresh, ir.Constant(row, None), old)
        total = e.builder.fadd(old, e.part(totals, m % together * nr, nr))
        e.store(total, targets[m], types.float32, present)


@intrinsic
def shrink_tiles(
    typingctx, x_like, w_like, call, some_rows, x_at, w_at, copy_at, some_ranks, some_k
):
    """v[p:p + count, low:high] (+)= x[rows[p:p + count], k:k + width] @ wa[low:high, k:].T.

    Semantics: k = 0 overwrites v, any other adds to it. 1 <= count <= MOST_ROWS; with x_at or
    copy_at MOST_ROWS - 1 <= count, as in tasks of more than FEW_ROWS rows.
    call  address of the call
    x_at  None; or (address, bytes from row to row) of these rows of x, one after the other
    w_at  (address, bytes from rank to rank) of the adapter's wa (r, h_in); and where the next call
          will begin to read, as far as is known
    copy_at  None; or (address, bytes from rank to rank), where the vectors of wa go that are
             multiplied, in their order
    some_rows  (p, count);  some_ranks  (low, high);  some_k  (k, width)
    """

    def codegen(context, builder, signature, args):
        e = Emit(builder)
        call = args[2]
        (p, count), (wa, w_stride, following) = e.numbers(args[3]), e.numbers(args[5])
        (low, high), (k, width) = e.numbers(args[7]), e.numbers(args[8])
        copied = None if copy_at == types.none else e.numbers(args[6])
        v, v_stride, rows = e.fields(CALL, call, "v", "v_stride", "x_rows")
        in_order = x_at != types.none
        x, x_stride = e.numbers(args[4]) if in_order else e.fields(CALL, call, "x", "x_stride")
        x = e.add(x, e.multiply(k, size(x_like)))
        w = e.add(wa, e.multiply(k, size(w_like)))
        rows = e.add(rows, e.multiply(p, 8))
        v = e.add(v, e.multiply(v_stride, p))
        fresh = builder.icmp_signed("==", k, ir.Constant(INT64, 0))

        def all_ranks(mr):
            numbers = [e.integer(e.add(rows, 8 * m)) for m in range(mr)]
            if in_order:
                numbers = [ir.Constant(INT64, m) for m in range(mr)]
            x_rows = [e.add(x, e.multiply(x_stride, number)) for number in numbers]
            v_rows = [e.add(v, e.multiply(v_stride, m)) for m in range(mr)]

            def tile(j, nothing):
                w_j = e.add(w, e.multiply(w_stride, j))
                targets = [e.add(row, e.multiply(j, 4)) for row in v_rows]
                ranks, nr = builder.sub(high, j), RANKS[mr]
                is_last = builder.icmp_signed("<=", ranks, ir.Constant(INT64, nr))
                after = builder.select(is_last, following, e.add(w_j, e.multiply(w_stride, nr)))
                w_at = w_j, w_stride, after
                copies = copied and (e.add(copied[0], e.multiply(copied[1], j)), copied[1])
                _shrink_tile(e, x_rows, w_at, copies, ranks, width, targets, fresh, x_like, w_like)
                return nothing

            e.loop(low, high, RANKS[mr], [], tile)

        fewest = MOST_ROWS - 1 if in_order or copied else 1
        e.switch(count, range(fewest, MOST_ROWS + 1), all_ranks)
        return context.get_dummy_value()

    operands = types.int64, PAIR, x_at, TRIPLE, copy_at, PAIR, PAIR
    return types.void(x_like, w_like, *operands), codegen


def _expand_tile(e, nv, y_rows, v_rows, w_row, r, factors, mask, w_like, y_like):
    """y_rows[m][:nv * LANES] += scale * (v_rows[m][:r] @ w[:r, :nv * LANES]), rounded once.

    w_row(j)  the address of w[j]
    factors   scale; None, or the addresses of DoRA's gains and offsets; the tile's first column
    """
    mr = len(y_rows)
    in_pairs = w_like == types.int16 and nv > 1 and mr <= nv

    def value(m, j):
        return e.broadcast(e.add(v_rows[m], e.multiply(j, 4)))

    def weights(j):
        """The vectors of w[j], each read when it is asked for."""
        for q in range(0, nv, 2 if in_pairs else 1):
            address = e.add(w_row(j), q * LANES * size(w_like))
            yield from e.even_and_odd(address) if in_pairs else [e.load(address, w_like, mask)]

    def step(j, sums):
        sums = list(sums)
        if mr <= nv:  # the fewer wait in registers, the others pass through one
            values = [value(m, j) for m in range(mr)]
            for q, passing in enumerate(weights(j)):
                for m in range(mr):
                    sums[m * nv + q] = e.fma(values[m], passing, sums[m * nv + q])
        else:
            waiting = list(weights(j))
            for m in range(mr):
                passing = value(m, j)
                for q in range(nv):
                    sums[m * nv + q] = e.fma(passing, waiting[q], sums[m * nv + q])
        return sums

    sums = e.loop(ir.Constant(INT64, 0), r, 1, [ZERO] * (mr * nv), step)
    if in_pairs:
        sums = [each for q in range(0, mr * nv, 2) for each in e.in_turn(*sums[q : q + 2])]
    scale, gained, column = factors
    if gained:
        gains, offsets = _gains(e, nv, *gained, column, mask)
    for m in range(mr):
        for q in range(nv):
            target = e.add(y_rows[m], q * LANES * size(y_like))
            total = e.fma(scale, sums[m * nv + q], e.load(target, y_like, mask))
            if gained:
                total = e.fma(gains[q], total, offsets[q])
            e.store(total, target, y_like, mask)


def _gains(e, nv, gains, offsets, column, mask):
    """Vectors of the gains and offsets from this column on; 0 where there are no offsets."""

    def row(address):
        first = e.add(address, e.multiply(column, 4))
        return [e.load(e.add(first, q * LANES * 4), mask=mask) for q in range(nv)]

    return row(gains), e.when(e.is_there(offsets), [ZERO] * nv, lambda _: row(offsets))


def _rows_at(e, call, position, count):
    """The addresses of the rows of y of `count` positions."""
    y, y_stride, rows = e.fields(CALL, call, "y", "y_stride", "y_rows")
    first = e.add(rows, e.multiply(position, 8))
    numbers = [e.integer(e.add(first, 8 * m)) for m in range(count)]
    return [e.add(y, e.multiply(y_stride, number)) for number in numbers]


def _ask_for_y(e, y_rows, next_rows, start, end, width):
    """Ask for Y_AHEAD bytes after `start` of the rows; past their `end`, for the next rows."""
    soon = e.add(start, Y_AHEAD)
    inside = e.builder.icmp_signed("<", soon, end)
    for both in zip(y_rows, next_rows):  # noqa: B905
        row = e.add(e.builder.select(inside, *both), soon)
        for offset in range(0, width, 64):
            e.prefetch(e.add(row, offset), write=True)


@intrinsic
def expand_tiles(typingctx, w_like, y_like, call, some_rows, wb, r, scaling, gains, some_columns):
    """y[rows[p:p + count], low:high] += scaling * (v[p:p + count, :r] @ wb[:, low:high]).

    Semantics: low is a multiple of PANEL, high too or else h_out. 1 <= count <= MOST_ROWS.
    call  address of the call;  wb  address of the adapter's panels
    gains  None; or DoRA's, at two addresses, the second may be 0: y = gains * y + offsets then
    some_rows  (p, count, where `count` rows come next);  some_columns  (low, high)
    """

    def codegen(context, builder, signature, args):
        e = Emit(builder)
        call, some_rows, wb, r, scaling, at, some_columns = args[2:]
        (p, count, after), (low, high) = e.numbers(some_rows), e.numbers(some_columns)
        gained = None if gains == types.none else e.numbers(at)
        v, v_stride = e.fields(CALL, call, "v", "v_stride")
        v, scale = e.add(v, e.multiply(v_stride, p)), e.everywhere(scaling)
        whole = e.add(low, builder.and_(builder.sub(high, low), ir.Constant(INT64, -PANEL)))
        end, width = (e.multiply(c, size(y_like)) for c in (high, builder.sub(high, low)))

        def all_columns(mr):
            nv = COLUMN_VECTORS[mr]
            y_rows = _rows_at(e, call, p, mr)
            next_rows = [builder.sub(row, width) for row in _rows_at(e, call, after, mr)]
            v_rows = [e.add(v, e.multiply(v_stride, m)) for m in range(mr)]

            def tile(column, w, w_stride, nv, mask=None):
                start = e.multiply(column, size(y_like))
                here = [e.add(row, start) for row in y_rows]
                _ask_for_y(e, y_rows, next_rows, start, end, nv * LANES * size(y_like))

                def w_row(j):
                    return e.add(w, e.multiply(j, w_stride))

                factors = scale, gained, column
                _expand_tile(e, nv, here, v_rows, w_row, r, factors, mask, w_like, y_like)

            def panel(column, nothing):
                w = e.add(wb, e.multiply(e.multiply(column, r), size(w_like)))
                for start in range(0, PANEL, nv * LANES):
                    w_start = e.add(w, start * size(w_like))
                    tile(e.add(column, start), w_start, PANEL * size(w_like), nv)
                return nothing

            def remainder(column, nothing):
                before = e.add(e.multiply(whole, r), builder.sub(column, whole))
                w = e.add(wb, e.multiply(before, size(w_like)))
                w_stride = e.multiply(builder.sub(high, whole), size(w_like))
                tile(column, w, w_stride, 1, e.below(builder.sub(high, column)))
                return nothing

            e.loop(low, whole, PANEL, [], panel)
            e.loop(whole, high, LANES, [], remainder)

        e.switch(count, range(1, MOST_ROWS + 1), all_columns)
        return context.get_dummy_value()

    integer = types.int64
    operands = integer, TRIPLE, integer, integer, types.float32, gains, PAIR
    return types.void(w_like, y_like, *operands), codegen
