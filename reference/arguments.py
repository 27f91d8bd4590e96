"""Who has which adapter: reads the arguments that both forms share. No arithmetic here."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Adapters = Any  # mapping id -> adapter, sequence indexed by id, or an object with `in` and `[]`
Scaling = Mapping[int, float] | Sequence[float] | NDArray[Any] | float | None


class Adapter(NamedTuple):
    """One adapter as the caller gave it: A (r, h_in), B (h_out, r), and its scaling."""

    A: NDArray[Any]
    B: NDArray[Any]
    scaling: float


def used_adapters(
    adapters: Adapters, adapter_ids: ArrayLike, scalings: Scaling, h_in: int, h_out: int, n: int
) -> tuple[NDArray[np.int64], dict[int, Adapter | None]]:
    """Checked ids (n,), and the adapter of every id that a row uses; None = base only.

    Semantics: `chosen[ids[i]]` is row i's adapter. Adapters that no row uses are never read.
    Raises: ValueError for ids, shapes or scalings that do not fit, naming id and remedy.

    >>> ids, chosen = used_adapters([(np.ones((2, 3)), np.ones((4, 2)))], [0, -1], 2.0, 3, 4, 2)
    >>> chosen[0].scaling, chosen[-1] is None
    (2.0, True)
    """
    ids = np.asarray(adapter_ids)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"adapter_ids: expected integers, got {ids.dtype}; pass one id per row")
    if ids.shape != (n,):
        raise ValueError(f"adapter_ids: expected shape ({n},), got {ids.shape}; one id per row")
    ids = ids.astype(np.int64)
    chosen: dict[int, Adapter | None] = {}
    for adapter_id in np.unique(ids).tolist():
        adapter = _lookup(adapters, adapter_id)
        if adapter is None:
            chosen[adapter_id] = None
            continue
        A, B = (adapter.A, adapter.B) if hasattr(adapter, "A") else adapter
        scaling = _scaling_of(adapter, adapter_id, scalings)
        chosen[adapter_id] = checked(A, B, scaling, h_in, h_out, f"adapter {adapter_id}")
    return ids, chosen


def checked(
    A: ArrayLike, B: ArrayLike, scaling: float, h_in: int, h_out: int | None, name: str = "adapter"
) -> Adapter:
    """The adapter with its shapes and scaling checked; h_out None takes B's own.

    Semantics: `A.shape == (r, h_in)`, `B.shape == (h_out, r)`, scaling finite.
    Raises: ValueError that names the argument, what was expected, what came and the remedy.

    >>> checked(np.ones((2, 3)), np.ones((4, 2)), 1, 3, None).scaling
    1.0
    """
    A, B = np.asarray(A), np.asarray(B)
    if A.ndim != 2 or A.shape[1] != h_in:
        raise ValueError(f"{name}: expected A of shape (r, {h_in}), got {A.shape}; pass (r, h_in)")
    width = "h_out" if h_out is None else h_out
    if B.ndim != 2 or B.shape[1] != A.shape[0] or (h_out is not None and B.shape[0] != h_out):
        raise ValueError(
            f"{name}: expected B of shape ({width}, {A.shape[0]}), got {B.shape}; pass (h_out, r)"
        )
    if not math.isfinite(scaling):
        raise ValueError(f"{name}: expected a finite scaling, got {scaling}; pass alpha / r")
    return Adapter(A, B, float(scaling))


def matrix(
    argument: ArrayLike, name: str, *, rows: int | None = None, columns: int | None = None
) -> NDArray[Any]:
    """The argument as a 2-D array, in its own dtype.

    Semantics: `argument.shape == (rows, columns)`, where they are given.
    Raises: ValueError that names the argument, what was expected, what came and the remedy.

    >>> matrix([[1.0, 2.0]], "x", columns=2).shape
    (1, 2)
    """
    array = np.asarray(argument)
    expected = ("rows" if rows is None else rows, "columns" if columns is None else columns)
    fits = array.ndim == 2 and rows in (None, len(array)) and columns in (None, array.shape[1])
    if not fits:
        raise ValueError(
            f"{name}: expected shape ({expected[0]}, {expected[1]}), got {array.shape}; "
            "pass one row per token, the widths of the other arguments"
        )
    return array


def _lookup(adapters: Adapters, adapter_id: int) -> Any:
    if adapter_id == -1:
        return None
    if isinstance(adapters, Sequence):
        known = 0 <= adapter_id < len(adapters)
    else:
        known = adapter_id in adapters
    if not known:
        raise ValueError(
            f"adapter_ids: expected ids of the adapters given, got {adapter_id}; "
            "add that adapter, or use -1 for base only"
        )
    return adapters[adapter_id]


def _scaling_of(adapter: Any, adapter_id: int, scalings: Scaling) -> float:
    if scalings is None:
        return float(getattr(adapter, "scaling", 1.0))
    if isinstance(scalings, Real):
        return float(scalings)
    if isinstance(scalings, Mapping):
        known = adapter_id in scalings
    else:
        known = 0 <= adapter_id < len(scalings)  # type: ignore[arg-type]  # numbers left above
    if not known:
        raise ValueError(
            f"scalings: expected one for adapter {adapter_id}, got none; add it, or pass one number"
        )
    return float(scalings[adapter_id])  # type: ignore[index]  # numbers left above
