"""START HERE. From adapter ids to y: segment, shrink, expand, in that order.

    adapter_ids ──segment──> Segments ───────┐
                                             v
    x (n, h_in) ──────────shrink──────────> v (n, r) ──────────expand──────────> y (n, h_out)
                 x[rows] @ A.T per segment            y[rows] += scaling * v @ B.T

`add_lora` is the call a server makes once per layer and step; the others are the textbook form, as
numpy has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv.adapter import Adapter, AdapterLike, Adapters, Scalings, as_adapter, items
from sgmv.backend import kernels
from sgmv.checks import check_matrix, check_scaling, check_x, check_y
from sgmv.dora import check_alone
from sgmv.dtypes import Array, promote, sum_dtype
from sgmv.errors import DtypeError, ShapeError, UnknownAdapterError, some
from sgmv.ids import BASE_ONLY, Integers, as_pairs
from sgmv.launch import run_both
from sgmv.segment import Segments, segment, weighted
from sgmv.stack import AdapterStack, check_stack


def add_lora(
    y: Array,
    x: Array,
    stack: AdapterStack,
    adapter_ids: Segments | npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    backend: str | None = None,
) -> Array:
    """Add every row's own LoRA delta to y, in place: shrink, then expand.

    Semantics: `y[i] += scaling * (x[i] @ A.T) @ B.T` with the adapter of `adapter_ids[i]`; both
    products are summed in float32 (float64 if any operand is) and y is rounded once. Rows of id -1
    or of a None entry keep their bits. Of k ids per row, each adds its delta times its weight, in
    ascending order of the ids, y rounded after each; an id named twice adds twice. A row of an
    adapter with magnitudes (DoRA), which is alone in its row, gets `gain * (y + delta)`, rounded
    once; see `AdapterStack.load`.

    y            (n, h_out)  float32, float16, bfloat16 or float64; writable; any strides
    x            (n, h_in)   likewise; not changed; no memory shared with y
    stack        the layer's adapters
    adapter_ids  (n,) or (n, k) integers, or the `Segments` made of them once for all layers of a
                 step
    weights      (n, k) finite numbers, used as float32; 1, if left out
    backend      "amx", "tiles" or "loops"; the first of these that can, if left out
    returns      y

    A row's result depends on no other row, nor on their order, the number of threads or the run.
    Raises ShapeError, DtypeError, MemoryLayoutError, ValueRangeError, UnknownAdapterError; y is
    then as it was. An interrupt (Ctrl-C) may leave y with some of the deltas added.
    Source: Punica (arXiv 2310.18547), section 4; punica/ops/__init__.py, `add_lora_sgmv`.

    >>> import sgmv
    >>> A, B = np.ones((1, 3), "float32"), np.array([[1], [10]], "float32")
    >>> stack = sgmv.AdapterStack.from_adapters({4: sgmv.Adapter(A, B, scaling=0.5)})
    >>> x = np.array([[1, 2, 3], [4, 5, 6]], "float32")
    >>> add_lora(np.zeros((2, 2), "float32"), x, stack, [-1, 4])
    array([[ 0. ,  0. ],
           [ 7.5, 75. ]], dtype=float32)
    >>> y = np.zeros((2, 2), "float32")
    >>> add_lora(y, x, stack, [[4, -1], [4, 4]], weights=[[2, 1], [1, 1]])
    array([[  6.,  60.],
           [ 15., 150.]], dtype=float32)
    """
    check_stack(stack)
    batch = _batch(adapter_ids, weights)
    n = batch.n if isinstance(batch, Segments) else len(batch)
    check_x(x, n, stack.h_in)
    check_y(y, n, stack.h_out, "x", x)
    table = stack.table
    if table.gains is not None and isinstance(batch, Segments):
        check_alone(table, batch)
    run_both(kernels(backend, x.dtype, stack.dtype, y.dtype), table, batch, x, y)
    return y


def _batch(
    adapter_ids: Segments | npt.ArrayLike, weights: npt.ArrayLike | None
) -> Segments | Integers:
    """Ids, one per row, as they are: compiled code sorts them. Anything else is segmented here."""
    if isinstance(adapter_ids, Segments):
        return weighted(adapter_ids, weights)
    ids, k = as_pairs(adapter_ids)
    if k is None and weights is None:
        return ids
    return weighted(segment(ids if k is None else ids.reshape(-1, k)), weights)


def apply_batched(
    x: Array,
    W: Array,
    adapters: Adapters | AdapterStack,
    adapter_ids: Segments | npt.ArrayLike,
    scalings: Scalings = None,
    *,
    weights: npt.ArrayLike | None = None,
) -> Array:
    """One linear layer for a batch with a different adapter for each row.

    Semantics: `y = x @ W.T`, once for the whole batch, by numpy; then `add_lora`. 16-bit inputs
    are widened to float32 for the base product, and y is rounded once at the end. Adapters with
    magnitudes (DoRA) take their gains from W.

    x            (n, h_in)
    W            (h_out, h_in)
    adapters     a mapping id -> Adapter, (A, B) or None; a sequence of those, indexed by id; or an
                 AdapterStack, which saves packing the weights at every call. None = base only
    adapter_ids  (n,) or (n, k) integers, or Segments; -1 = base only
    scalings     a mapping, a sequence indexed by id, or one number; each Adapter's own (1.0 for an
                 (A, B) pair), if left out
    weights      (n, k) finite numbers, a factor of each pair's delta; 1, if left out
    returns      (n, h_out) in the smallest type that holds x, W and the weights used

    The base product is numpy's BLAS: its bits may depend on the batch's size, the deltas' do not.
    Raises as `add_lora` and `Adapter` do. Source: LoRA (arXiv 2106.09685), section 4.1; vLLM,
    lora/punica_wrapper, `add_lora_linear`.

    >>> x, W = np.eye(2, dtype="float32"), np.zeros((3, 2), "float32")
    >>> A, B = np.array([[1, 2]], "float32"), np.array([[1], [0], [1]], "float32")
    >>> apply_batched(x, W, {7: (A, B)}, [7, -1], scalings={7: 0.5})
    array([[0.5, 0. , 0.5],
           [0. , 0. , 0. ]], dtype=float32)
    """
    segments = adapter_ids if isinstance(adapter_ids, Segments) else segment(adapter_ids)
    h_in = check_matrix("x", x).shape[1]
    if check_matrix("W", W).shape[1] != h_in:
        raise ShapeError(
            "W", f"(h_out, {h_in}), as x has h_in = {h_in}", str(W.shape), "pass W as (h_out, h_in)"
        )
    check_x(x, segments.n, h_in)
    if isinstance(adapters, AdapterStack):
        if scalings is not None:
            raise DtypeError(
                "scalings",
                "none, as an AdapterStack holds each adapter's own",
                type(scalings).__name__,
                "set them when loading: Adapter(A, B, scaling)",
            )
        stack = adapters
    else:
        used = _used(adapters, scalings, segments)
        stack = AdapterStack.from_adapters(used, h_in=W.shape[1], h_out=W.shape[0], W=W)
    if (stack.h_in, stack.h_out) != (W.shape[1], W.shape[0]):
        raise ShapeError(
            "adapters",
            f"h_in = {W.shape[1]} and h_out = {W.shape[0]}, the widths of W",
            f"h_in = {stack.h_in} and h_out = {stack.h_out}",
            "use adapters made for this layer",
        )
    wide = sum_dtype(x.dtype, W.dtype, stack.dtype)
    types = [x.dtype, W.dtype, *([stack.dtype] if stack.slots else [])]
    with np.errstate(invalid="ignore", over="ignore"):  # inf and NaN pass through, as in add_lora
        y: Array = x.astype(wide, copy=False) @ W.astype(wide, copy=False).T
        add_lora(y, x, stack, segments, weights=weights)
        return y.astype(promote(*types), copy=False)


def apply_single(
    x: Array, W: Array, A: Array, B: Array, scaling: float, magnitude: Array | None = None
) -> Array:
    """One linear layer with one adapter for all rows.

    Semantics: `x @ W.T + scaling * (x @ A.T) @ B.T`, rounded once. With magnitudes, each column of
    that times its gain, `magnitude / length of the row of W + scaling * B @ A`.

    x (n, h_in)   W (h_out, h_in)   A (r, h_in)   B (h_out, r)   scaling finite
    magnitude (h_out,), or None for plain LoRA
    returns (n, h_out) in the smallest type that holds all four

    Raises as `apply_batched` does. Source: LoRA (arXiv 2106.09685), equation 3; DoRA (arXiv
    2402.09353), equation 5.

    >>> x, W = np.eye(2, dtype="float32"), np.ones((1, 2), "float32")
    >>> apply_single(x, W, np.array([[1, 2]], "float32"), np.ones((1, 1), "float32"), 0.5)
    array([[1.5],
           [2. ]], dtype=float32)
    """
    return apply_batched(x, W, [Adapter(A, B, scaling, magnitude)], _all_rows(x))


def lora_delta(x: Array, A: Array, B: Array, scaling: float) -> Array:
    """What one adapter adds to its rows.

    Semantics: `scaling * (x @ A.T) @ B.T`, rounded once.

    x (n, h_in)   A (r, h_in)   B (h_out, r)   scaling finite
    returns (n, h_out) in the smallest type that holds all three

    Raises as `add_lora` and `Adapter` do. Source: LoRA (arXiv 2106.09685), equation 3.

    >>> x = np.eye(2, dtype="float32")
    >>> lora_delta(x, np.array([[1, 2]], "float32"), np.ones((1, 1), "float32"), 0.5)
    array([[0.5],
           [1. ]], dtype=float32)
    """
    stack = AdapterStack.from_adapters([Adapter(A, B, scaling)])
    segments = segment(_all_rows(x))
    y = np.zeros((segments.n, stack.h_out), promote(x.dtype, stack.dtype))
    return add_lora(y, x, stack, segments)


def _all_rows(x: Any) -> npt.NDArray[np.int64]:
    return np.zeros(len(check_matrix("x", x)), np.int64)


def _used(adapters: Adapters, scalings: Scalings, segments: Segments) -> dict[int, Adapter | None]:
    """The batch's adapters, with the scalings given for them; those of other ids are not read."""
    entries: dict[int, AdapterLike] = dict(items(adapters))
    ids = [i for i in dict.fromkeys(segments.adapter_ids.tolist()) if i != BASE_ONLY]
    unknown = [adapter_id for adapter_id in ids if adapter_id not in entries]
    if unknown:
        raise UnknownAdapterError(
            "adapter_ids",
            f"-1 or ids of the given adapters, {some(entries)}",
            some(unknown),
            "add them to adapters, or name -1 for base only",
        )
    used: dict[int, Adapter | None] = {}
    for adapter_id in ids:
        adapter = as_adapter(f"adapters[{adapter_id}]", entries[adapter_id])
        if adapter is not None and scalings is not None:
            adapter = replace(adapter, scaling=_scaling(scalings, adapter_id))
        used[adapter_id] = adapter
    return used


def _scaling(scalings: Mapping[int, float] | Sequence[float] | float, adapter_id: int) -> float:
    if isinstance(scalings, Mapping):
        known = adapter_id in scalings
    elif isinstance(scalings, Sequence | np.ndarray) and not _is_single(scalings):
        known = adapter_id < len(scalings)
    else:
        return check_scaling("scalings", scalings)
    if not known:
        raise UnknownAdapterError(
            "scalings",
            "a scaling for every adapter that the batch names",
            f"none for adapter {adapter_id}",
            "add it, or leave scalings out to use each Adapter's own",
        )
    return check_scaling(f"scalings[{adapter_id}]", scalings[adapter_id])


def _is_single(scalings: object) -> bool:
    return isinstance(scalings, str | bytes) or getattr(scalings, "ndim", 1) == 0
