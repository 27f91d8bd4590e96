"""Adapter ids, and the other integers that callers pass: one type, one way in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from sgmv.errors import DtypeError, ShapeError, ValueRangeError, shown
from sgmv.kernels import plan

BASE_ONLY = plan.BASE_ONLY  # the id of rows that have no adapter
NO_SLOT = plan.NO_SLOT  # the slot of ids that are known and base only
MOST = 2**63 - 1  # what an int64 holds
Integers = npt.NDArray[np.int64]


def is_integer(value: object) -> TypeGuard[int]:
    """Whether the value is a Python or numpy integer; True and False are not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))


def check_id(adapter_id: object, argument: str = "adapter_id") -> int:
    """The id of an adapter as an int, if it is one from 0 to 2**63 - 2."""
    if not is_integer(adapter_id):
        raise DtypeError(argument, "an integer >= 0", repr(adapter_id), "name adapters by integers")
    if not 0 <= adapter_id < MOST:
        raise ValueRangeError(
            argument,
            "an integer from 0 to 2**63 - 2",
            shown(adapter_id),
            "use another id; -1 always means base only",
        )
    return int(adapter_id)


def as_ids(
    adapter_ids: npt.ArrayLike | Sequence[int | None], argument: str = "adapter_ids"
) -> Integers:
    """The ids as contiguous int64; the sort checks their range."""
    if (
        isinstance(adapter_ids, np.ndarray)
        and adapter_ids.dtype == np.int64
        and adapter_ids.ndim == 1
        and adapter_ids.flags.c_contiguous
    ):
        return adapter_ids
    return as_integers(argument, _none_as_base_only(adapter_ids))


def as_pairs(
    adapter_ids: npt.ArrayLike | Sequence[Any], argument: str = "adapter_ids"
) -> tuple[Integers, int | None]:
    """The ids as contiguous int64 (n * k,) and k; for (n,) ids k is None."""
    shape = getattr(adapter_ids, "shape", None)
    if shape is None and isinstance(adapter_ids, list | tuple):
        rows = [
            row
            for row in adapter_ids
            if isinstance(row, list | tuple) or (isinstance(row, np.ndarray) and row.ndim == 1)
        ]
        lengths = {len(row) for row in rows}
        if rows and len(rows) == len(adapter_ids) and len(lengths) == 1:
            shape = len(rows), lengths.pop()
    if shape is None or len(shape) == 1:
        return as_ids(adapter_ids, argument), None
    if len(shape) != 2 or shape[1] < 1:
        expected = "shape (n,) or (n, k), k of 1 or more"
        raise ShapeError(argument, expected, str(tuple(shape)), "give one id per row, or several")
    try:
        array = np.asarray(adapter_ids)
    except ValueError:  # lists among the ids
        array = np.empty(0)
    if array.ndim != 2:
        remedy = "give one id per row, or several"
        raise ShapeError(argument, "an integer at each place", "lists", remedy)
    flat = array.reshape(-1)
    return as_ids(flat.tolist() if flat.dtype == object else flat, argument), shape[1]


def as_integers(argument: str, values: Any) -> Integers:
    """The values, integers in one dimension, as contiguous int64."""
    try:
        array = values if isinstance(values, np.ndarray) else np.asarray(values)
        shape = f"shape {array.shape}"
    except ValueError:
        array, shape = np.empty((0, 0)), "lists of unequal lengths"
    except (TypeError, OverflowError):  # of no type that numpy has
        array = np.empty(1, object)
        shape = ""
    if array.ndim != 1:
        raise ShapeError(argument, "one dimension", shape, "give one integer per row")
    if array.size == 0:
        return np.empty(0, np.int64)
    dtype = array.dtype
    if dtype.kind == "f" and isinstance(values, (list, tuple)):
        array = np.array(values, object)  # of int64 and uint64 numpy made floats
    if array.dtype.kind not in "iu" and not all(map(is_integer, array)):
        how = ".long()" if hasattr(values, "long") else ".astype(np.int64)"  # a tensor's
        raise DtypeError(argument, "integers", str(dtype), f"convert with {how}")
    if array.dtype.kind != "i" and array.max() > MOST:
        received = shown(array.max())
        raise ValueRangeError(argument, "integers below 2**63", received, "use smaller ids")
    if array.dtype.kind == "O" and array.min() < -MOST - 1:
        received = shown(array.min())
        raise ValueRangeError(argument, "integers from -2**63", received, "use -1 for base only")
    return np.ascontiguousarray(array, np.int64)


def _none_as_base_only(adapter_ids: Any) -> Any:
    is_array = isinstance(adapter_ids, np.ndarray) and adapter_ids.ndim == 1
    if (is_array and adapter_ids.dtype == object) or isinstance(adapter_ids, list | tuple):
        return [BASE_ONLY if adapter_id is None else adapter_id for adapter_id in adapter_ids]
    return adapter_ids
