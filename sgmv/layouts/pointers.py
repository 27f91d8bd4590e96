"""Engines that take weights by address: Punica, and LoRAX, which grew out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, check_several, fits_memory
from sgmv.dtypes import Array
from sgmv.errors import ShapeError, StackError, UnknownAdapterError, ValueRangeError, some
from sgmv.ids import BASE_ONLY, NO_SLOT, Integers, as_ids
from sgmv.layouts.rows import (
    Batch,
    Int32,
    Layout,
    as_segments,
    frozen,
    look_up,
    offsets,
    row_ids,
    runs,
    sorted_items,
    spread,
)
from sgmv.stack import AdapterStack, check_stack
from sgmv.table import Stored

RANK_UNIT = 16


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


def per_request(ids: Integers, seq_lens: Integers) -> Integers:
    """One id per request of so many rows each, which all must name it; -1 for one of no rows."""
    if (seq_lens < 0).any():
        received = some(seq_lens[seq_lens < 0])
        raise ValueRangeError("seq_lens", "lengths >= 0", received, "use 0 for a request of none")
    rows = sum(seq_lens.tolist())  # may be beyond int64
    if len(ids) != rows:
        raise ShapeError(
            "adapter_ids",
            f"{rows} ids, the rows of all requests",
            str(len(ids)),
            "name one id per row, or give the lengths of this batch",
        )
    start = np.cumsum(seq_lens) - seq_lens
    found = np.append(ids, BASE_ONLY)[np.where(seq_lens > 0, start, len(ids))]
    differs = np.flatnonzero(ids != np.repeat(found, seq_lens))
    if len(differs):
        request = np.searchsorted(start, differs[0], "right") - 1
        raise ValueRangeError(
            "adapter_ids",
            "one id for all rows of a request",
            f"{some(np.unique(ids[start[request] : start[request] + seq_lens[request]]))} in "
            f"request {request}",
            "give the lengths of this batch's requests",
        )
    return found


@dataclass(frozen=True, eq=False)
class RankSegments(Layout):
    """The segments of one launch of LoRAX: those whose padded rank is `rank`.

    Semantics: segment i of the launch is rows `s_start[i]:s_end[i]`; other rows are untouched.

    rank            padded to a multiple of 16
    s_start, s_end  (k,) int32, ascending, apart where rows of another rank stand between

    Source: lorax, server/lorax_server/adapters/lora.py, where the fields are called
    `segment_starts` and `segment_ends`, and utils/sgmv.py, where they are the kernels' `s_start`
    and `s_end`.

    >>> print(lorax([3, 3, -1, 3], 16).rank_data[16])
    rank     16
    s_start  int32 (2,) [0, 3]
    s_end    int32 (2,) [2, 4]
    """

    rank: int
    s_start: Int32
    s_end: Int32


@dataclass(frozen=True, eq=False)
class Lorax(Layout):
    """LoRAX's `AdapterBatchMetadata`, and the `rank_data` of its launches.

    Semantics: rows `adapter_segments[s]:adapter_segments[s+1]` name `segment_indices[s]`. Rows
    stay as they are: neighbours are merged, nothing is sorted.

    adapter_indices   (n,) int64    LoRAX's own numbers: 0 is the base model, ours are id + 1
    adapter_segments  (S+1,) int32  from 0 to n
    segment_indices   (S,)          a tuple of ints
    rank_data         padded rank -> RankSegments; segments without weights are in none

    Source: lorax, server/lorax_server/adapters/weights.py, adapters/lora.py.
    """

    adapter_indices: Integers
    adapter_segments: Int32
    segment_indices: tuple[int, ...]
    rank_data: Mapping[int, RankSegments]

    def shown(self, name: str) -> str:
        """The launches as slices of rows."""
        if name != "rank_data":
            return super().shown(name)
        return "; ".join(
            f"rank {launch.rank}: s_start {some(launch.s_start)} s_end {some(launch.s_end)}"
            for launch in self.rank_data.values()
        )

    def adapter_ids(self) -> Integers:
        """(n,) the id of each row; LoRAX names adapters, so nothing else is needed."""
        indices = np.array(self.segment_indices, np.int64)
        return np.repeat(indices - 1, np.diff(self.adapter_segments))


def lorax(batch: Batch, ranks: AdapterStack | Mapping[int, int] | int) -> Lorax:
    """The batch as LoRAX takes it: one launch for each distinct padded rank.

    Semantics: equal neighbours are merged; a segment whose adapter has weights is in the launch of
    its rank, padded to a multiple of 16.

    batch  (n,) adapter ids, or Segments
    ranks  an AdapterStack, a mapping id -> rank (an id that is not in it has no weights, as in
           LoRAX), or one rank for all

    Raises UnknownAdapterError for ids that the stack does not hold, DtypeError and
    ValueRangeError for what is no rank >= 0.
    Source: lorax, server/lorax_server/adapters/lora.py, `BatchLoraWeights.load`.

    >>> print(lorax([3, 3, -1, 5], {3: 8, 5: 64}))
    adapter_indices   int64 (4,) [4, 4, 0, 6]
    adapter_segments  int32 (4,) [0, 2, 3, 4]
    segment_indices   (4, 0, 6)
    rank_data         rank 16: s_start [0] s_end [2]; rank 64: s_start [3] s_end [4]
    """
    segments = as_segments(batch)
    ids = row_ids(segments)
    start, lengths = runs(ids)
    s = frozen("adapter_segments", np.append(start, segments.n))
    by_adapter = _padded_ranks(segments.adapter_ids, ranks)
    padded = by_adapter[np.searchsorted(segments.adapter_ids, ids[start])]
    return Lorax(
        adapter_indices=frozen("adapter_indices", ids + 1, np.int64),
        adapter_segments=s,
        segment_indices=tuple((ids[start] + 1).tolist()),
        rank_data={
            rank: RankSegments(
                rank,
                frozen("s_start", start[padded == rank]),
                frozen("s_end", (start + lengths)[padded == rank]),
            )
            for rank in np.unique(padded[padded >= 0]).tolist()
        },
    )


def _padded_ranks(ids: Integers, ranks: AdapterStack | Mapping[int, int] | int) -> Integers:
    """LoRAX's rank of each id, -1 where it has no weights."""
    if isinstance(ranks, AdapterStack):
        slot, rank = ranks.table.find(ids)
        weights = slot != NO_SLOT
    elif isinstance(ranks, Mapping):
        rank, unknown = look_up(*sorted_items("ranks", ranks, 0), ids)
        weights = ~unknown
    else:
        rank = np.full(len(ids), check_count("ranks", ranks, 0))
        weights = np.ones(len(ids), bool)
    padded = np.maximum(-(-rank // RANK_UNIT), 1) * RANK_UNIT
    return np.where(weights & (ids != BASE_ONLY), padded, BASE_ONLY)
