"""One seeded batch with its answer: who uses which adapter, the arrays, and the verdict."""

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from reference import bounds, by_row, compare
from reference.arguments import Adapter
from reference.floats import float_type, sum_dtype

POPULARITIES = ("distinct", "uniform", "skewed", "identical")

Weights = tuple[NDArray[Any], NDArray[Any]]


class Scaled(NamedTuple):
    """What DoRA adds to a batch: magnitudes (h_out,) of some adapters, the layer's W and bias."""

    magnitudes: Mapping[int, NDArray[Any]]
    W: NDArray[Any]
    bias: NDArray[Any] | None = None


def popularity(kind: str, n: int, seed: int = 0) -> NDArray[np.int64]:
    """One adapter id per row, in the mixes of Punica's benchmarks, rows shuffled.

    Semantics: with c[i] = rows of adapter i, c descending and c.sum() == n:
    distinct   c = [1] * n
    uniform    ceil(sqrt(n)) adapters, as equal as possible
    skewed     floor(1.5**i) rows each while their sum stays below n; the last takes the rest
    identical  c = [n]
    Nx8        8 adapters of n / 8 rows (n a multiple of 8)
    Returns (n,) int64. Raises: ValueError on an unknown kind, n < 0, or n that 8 does not divide.
    Source: Chen et al. 2023, section 7, and the benchmarks of punica-ai/punica.

    >>> [np.bincount(popularity(kind, 8)).tolist() for kind in ("skewed", "uniform")]
    [[3, 2, 1, 1, 1], [3, 3, 2]]
    """
    if n < 0:
        raise ValueError(f"n: expected 0 or more rows, got {n}; pass the size of the batch")
    if kind == "distinct":
        lengths = [1] * n
    elif kind == "uniform":
        adapters = math.isqrt(max(n - 1, 0)) + 1
        lengths = [n // adapters + (i < n % adapters) for i in range(adapters)]
    elif kind == "skewed":
        lengths = []
        while sum(lengths) + math.floor(1.5 ** len(lengths)) < n:
            lengths.append(math.floor(1.5 ** len(lengths)))
        lengths = sorted([*lengths, n - sum(lengths)], reverse=True)
    elif kind == "identical":
        lengths = [n]
    elif kind == "Nx8":
        if n % 8:
            raise ValueError(f"n: expected a multiple of 8 for Nx8, got {n}; pass {n + -n % 8}")
        lengths = [n // 8] * 8
    else:
        known = ", ".join((*POPULARITIES, "Nx8"))
        raise ValueError(f"kind: expected one of {known}, got {kind!r}; pick one of these")
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return np.random.default_rng(seed).permutation(ids)


class Wrong(NamedTuple):
    """Why a result is no right y; `worst` where its values are compared."""

    kind: Literal["result", "spoiled", "base only", "values", "raised"]
    what: str
    worst: compare.Worst | None = None


@dataclass(frozen=True, eq=False)
class Workload:
    """One batch with its answer.

    x (n, h_in), y (n, h_out) before the call, adapter_ids (n,) int64, adapters {id: (A, B) or
    None}, scalings {id: float}; `why` says which fault it hunts. A mixture has adapter_ids (n, k)
    and weights (n, k), or None = 1. `exact`: every sum fits the significand of the sums' type, so
    that only the expected value, rounded once to y's type, is right. Give a kernel a copy of y;
    `check` finds one that writes to anything else, and names what it wrote to.

    >>> case = real("demo", "shows the fields", [0, -1], {0: 2}, h_in=3, h_out=4)
    >>> case.expected.shape, case.rows, case.seq_start, case.segment_ids
    ((2, 4), array([1, 0]), array([0, 1, 2]), array([-1,  0]))
    """

    name: str
    why: str
    x: NDArray[Any]
    y: NDArray[Any]
    adapters: Mapping[int, Weights | None]
    scalings: Mapping[int, float]
    adapter_ids: NDArray[np.int64]
    exact: bool = False
    weights: NDArray[np.float32] | None = None
    dora: Scaled | None = None
    fingerprint: Mapping[str, int] = field(init=False, repr=False)  # of each operand

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", self._fingerprint())

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """rows[p]: which row of x stands at sorted position p (stable sort by id), (n,)."""
        return _frozen(np.argsort(self.adapter_ids, kind="stable"))

    @cached_property
    def segment_ids(self) -> NDArray[np.int64]:
        """The adapter of each segment, ascending; -1 first if there are base-only rows, (S,)."""
        return _frozen(np.unique(self.adapter_ids))

    @cached_property
    def seq_start(self) -> NDArray[np.int64]:
        """Segment s is sorted positions seq_start[s]:seq_start[s+1], (S+1,)."""
        _, lengths = np.unique(self.adapter_ids, return_counts=True)
        return _frozen(np.concatenate(([0], np.cumsum(lengths))))

    @property
    def _pairs(self) -> tuple[Any, Any, Any]:
        """Who has which adapter, as the reference's calls take it."""
        adapters: dict[int, Any] = dict(self.adapters)
        for i, magnitude in (self.dora.magnitudes if self.dora else {}).items():
            if (pair := adapters[i]) is not None:
                adapters[i] = Adapter(pair[0], pair[1], self.scalings[i], magnitude)
        return adapters, self.adapter_ids, self.scalings

    @property
    def _more(self) -> dict[str, Any]:
        """What they take by name."""
        found: dict[str, Any] = {"weights": self.weights}
        return found if self.dora is None else {**found, "W": self.dora.W, "bias": self.dora.bias}

    @cached_property
    def expected(self) -> NDArray[np.float64]:
        """What y must become, (n, h_out)."""
        return by_row.add_lora(self.y, self.x, *self._pairs, **self._more)

    @cached_property
    def bound(self) -> NDArray[np.float64]:
        """How far from `expected` each element may be, (n, h_out)."""
        if self.exact:
            return _store_error(self.expected, self.y.dtype)
        return bounds.add_lora_bound(
            self.y, self.x, *self._pairs, **self._more, expected=self.expected
        )

    @cached_property
    def W(self) -> NDArray[Any]:
        """A base weight for `apply_batched`, (h_out, h_in), in x's type."""
        if self.dora is not None:
            return self.dora.W
        rng = _seeded(self.name + " W")
        shape = (self.y.shape[1], self.x.shape[1])
        if self.exact:
            return _signs(rng, shape, nonzeros=4, dtype=self.x.dtype)
        return (rng.standard_normal(shape) / math.sqrt(max(shape[1], 1))).astype(self.x.dtype)

    @cached_property
    def expected_applied(self) -> NDArray[np.float64]:
        """What `apply_batched(x, W, ...)` must return, (n, h_out)."""
        return by_row.apply_batched(self.x, self.W, *self._pairs, weights=self.weights)

    @cached_property
    def bound_applied(self) -> NDArray[np.float64]:
        """How far from `expected_applied` each element may be, (n, h_out)."""
        if self.exact:
            return _store_error(self.expected_applied, self.x.dtype)
        return bounds.apply_batched_bound(
            self.x, self.W, *self._pairs, weights=self.weights, expected=self.expected_applied
        )

    def flush_bound(self, phases: Collection[str]) -> NDArray[np.float64] | float:
        """What a kernel that flushes subnormal numbers in these phases may add to a bound."""
        if self.exact or not phases:
            return 0.0
        operands = self.y, self.x, *self._pairs
        more = bounds.flush_bound(*operands, **self._more, expand="expand" in phases)
        return np.where(np.isfinite(self.expected), more, 0.0)

    def check(self, actual: ArrayLike, flushes: Collection[str] = ()) -> None:
        """Passes if `actual` is a right y.

        Semantics: y's shape and type; inputs unchanged; base-only rows equal to y bit for bit;
        every other element within `bound` of `expected`, NaN and inf exactly where expected.
        flushes  the phases, shrink and expand, that may take subnormal numbers for 0
        Raises: AssertionError naming the case and the worst element, or the operand changed.
        """
        wrong = self.wrong(actual, flushes)
        if wrong is not None:
            why = "" if wrong.kind in ("result", "spoiled") else f" ({self.why})"
            raise AssertionError(f"{self.name}{why}: {wrong.what}")

    def wrong(self, actual: ArrayLike, flushes: Collection[str] = ()) -> Wrong | None:
        """What is wrong with `actual` as y, told instead of raised; None if nothing is.

        Semantics: as `check`. The first of: the result's type and shape, operands that changed,
        bits of base-only rows, values.

        >>> case = real("demo", "a wrong type", [0], {0: 2}, h_in=3, h_out=4)
        >>> case.wrong(case.expected).what
        'expected float32 of shape (1, 4), got float64 of shape (1, 4)'
        """
        refused = self._refused(actual, self.y.dtype)
        if refused is not None:
            return refused
        actual = np.asarray(actual)
        has_adapter = [
            any(self.adapters.get(i) is not None for i in np.atleast_1d(ids).tolist())
            for ids in self.adapter_ids
        ]
        base_only = np.flatnonzero(~np.array(has_adapter, bool))
        bound = self.bound + self.flush_bound(flushes)
        worst = compare.worst(actual, self.expected, bound)
        lost = [i for i in base_only if actual[i].tobytes() != self.y[i].tobytes()]
        if lost:
            return Wrong("base only", f"base-only row {lost[0]} of y lost its bits", worst)
        return None if worst is None else Wrong("values", str(worst), worst)

    def check_applied(self, actual: ArrayLike, flushes: Collection[str] = ()) -> None:
        """Passes if `actual` is a right result of `apply_batched(x, W, ...)`.

        Semantics: as `check`, with `expected_applied` and `bound_applied`, in x's type.
        Raises: AssertionError naming the case and the worst element.
        """
        refused = self._refused(actual, self.x.dtype)
        if refused is not None:
            raise AssertionError(f"{self.name}: {refused.what}")
        name = f"{self.name}, applied ({self.why})"
        bound = self.bound_applied + self.flush_bound(flushes)
        compare.check(actual, self.expected_applied, bound, name)

    def _refused(self, actual: ArrayLike, dtype: np.dtype[Any]) -> Wrong | None:
        result = np.asarray(actual)
        if result.dtype != dtype or result.shape != self.y.shape:
            got = "None" if actual is None else f"{result.dtype} of shape {result.shape}"
            return Wrong("result", f"expected {dtype} of shape {self.y.shape}, got {got}")
        now = self._fingerprint()
        changed = [operand for operand in now if now[operand] != self.fingerprint[operand]]
        if changed:
            remedy = "give it y.copy()" if changed == ["y"] else "write to y alone"
            return Wrong("spoiled", f"the kernel changed {' and '.join(changed)}; {remedy}")
        return None

    def _fingerprint(self) -> Mapping[str, int]:
        pairs = [pair for pair in self.adapters.values() if pair is not None]
        operands = {
            "x": [self.x],
            "y": [self.y],
            "adapter_ids": [self.adapter_ids],
            "weights": [] if self.weights is None else [self.weights],
            "A": [A for A, _ in pairs],
            "B": [B for _, B in pairs],
        }
        digests = dict.fromkeys(operands, 0)
        for operand, arrays in operands.items():
            for array in arrays:
                digests[operand] = zlib.crc32(array.tobytes(), digests[operand])
        return digests


def real(
    name: str,
    why: str,
    adapter_ids: ArrayLike,
    ranks: Mapping[int, int | None],
    h_in: int,
    h_out: int,
    *,
    scalings: Mapping[int, float] | None = None,
    dtype: DTypeLike = np.float32,
    weight_dtype: DTypeLike | None = None,
    y_dtype: DTypeLike | None = None,
) -> Workload:
    """A batch of normal deviates, scaled like a model's; the name is its seed.

    Semantics: x, y ~ N(0, 1), A ~ N(0, 1 / h_in), B ~ N(0, 1 / r), so that the delta is of y's
    size; scalings, if left out, differ per adapter in [0.5, 2) and are no powers of two.
    ranks {id: r, or None = base only} may name ids that no row uses. Types: x has dtype, weights
    and y too unless said otherwise.

    >>> real("demo", "mixed types", [0], {0: 2}, 3, 4, y_dtype=np.float16).y.dtype.name
    'float16'
    """
    rng = _seeded(name)
    ids = np.asarray(adapter_ids, np.int64)
    x = rng.standard_normal((len(ids), h_in)).astype(dtype)
    y = rng.standard_normal((len(ids), h_out)).astype(y_dtype or dtype)
    adapters: dict[int, Weights | None] = {}
    for adapter_id, r in ranks.items():
        adapters[adapter_id] = None
        if r is not None:
            A = rng.standard_normal((r, h_in)) / math.sqrt(max(h_in, 1))
            B = rng.standard_normal((h_out, r)) / math.sqrt(max(r, 1))
            adapters[adapter_id] = A.astype(weight_dtype or dtype), B.astype(weight_dtype or dtype)
    drawn = {adapter_id: float(rng.uniform(0.5, 2.0)) for adapter_id in ranks}
    return Workload(name, why, x, y, adapters, drawn if scalings is None else scalings, ids)


def integer(
    name: str,
    why: str,
    adapter_ids: ArrayLike,
    ranks: Mapping[int, int | None],
    h_in: int,
    h_out: int,
    *,
    scalings: Mapping[int, float] | None = None,
    dtype: DTypeLike = np.float32,
    weight_dtype: DTypeLike | None = None,
    y_dtype: DTypeLike | None = None,
) -> Workload:
    """A batch of small integers whose sums fit the significand, in any order; the name is its seed.

    Semantics: A, B of 1 and -1; dense for float32 and float64, else x and B with a few nonzeros a
    row, the last column always among them, so that the result also fits y's type. Scalings, if
    left out, cycle through 2, -1, 3, 1, -2. Arguments as in `real`.
    Raises: ValueError if scalings or sizes are so large that a sum may not fit.

    >>> integer("demo", "bits", [0], {0: 2}, h_in=3, h_out=4).exact
    True
    """
    rng = _seeded(name)
    ids = np.asarray(adapter_ids, np.int64)
    weight_dtype, y_dtype = weight_dtype or dtype, y_dtype or dtype
    dense = min(float_type(y_dtype).bits, float_type(dtype).bits) >= 24
    x = _signs(rng, (len(ids), h_in), h_in if dense else 8, dtype)
    x *= rng.integers(1, 3, x.shape).astype(dtype)
    y = rng.integers(-8, 9, (len(ids), h_out)).astype(y_dtype)
    adapters: dict[int, Weights | None] = {}
    for adapter_id, r in ranks.items():
        adapters[adapter_id] = None
        if r is not None:
            A = _signs(rng, (r, h_in), h_in, weight_dtype)
            adapters[adapter_id] = A, _signs(rng, (h_out, r), r if dense else 4, weight_dtype)
    if scalings is None:
        scalings = {id_: float((2, -1, 3, 1, -2)[i % 5]) for i, id_ in enumerate(ranks)}
    workload = Workload(name, why, x, y, adapters, scalings, ids, exact=True)
    _check_sums_fit(workload)
    return workload


def _frozen(array: NDArray[Any]) -> NDArray[np.int64]:
    frozen = array.astype(np.int64)
    frozen.flags.writeable = False
    return frozen


def _signs(
    rng: np.random.Generator, shape: tuple[int, int], nonzeros: int, dtype: DTypeLike
) -> NDArray[Any]:
    """1 and -1 at `nonzeros` random places of every row, its last column included; else 0."""
    signs = rng.choice((-1.0, 1.0), shape)
    if nonzeros < shape[1]:
        order = rng.random(shape)
        order[:, -1] = 2.0
        threshold = np.partition(order, -nonzeros, axis=1)[:, -nonzeros, None]
        signs[order < threshold] = 0.0
    return signs.astype(dtype)


def _store_error(exact: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[np.float64]:
    """What one rounding to nearest costs; 0 wherever the type holds the value."""
    return np.abs(exact.astype(dtype).astype(np.float64) - exact)


def _check_sums_fit(workload: Workload) -> None:
    """Higher bits never lost: no partial sum, in any order, can leave the significand."""
    x = np.abs(workload.x.astype(np.float64))
    y = np.abs(workload.y.astype(np.float64))
    adapters = {
        adapter_id: pair and tuple(np.abs(weight.astype(np.float64)) for weight in pair)
        for adapter_id, pair in workload.adapters.items()
    }
    scalings = {adapter_id: abs(s) for adapter_id, s in workload.scalings.items()}
    largest = by_row.add_lora(y, x, adapters, workload.adapter_ids, scalings).max(initial=0.0)
    bits = min(float_type(workload.y.dtype).bits, float_type(sum_dtype(workload.x)).bits)
    whole = all(float(scaling).is_integer() for scaling in scalings.values())
    if largest > 2.0**bits or not whole:
        scaling = sorted(set(workload.scalings.values()))
        raise ValueError(
            f"{workload.name}: expected integer scalings and sums up to 2**{bits}, got scalings "
            f"{scaling} and sums up to {largest:.0f}; make it smaller"
        )


def _seeded(name: str) -> np.random.Generator:
    """A generator seeded by a case's own name: adding a case leaves the others as they were."""
    return np.random.default_rng(zlib.crc32(name.encode()))
