"""Seeded batches, and a corpus of nasty ones with the answer and its bound, for any kernel.

popularity(kind, n)   who uses which adapter: the four mixes of Punica's paper, and "Nx8"
real(...)             normal deviates, scaled like a model's: held to the derived bound
integer(...)          small integers whose sums fit the significand: held to the bit
corpus()              a few dozen named cases; `case.check(my_y)` is the verdict
"""

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from reference import by_row
from reference.batch import POPULARITIES, Weights, Workload, integer, popularity, real
from reference.floats import dtype_of, float_type

__all__ = ["POPULARITIES", "Workload", "corpus", "integer", "popularity", "real"]


def corpus(
    max_elements: int | None = None, dtypes: DTypeLike | Iterable[DTypeLike] = (np.float32,)
) -> Iterator[Workload]:
    """The adversarial cases, drawn one by one.

    Semantics: every case in every dtype, those with more than max_elements numbers left out.
    dtypes: one or several of float16, float32, float64 and bfloat16 (with ml_dtypes installed), by
    name or as numpy has them. The same cases in every run. "far rows" is left out where the system
    refuses the address space (16 GiB in float32, of which it touches a few pages).
    Raises: ValueError for any other type, before the first case.

    >>> len({case.name for case in corpus(max_elements=5_000, dtypes="float16")}) > 10
    True
    """
    return _cases(max_elements, types_of(dtypes))


def types_of(dtypes: DTypeLike | Iterable[DTypeLike]) -> list[np.dtype[Any]]:
    """One float type or several, by name or as numpy has them, as numpy's dtypes.

    Raises: ValueError for any other type.

    >>> types_of("float16"), types_of([np.float32, "float64"])
    ([dtype('float16')], [dtype('float32'), dtype('float64')])
    """
    if isinstance(dtypes, Iterable) and not isinstance(dtypes, str | type):
        return [dtype_of(dtype) for dtype in dtypes]
    return [dtype_of(dtypes)]


def _cases(max_elements: int | None, dtypes: list[np.dtype[Any]]) -> Iterator[Workload]:
    for dtype in dtypes:
        for spec in _specs():
            fits = max_elements is None or spec.elements <= max_elements
            if fits and spec.only in (None, dtype.name):
                try:
                    case = spec.workload(dtype)
                except OSError:  # "far rows" alone asks the system for anything
                    continue
                yield case


@dataclass(frozen=True)
class _Spec:
    """A case before its arrays are drawn; `edit` gets the drawn case and returns new fields."""

    name: str
    why: str
    adapter_ids: Any
    ranks: Mapping[int, int | None]
    h_in: int
    h_out: int
    build: Callable[..., Workload] = real
    scalings: Mapping[int, float] | None = None
    edit: Callable[[Workload], dict[str, Any]] | None = None
    only: str | None = None  # a dtype's name

    @property
    def elements(self) -> int:
        """Numbers held in x, y and the adapters."""
        ranks = sum(r or 0 for r in self.ranks.values())
        return (len(self.adapter_ids) + ranks) * (self.h_in + self.h_out)

    def workload(self, dtype: np.dtype[Any]) -> Workload:
        """The case in this type."""
        case = self.build(
            f"{self.name}, {dtype.name}",
            self.why,
            self.adapter_ids,
            self.ranks,
            self.h_in,
            self.h_out,
            scalings=self.scalings,
            dtype=dtype,
        )
        return case if self.edit is None else replace(case, **self.edit(case))


def _specs() -> Iterator[_Spec]:
    yield from _popularity_specs()
    yield from _segment_specs()
    yield from _adapter_specs()
    yield from _value_specs()
    yield from _layout_specs()


def _popularity_specs() -> Iterator[_Spec]:
    widths = ((1, 65), (17, 64), (63, 1), (64, 63), (65, 17), (256, 129), (3424, 33), (31, 3424))
    rank_of = {"distinct": 3, "uniform": 16, "skewed": 17, "identical": 64}
    for i, kind in enumerate(POPULARITIES):
        for j, n in enumerate((1, 3, 127, 128, 129, 133)):
            # Strides that bring each kind most widths, and each width both builders.
            h_in, h_out = widths[(2 * i + 3 * j) % len(widths)]
            ids = popularity(kind, n, seed=n)
            yield _Spec(
                f"{kind}, {n} rows, {h_in} to {h_out}",
                "sizes that no tile divides, row order shuffled",
                ids,
                dict.fromkeys(range(max(ids) + 1), rank_of[kind]),
                h_in,
                h_out,
                build=integer if (i + j) % 2 else real,
            )
    for n, build in ((8, real), (128, integer)):
        ids = popularity("Nx8", n)
        ranks = dict.fromkeys(range(8), 8)
        yield _Spec(f"Nx8, {n} rows", "equal segments", ids, ranks, 65, 63, build)


def _segment_specs() -> Iterator[_Spec]:
    def spec(name: str, why: str, ids: Any, adapters: Iterable[int], r: int = 8) -> _Spec:
        return _Spec(name, why, ids, dict.fromkeys(adapters, r), 33, 65, integer)

    yield spec("no rows", "an empty batch", [], [0])
    yield spec("one row", "a lone token's decode", [0], [0])
    yield spec("one base-only row", "a base-only row given the only adapter's delta", [-1], [0])
    yield spec("all rows base-only", "S = 1 and no weights to read", [-1] * 5, [0, 1])
    yield spec("no adapters", "an empty stack", [-1] * 3, [])
    yield spec(
        "base-only rows between",
        "-1 rows given the last adapter's delta, as index -1 would",
        [2, -1, 0, -1, 1, 2, -1, 0],
        range(3),
    )
    yield spec(
        "empty segments", "ids without rows divide by 0 or shift others", [6, 2, 6], range(9)
    )
    yield spec("first and last slot", "an off-by-one in slots", [7, 0, 7, 7, 0], range(8))
    yield spec(
        "1 row against 133", "steps of one segment applied to all", [0] + [1] * 133, range(2)
    )
    yield spec(
        "64-row steps",
        "segments that differ by 65 rows and more take unequal numbers of steps",
        np.repeat([0, 1, 2, 3, 4], [63, 64, 65, 128, 1]),
        range(5),
    )
    yield spec("ids far apart", "ids taken for slots", [7, 10_000, 3, 10_000, 7], [7, 10_000, 3])
    yield spec("alternating", "only neighbours merged, or rows not put back", [0, 1] * 9, range(2))
    yield spec("descending", "rows not put back where they came from", [4, 3, 2, 1, 0], range(5))
    yield spec("300 adapters", "slot numbers beyond a byte", np.arange(300)[::-1], range(300), r=1)
    for batch, ids in (("first", [0, 1, 1, 2, 0, -1]), ("second", [2, 0, -1, 1, 1, 2])):
        why = "metadata cached from an earlier batch of the same shape"
        yield spec(f"cached metadata, {batch} batch", why, ids, range(3))
    for tenant in ("first", "second"):
        why = "a stale slot serves another tenant's weights: same ids and shapes, new adapters"
        yield spec(f"reused ids, {tenant} tenant", why, [0, 1, 2, 1], range(3))


def _adapter_specs() -> Iterator[_Spec]:
    mixed = dict(enumerate((0, 1, 3, 8, 16, 17, 64, 128)))
    ids = np.random.default_rng(8).permutation(np.arange(133) % 9 - 1)
    why = "one rank or scaling for all, or garbage past a slot's own rank"
    yield _Spec("mixed ranks", why, ids, mixed, 65, 129)
    yield _Spec("mixed ranks, integers", why, ids, mixed, 257, 63, integer)
    why = "no kernel for this rank"
    for r in (1, 2, 5, 17, 31, 96, 129):
        yield _Spec(f"rank {r}", why, [0, 1, 0], {0: r, 1: r}, 64, 64, integer)
    yield _Spec("rank 0 only", "rank 0 divides by zero", [0, 0, 1], {0: 0, 1: 0}, 17, 5)
    yield _Spec("rank 0 between", "rank 0 ends the loop", [0, 1, 2], {0: 3, 1: 0, 2: 3}, 17, 5)
    yield _Spec(
        "None as adapter", "None read as weights", [0, 1, 2, 1], {0: 4, 1: None, 2: 4}, 9, 9
    )
    yield _Spec("all of width 1", "squeezed axes", [0, -1, 0], {0: 1}, 1, 1)
    for h_in, h_out in ((3424, 48), (48, 3424), (22016, 16), (16, 22016), (16, 32001)):
        why = "no kernel for this width"
        yield _Spec(f"{h_in} to {h_out}", why, [0, 1, 0], {0: 8, 1: 4}, h_in, h_out, integer)
    scalings = {0: -1.5, 1: 0.0, 2: 300.0, 3: 0.1, 4: 1e-3}
    why = "scaling dropped, taken from another adapter, or positive and of size 1 assumed"
    yield _Spec(
        "scalings",
        why,
        [0, 1, 2, 3, 4, 1, 0],
        dict.fromkeys(range(5), 8),
        64,
        65,
        scalings=scalings,
    )
    yield _Spec(
        "same weights, two scalings",
        "scaling kept by weights instead of by id",
        [0, 1, 0, 1],
        {0: 8, 1: 8},
        33,
        17,
        scalings={0: 2.0, 1: -0.3},
        edit=lambda case: {"adapters": {0: case.adapters[0], 1: case.adapters[0]}},
    )


def _value_specs() -> Iterator[_Spec]:
    ids = [0, 1, 0, -1, 1, 0, 2, -1, 2]
    ranks = {0: 1, 1: 17, 2: 64, 3: 8}

    def spec(name: str, why: str, edit: Callable[[Workload], dict[str, Any]]) -> _Spec:
        return _Spec(name, why, ids, ranks, 65, 33, edit=edit)

    yield spec("NaN and inf in x", "NaN leaves its row: 0 * NaN in a mask or a pad", _nan_in_x)
    yield spec("NaN in a used adapter", "NaN reaches rows of other adapters", _nan_in_used_adapter)
    yield spec("NaN in an unused adapter", "memory of no row is read", _nan_in_unused_adapter)
    yield spec("NaN in y", "NaN leaves its row of y", _nan_in_y)
    yield spec(
        "base-only bits", "base-only rows rewritten: -0.0 + 0.0, a NaN's bits", _odd_base_bits
    )
    yield spec("zero B", "a fresh adapter must add nothing", _zero_B)
    yield spec("cancellation", "y rounded between two additions; large y, small result", _cancels)
    yield spec("subnormal", "subnormal numbers flushed to zero", _subnormal)
    yield _Spec(
        "long sum of one sign",
        "sums kept in 16 bits stop growing",
        [0, 0, 1],
        {0: 1, 1: 2},
        3424,
        17,
        integer,
        edit=_long_sum,
    )
    yield _Spec(
        "store beyond float16",
        "a result too large for y saturates instead of becoming inf",
        [0, 1, 0],
        {0: 4, 1: 4},
        33,
        65,
        scalings={0: 1e5, 1: 1.0},
        only="float16",
    )


def _layout_specs() -> Iterator[_Spec]:
    ids, ranks = [1, 0, -1, 1, 0, 2], {0: 3, 1: 16, 2: 17}
    why = "contiguous memory assumed: x is a slice of wider rows, A and B are transposed views"
    yield _Spec("views", why, ids, ranks, 65, 33, integer, edit=_views)
    why = "32-bit offsets into x, whose rows lie 2**31 elements apart"
    yield _Spec("far rows", why, [0, 1, 0], {0: 3, 1: 3}, 65, 33, integer, edit=_far_rows)


def _nan_in_x(case: Workload) -> dict[str, Any]:
    x = case.x.copy()
    x[0, 3] = x[3, 0] = x[4, 64] = np.nan  # row 3 is base-only
    x[2, 64], x[5, 7] = np.inf, -np.inf
    return {"x": x}


def _nan_in_used_adapter(case: Workload) -> dict[str, Any]:
    A, B = _weights(case, 1)
    A[5, 64] = np.nan
    B[7] = np.inf
    return {"adapters": {**case.adapters, 1: (A, B)}}


def _nan_in_unused_adapter(case: Workload) -> dict[str, Any]:
    A, B = _weights(case, 3)
    A[:], B[:] = np.nan, np.inf
    return {"adapters": {**case.adapters, 3: (A, B)}}


def _nan_in_y(case: Workload) -> dict[str, Any]:
    y = case.y.copy()
    y[1, 4], y[4], y[6, 0], y[6, 32] = np.nan, np.nan, np.inf, -np.inf
    return {"y": y}


def _odd_base_bits(case: Workload) -> dict[str, Any]:
    y = case.y.copy()
    y[3], y[7, :16] = -0.0, np.nan
    # The lowest bit of a NaN is its payload: arithmetic may lose it, leaving it alone cannot.
    y.view(f"u{y.itemsize}")[7, :8] |= 1
    return {"y": y}


def _zero_B(case: Workload) -> dict[str, Any]:
    A, B = _weights(case, 1)
    return {"adapters": {**case.adapters, 1: (A, np.zeros_like(B))}}


def _cancels(case: Workload) -> dict[str, Any]:
    large = 2.0**8 if case.x.dtype == np.float16 else 2.0**60
    x = (case.x.astype(np.float64) * large).astype(case.x.dtype)
    delta = by_row.add_lora(
        np.zeros(case.y.shape), x, case.adapters, case.adapter_ids, case.scalings
    )
    return {"x": x, "y": (-delta).astype(case.y.dtype)}


def _subnormal(case: Workload) -> dict[str, Any]:
    smallest = float_type(case.x.dtype).smallest_normal
    if case.x.dtype == np.float16:
        x = case.x.astype(np.float64) * smallest
        return {"x": x.astype(case.x.dtype), "y": np.zeros_like(case.y)}
    # x and A stay normal, their products do not.
    share = math.sqrt(smallest) / 16
    adapters = {
        adapter_id: pair and ((pair[0].astype(np.float64) * share).astype(case.x.dtype), pair[1])
        for adapter_id, pair in case.adapters.items()
    }
    x = (case.x.astype(np.float64) * share).astype(case.x.dtype)
    return {"x": x, "y": np.zeros_like(case.y), "adapters": adapters}


def _long_sum(case: Workload) -> dict[str, Any]:
    ones: dict[int, Weights] = {}
    for adapter_id in case.adapters:
        A, B = _weights(case, adapter_id)
        ones[adapter_id] = np.ones_like(A), np.ones_like(B)
    # 3424 and its doubles have 7 significant bits: they fit every float type.
    return {
        "x": np.ones_like(case.x),
        "y": np.zeros_like(case.y),
        "adapters": ones,
        "scalings": {0: 2.0, 1: -1.0},
    }


def _views(case: Workload) -> dict[str, Any]:
    n, h_in = case.x.shape
    wide = np.full((2 * n, h_in + 7), np.nan, case.x.dtype)
    wide[::2, 3:-4] = case.x
    adapters = {
        adapter_id: pair and (np.asfortranarray(pair[0]), np.asfortranarray(pair[1]))
        for adapter_id, pair in case.adapters.items()
    }
    return {"x": wide[::2, 3:-4], "adapters": adapters}


def _far_rows(case: Workload) -> dict[str, Any]:
    n, h_in = case.x.shape
    apart = 2**31 + 16
    size = ((n - 1) * apart + h_in) * case.x.itemsize
    memory = mmap.mmap(-1, size)
    strides = (apart * case.x.itemsize, case.x.itemsize)
    far: NDArray[Any] = np.ndarray((n, h_in), case.x.dtype, memory, strides=strides)
    far[:] = case.x
    return {"x": far}


def _weights(case: Workload, adapter_id: int) -> Weights:
    """Copies of A and B of an adapter that has some."""
    pair = case.adapters[adapter_id]
    if pair is None:
        raise ValueError(f"{case.name}: expected weights for adapter {adapter_id}, got None")
    return pair[0].copy(), pair[1].copy()
