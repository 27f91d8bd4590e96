"""Punica: weights by address, one rank per call, rows sorted by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, check_several, fits_memory
from sgmv.dtypes import Array
from sgmv.errors import ShapeError, StackError, UnknownAdapterError, ValueRangeError, some
from sgmv.ids import BASE_ONLY, NO_SLOT, Integers, as_ids
from sgmv.layouts.exam import Exam, Examiner
from sgmv.layouts.repairs import handed_over, handed_over_offsets
from sgmv.layouts.rows import (
    Batch,
    Int32,
    Layout,
    as_segments,
    frozen,
    look_up,
    offsets,
    per_request,
    slots_of,
    spread,
)
from sgmv.stack import AdapterStack, check_stack
from sgmv.table import Stored

LEAST_ADDRESS = 1 << 16  # no process has memory below: systems never map these pages


@dataclass(frozen=True, eq=False)
class Punica(Layout):
    """What `punica.ops`' SGMV calls take: `s`, `wa_ptr`, `wb_ptr`, `lora_rank`.

    Semantics: `y[rows][s[i]:s[i+1]] += x[rows][s[i]:s[i+1]] @ deref(wa_ptr[i]).T @
    deref(wb_ptr[i])`; the pointers are good for as long as this object lives.

    s          (S+1,) int32  from 0 to the number of rows that a call gets
    wa_ptr     (S,) int64    addresses of wa (1, r, h_in): the stack's own memory
    wb_ptr     (S,) int64    addresses of wb (1, r, h_out): copies, see `punica`
    lora_rank  the rank r of all of them
    rows       not Punica's: the row of x at each position; Punica has its caller sort
    wa, wb     not Punica's: the arrays behind the addresses, held alive

    Source: punica, src/punica/ops/__init__.py, src/punica/utils/lora.py.

    >>> stack = AdapterStack.from_adapters({7: (np.ones((8, 64), "f"), np.ones((32, 8), "f"))})
    >>> print(punica([7, -1, 7], stack))
    s          int32 (2,) [0, 2]
    wa_ptr     int64 (1,) addresses of [(8, 64)]
    wb_ptr     int64 (1,) addresses of [(8, 32)]
    lora_rank  8
    rows       int64 (2,) [0, 2]
    """

    s: Int32
    wa_ptr: Integers
    wb_ptr: Integers
    lora_rank: int
    rows: Integers
    wa: tuple[Array, ...] = field(repr=False)
    wb: tuple[Array, ...] = field(repr=False)

    def shown(self, name: str) -> str:
        """Addresses differ from run to run: their arrays' shapes are shown instead."""
        if name in ("wa_ptr", "wb_ptr"):
            arrays: tuple[Array, ...] = getattr(self, name[:2])
            return f"int64 ({len(arrays)},) addresses of {some(array.shape for array in arrays)}"
        return super().shown(name)

    def adapter_ids(self, n: int, stack: AdapterStack) -> Integers:
        """(n,) the id of each of n rows, -1 where no segment has it, by the addresses of wa.

        Raises UnknownAdapterError when the stack does not hold such an address any more.
        """
        check_stack(stack)
        table = stack.table
        held = table.slots != NO_SLOT
        address = table.wa_address[table.slots[held]]
        order = np.argsort(address)
        ids, unknown = look_up(address[order], table.ids[held][order], self.wa_ptr)
        if unknown.any():
            raise UnknownAdapterError(
                "stack",
                "the weights that the pointers were made for",
                f"none at the addresses of segments {some(np.flatnonzero(unknown))}",
                "pass the same stack, and make the pointers anew after a load or an unload",
            )
        return spread(ids, np.diff(self.s), self.rows, check_count("n", n, 0))


def punica(batch: Batch, stack: AdapterStack, lora_rank: int | None = None) -> Punica:
    """The batch as Punica's SGMV calls take it.

    Semantics: one segment for each adapter of this rank, ascending by id. Punica knows no -1 and
    one rank per call, so rows without weights, and those of other ranks, are left out of `rows`:
    its calls add in place, and a row that is not handed over keeps its bits. `wa_ptr` points into
    the stack. Punica has no scaling, and the stack keeps wb in panels (docs/kernels.md): `wb_ptr`
    points to `scaling * B.T`, (r, h_out), rounded to the stack's dtype, made here.

    batch      (n,) adapter ids, or Segments
    stack      the layer's adapters
    lora_rank  which rank; left out, all adapters of the batch must have the same one

    Raises UnknownAdapterError for ids that the stack does not hold, StackError where ranks differ,
    ValueRangeError where scaling * B overflows the stack's dtype; DtypeError as `segment` does.
    Source: punica, src/punica/ops/__init__.py; its paper (arXiv 2310.18547), section 4.

    >>> stack = AdapterStack.from_adapters({7: (np.ones((8, 64), "f"), np.ones((32, 8), "f"))})
    >>> batch = punica([7, -1, 7], stack)
    >>> batch.s, batch.adapter_ids(3, stack)
    (array([0, 2], dtype=int32), array([ 7, -1,  7]))
    """
    check_stack(stack)
    segments, table = as_segments(batch), stack.table
    slot, rank = table.find(segments.adapter_ids)
    ranks = np.unique(rank[slot != NO_SLOT])
    if lora_rank is None:
        if len(ranks) > 1:
            raise StackError(
                "stack",
                "adapters of one rank, as Punica's calls take one lora_rank",
                f"ranks {some(ranks)}",
                "call punica once with each lora_rank",
            )
        lora_rank = int(ranks[0]) if len(ranks) else 0
    taken = (slot != NO_SLOT) & (rank == check_count("lora_rank", lora_rank, 0))
    if (gained := taken & table.is_gained(slot)).any():
        raise StackError(
            "stack",
            "adapters without magnitudes (DoRA), which Punica's calls do not have",
            f"those of {some(segments.adapter_ids[gained])}",
            "run these rows with add_lora",
        )
    stored = [weights for i in slot[taken] if (weights := table.weights[i]) is not None]
    wb = [_scaled(weights, stack.h_out) for weights in stored]
    return Punica(
        s=frozen("s", offsets(segments.lengths[taken])),
        wa_ptr=frozen("wa_ptr", table.wa_address[slot[taken]], np.int64),
        wb_ptr=frozen("wb_ptr", [array.ctypes.data for array in wb], np.int64),
        lora_rank=lora_rank,
        rows=frozen("rows", segments.rows[np.repeat(taken, segments.lengths)], np.int64),
        wa=tuple(weights.wa for weights in stored),
        wb=tuple(wb),
    )


def _scaled(weights: Stored, h_out: int) -> Array:
    """B.T (r, h_out) times the scaling, rounded once, read-only."""
    wb = np.ascontiguousarray(weights.unpack(h_out)[1].T)
    if weights.scaling != 1.0:
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = (wb.astype(np.float64) * weights.scaling).astype(wb.dtype)
        if (np.isinf(scaled) & ~np.isinf(wb)).any():
            raise ValueRangeError(
                "stack",
                f"scaling * B that {wb.dtype.name} can hold",
                f"a scaling of {weights.scaling}",
                "use a stack of a wider dtype",
            )
        wb = scaled
    wb.flags.writeable = False
    return wb


@dataclass(frozen=True)
class BatchLenInfo:
    """Rows of a batch of prefill requests, several rows each, then decode requests, one row each.

    Semantics: prefill request i is rows `indptr[i]:indptr[i+1]`, decode request j is row
    `doff + j`.

    prefills  the length of each prefill request
    decode    how many decode requests

    Raises DtypeError and ValueRangeError for lengths that are no integers >= 0.
    Source: punica, src/punica/utils/cat_tensor.py.

    >>> lens = BatchLenInfo([3, 2], 2)
    >>> lens.indptr, lens.doff, lens.adapter_ids([7, -1, 7, 4])
    (array([0, 3, 5], dtype=int32), 5, array([ 7,  7,  7, -1, -1,  7,  4]))
    """

    prefills: Sequence[int]
    decode: int

    def __post_init__(self) -> None:
        check_several("prefills", self.prefills, "a length for each request")
        lengths = tuple(check_count("prefills", length, 0) for length in self.prefills)
        object.__setattr__(self, "prefills", lengths)
        object.__setattr__(self, "decode", check_count("decode", self.decode, 0))

    @cached_property
    def indptr(self) -> Int32 | None:
        """(len(prefills) + 1,) int32, the running sum of the prefills; None if there are none."""
        return frozen("prefills", offsets(np.array(self.prefills))) if self.prefills else None

    @property
    def doff(self) -> int:
        """The first decode request's row, and the rows of all prefills."""
        return sum(self.prefills)

    @property
    def n(self) -> int:
        """Rows in the batch."""
        return self.doff + self.decode

    @cached_property
    def seq_lens(self) -> Integers:
        """The rows of every request, prefills first."""
        with fits_memory("decode", self.decode):
            return np.array([*self.prefills, *[1] * self.decode], np.int64)

    def adapter_ids(self, request_ids: npt.ArrayLike) -> Integers:
        """(n,) the id of each row, from that of each request; ShapeError unless they are as many.

        >>> BatchLenInfo([2], 1).adapter_ids([4, 9])
        array([4, 4, 9])
        """
        ids = as_ids(request_ids, "request_ids")
        if len(ids) != len(self.seq_lens):
            raise ShapeError(
                "request_ids",
                f"{len(self.seq_lens)} ids, one per request",
                str(len(ids)),
                "name those of the prefills first, then those of decode",
            )
        with fits_memory("prefills", self.doff):
            np.empty(self.n, np.int64)  # numpy's repeat does not look whether its result fits
            return np.repeat(ids, self.seq_lens)

    def request_ids(self, adapter_ids: npt.ArrayLike) -> Integers:
        """The id of each request, from that of each row; the way back of `adapter_ids`.

        Requests of no rows are given -1. Raises ShapeError unless there are n ids, ValueRangeError
        where rows of one request differ.

        >>> BatchLenInfo([2], 1).request_ids([4, 4, 9])
        array([4, 9])
        """
        return per_request(as_ids(adapter_ids), self.seq_lens)


def _punica(exam: Exam) -> None:
    s = exam.array("s", 0)
    wanted = None if exam.segments is None else slots_of(exam.segments, exam.slots)
    table = exam.slots.table if isinstance(exam.slots, AdapterStack) else None
    lora_rank = exam.number("lora_rank")
    if wanted is not None and table is not None and lora_rank is not None:
        wanted = np.where(np.append(table.ranks, 0)[wanted] == lora_rank, wanted, BASE_ONLY)
    n = exam.n
    rows = exam.rows_handed_over(wanted)
    exam.indptr("s", s)
    for name in ("wa_ptr", "wb_ptr", "w_ptr"):
        if exam.get(name) is not None:
            _addresses(exam, name, len(s) - 1, 1 if table is None else table.dtype.itemsize)
    wa_ptr = exam.numbers("wa_ptr")
    if table is None or wa_ptr is None or wa_ptr.ndim != 1:
        return
    held = np.flatnonzero([weights is not None for weights in table.weights])
    slot_at = dict(zip(table.wa_address[held].tolist(), held.tolist(), strict=True))
    slot = np.array([slot_at.get(address, NO_SLOT) for address in wa_ptr.tolist()], np.int64)
    exam.slot_of_segment = slot
    moved = (slot == NO_SLOT) & (wa_ptr >= LEAST_ADDRESS)
    exam.add_at("wa_ptr", "no weights", "an address of this stack's wa", wa_ptr, "segment", moved)
    if wanted is not None and rows is not None and n is not None and not exam.found:
        exam.same_rows("wa_ptr", spread(slot, np.diff(s), rows, n), wanted)


def _addresses(exam: Exam, name: str, S: int, itemsize: int) -> None:
    """An address of weights per segment: that of its array, where the metadata holds arrays."""
    pointers = exam.array(name, 0, int32=False)
    exam.has_length(name, len(pointers), S)
    null = pointers < LEAST_ADDRESS
    exam.add_at(name, "no weights", "an address of weights", pointers, "segment", null)
    odd = (pointers % itemsize != 0) & ~null
    expected = f"addresses that {itemsize} divides, the size of an element"
    exam.add_at(name, "no weights", expected, pointers, "segment", odd)
    held = exam.get(name.removesuffix("_ptr"))
    arrays = isinstance(held, tuple) and all(isinstance(array, np.ndarray) for array in held)
    if held is not None and not arrays:
        exam.add(name.removesuffix("_ptr"), "shape", "a tuple of arrays", type(held).__name__)
    elif held is not None and len(held) == len(pointers):
        wanted = np.array([array.ctypes.data for array in held], np.int64)
        exam.add_at(name, "no weights", wanted, pointers, "segment", (pointers != wanted) & ~null)


def _batch_len_info(exam: Exam) -> None:
    doff, decode = exam.number("doff") or 0, exam.number("decode")
    if decode is not None:
        exam.has_rows("decode", doff + decode)
    if exam.get("indptr") is not None:
        indptr = exam.array("indptr", 0)
        exam.n = doff
        exam.indptr("indptr", indptr)
        if exam.get("prefills") is not None:
            prefills = exam.array("prefills", 0)
            if exam.has_length("indptr", len(indptr), len(prefills) + 1):
                wrong = np.diff(indptr) != prefills
                exam.add_at("indptr", "counts", prefills, np.diff(indptr), "request", wrong)
    elif doff:
        exam.add("doff", "counts", "0, as there is no indptr", doff)


EXAMINERS = (
    Examiner(
        ("s",),
        _punica,
        {"s": ("counts", handed_over_offsets), "rows": ("stale", handed_over)},
    ),
    Examiner(
        ("decode",),
        _batch_len_info,
        {
            "doff": ("counts", lambda exam: exam.ints("prefills").sum()),
            "prefills": ("counts", lambda exam: np.diff(exam.ints("indptr"))),
            "indptr": ("counts", lambda exam: offsets(exam.ints("prefills"))),
        },
    ),
)
