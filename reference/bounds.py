"""How far a correct kernel may be from `by_row`, derived for every element.

The kernel: v = A @ x and d = B @ v, in any order of summation and with or without fused
multiply-add; scaling, rounded to v's type, multiplied once into v or into d; y added first, last
or in between. Its inputs are exact as stored; converting 16 bits to float32 rounds nothing.

Write u for a type's unit roundoff, eta for half its smallest subnormal, and, with Higham
(Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1 and section 2.1),

    fl(a b) = a b (1 + e) + t       |e| <= u, |t| <= eta
    fl(a + b) = (a + b) (1 + e)     no t: a sum below the normal range is exact
    prod_{i<=m} (1 + e_i) = 1 + g   |g| <= gamma_m = m u / (1 - m u)

Count the roundings that one product s B_ij A_jk x_k can meet:
    shrink    1 for x_k A_jk, at most h_in - 1 additions                        h_in
    scaling   1 where it is rounded to v's type, 1 multiplication               2
    expand    1 for v_j B_ij, at most r additions: r - 1, and 1 for y           r + 1
and y_i itself meets at most r additions. With M_i = |s| sum_jk |B_ij| |A_jk| |x_k|:

    |sum - exact| <= gamma_{h_in + r + 3} M_i + gamma_r |y_i| + (1 + gamma_{h_in + r + 3}) T_i

where T_i gathers every t, times what is multiplied onto it afterwards:

    T_i = (|s| + eta) (h_in eta sum_j |B_ij| + r eta)     shrink's and expand's products
        + eta (M_i / |s| + sum_j |B_ij| + r + 1)          the rounding of s, s v_j or s d_i, and
                                                          expand's products where s v_j came first

(v in float32 and the rest in float64, as for a float64 y, counts each part with its own u, and
the product by scaling in both, as it may stand in either.)
A base product W @ x in place of y brings its own gamma_{h_in} and h_in eta, before its additions.

ONE rounding at the store, if y's type is narrower than the sum: u max(|sum|, smallest normal).

A row with k adapters: k such deltas are added one after the other, each times its weight w_j, which
is one rounding more in shrink or expand (and eta (|s| + |w_j| + 1) sum_j |B_ij| more). What a delta
is added to is at most |y_i| + sum_j |w_j| M_ij, whatever the order; each sum may be stored, and
rounded, on its own; and an error made early meets the additions and roundings that come later.

A row of an adapter with a magnitude (DoRA) is then multiplied: see gains.py.

Last, `by_row` itself sums in float64: its own error, the same formula with u = 2**-53, is added,
as is the rounding of this file's arithmetic. Where every product is exactly 0 (rank 0, B = 0,
scaling 0, base only) the sum is exactly y, and the bound is 0.

The derivation holds while |y_i| + M_i is below the largest finite value of the sum's type.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from reference import by_row
from reference.arguments import (
    Adapter,
    Adapters,
    Scaling,
    checked,
    factors,
    matrix,
    used_adapters,
)
from reference.floats import FloatType, float_type, sum_dtype
from reference.floats import gamma as gamma
from reference.gains import Gains, gains_of

Bound = NDArray[np.float64]
_FLOAT64 = float_type("float64")


def unit_roundoff(dtype: Any) -> float:
    """Half the gap after 1.0: rounding to nearest errs by at most this share of the value.

    Semantics: 2**-11 float16, 2**-8 bfloat16, 2**-24 float32, 2**-53 float64.
    Raises: ValueError for any other type. Source: Higham, section 2.1.

    >>> unit_roundoff("bfloat16"), unit_roundoff(np.float16) == 2.0**-11
    (0.00390625, True)
    """
    return float_type(dtype).unit_roundoff


def lora_delta_bound(
    x: ArrayLike, A: ArrayLike, B: ArrayLike, scaling: float, *, out: DTypeLike | None = None
) -> Bound:
    """Largest |actual - by_row.lora_delta| of a correct kernel, for every element.

    Semantics: this file's head, with y = 0. Arguments and errors as `by_row.lora_delta`; out is
    the type of the kernel's result, left out: numpy's promotion of x, A, B -> (n, h_out) float64.

    >>> bool(lora_delta_bound(np.ones((1, 4), np.float32), np.ones((2, 4)), [[0.0, 0.0]], 1.0) == 0)
    True
    """
    x = matrix(x, "x")
    adapter = checked(A, B, scaling, h_in=x.shape[1], h_out=None)
    out = np.result_type(x, adapter.A, adapter.B) if out is None else np.dtype(out)
    nothing = np.zeros((len(x), len(adapter.B)), x.dtype)
    return add_lora_bound(nothing, x, [adapter], np.zeros(len(x), np.int64), out=out)


@np.errstate(invalid="ignore", over="ignore", under="ignore")
def add_lora_bound(
    y: ArrayLike,
    x: ArrayLike,
    adapters: Adapters,
    adapter_ids: ArrayLike,
    scalings: Scaling = None,
    *,
    weights: ArrayLike | None = None,
    W: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    out: DTypeLike | None = None,
    expected: Bound | None = None,
) -> Bound:
    """Largest |actual - by_row.add_lora| of a correct kernel, for every element.

    Semantics: this file's head. Exactly 0 on base-only rows, and where the expected value is NaN
    or inf (there kind and place must agree). Arguments and errors as `by_row.add_lora`; out is the
    type of the result, left out: y's; expected saves computing it again -> (n, h_out) float64.

    >>> add_lora_bound(np.ones((1, 1)), np.ones((1, 1)), [None], [0])
    array([[0.]])
    """
    y = matrix(y, "y")
    x = matrix(x, "x", rows=len(y))
    ids, chosen = used_adapters(adapters, adapter_ids, scalings, x.shape[1], y.shape[1], len(y))
    if expected is None:
        given = {"weights": weights, "W": W, "bias": bias}
        expected = by_row.add_lora(y, x, adapters, ids, scalings, **given)
    start = _Start(np.abs(y.astype(np.float64)), y, float_type(y.dtype), roundings=0)
    out_type = float_type(y.dtype if out is None else out)
    gains = gains_of(ids, chosen, weights, W, bias, x)
    return _bound(start, x, ids, chosen, weights, expected, out_type, gains)


@np.errstate(invalid="ignore", over="ignore", under="ignore")
def apply_batched_bound(
    x: ArrayLike,
    W: ArrayLike,
    adapters: Adapters,
    adapter_ids: ArrayLike,
    scalings: Scaling = None,
    *,
    weights: ArrayLike | None = None,
    out: DTypeLike | None = None,
    expected: Bound | None = None,
) -> Bound:
    """Largest |actual - by_row.apply_batched| of a correct kernel, for every element.

    Semantics: this file's head, with the base product W @ x in place of y. Arguments and errors as
    `by_row.apply_batched`; out is the type of the result, left out: numpy's promotion of x, W and
    the adapters that rows use -> (n, h_out) float64. One adapter for all rows is `apply_single`.

    >>> bool(apply_batched_bound(np.ones((1, 2)), np.ones((1, 2)), [None], [0])[0, 0] > 0)
    True
    """
    x = matrix(x, "x")
    W = matrix(W, "W", columns=x.shape[1])
    ids, chosen = used_adapters(adapters, adapter_ids, scalings, x.shape[1], len(W), len(x))
    if expected is None:
        expected = by_row.apply_batched(x, W, adapters, ids, scalings, weights=weights)
    if out is None:
        used = [matrix for adapter in chosen.values() if adapter for matrix in adapter[:2]]
        out = np.result_type(x, W, *used)
    size = np.abs(x.astype(np.float64)) @ np.abs(W.astype(np.float64)).T
    start = _Start(size, W, float_type(sum_dtype(x, W)), roundings=x.shape[1])
    gains = gains_of(ids, chosen, weights, W, None, x)
    return _bound(start, x, ids, chosen, weights, expected, float_type(out), gains)


@np.errstate(invalid="ignore", over="ignore", under="ignore")
def flush_bound(
    y: ArrayLike,
    x: ArrayLike,
    adapters: Adapters,
    adapter_ids: ArrayLike,
    scalings: Scaling = None,
    *,
    weights: ArrayLike | None = None,
    W: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    expand: bool = False,
) -> Bound:
    """What must be added to a bound where numbers below 2**-126 are taken for 0, as AMX does.

    Semantics: t = 2**-126 is the most that one such number can be. In shrink an x_k lost costs
    t |A_jk|, an A_jk lost t |x_k|; and of the h_in products and their additions each may be lost.
    So v_j errs by t (sum_k |A_jk| + sum_k |x_k| + 2 h_in) more, which expand's own roundings, and
    the store's to at most 8 bits, then carry on.
    In expand v_j is three parts, of which those below t are lost: together less than 2 t. A B_ij
    lost costs t |v_j|; and of the 3 (r + 1) products, added as they are made, and of two additions
    for each 32 of them, each sum may be lost: fewer than 4 r + 8. So y_i errs by another
    |s| t (sum_j 2 |B_ij| + |v_j| + 4 r + 8). DoRA's gain multiplies all of it.

    expand  whether expand does so, too
    Arguments and errors otherwise as `by_row.add_lora` -> (n, h_out) float64.

    >>> one = np.ones((1, 1))
    >>> flush_bound(one, one, [(one, one)], [0]) < 2.0**-123
    array([[ True]])
    """
    y = matrix(y, "y")
    x = matrix(x, "x", rows=len(y))
    ids, chosen = used_adapters(adapters, adapter_ids, scalings, x.shape[1], y.shape[1], len(y))
    tiny, u = float_type("float32").smallest_normal, float_type("float32").unit_roundoff
    bound = np.zeros(y.shape)
    places = 1 if ids.ndim == 1 else ids.shape[1]
    for rows, adapter, factor in _pairs(ids, chosen, weights):
        A, B, its = (np.abs(a.astype(np.float64)) for a in (*adapter[:2], x[rows]))
        v = tiny * (A.sum(axis=1) + its.sum(axis=1)[:, None] + 2 * x.shape[1])
        more = factor * (v @ B.T)
        if expand:
            size = factor * (its @ A.T).sum(axis=1)[:, None]
            more = more + tiny * (2 * B.sum(axis=1) + size + 4 * len(A) + 8)
        roundings = x.shape[1] + len(A) + 3 + (weights is not None)
        carried = (1 + gamma(roundings, u)) * (1 + 2.0**-8) ** places
        bound[rows] += carried * abs(adapter.scaling) * more
    for rows, gain in gains_of(ids, chosen, weights, W, bias, x).values():
        bound[rows] *= np.abs(gain.value) + gain.error(float_type("float32"))
    return bound


class _Start(NamedTuple):
    """What the delta is added to: y, exact as stored (0 roundings), or x @ W.T (h_in of them)."""

    size: Bound  # |y| or |x| |W|.T, (n, h_out)
    operand: NDArray[Any]  # y or W: its dtype takes part in choosing the type of the sums
    type: FloatType  # the one it was summed in
    roundings: int


class _Delta(NamedTuple):
    """The magnitudes in the derivation, for the rows of one adapter."""

    h_in: int
    r: int
    scaling: float  # |s|
    product: Bound  # M / |s|, (rows, h_out)
    B_sum: Bound  # sum_j |B_ij|, (h_out,)


_Pairs = list[tuple[NDArray[np.intp], Adapter, Bound]]  # rows, their adapter, |weights| (rows, 1)


def _pairs(
    ids: NDArray[np.int64], chosen: dict[int, Adapter | None], weights: ArrayLike | None
) -> _Pairs:
    """The rows of each adapter in each place of their ids, but for base only."""
    of_pair = np.abs(factors(weights, ids))
    if ids.ndim == 1:
        of_pair = of_pair[:, np.newaxis]
    in_columns: Any = ids.reshape(of_pair.shape)
    return [
        (rows, adapter, of_pair[rows, j, None])
        for j in range(of_pair.shape[1])
        for adapter_id, adapter in chosen.items()
        if adapter is not None and len(rows := np.flatnonzero(in_columns[:, j] == adapter_id))
    ]


def _bound_of_pairs(
    start: _Start, x: NDArray[Any], pairs: _Pairs, expected: Bound, out: FloatType
) -> Bound:
    """The bound of rows with several adapters, or with weights."""
    most, deltas = start.size.copy(), []
    for rows, adapter, weight in pairs:
        delta, touched = _magnitudes(x[rows], adapter)
        touched &= weight != 0
        most[rows] += abs(adapter.scaling) * weight * delta.product
        deltas.append((rows, adapter, weight, delta, touched))
    total, stores = np.zeros(most.shape), np.zeros(most.shape)
    additions, u = 0, 0.0
    for rows, adapter, weight, delta, touched in deltas:
        v_type = float_type(sum_dtype(x, adapter.A))
        sum_type = float_type(sum_dtype(x, adapter.A, adapter.B, start.operand))
        for types in ((v_type, sum_type), (_FLOAT64, _FLOAT64)):
            total[rows] += _delta_error(delta, touched, *types, weight)
            total[rows] += np.where(touched, gamma(delta.r, types[1].unit_roundoff), 0) * most[rows]
        stores[rows] += touched & (out.unit_roundoff > sum_type.unit_roundoff)
        additions, u = additions + delta.r + 1, max(u, sum_type.unit_roundoff)
    total += _start_error(start, start.size, start.type)
    total += _start_error(start, start.size, _FLOAT64)
    later = (1 + gamma(additions, u)) * (1 + out.unit_roundoff) ** stores
    total *= later
    if start.roundings:  # y is made in the sum's type, and stored at the end
        stores = np.ones(most.shape) * (out.unit_roundoff > float_type(sum_dtype(x)).unit_roundoff)
    total += stores * out.unit_roundoff * np.maximum(most + total, out.smallest_normal) * later
    total *= 1 + gamma(x.shape[1] + additions + 32, _FLOAT64.unit_roundoff)
    return np.where(np.isfinite(expected), total, 0.0)


def _bound(
    start: _Start,
    x: NDArray[Any],
    ids: NDArray[np.int64],
    chosen: dict[int, Adapter | None],
    weights: ArrayLike | None,
    expected: Bound,
    out: FloatType,
    gains: Gains,
) -> Bound:
    if ids.ndim > 1 or weights is not None:
        bound = _bound_of_pairs(start, x, _pairs(ids, chosen, weights), expected, out)
        for i, (rows, gain) in gains.items():  # alone in their rows, with a weight of 1
            its = start._replace(size=start.size[rows]), x[rows], np.full(len(rows), i)
            alone = {i: (np.arange(len(rows)), gain)}
            bound[rows] = _bound(*its, {i: chosen[i]}, None, expected[rows], out, alone)
        return bound
    h_in, h_out = x.shape[1], start.size.shape[1]
    nothing = Adapter(np.zeros((0, h_in), x.dtype), np.zeros((h_out, 0), x.dtype), 0.0)
    bound = np.zeros(start.size.shape)
    largest_rank = 0
    for adapter_id, used in chosen.items():
        rows = np.flatnonzero(ids == adapter_id)
        adapter = nothing if used is None else used
        largest_rank = max(largest_rank, len(adapter.A))
        v_type = float_type(sum_dtype(x, adapter.A))
        sum_type = float_type(sum_dtype(x, adapter.A, adapter.B, start.operand))
        delta, touched = _magnitudes(x[rows], adapter)
        total = _sum_error(delta, touched, start, rows, v_type, sum_type, start.type)
        by_rows = _sum_error(delta, touched, start, rows, _FLOAT64, _FLOAT64, _FLOAT64)
        if adapter_id in gains:
            gain, most = gains[adapter_id][1], start.size[rows] + delta.scaling * delta.product
            own = float_type(sum_dtype(*adapter[:2]))  # what a stack of these sums in
            total = gain.carried(total, most, sum_type, own)
            by_rows = gain.carried(by_rows, most, _FLOAT64, _FLOAT64)
            touched = np.ones_like(touched)
        total += by_rows
        if out.unit_roundoff > sum_type.unit_roundoff:
            reached = np.maximum(np.abs(expected[rows]) + total, out.smallest_normal)
            rounded = touched | (start.roundings > 0)
            total += np.where(rounded, out.unit_roundoff * reached, 0.0)
        bound[rows] = total
    # This arithmetic, all of it on numbers >= 0, and the subtraction in a comparison.
    bound *= 1 + gamma(h_in + largest_rank + 32, _FLOAT64.unit_roundoff)
    return np.where(np.isfinite(expected), bound, 0.0)


def _magnitudes(x: NDArray[Any], adapter: Adapter) -> tuple[_Delta, NDArray[np.bool_]]:
    """The magnitudes, and where any product differs from 0 (tested apart: float64 underflows)."""
    x_abs, A_abs, B_abs = (np.abs(array.astype(np.float64)) for array in (x, *adapter[:2]))
    product = (x_abs @ A_abs.T) @ B_abs.T
    v_touched = (x_abs != 0).astype(np.float32) @ (A_abs != 0).astype(np.float32).T > 0
    touched = v_touched.astype(np.float32) @ (B_abs != 0).astype(np.float32).T > 0
    r, h_in = adapter.A.shape
    delta = _Delta(h_in, r, abs(adapter.scaling), product, B_abs.sum(axis=1))
    return delta, touched & (adapter.scaling != 0)


def _sum_error(
    delta: _Delta,
    touched: NDArray[np.bool_],
    start: _Start,
    rows: NDArray[np.intp],
    v_type: FloatType,
    sum_type: FloatType,
    start_type: FloatType,
) -> Bound:
    """The inequality in this file's head, and the start's own error carried through it."""
    error = _delta_error(delta, touched, v_type, sum_type)
    later = np.where(touched, gamma(delta.r, sum_type.unit_roundoff), 0.0)
    size = start.size[rows]
    return error + later * size + (1 + later) * _start_error(start, size, start_type)


def _start_error(start: _Start, size: Bound, in_type: FloatType) -> Bound:
    """The error of what the delta is added to, of this size."""
    own = gamma(start.roundings, in_type.unit_roundoff)
    return own * size + (1 + own) * start.roundings * in_type.half_smallest_subnormal


def _delta_error(
    delta: _Delta,
    touched: NDArray[np.bool_],
    v_type: FloatType,
    sum_type: FloatType,
    weight: Bound | None = None,
) -> Bound:
    """The error of a row's delta, times its weight, before it is added."""
    h_in, r, s, product, B_sum = delta
    weighted, w = weight is not None, 1.0 if weight is None else weight
    in_v = gamma(h_in + (1 if v_type == sum_type else 2) + weighted, v_type.unit_roundoff)
    in_sum = gamma(r + 2, sum_type.unit_roundoff)
    growth = in_v + in_sum + in_v * in_sum
    eta_v, eta = v_type.half_smallest_subnormal, sum_type.half_smallest_subnormal
    tiny = (s * w + eta_v) * (h_in * eta_v * B_sum + r * eta) + eta_v * (w * product + B_sum)
    if weighted:
        tiny = tiny + eta_v * (product + (s + w + 1) * B_sum)
    tiny = tiny + (r + 1) * eta
    return np.where(touched, growth * s * w * product + (1 + growth) * tiny, 0.0)
