"""What every layout is made with: rows, runs of equal neighbours, slots, arrays that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, check_weights, fits_memory
from sgmv.errors import DtypeError, ShapeError, UnknownAdapterError, ValueRangeError, some
from sgmv.ids import BASE_ONLY, NO_SLOT, Integers
from sgmv.segment import Segments, segment
from sgmv.stack import AdapterStack

Batch: TypeAlias = "Segments | npt.ArrayLike"
Slots: TypeAlias = "AdapterStack | Mapping[int, int] | None"
Int32 = npt.NDArray[np.int32]
INT32_MAX = 2**31 - 1


class Layout:
    """Metadata under an engine's own names; `str` sets the fields one below the other."""

    def __str__(self) -> str:
        listed = [field.name for field in fields(self) if field.repr]  # type: ignore[arg-type]  # every layout is a dataclass
        named = [(name, self.shown(name)) for name in listed]
        width = max(len(name) for name, _ in named)
        return "\n".join(f"{name:{width}}  {text}" for name, text in named)

    def shown(self, name: str) -> str:
        """One field for `str`: an array's dtype, shape and first values, anything else as it is."""
        value = getattr(self, name)
        if isinstance(value, np.ndarray):
            return f"{value.dtype} {value.shape} {some(value.tolist(), 16)}"
        return str(value)


def as_segments(batch: Batch, argument: str = "batch") -> Segments:
    """The batch's segments, made if they are not there yet; of one adapter per row.

    Raises ShapeError for several, which most engines' metadata does not have.
    """
    segments = batch if isinstance(batch, Segments) else segment(batch)
    if segments.k > 1:
        remedy = "lay out one at a time; llama.cpp and LoRAX alone have several"
        raise ShapeError(argument, "one adapter per row", f"{segments.k}", remedy)
    return segments


def mixture(
    batch: Batch, weights: npt.ArrayLike | None = None
) -> tuple[Segments, npt.NDArray[np.float32]]:
    """The batch's segments, of one adapter per row or several, and (n, k) the weight of each."""
    segments = batch if isinstance(batch, Segments) else segment(batch)
    if weights is None:
        return segments, np.ones((segments.n, segments.k), np.float32)
    return segments, check_weights(weights, segments.n, segments.k)


def padded(lists: Sequence[Sequence[Any]], fill: int, dtype: type) -> npt.NDArray[Any]:
    """The lists as (n, k), filled up; as (n,) where none has several entries."""
    k = max(1, *map(len, lists)) if lists else 1
    full = [[*one, *[fill] * (k - len(one))] for one in lists]
    return np.array(full, dtype).reshape((len(lists), k) if k > 1 else -1)


def row_ids(segments: Segments) -> Integers:
    """(n,) the id of each row."""
    return spread(segments.adapter_ids, segments.lengths, segments.rows, segments.n)


def spread(values: Integers, lengths: Integers, rows: Integers | None, n: int) -> Integers:
    """(n,) each segment's value on its rows, -1 on rows of no segment; rows None: in order."""
    repeated = np.repeat(values, lengths)
    if rows is None:
        return repeated
    with fits_memory("n", n):
        found = np.full(n, BASE_ONLY, np.int64)
    least = int(rows.max(initial=-1)) + 1
    if n < least:
        raise ShapeError("n", f"at least {least}, the rows that there are", str(n), "count all")
    found[rows] = repeated
    return found


def runs(values: Integers) -> tuple[Integers, Integers]:
    """Where each run of equal neighbours starts, and how long it is."""
    if len(values) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    start = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
    return start, np.diff(start, append=len(values))


def offsets(lengths: Integers) -> Integers:
    """(S+1,) the running sum of the lengths, from 0."""
    return np.concatenate([[0], np.cumsum(lengths)])


def slot_table(slots: AdapterStack | Mapping[int, int]) -> tuple[Integers, Integers]:
    """The ids ascending, and the slot of each; NO_SLOT for those that are base only."""
    if isinstance(slots, AdapterStack):
        table = slots.table
        return table.ids, table.slots
    ids, slot = sorted_items("slots", slots, NO_SLOT)
    taken, times = np.unique(slot[slot != NO_SLOT], return_counts=True)
    if (times > 1).any():
        raise ValueRangeError(
            "slots",
            "a slot of its own for every id",
            f"slots {some(taken[times > 1])} for several",
            "give each adapter another slot, and -1 to those that are base only",
        )
    return ids, slot


def sorted_items(
    argument: str, mapping: Mapping[int, int], least: int
) -> tuple[Integers, Integers]:
    """A mapping's keys ascending and the value of each, all of them whole numbers >= least."""
    if not isinstance(mapping, Mapping):
        kind = type(mapping).__name__
        raise DtypeError(argument, "an AdapterStack or a mapping", kind, "pass a dict of integers")
    keys = np.array([check_count(argument, key, 0) for key in mapping], np.int64)
    values = np.array([check_count(argument, v, least) for v in mapping.values()], np.int64)
    order = np.argsort(keys)
    return keys[order], values[order]


def look_up(keys: Integers, values: Integers, wanted: Integers) -> tuple[Integers, Any]:
    """The value of every wanted key, from ascending keys, and which of them are not there."""
    at = np.searchsorted(keys, wanted)
    unknown = np.append(keys, 0)[at] != wanted
    unknown |= at == len(keys)
    found = np.append(values, NO_SLOT)[np.where(unknown, len(keys), at)]
    found[wanted == BASE_ONLY] = NO_SLOT
    return found, unknown & (wanted != BASE_ONLY)


def slots_of(segments: Segments, slots: Slots) -> Integers:
    """(n,) the slot of each row, -1 where it is base only."""
    ids = _slots_of_segments(segments, slots)
    return spread(ids, segments.lengths, segments.rows, segments.n)


def slots_of_pairs(segments: Segments, slots: Slots) -> Integers:
    """(n, k) the slot of each id of each row, -1 for none."""
    ids = _slots_of_segments(segments, slots)
    found = np.empty(len(segments.pairs), np.int64)
    found[segments.pairs] = np.repeat(ids, segments.lengths)
    return found.reshape(segments.n, segments.k)


def _slots_of_segments(segments: Segments, slots: Slots) -> Integers:
    """(S,) the slot of each segment."""
    ids = segments.adapter_ids
    if slots is not None:
        known, slot = slot_table(slots)
        ids, unknown = look_up(known, slot, ids)
        if unknown.any():
            raise UnknownAdapterError(
                "adapter_ids",
                f"-1 or ids that have a slot, {some(known)}",
                some(segments.adapter_ids[unknown]),
                "load those adapters first, or name -1 for base only",
            )
    return ids


def ids_of(slot: Integers, slots: Slots) -> Integers:
    """(n,) the id of each row's slot; -1 stays -1."""
    if slots is None:
        return slot
    ids, of = slot_table(slots)
    held = of != NO_SLOT
    order = np.argsort(of[held])
    found, unknown = look_up(of[held][order], ids[held][order], slot)
    if unknown.any():
        raise UnknownAdapterError(
            "slots",
            "an id for every slot that the metadata names",
            f"none for {some(np.unique(slot[unknown]))}",
            "pass the stack, or the mapping, that the metadata was made with",
        )
    return found


def frozen(argument: str, values: npt.ArrayLike, dtype: type = np.int32) -> npt.NDArray[Any]:
    """The values in the engine's dtype, read-only; refused where they would wrap around."""
    array = np.asarray(values)
    if dtype is np.int32 and array.size and array.max() > INT32_MAX:
        raise ValueRangeError(
            argument,
            "numbers below 2**31, as the engine keeps them in int32",
            str(array.max()),
            "pass slots: a stack, or a mapping id -> slot",
        )
    array = array.astype(dtype)
    array.flags.writeable = False
    return array


def per_request(ids: Integers, seq_lens: Integers) -> Integers:
    """One id per request of `seq_lens` rows, the id of all its rows; -1 for one of no rows."""
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
