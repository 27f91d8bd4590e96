"""Where adapters' weights are stored, as the kernels look them up: by slot.

    adapter id   7 ─┐   slot   wa_address     wb_address     rank  scaling
    adapter id  42 ─┼──> 0     (r, h_in)      (r, h_out)      16     2.0     Punica's storage order:
    adapter id  -1  │    1     (r, h_in)      (r, h_out)       8     1.0     wa = A, wb = B.T, which
       base only    └──> 2     free                                          is packed in panels

The kernels index this table by slot. It is never changed, only replaced: a call that has taken it
keeps the weights it started with, and the next call sees the new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv.cpu import VECTOR_BITS
from sgmv.dtypes import Array
from sgmv.errors import UnknownAdapterError, some
from sgmv.ids import NO_SLOT, Integers
from sgmv.kernels.plan import UNKNOWN, find
from sgmv.kernels.records import PANEL, TABLE, WIDE_PANEL
from sgmv.memory import aligned


@dataclass(frozen=True, eq=False)
class Stored:
    """One slot's weights in Punica's storage order, on cache lines of their own.

    wb = B.T is packed in panels, (r, columns) each; the last one has the columns that are left.
    Packing is the copy, so the weights are in memory once.
    """

    wa: Array  # (r, h_in)
    wb: Array  # (r * h_out,)
    scaling: float
    columns: int
    magnitude: Array | None = None  # (h_out,), of a DoRA adapter; no kernel reads it
    gains: Array | None = None  # (1, h_out), or with offsets (2, h_out); see dora.py

    @classmethod
    def pack(
        cls,
        A: Array,
        B: Array,
        scaling: float,
        magnitude: Array | None = None,
        gains: Array | None = None,
    ) -> Stored:
        """Copy A (r, h_in), B (h_out, r) and a DoRA adapter's numbers into storage order."""
        wa, wb = aligned(A.shape, A.dtype), aligned((B.size,), B.dtype)
        wa[:] = A
        columns = columns_of(A.dtype)
        for panel, span in _panels(wb, len(A), len(B), columns):
            panel[:] = B[span].T
        wa.flags.writeable = wb.flags.writeable = False
        if magnitude is not None:
            magnitude = read_only(magnitude)
        return cls(wa, wb, scaling, columns, magnitude, _placed(gains))

    def moved(self) -> Stored:
        """The same weights in another place."""
        return replace(self, wa=_placed(self.wa), wb=_placed(self.wb), gains=_placed(self.gains))

    def unpack(self, h_out: int) -> tuple[Array, Array]:
        """A and B (h_out, r), read-only copies: they keep no other memory alive."""
        A, B = self.wa.copy(), np.empty((h_out, len(self.wa)), self.wb.dtype)
        for panel, span in _panels(self.wb, *B.shape[::-1], self.columns):
            B[span] = panel.T
        A.flags.writeable = B.flags.writeable = False
        return A, B


def read_only(array: Array) -> Array:
    """A copy that nobody changes."""
    copy: Array = array.copy()
    copy.flags.writeable = False
    return copy


def _placed(weights: Any) -> Any:
    """A read-only copy on cache lines of its own; None stays None."""
    if weights is None:
        return None
    copy = aligned(weights.shape, weights.dtype)
    copy[:] = weights
    copy.flags.writeable = False
    return copy


def columns_of(dtype: np.dtype[Any]) -> int:
    """The columns of a panel of weights of this type."""
    return PANEL if VECTOR_BITS and dtype != np.float64 else WIDE_PANEL


def _panels(wb: Array, r: int, h_out: int, columns: int) -> Iterator[tuple[Array, slice]]:
    """Every panel (r, columns) of packed weights as a view, and the columns it holds."""
    for c in range(0, h_out, columns):
        end = min(c + columns, h_out)
        yield wb[c * r : end * r].reshape(r, end - c), slice(c, end)


@dataclass(frozen=True, eq=False)
class SlotTable:
    """What the kernels read: ids in ascending order with their slots, and the slots' weights."""

    h_in: int
    h_out: int
    dtype: np.dtype[Any]
    slot_of: Mapping[int, int]  # id -> slot, NO_SLOT where the id is base only
    ids: Integers  # (loaded,) the same for the kernels: the ids ascending
    slots: Integers  # (loaded,) and the slot of each
    wa_address: Integers  # (slots, slices)
    wb_address: Integers  # (slots,)
    ranks: Integers  # (slots,)
    scalings: npt.NDArray[np.float64]  # (slots,)
    weights: tuple[Stored | None, ...]  # (slots,) keeps what the addresses point to alive
    # A stack's wb is packed, and it has one slice; see kernels/records.py, and compat/ for others.
    wb_strides: tuple[int, int] = (0, 0)
    slices: int = 1
    gains: Integers | None = None  # (2, slots) addresses of gains and offsets; None: no slot's

    @cached_property
    def width(self) -> int:
        """The columns of v: the highest rank loaded, for each slice."""
        return int(self.ranks.max(initial=0)) * self.slices

    @cached_property
    def record(self) -> npt.NDArray[Any]:
        """The table as compiled code takes it."""
        found = np.zeros(1, TABLE)
        found["h_in"], found["h_out"] = self.h_in, self.h_out
        found["width"] = self.width
        found["loaded"], found["slots"] = len(self.ids), len(self.ranks)
        found["ids"], found["slot_of"] = self.ids.ctypes.data, self.slots.ctypes.data
        found["wa"], found["wb"] = self.wa_address.ctypes.data, self.wb_address.ctypes.data
        found["ranks"], found["scalings"] = self.ranks.ctypes.data, self.scalings.ctypes.data
        found["slices"], found["panel_columns"] = self.slices, columns_of(self.dtype)
        found["wb_rank_stride"], found["wb_column_stride"] = self.wb_strides
        if self.gains is not None:
            found["gains"], found["offsets"] = (row.ctypes.data for row in self.gains)
        return found

    @cached_property
    def address(self) -> int:
        """The address of `record`."""
        return int(self.record.ctypes.data)

    @classmethod
    def empty(cls, h_in: int, h_out: int, slots: int, dtype: np.dtype[Any]) -> SlotTable:
        """A table of slots without weights."""
        none = np.empty(0, np.int64)
        wa, wb, ranks = np.zeros((3, slots), np.int64)
        tables = none, none, wa, wb, ranks, np.zeros(slots), (None,) * slots
        return cls(h_in, h_out, dtype, {}, *tables)

    def with_changes(
        self, slot_of: Mapping[int, int], changes: Mapping[int, Stored | None]
    ) -> SlotTable:
        """A new table: these ids, and new contents for some of the slots."""
        ids = np.array(sorted(slot_of), np.int64)
        slots = np.array([slot_of[i] for i in ids.tolist()], np.int64)
        wa_address, wb_address = self.wa_address.copy(), self.wb_address.copy()
        ranks, scalings, weights = self.ranks.copy(), self.scalings.copy(), list(self.weights)
        gains = np.zeros((2, len(ranks)), np.int64) if self.gains is None else self.gains.copy()
        for slot, stored in changes.items():
            weights[slot] = stored
            wa_address[slot] = 0 if stored is None else stored.wa.ctypes.data
            wb_address[slot] = 0 if stored is None else stored.wb.ctypes.data
            ranks[slot] = 0 if stored is None else len(stored.wa)
            scalings[slot] = 0.0 if stored is None else stored.scaling
            gains[:, slot] = 0
            if stored is not None and stored.gains is not None:
                gains[: len(stored.gains), slot] = [row.ctypes.data for row in stored.gains]
        return replace(
            self,
            slot_of=slot_of,
            ids=ids,
            slots=slots,
            wa_address=wa_address,
            wb_address=wb_address,
            ranks=ranks,
            scalings=scalings,
            weights=tuple(weights),
            gains=gains if gains.any() else None,
        )

    def is_gained(self, slot: Integers) -> npt.NDArray[np.bool_]:
        """Whether these slots, NO_SLOT among them, have gains."""
        if self.gains is None:
            return np.zeros(len(slot), np.bool_)
        found: npt.NDArray[np.bool_] = (slot != NO_SLOT) & (self.gains[0][slot] != 0)
        return found

    def changes(self, slot: Integers, rank: Integers) -> npt.NDArray[np.bool_]:
        """Whether rows of these slots and ranks change at all."""
        return (rank > 0) | self.is_gained(slot)

    def find(self, adapter_ids: Integers) -> tuple[Integers, Integers]:
        """Slot and rank (S,) of each id: NO_SLOT and 0 if base only; unknown ids are listed."""
        slot = np.empty(len(adapter_ids), np.int64)
        rank = np.empty(len(adapter_ids), np.int64)
        if find(self.ids, self.slots, self.ranks, adapter_ids, slot, rank) > 0:
            raise UnknownAdapterError(
                "adapter_ids",
                f"-1 or ids of loaded adapters, {some(self.ids)}",
                some(adapter_ids[slot == UNKNOWN]),
                "load those adapters first, or name -1 for base only",
            )
        return slot, rank
