"""The arrays of one timed case: a pool of adapters, and a batch of rows over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks.text import Console
from reference import workloads
from sgmv.tensors import as_array

# With one row the four popularities are the same batch: it is timed once, under this name.
ONE_ROW = "one row"
DTYPES = ("float32", "float16", "bfloat16")
# Whose arrays a layer's x, y and weights are, and of what type.
KINDS = (("numpy", "float32"), ("torch", "float32"), ("torch", "bfloat16"))


@dataclass(frozen=True)
class Pool:
    """Adapters 0..slots-1, held twice: loaded into sgmv's stack, and as the baselines like them.

    Baselines read float32 in the storage order that suits BLAS: `A (slots, max rank, h_in)` and
    `wb (slots, max rank, h_out)`, zero past a slot's rank. Rank 0 is a slot without an adapter.
    `weight_bytes` per slot is what the stack holds. `dtype` is that of x and y.
    """

    adapters: list[sgmv.Adapter | None]
    stack: sgmv.AdapterStack
    A: NDArray[np.float32]
    wb: NDArray[np.float32]
    ranks: NDArray[np.int64]
    scalings: NDArray[np.float32]
    weight_bytes: NDArray[np.int64]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Batch:
    """Rows over a pool; segments stand ready for the baselines as they do for sgmv.

    `rows` are each segment's row numbers; `takes` the same as baselines index with them: a slice
    where they are consecutive, which numpy and torch read and write without a copy.
    """

    pool: Pool
    x: NDArray[Any]
    y: NDArray[Any]
    adapter_ids: NDArray[np.int64]
    segments: sgmv.Segments
    rows: list[NDArray[np.int64]]
    takes: list[slice | NDArray[np.int64]]
    slots: list[int]
    prepared: dict[str, Any] = field(default_factory=dict)

    def footprint(self) -> int:
        """Bytes that one call touches: the weights once per segment, x, and y read and written."""
        weights = self.pool.weight_bytes[self.slots].sum()
        return int(weights) + int(self.x.nbytes) + 2 * int(self.y.nbytes)

    def operands(self) -> list[NDArray[Any]]:
        """The arrays that one call reads: x, y and each segment's weights, as sgmv stores them."""
        table = self.pool.stack.table
        slots, _ranks = table.find(self.segments.adapter_ids)
        stored = [table.weights[slot] for slot in slots if slot >= 0]  # others are base only
        weights = [array for each in stored if each is not None for array in (each.wa, each.wb)]
        return [self.x, self.y, *weights]

    def flops(self) -> int:
        """Multiplications and additions of shrink and expand."""
        widths = int(self.x.shape[1]) + int(self.y.shape[1])
        return 2 * int(self.pool.ranks[self.adapter_ids].sum()) * widths

    def own_weights(self, slot: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A and wb in the adapter's own type, without a copy where they lie in that order."""
        adapter = self.pool.adapters[slot]
        assert adapter is not None, slot
        return np.ascontiguousarray(adapter.A), np.ascontiguousarray(adapter.B.T)

    def stacks(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """A (S, max rank, h_in) and wb (S, max rank, h_out) in x's type, zero past a rank.

        A view of the pool's where it holds float32 and the batch uses its first slots.
        """
        pool, slots = self.pool, self.slots
        if self.x.dtype == np.float32:
            take = slice(len(slots)) if slots == list(range(len(slots))) else slots
            return pool.A[take], pool.wb[take]
        A = np.zeros((len(slots), *pool.A.shape[1:]), self.x.dtype)
        wb = np.zeros((len(slots), *pool.wb.shape[1:]), self.x.dtype)
        for i, slot in enumerate(slots):
            if r := pool.ranks[slot]:
                A[i, :r], wb[i, :r] = self.own_weights(slot)
        return A, wb


def weights_refuse(batch: Batch) -> str:
    """Why no baseline with weights of x's type is timed: weights of another one would be rounded.

    That is another result. The pool holds any weights in float32, exactly.
    """
    if batch.x.dtype == np.float32:
        return ""
    adapters = [batch.pool.adapters[slot] for slot in batch.slots]
    dtypes = {adapter.dtype for adapter in adapters if adapter is not None and adapter.r}
    if others := sorted(str(dtype) for dtype in dtypes - {batch.x.dtype}):
        return f"needs weights of x's type, {batch.x.dtype}; they are {', '.join(others)}"
    return ""


def dtype_of(name: str) -> np.dtype[Any]:
    """The numpy dtype of a name; bfloat16 needs ml_dtypes.

    >>> dtype_of("float16").itemsize
    2
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise SystemExit("--dtype bfloat16 needs ml_dtypes; pip install ml_dtypes") from error
    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def installed_kinds(console: Console) -> Iterator[tuple[str, str]]:
    """Each of KINDS that can be had here; the console says which, and which are left out."""
    for library, dtype in KINDS:
        if find_spec(library) and (dtype != "bfloat16" or find_spec("ml_dtypes")):
            console.print(f"  {library} {dtype}")
            yield library, dtype
        else:
            console.print(f"  {library} {dtype}: not installed, left out", "yellow")


def in_library(library: str, array: NDArray[Any]) -> Any:
    """The array itself, or a tensor over its memory."""
    if library == "numpy":
        return array
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def base_product(library: str, x: NDArray[Any], W: NDArray[Any]) -> Callable[[], NDArray[Any]]:
    """The product x @ W.T by this library, as numpy has it."""
    if library == "numpy":
        return lambda: x @ W.T
    import torch

    product = partial(torch.nn.functional.linear, in_library(library, x), in_library(library, W))
    return lambda: as_array("y", product())


def popularity_ids(popularity: str, n: int, seed: int) -> NDArray[np.int64]:
    """One adapter id per row.

    >>> int(popularity_ids("uniform", 16, seed=0).max())
    3
    """
    kind = "identical" if popularity == ONE_ROW else popularity
    return np.asarray(workloads.popularity(kind, n, seed), dtype=np.int64)


def pool_bytes(slots: int, rank: int, h_in: int, h_out: int, dtype: np.dtype[Any]) -> int:
    """Bytes of a pool: the baselines' float32 copy and sgmv's, which is of `dtype`."""
    return slots * rank * (h_in + h_out) * (4 + dtype.itemsize)


def make_pool(
    h_in: int, h_out: int, rank: int, slots: int, dtype: np.dtype[Any], seed: int
) -> Pool:
    """Seeded random adapters; scalings differ, so that a kernel that mixes them up is found."""
    rng = np.random.Generator(np.random.SFC64(seed))
    A = uniform(rng, (slots, rank, h_in), h_in**-0.5)
    wb = uniform(rng, (slots, rank, h_out), rank**-0.5)
    scalings = rng.choice(np.array([0.5, 1.0, 2.0], np.float32), slots)
    a, b = A, wb
    if dtype != np.float32:
        # Both sides must hold the same values, so the baselines get what 16 bits can hold.
        a, b = A.astype(dtype), wb.astype(dtype)
        A[...], wb[...] = a, b
    adapters: list[sgmv.Adapter | None] = [
        sgmv.Adapter(a[slot], b[slot].T, scaling=float(scalings[slot])) for slot in range(slots)
    ]
    return _pool(adapters, A, wb, np.full(slots, rank, np.int64), scalings, dtype)


def pool_from_adapters(adapters: Sequence[sgmv.Adapter | None], dtype: np.dtype[Any]) -> Pool:
    """A pool of given adapters, such as PEFT's; ranks may differ, None is base only."""
    given = [adapter for adapter in adapters if adapter is not None]
    ranks = np.array([0 if adapter is None else adapter.r for adapter in adapters], np.int64)
    A = np.zeros((len(adapters), int(ranks.max()), given[0].h_in), np.float32)
    wb = np.zeros((len(adapters), int(ranks.max()), given[0].h_out), np.float32)
    scalings = np.ones(len(adapters), np.float32)
    for slot, adapter in enumerate(adapters):
        if adapter is not None:
            A[slot, : ranks[slot]] = adapter.A
            wb[slot, : ranks[slot]] = adapter.B.T
            scalings[slot] = adapter.scaling
    return _pool(list(adapters), A, wb, ranks, scalings, dtype)


def make_batch(pool: Pool, adapter_ids: NDArray[np.int64], seed: int) -> Batch:
    """Seeded x and y of the pool's dtype, and the segments of `adapter_ids`."""
    rng = np.random.Generator(np.random.SFC64(seed))
    n = len(adapter_ids)
    x = uniform(rng, (n, pool.A.shape[2]), 1.0).astype(pool.dtype, copy=False)
    y = uniform(rng, (n, pool.wb.shape[2]), 1.0).astype(pool.dtype, copy=False)
    slots, counts = np.unique(adapter_ids, return_counts=True)
    order = np.argsort(adapter_ids, kind="stable")
    rows = np.split(order, np.cumsum(counts)[:-1])
    segments = sgmv.segment(adapter_ids)
    takes = [consecutive(part) for part in rows]
    return Batch(pool, x, y, adapter_ids, segments, rows, takes, slots.tolist())


def consecutive(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """A slice of the same rows, if there is one.

    >>> consecutive(np.array([3, 4, 5])) == slice(3, 6), consecutive(np.array([3, 5])).tolist()
    (True, [3, 5])
    """
    if len(rows) and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _pool(
    adapters: list[sgmv.Adapter | None],
    A: NDArray[np.float32],
    wb: NDArray[np.float32],
    ranks: NDArray[np.int64],
    scalings: NDArray[np.float32],
    dtype: np.dtype[Any],
) -> Pool:
    stack = sgmv.AdapterStack.from_adapters(dict(enumerate(adapters)))
    weight_bytes = ranks * (stack.h_in + stack.h_out) * stack.dtype.itemsize
    return Pool(adapters, stack, A, wb, ranks, scalings, weight_bytes, dtype)


def uniform(
    rng: np.random.Generator, shape: tuple[int, ...], deviation: float
) -> NDArray[np.float32]:
    """Uniform values with mean 0 and the given standard deviation.

    They are much cheaper to draw than normal ones, and no kernel's time depends on the values.
    """
    values = rng.random(shape, dtype=np.float32)
    values -= np.float32(0.5)
    values *= np.float32(deviation * 12**0.5)
    return values
