"""LoRA on experts: adapters with factors of their own for each expert, in mixed batches.

A pair's delta is that of its (expert, adapter). Each of these is a slot of an AdapterStack, so that
what remains is a plain batch: one row per pair, sorted by (adapter, expert).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv.adapter import Adapter, ExpertAdapter, check_expert_adapter
from sgmv.backend import kernels
from sgmv.checks import check_count, check_y
from sgmv.dtypes import Array
from sgmv.errors import DtypeError, ShapeError, UnknownAdapterError, some
from sgmv.experts.grouped import pairs_of
from sgmv.ids import BASE_ONLY, Integers, as_ids, check_id, is_integer
from sgmv.launch import run_both
from sgmv.products import batch_of_pairs
from sgmv.segment import Segments
from sgmv.stack import AdapterStack


class ExpertStack:
    """The adapters of one layer of experts, packed for the kernels.

    Semantics: as `AdapterStack`, with E slots for each adapter; a factor that experts share is
    stored once per expert. `load` replaces, `unload` removes; ids are 0 or more.

    experts  E            h_in, h_out  the widths of each expert
    slots    adapters that fit at once; max_rank, dtype as in `AdapterStack`

    >>> stack = ExpertStack(experts=4, h_in=8, h_out=16, slots=2, max_rank=2)
    >>> stack.load(7, ExpertAdapter(np.ones((4, 2, 8)), np.ones((4, 16, 2))))
    >>> 7 in stack, stack.ids
    (True, [7])
    """

    def __init__(
        self,
        experts: int,
        h_in: int,
        h_out: int,
        *,
        slots: int,
        max_rank: int,
        dtype: npt.DTypeLike = "float32",
    ) -> None:
        self.experts = check_count("experts", experts, 1)
        slots = check_count("slots", slots, 0) * self.experts
        self.stack = AdapterStack(h_in, h_out, slots=slots, max_rank=max_rank, dtype=dtype)
        self._places: dict[int, int] = {}  # adapter id -> place
        self._know()

    @property
    def ids(self) -> list[int]:
        """The ids that are loaded, in ascending order."""
        return sorted(self._places)

    def __contains__(self, adapter_id: object) -> bool:
        return is_integer(adapter_id) and adapter_id in self._places

    def load(self, adapter_id: int, adapter: ExpertAdapter | None) -> None:
        """Put an adapter under this id, or no adapter (None): base only.

        Raises as `AdapterStack.load`, and ShapeError for another number of experts; nothing has
        changed then.
        """
        adapter_id = check_id(adapter_id)
        parts: list[Adapter | None] = [None] * self.experts
        if adapter is not None:
            check_expert_adapter("adapter", adapter)
            if adapter.experts != self.experts:
                raise ShapeError(
                    "adapter", f"{self.experts} experts", str(adapter.experts), "pass this layer's"
                )
            parts = [self.stack.fitted(adapter.of(e)) for e in range(self.experts)]
        used = set(self._places.values())
        place = self._places.get(adapter_id, next(i for i in range(len(used) + 1) if i not in used))
        for e, part in enumerate(parts):
            self.stack.load(place * self.experts + e, part)
        self._places[adapter_id] = place
        self._know()

    def unload(self, adapter_id: int) -> None:
        """Free the slots of this id. Raises UnknownAdapterError."""
        place = self._place(adapter_id)
        for e in range(self.experts):
            self.stack.unload(place * self.experts + e)
        del self._places[adapter_id]
        self._know()

    def _pair_ids(self, expert_ids: Integers, adapter_ids: Integers) -> Integers:
        """(n, k) the stack's id of each pair; -1 where there is no expert or no adapter."""
        at = np.searchsorted(self._ids[:-1], adapter_ids)
        unknown = (self._ids[at] != adapter_ids) & (adapter_ids != BASE_ONLY)
        if unknown.any():
            raise self._not_loaded("adapter_ids", some(np.unique(adapter_ids[unknown])))
        found = self._first[at][:, np.newaxis] + expert_ids
        found[(expert_ids == BASE_ONLY) | (adapter_ids == BASE_ONLY)[:, np.newaxis]] = BASE_ONLY
        return found

    def _know(self) -> None:
        """The ids that are loaded, ascending, and the stack's id of each one's first expert."""
        known = self.ids
        self._ids = np.array([*known, BASE_ONLY])
        self._first = np.array([*(self._places[i] * self.experts for i in known), BASE_ONLY])

    def _place(self, adapter_id: Any) -> int:
        if adapter_id not in self:
            raise self._not_loaded("adapter_id", repr(adapter_id))
        return self._places[adapter_id]

    def _not_loaded(self, argument: str, received: str) -> UnknownAdapterError:
        expected = f"ids that are loaded, {some(self.ids)}"
        return UnknownAdapterError(argument, expected, received, "load it first")


def add_lora(
    y: Array,
    x: Array,
    stack: ExpertStack,
    expert_ids: Segments | npt.ArrayLike,
    adapter_ids: npt.ArrayLike,
    *,
    backend: str | None = None,
) -> Array:
    """Add to each pair's product the delta of its expert's adapter, in place.

    Semantics: `y[i, j] += scaling * (x[i] @ A[e].T) @ B[e].T` with e = expert_ids[i, j] and the
    factors of adapter_ids[i]; x (n, k, h_in) gives `x[i, j]`. -1, as expert or adapter, adds
    nothing.

    y            (n, k, h_out), contiguous, what `grouped_matmul` returned; or (n, h_out) for (n,)
    x            (n, h_in) or (n, k, h_in)
    stack        the layer's adapters
    expert_ids   (n, k) or (n,) integers, or the `Segments` made of them
    adapter_ids  (n,) integers
    backend      as in `sgmv.add_lora`
    returns      y

    Same row, same bits, as in `sgmv.add_lora`. Raises as it does; y is then as it was.
    Source: vLLM, `add_lora_fused_moe`.

    >>> stack = ExpertStack(2, 3, 1, slots=1, max_rank=1)
    >>> stack.load(5, ExpertAdapter(np.ones((2, 1, 3)), np.array([[[1]], [[10]]], "float32")))
    >>> x = np.array([[1, 2, 3], [4, 5, 6]], "float32")
    >>> add_lora(np.zeros((2, 2, 1), "float32"), x, stack, [[0, 1], [1, 0]], [5, -1])[:, :, 0]
    array([[ 6., 60.],
           [ 0.,  0.]], dtype=float32)
    """
    if not isinstance(stack, ExpertStack):
        got = type(stack).__name__
        raise DtypeError("stack", "an ExpertStack", got, "make one, and load adapters into it")
    pairs, _, flat = pairs_of(x, expert_ids)
    adapters = as_ids(adapter_ids)
    if len(adapters) != pairs.n:
        raise ShapeError(
            "adapter_ids", f"shape (n,) = ({pairs.n},)", str(adapters.shape), "give one per row"
        )
    experts = pairs.named
    if experts.max(initial=-1) >= stack.experts:
        beyond = some(np.unique(experts[experts >= stack.experts]))
        raise UnknownAdapterError(
            "expert_ids", f"experts 0..{stack.experts - 1}", beyond, "pass this layer's ids"
        )
    ids = stack._pair_ids(experts.reshape(pairs.n, pairs.k), adapters)
    batch = batch_of_pairs(ids.tobytes(), pairs.k, getattr(x, "ndim", 2) == 2)
    rows = _rows_of(y, pairs)
    table = stack.stack.table
    if flat.shape[1] != stack.stack.h_in:
        raise ShapeError("x", f"{stack.stack.h_in} columns", str(x.shape), "pass this layer's x")
    check_y(rows, batch.n, stack.stack.h_out, "x", flat)
    run_both(kernels(backend, flat.dtype, stack.stack.dtype, rows.dtype), table, batch, flat, rows)
    return y


def _rows_of(y: Any, pairs: Segments) -> Array:
    """The rows of y as a matrix, over the same memory."""
    shape: tuple[int, ...] = getattr(y, "shape", ())
    fits = shape[:-1] == (pairs.n, pairs.k) or (pairs.k == 1 and shape[:-1] == (pairs.n,))
    if not fits or not y.flags.c_contiguous:
        raise ShapeError(
            "y",
            f"contiguous, of shape ({pairs.n}, {pairs.k}, h_out)",
            str(shape),
            "pass what grouped_matmul returned",
        )
    rows: Array = y.reshape(pairs.n * pairs.k, shape[-1])
    return rows
