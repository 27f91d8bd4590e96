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
    """One adapter as the caller gave it: A (r, h_in), B (h_out, r), scaling, magnitude (h_out,)."""

    A: NDArray[Any]
    B: NDArray[Any]
    scaling: float
    magnitude: NDArray[Any] | None = None


def used_adapters(
    adapters: Adapters, adapter_ids: ArrayLike, scalings: Scaling, h_in: int, h_out: int, n: int
) -> tuple[NDArray[np.int64], dict[int, Adapter | None]]:
    """Checked ids (n,) or (n, k), and the adapter of every id that a row uses; None = base only.

    Semantics: `chosen[ids[i]]` is row i's adapter. Adapters that no row uses are never read.
    Raises: ValueError for ids, shapes or scalings that do not fit, naming id and remedy.

    >>> ids, chosen = used_adapters([(np.ones((2, 3)), np.ones((4, 2)))], [0, -1], 2.0, 3, 4, 2)
    >>> chosen[0].scaling, chosen[-1] is None
    (2.0, True)
    """
    ids = _array(adapter_ids, "adapter_ids", "integers")
    if ids.size and ids.dtype.kind not in "iu":
        raise ValueError(f"adapter_ids: expected integers, got {ids.dtype}; pass one id per row")
    if ids.shape[:1] != (n,) or ids.ndim > 2 or 0 in ids.shape[1:]:
        expected = f"shape ({n},) or ({n}, k)"
        raise ValueError(f"adapter_ids: expected {expected}, got {ids.shape}; one id per row")
    if ids.dtype.kind == "u" and ids.max(initial=0) >= 2**63:  # int64 would make it negative
        raise _unknown(ids.max())
    ids = ids.astype(np.int64)
    chosen: dict[int, Adapter | None] = {}
    for adapter_id in np.unique(ids).tolist():
        adapter = _lookup(adapters, adapter_id)
        if adapter is None:
            chosen[adapter_id] = None
            continue
        name = f"adapter {adapter_id}"
        A, B = _pair(adapter, name)
        scaling = _scaling_of(adapter, adapter_id, scalings)
        magnitude = getattr(adapter, "magnitude", None)
        chosen[adapter_id] = checked(A, B, scaling, h_in, h_out, name, magnitude)
    return ids, chosen


def scaled_rows(
    ids: NDArray[np.int64],
    chosen: Mapping[int, Adapter | None],
    weights: ArrayLike | None,
    W: ArrayLike | None,
    bias: ArrayLike | None,
    shape: tuple[int, int],
) -> tuple[dict[int, NDArray[np.intp]], NDArray[Any], NDArray[Any] | None]:
    """The rows of each adapter with magnitudes, W (h_out, h_in), and bias (h_out,) or None.

    Semantics: such an adapter is alone in its rows, with a weight of 1.
    Raises: ValueError where it is not, or where W is missing; magnitude and bias are (h_out,).
    """
    scaled = {i: one for i, one in chosen.items() if one and one.magnitude is not None}
    if not scaled:
        return {}, np.empty((0, 0)), None
    if W is None:
        raise ValueError("W: expected the base weight for adapters with magnitudes, got none")
    per_column: dict[str, Any] = {
        f"magnitude of adapter {i}": one.magnitude for i, one in scaled.items()
    }
    if bias is not None:
        per_column["bias"] = bias = _numbers(bias, "bias", "real numbers")
    for name, array in per_column.items():
        if np.shape(array) != shape[:1]:
            raise ValueError(f"{name}: expected shape ({shape[0]},), got {np.shape(array)}")
    in_columns: Any = ids.reshape(len(ids), -1)
    used = np.isin(in_columns, [i for i, one in chosen.items() if one])
    found = {}
    for i in scaled:
        places = in_columns == i
        rows = np.flatnonzero(places.any(axis=1))
        alone = used[rows].sum(axis=1) == 1
        if not alone.all() or (factors(weights, ids).reshape(places.shape)[places] != 1).any():
            raise ValueError(f"adapter_ids: expected adapter {i} alone in its rows, with weight 1")
        found[i] = rows
    return found, matrix(W, "W", rows=shape[0], columns=shape[1]), bias


def factors(weights: ArrayLike | None, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """A factor for each id, in ids' shape; 1, if weights are left out.

    Raises: ValueError unless they are finite real numbers in that shape.

    >>> factors(None, np.array([[3, -1]]))
    array([[1., 1.]])
    """
    if weights is None:
        return np.ones(ids.shape)
    given = _numbers(weights, "weights", "real numbers")
    if given.shape != ids.shape:
        raise ValueError(f"weights: expected shape {ids.shape}, got {given.shape}; one for each id")
    if not np.isfinite(given.astype(np.float64)).all():
        raise ValueError("weights: expected finite numbers, got NaN or inf; use the id -1 instead")
    return given.astype(np.float64)


def checked(
    A: ArrayLike,
    B: ArrayLike,
    scaling: float,
    h_in: int,
    h_out: int | None,
    name: str = "adapter",
    magnitude: ArrayLike | None = None,
) -> Adapter:
    """The adapter with its shapes and scaling checked; h_out None takes B's own.

    Semantics: `A.shape == (r, h_in)`, `B.shape == (h_out, r)`, real numbers, scaling finite.
    Raises: ValueError that names the argument, what was expected, what came and the remedy.

    >>> checked(np.ones((2, 3)), np.ones((4, 2)), 1, 3, None).scaling
    1.0
    """
    A, B = _numbers(A, name, "A of real numbers"), _numbers(B, name, "B of real numbers")
    if A.ndim != 2 or A.shape[1] != h_in:
        raise ValueError(f"{name}: expected A of shape (r, {h_in}), got {A.shape}; pass (r, h_in)")
    width = "h_out" if h_out is None else h_out
    if B.ndim != 2 or B.shape[1] != A.shape[0] or (h_out is not None and B.shape[0] != h_out):
        raise ValueError(
            f"{name}: expected B of shape ({width}, {A.shape[0]}), got {B.shape}; pass (h_out, r)"
        )
    number = _float(scaling, name)
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite scaling, got {number}; pass alpha / r")
    return Adapter(A, B, number, None if magnitude is None else np.asarray(magnitude))


def matrix(
    argument: ArrayLike, name: str, *, rows: int | None = None, columns: int | None = None
) -> NDArray[Any]:
    """The argument as a 2-D array, in its own dtype.

    Semantics: `argument.shape == (rows, columns)`, where they are given; real numbers.
    Raises: ValueError that names the argument, what was expected, what came and the remedy.

    >>> matrix([[1.0, 2.0]], "x", columns=2).shape
    (1, 2)
    """
    array = _numbers(argument, name, "real numbers")
    expected = ("rows" if rows is None else rows, "columns" if columns is None else columns)
    fits = array.ndim == 2 and rows in (None, len(array)) and columns in (None, array.shape[1])
    if not fits:
        raise ValueError(
            f"{name}: expected shape ({expected[0]}, {expected[1]}), got {array.shape}; "
            "pass one row per token, the widths of the other arguments"
        )
    return array


def _array(argument: Any, name: str, expected: str) -> NDArray[Any]:
    try:
        return np.asarray(argument)
    except (TypeError, ValueError, RuntimeError):  # rows of unequal lengths, or a foreign array
        raise ValueError(
            f"{name}: expected {expected}, got {type(argument).__name__} that numpy cannot read; "
            "pass a numpy array"
        ) from None


def _numbers(argument: Any, name: str, expected: str) -> NDArray[Any]:
    array = _array(argument, name, expected)
    if not _is_real(array.dtype):
        raise ValueError(
            f"{name}: expected {expected}, got {array.dtype}; "
            "convert them, for example with .astype(np.float64)"
        )
    return array


def _is_real(dtype: np.dtype[Any]) -> bool:
    # bfloat16 too, which numpy itself does not count among its floats.
    return np.can_cast(dtype, np.float64, "same_kind")


def _float(scaling: Any, name: str) -> float:
    try:
        array = np.asarray(scaling)
        if isinstance(scaling, Real) or (array.ndim == 0 and _is_real(array.dtype)):
            return float(scaling)
    except OverflowError:  # an int beyond every float
        return math.inf
    except (TypeError, ValueError):  # also numpy's durations, which are registered as numbers
        pass
    raise ValueError(
        f"{name}: expected a real number as scaling, got {type(scaling).__name__}; pass alpha / r"
    )


def _pair(adapter: Any, name: str) -> tuple[Any, Any]:
    try:
        A, B = (adapter.A, adapter.B) if hasattr(adapter, "A") else adapter
    except (AttributeError, TypeError, ValueError):
        count = f" of {len(adapter)}" if isinstance(adapter, Sequence) else ""
        raise ValueError(
            f"{name}: expected (A, B), an Adapter or None, got {type(adapter).__name__}{count}; "
            "pass (A, B) of shapes (r, h_in) and (h_out, r)"
        ) from None
    return A, B


def _lookup(adapters: Adapters, adapter_id: int) -> Any:
    if adapter_id == -1:
        return None
    if isinstance(adapters, Sequence):
        known = 0 <= adapter_id < len(adapters)
    elif _is_keyed(adapters):
        known = adapter_id in adapters
    else:
        raise ValueError(
            f"adapters: expected a mapping or a sequence, got {type(adapters).__name__}; "
            "pass {id: (A, B)}"
        )
    if not known:
        raise _unknown(adapter_id)
    return adapters[adapter_id]


def _is_keyed(adapters: Adapters) -> bool:
    if isinstance(adapters, np.ndarray):  # whose `in` looks at elements
        return False
    return hasattr(adapters, "__contains__") and hasattr(adapters, "__getitem__")


def _unknown(adapter_id: int) -> ValueError:
    return ValueError(
        f"adapter_ids: expected ids of the adapters given, got {adapter_id}; "
        "add that adapter, or use -1 for base only"
    )


def _scaling_of(adapter: Any, adapter_id: int, scalings: Scaling) -> Any:
    if scalings is None:
        return getattr(adapter, "scaling", 1.0)
    if isinstance(scalings, Mapping):
        known = adapter_id in scalings
    elif isinstance(scalings, Sequence) or np.ndim(scalings):
        known = 0 <= adapter_id < len(scalings)  # type: ignore[arg-type]  # numbers go below
    else:
        return scalings
    if not known:
        raise ValueError(
            f"scalings: expected one for adapter {adapter_id}, got none; add it, or pass one number"
        )
    return scalings[adapter_id]  # type: ignore[index]  # numbers left above
