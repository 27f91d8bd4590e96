"""The adapters of one layer: each id has a slot of the table, or is base only."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv.adapter import Adapter, AdapterLike, Adapters, as_adapter, items, with_gains
from sgmv.checks import check_count, check_dtype, fits_memory
from sgmv.dora import gains_of
from sgmv.dtypes import Array, promote, sum_dtype
from sgmv.errors import (
    DtypeError,
    ShapeError,
    StackError,
    UnknownAdapterError,
    ValueRangeError,
    some,
)
from sgmv.ids import NO_SLOT, check_id, is_integer
from sgmv.memory import sparse
from sgmv.table import SlotTable, Stored, read_only

_stacks: weakref.WeakValueDictionary[int, AdapterStack] = weakref.WeakValueDictionary()


class AdapterStack:
    """The adapters of one layer, in slots: what a batch's adapter ids are looked up in.

    Semantics: `load` copies the weights into Punica's storage order, `wa (r, h_in)` and
    `wb (r, h_out)`, at their own rank: no padding, and memory follows what is loaded. wb is packed
    into panels of columns on the way, which takes no more memory than the copy. Loading an
    id again replaces it. A call in flight, in another thread, keeps the weights it started with;
    the next call sees the new ones, so a reused id never serves the old weights.

    h_in, h_out  widths of the layer
    slots        the most adapters held at once (vLLM: max_loras)
    max_rank     the highest rank taken, and the width of v (vLLM: max_lora_rank)
    dtype        float32, float16, bfloat16 (pass ml_dtypes.bfloat16) or float64; weights of another
                 type are converted when loaded, with one rounding

    Raises ShapeError, DtypeError, ValueRangeError; `load` also StackError.
    Source: S-LoRA (arXiv 2311.03285), section 4; vLLM, lora/model_manager.py.

    >>> stack = AdapterStack(h_in=64, h_out=32, slots=2, max_rank=8)
    >>> stack.load(7, Adapter(np.ones((4, 64), "float32"), np.ones((32, 4), "float32")))
    >>> 7 in stack, stack[7]
    (True, Adapter(r=4, h_in=64, h_out=32, float32, scaling=1.0))
    >>> stack.unload(7)
    >>> stack
    AdapterStack(h_in=64, h_out=32, 0 of 2 slots used, max_rank=8, float32)
    """

    def __init__(
        self,
        h_in: int,
        h_out: int,
        slots: int = 8,
        max_rank: int = 64,
        dtype: npt.DTypeLike = "float32",
    ) -> None:
        self.h_in = check_count("h_in", h_in, 1)
        self.h_out = check_count("h_out", h_out, 1)
        self.slots = check_count("slots", slots, 0)
        self.max_rank = check_count("max_rank", max_rank, 0)
        self.dtype = check_dtype("dtype", dtype)
        with fits_memory("slots", self.slots):
            self._table = SlotTable.empty(self.h_in, self.h_out, self.slots, self.dtype)
        self._changing = threading.Lock()
        _stacks[id(self)] = self

    @classmethod
    def from_adapters(
        cls,
        adapters: Adapters,
        *,
        h_in: int | None = None,
        h_out: int | None = None,
        dtype: npt.DTypeLike | None = None,
        W: Any = None,
        bias: Array | None = None,
    ) -> AdapterStack:
        """A stack that holds exactly these adapters; their ranks and scalings may differ.

        Semantics: one slot for each adapter, in the order of `adapters`.

        adapters     a mapping id -> Adapter, (A, B) or None; or a sequence indexed by id.
                     None = base only
        h_in, h_out  the layer's widths; needed only where there is no adapter to tell them
        dtype        the smallest type that holds all of them exactly, if left out
        W, bias      the layer's, for adapters with magnitudes; see `load`

        Raises as `Adapter` and `load` do. Source: vLLM, lora/model_manager.py.

        >>> A, B = np.ones((2, 8), "float32"), np.ones((4, 2), "float32")
        >>> AdapterStack.from_adapters({0: (A, B), 5: Adapter(A, B, 0.5), 9: None}).ids
        [0, 5, 9]
        """
        given = {
            check_id(i, "adapters"): as_adapter(f"adapters[{i}]", entry)
            for i, entry in items(adapters)
        }
        held = [adapter for adapter in given.values() if adapter is not None]
        if not held and (h_in is None or h_out is None):
            raise ShapeError(
                "adapters",
                "at least one adapter, to tell the layer's widths",
                f"{len(given)} ids without weights",
                "pass h_in and h_out",
            )
        stack = cls(
            held[0].h_in if h_in is None else h_in,
            held[0].h_out if h_out is None else h_out,
            slots=len(held),
            max_rank=max((adapter.r for adapter in held), default=0),
            dtype=dtype or (promote(*(adapter.dtype for adapter in held)) if held else "float32"),
        )
        stack._load_all(given, W, bias)
        return stack

    @property
    def ids(self) -> list[int]:
        """The ids that are known, ascending; those that are base only included."""
        return sorted(self._table.slot_of)

    def load(
        self, adapter_id: int, adapter: AdapterLike, W: Any = None, bias: Array | None = None
    ) -> None:
        """Put an adapter's weights into a slot, replacing what the id held before.

        Semantics: afterwards `stack[adapter_id]` holds the adapter's values in the stack's dtype.
        None makes the id base only and takes no slot. With magnitudes, rows of the adapter get
        `gain * (y + delta) + (1 - gain) * bias`, where y is the layer's own output, bias included,
        and `gain[c] = magnitude[c] / length of row c of W + scaling * B @ A`, summed in float64.

        adapter_id  an integer >= 0
        adapter     Adapter or (A, B): A (r, h_in), B (h_out, r), r <= max_rank
        W           (h_out, h_in), the layer's weight, for an adapter with magnitudes; others do not
                    read it. An array of any float type and strides; or any object with such a
                    `shape` of which `W[first:last]` is an array of these rows: quantised weights
                    are dequantised some rows at a time. It is read here, and not kept
        bias        (h_out,), the layer's bias, if it has one; likewise

        An adapter that a stack returned, by `fitted` or `stack[adapter_id]`, brings the gains that
        it has there, and is loaded without W.

        Raises ShapeError when the widths differ from the stack's, StackError when the rank is
        above max_rank, no slot is free or W is missing, ValueRangeError when a weight is too large
        for the stack's dtype; the stack is then as it was. Source: vLLM,
        LoRAModelManager.activate_adapter; peft 0.21, lora/dora.py.

        >>> stack = AdapterStack(h_in=64, h_out=32, slots=1)
        >>> stack.load(7, (np.ones((4, 64), "float32"), np.ones((32, 4), "float32")))
        >>> stack.load(8, (np.ones((4, 64), "float32"), np.ones((32, 4), "float32")))
        Traceback (most recent call last):
        sgmv.errors.StackError: adapter: expected a free slot among 1, got none; \
unload an adapter first, or make the stack with more slots
        """
        self._load_all({check_id(adapter_id): as_adapter("adapter", adapter)}, W, bias)

    def unload(self, adapter_id: int) -> None:
        """Forget an adapter and free its slot.

        Semantics: afterwards `adapter_id not in stack`; a call in flight still ends with it.

        Raises UnknownAdapterError when it is not loaded. Source: vLLM,
        LoRAModelManager.deactivate_adapter.

        >>> stack = AdapterStack.from_adapters({7: None}, h_in=64, h_out=32)
        >>> stack.unload(7)
        >>> 7 in stack
        False
        """
        with self._changing:
            slot = self._slot(adapter_id, "there is nothing to unload")
            slot_of = {i: s for i, s in self._table.slot_of.items() if i != adapter_id}
            changes = {} if slot == NO_SLOT else {slot: None}
            self._table = self._table.with_changes(slot_of, changes)
        _move_weights_together()

    def fitted(self, adapter: Adapter, W: Any = None, bias: Array | None = None) -> Adapter:
        """The adapter as `load` would hold it, before it is packed: in the stack's dtype.

        Semantics: what it returns, `load` takes. The arrays are copied only where they are
        converted; the stack does not change. W and bias as in `load`.

        Raises as `load` does, but for a free slot. Source: vLLM, which keeps adapters in host
        memory in lora_dtype, lora/lora_model.py.

        >>> stack = AdapterStack(h_in=64, h_out=32, dtype="float16")
        >>> stack.fitted(Adapter(np.ones((4, 64), "float32"), np.ones((32, 4), "float32")))
        Adapter(r=4, h_in=64, h_out=32, float16, scaling=1.0)
        """
        if not isinstance(adapter, Adapter):
            raise DtypeError(
                "adapter", "an Adapter", type(adapter).__name__, "wrap it in Adapter(A, B)"
            )
        self._check_fits(adapter)
        A, B = (self._converted(weights) for weights in (adapter.A, adapter.B))
        if adapter.magnitude is None:
            return Adapter(A, B, adapter.scaling)
        wide = sum_dtype(self.dtype)
        made = Adapter(A, B, adapter.scaling, adapter.magnitude.astype(wide, copy=False))
        gains = adapter._gains
        if W is not None or gains is None:
            gains = gains_of(made, W, bias)
        return with_gains(made, gains.astype(wide, copy=False))

    def __getitem__(self, adapter_id: int) -> Adapter | None:
        """The adapter as loaded, in read-only arrays of the stack's dtype; None if base only."""
        with self._changing:
            slot = self._slot(adapter_id)
            stored = None if slot == NO_SLOT else self._table.weights[slot]
        if stored is None:
            return None
        adapter = Adapter(*stored.unpack(self.h_out), stored.scaling, stored.magnitude)
        return adapter if stored.gains is None else with_gains(adapter, read_only(stored.gains))

    def __contains__(self, adapter_id: object) -> bool:
        return is_integer(adapter_id) and adapter_id in self._table.slot_of

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self._table.slot_of)

    def __repr__(self) -> str:
        used = sum(stored is not None for stored in self._table.weights)
        return (
            f"AdapterStack(h_in={self.h_in}, h_out={self.h_out}, {used} of {self.slots} slots "
            f"used, max_rank={self.max_rank}, {self.dtype.name})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Values, never addresses: a pickled or copied stack loads its adapters anew."""
        shape = {name: getattr(self, name) for name in ("h_in", "h_out", "slots", "max_rank")}
        return {"shape": shape, "dtype": self.dtype, "adapters": {i: self[i] for i in self.ids}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["shape"], dtype=state["dtype"])  # type: ignore[misc]
        self._load_all(state["adapters"])

    @property
    def table(self) -> SlotTable:
        """The slot table as it is now; it never changes, so one call works with one table."""
        return self._table

    def _slot(self, adapter_id: int, remedy: str = "load it first") -> int:
        if adapter_id not in self:
            raise UnknownAdapterError(
                "adapter_id", f"one of {some(self.ids)}", repr(adapter_id), remedy
            )
        return self._table.slot_of[adapter_id]

    def _packed(self, adapter: Adapter) -> Stored:
        """A copy of a fitted adapter in storage order, which `_load_all` takes as it is."""
        parts = adapter.A, adapter.B, adapter.scaling, adapter.magnitude, adapter._gains
        return Stored.pack(*parts)

    def _load_all(
        self,
        adapters: Mapping[int, Adapter | Stored | None],
        W: Any = None,
        bias: Array | None = None,
    ) -> None:
        fitted = {
            i: self.fitted(adapter, W, bias) if isinstance(adapter, Adapter) else adapter
            for i, adapter in adapters.items()
        }
        with self._changing:
            slot_of = dict(self._table.slot_of)
            changes: dict[int, Stored | None] = {}
            for adapter_id in fitted:
                slot = slot_of.pop(adapter_id, NO_SLOT)
                if slot != NO_SLOT:
                    changes[slot] = None
            taken = set(slot_of.values())
            free = (slot for slot in range(self.slots) if slot not in taken)
            for adapter_id, adapter in fitted.items():
                slot_of[adapter_id] = NO_SLOT if adapter is None else self._take(free)
                if adapter is not None:
                    changes[slot_of[adapter_id]] = (
                        adapter if isinstance(adapter, Stored) else self._packed(adapter)
                    )
            self._table = self._table.with_changes(slot_of, changes)
        _move_weights_together()

    def _leave(self, first: int, end: int) -> None:
        """Have no weights between these addresses."""
        with self._changing:
            table = self._table
            gains = [] if table.gains is None else [table.gains[0]]
            addresses = np.stack([table.wa_address, table.wb_address, *gains])
            slots = np.flatnonzero(((first <= addresses) & (addresses < end)).any(0)).tolist()
            held = {slot: stored for slot in slots if (stored := table.weights[slot])}
            changes = {slot: stored.moved() for slot, stored in held.items()}
            if changes:
                self._table = table.with_changes(table.slot_of, changes)

    def _take(self, free: Iterator[int]) -> int:
        for slot in free:
            return slot
        raise StackError(
            "adapter",
            f"a free slot among {self.slots}",
            "none",
            "unload an adapter first, or make the stack with more slots",
        )

    def _check_fits(self, adapter: Adapter) -> None:
        if (adapter.h_in, adapter.h_out) != (self.h_in, self.h_out):
            raise ShapeError(
                "adapter",
                f"h_in = {self.h_in} and h_out = {self.h_out}",
                f"h_in = {adapter.h_in} and h_out = {adapter.h_out}",
                "use a stack made for this layer",
            )
        if adapter.r > self.max_rank:
            raise StackError(
                "adapter",
                f"a rank of at most max_rank = {self.max_rank}",
                str(adapter.r),
                "make the stack with a larger max_rank",
            )

    def _converted(self, weights: Array) -> Array:
        if weights.dtype == self.dtype:
            return weights
        with np.errstate(over="ignore", invalid="ignore"):
            converted: Array = weights.astype(self.dtype)
        if (np.isinf(converted) & ~np.isinf(weights)).any():
            raise ValueRangeError(
                "adapter",
                f"weights that {self.dtype.name} can hold",
                str(np.abs(weights.astype(np.float64)).max()),
                "use a stack of a wider dtype",
            )
        return converted


def _move_weights_together() -> None:
    """Let memory follow what is loaded, after a change: empty the chunks that hold little.

    A call in flight has the table it began with, and that the weights as they stood.
    """
    try:
        for first, end in sparse():
            for known in _stacks.valuerefs():  # a list: other threads make stacks meanwhile
                stack = known()
                if stack is not None:
                    stack._leave(first, end)
    except MemoryError:  # no room to copy to; the change itself is made
        pass


def _renew_locks() -> None:
    """In a forked child: another thread of the parent may have held one."""
    for stack in _stacks.values():
        stack._changing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def check_stack(stack: object) -> None:
    """Refuse what is no AdapterStack."""
    if not isinstance(stack, AdapterStack):
        raise DtypeError(
            "stack",
            "an AdapterStack",
            type(stack).__name__,
            "make one with AdapterStack.from_adapters",
        )
