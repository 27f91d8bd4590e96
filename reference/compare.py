"""Holds a result against `by_row` and its bound: the verdict, its message, and the statistics."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reference.floats import float_type


class ErrorStatistics(NamedTuple):
    """How large the errors are, over the elements that are finite on both sides.

    A mean far from 0 beside the other figures is a bias: rounding to nearest has none.
    """

    mean_signed: float
    root_mean_square: float
    largest: float
    largest_in_bounds: float  # 1.0 = an element lies exactly on its bound
    largest_in_ulps: float  # gaps of the result's type at the expected value


class Worst(NamedTuple):
    """How many elements are wrong, and the one furthest beyond its bound."""

    wrong: int
    size: int
    row: int
    column: int
    got: float
    expected: float
    error: float
    bound: float

    def __str__(self) -> str:
        return (
            f"{self.wrong} of {self.size} elements wrong, worst at row {self.row}, column "
            f"{self.column}: got {self.got}, expected {self.expected}, error {self.error:.6g}, "
            f"bound {self.bound:.6g}"
        )


def violations(actual: ArrayLike, expected: ArrayLike, bound: ArrayLike) -> NDArray[np.bool_]:
    """Which elements are wrong.

    Semantics: `abs(actual - expected) > bound`; NaN and inf only where expected has the same, or
    inf where the value, up to its bound, rounds to inf in actual's type.
    actual (n, h_out) float, expected and bound (n, h_out) float64 -> (n, h_out) bool.
    Raises: ValueError on unequal shapes, and on a bound that is negative, NaN or inf: it would
    prove nothing. Source: bounds.py.

    >>> violations(np.array([[1.0, 2.0, np.nan]]), [[1.0, 2.5, 3.0]], [[0.0, 0.1, 9.0]])
    array([[False,  True,  True]])
    """
    actual, stored = _widened(actual)
    expected, bound = np.asarray(expected, np.float64), np.asarray(bound, np.float64)
    for name, array in (("actual", actual), ("bound", bound)):
        if array.shape != expected.shape:
            raise ValueError(
                f"{name}: expected the shape of expected, {expected.shape}, got {array.shape}; "
                "compare whole results"
            )
    if not np.all((bound >= 0) & np.isfinite(bound)):
        raise ValueError("bound: expected finite numbers >= 0, got others; sums may overflow there")
    with np.errstate(invalid="ignore", over="ignore"):
        close = np.abs(actual - expected) <= bound
        overflows = np.abs(expected) + bound >= float_type(stored).overflow_threshold
        rounds_to_inf = np.isinf(actual) & overflows & (np.sign(actual) == np.sign(expected))
    same_kind = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    right: NDArray[np.bool_] = np.where(np.isfinite(expected), close | rounds_to_inf, same_kind)
    return ~right


def check(actual: ArrayLike, expected: ArrayLike, bound: ArrayLike, name: str = "result") -> None:
    """Passes if every element is right.

    Semantics: `not violations(actual, expected, bound).any()`; arguments as there.
    Raises: AssertionError naming the worst element: row, column, actual, expected, error, bound;
    ValueError as `violations`.

    >>> check(np.array([[1.0, 2.5]]), [[1.0, 2.0]], [[0.1, 0.1]])
    Traceback (most recent call last):
    AssertionError: result: 1 of 2 elements wrong, worst at row 0, column 1: \
got 2.5, expected 2.0, error 0.5, bound 0.1
    """
    found = worst(actual, expected, bound)
    if found is not None:
        raise AssertionError(f"{name}: {found}")


def worst(actual: ArrayLike, expected: ArrayLike, bound: ArrayLike) -> Worst | None:
    """The wrong element furthest beyond its bound; None if every element is right.

    Semantics: that of `violations` with the largest `abs(actual - expected) - bound`, NaN and inf
    before all others. Arguments and errors as there.

    >>> worst(np.array([[1.0, 2.5]]), [[1.0, 2.0]], [[0.1, 0.1]]).column
    1
    """
    wrong = violations(actual, expected, bound)
    if not wrong.any():
        return None
    actual, _ = _widened(actual)
    expected, bound = np.asarray(expected, np.float64), np.asarray(bound, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(actual - expected)
        excess = np.where(np.isfinite(error), error - bound, np.inf)
    row, column = np.unravel_index(np.argmax(np.where(wrong, excess, -1.0)), wrong.shape)
    values = [float(array[row, column]) for array in (actual, expected, error, bound)]
    return Worst(int(wrong.sum()), wrong.size, int(row), int(column), *values)


def error_statistics(actual: ArrayLike, expected: ArrayLike, bound: ArrayLike) -> ErrorStatistics:
    """The errors' size and bias, over the elements finite on both sides; zeros if there are none.

    Semantics: `error = actual - expected`; arguments as in `violations`. Units as its fields say.

    >>> s = error_statistics(np.array([[1.5, 2.0]]), [[1.0, 2.0]], [[1.0, 1.0]])
    >>> s.mean_signed, s.largest, s.largest_in_bounds
    (0.25, 0.5, 0.5)
    """
    actual, stored = _widened(actual)
    expected, bound = np.asarray(expected, np.float64), np.asarray(bound, np.float64)
    finite = np.isfinite(actual) & np.isfinite(expected)
    if not finite.any():
        return ErrorStatistics(0.0, 0.0, 0.0, 0.0, 0.0)
    error = actual[finite] - expected[finite]
    size = np.abs(error)
    with np.errstate(divide="ignore", invalid="ignore"):
        in_bounds = np.where(size == 0, 0.0, size / bound[finite])
    return ErrorStatistics(
        mean_signed=float(error.mean()),
        root_mean_square=float(np.sqrt(np.mean(error**2))),
        largest=float(size.max()),
        largest_in_bounds=float(in_bounds.max()),
        largest_in_ulps=float((size / _ulp(expected[finite], stored)).max()),
    )


def check_no_worse(
    actual: ArrayLike, plain: ArrayLike, expected: ArrayLike, factor: float = 2.0
) -> None:
    """Passes if actual errs by no more than `factor` times what plain numpy errs by.

    Semantics: for the largest error and the root mean square alike, `error(actual) <= factor *
    error(plain) + ulp / 2`, with the ulp of the largest expected value: the one rounding at the
    store can cost that much, however well plain's happened to fall.
    actual, plain (n, h_out) in the same type, expected float64. Raises: AssertionError with both
    errors. Source: the comparative test of FlashAttention (Dao et al. 2022).

    >>> check_no_worse(np.array([[1.0]]), np.array([[1.0]]), [[1.0]])
    """
    expected = np.asarray(expected, np.float64)
    nothing = np.zeros(expected.shape)
    ours = error_statistics(actual, expected, nothing)
    theirs = error_statistics(plain, expected, nothing)
    finite = np.abs(expected[np.isfinite(expected)])
    store = float(_ulp(finite, _widened(actual)[1]).max(initial=0.0)) / 2
    for field in ("largest", "root_mean_square"):
        limit = factor * getattr(theirs, field) + store
        if not getattr(ours, field) <= limit:
            raise AssertionError(
                f"{field} error: expected at most {limit:.6g}, {factor} times plain numpy's "
                f"{getattr(theirs, field):.6g} and one rounding, got {getattr(ours, field):.6g}"
            )


def _widened(actual: ArrayLike) -> tuple[NDArray[np.float64], np.dtype[Any]]:
    array = np.asarray(actual)
    float_type(array.dtype)
    return array.astype(np.float64), array.dtype


def _ulp(value: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[np.float64]:
    kind = float_type(dtype)
    _, exponent = np.frexp(np.maximum(np.abs(value), kind.smallest_normal))
    ulp: NDArray[np.float64] = np.ldexp(1.0, exponent - kind.bits)
    return ulp
