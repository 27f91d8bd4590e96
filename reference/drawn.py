"""Random batches, each of its seed and index alone, and a failing one made as small as it goes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.batch import POPULARITIES, Weights, Workload, Wrong, integer, popularity, real

HUNTS = "random batches"
RANKS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 64)
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100)
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 63, 64, 65, 70)


def batch(seed: int, index: int, dtype: np.dtype[Any]) -> Workload:
    """The random batch of this number.

    Semantics: seed and index alone decide rows, widths, ranks, ids, scalings, values and what is
    odd about it: base-only rows, None as adapter, adapters that no row uses (with NaN in them), ids
    far apart, a row of NaN; the type then rounds the values. Half of them are integer-valued.

    >>> case = batch(0, 7, np.dtype("float32"))
    >>> case.name, case.fingerprint == batch(0, 7, np.dtype("float32")).fingerprint
    ('random batch 7 of seed 0, float32', True)
    """
    rng = np.random.default_rng([seed, index])
    n, h_in, h_out = (int(rng.choice(sizes)) for sizes in (ROWS, SIZES, SIZES))
    ids = popularity(str(rng.choice(POPULARITIES)), n, seed=int(rng.integers(2**31)))
    places = int(ids.max(initial=-1)) + 1
    spare = int(rng.integers(0, 3))
    step = int(rng.choice((1, 1, 2, 100)))
    ids = np.where(rng.random(n) < rng.choice((0.0, 0.2, 0.9)), -1, ids * step)
    one_rank = int(rng.choice(RANKS)) if rng.random() < 0.3 else None
    ranks: dict[int, int | None] = {
        place * step: int(rng.choice(RANKS)) if one_rank is None else one_rank
        for place in range(places + spare)
    }
    for adapter_id in ranks:
        if rng.random() < 0.05:
            ranks[adapter_id] = None
    whole = rng.random() < 0.5
    choice = (2, -1, 3, 1, -2, 0) if whole else (0.5, -1.3, 1.0, 2.7, 0.1, 0.0)
    scalings = {adapter_id: float(rng.choice(choice)) for adapter_id in ranks}
    build = integer if whole else real
    case = build(
        name(seed, index, dtype.name),
        HUNTS,
        ids,
        ranks,
        h_in,
        h_out,
        scalings=scalings,
        dtype=dtype,
    )
    if rng.random() < 0.1 and n:
        x = case.x.copy()
        x[rng.integers(n), rng.integers(h_in)] = rng.choice((np.nan, np.inf))
        case = replace(case, x=x, exact=False)
    if rng.random() < 0.1:
        unused = [i for i, pair in case.adapters.items() if pair is not None and i not in ids]
        adapters = _each(case.adapters, lambda A, B: (np.full_like(A, np.nan), B))
        adapters = {i: adapters[i] if i in unused else pair for i, pair in case.adapters.items()}
        case = replace(case, adapters=adapters)
    return case


def name(seed: int, index: int, dtype: str) -> str:
    """What the batch of this number is called.

    >>> name(0, 7, "float32")
    'random batch 7 of seed 0, float32'
    """
    return f"random batch {index} of seed {seed}, {dtype}"


def size(case: Workload) -> int:
    """Numbers held in x, y and the adapters.

    >>> size(batch(0, 7, np.dtype("float32"))) > 0
    True
    """
    weights = [w.size for pair in case.adapters.values() for w in pair or ()]
    return int(case.x.size + case.y.size + sum(weights))


def smallest(case: Workload, wrong: Callable[[Workload], Wrong | None]) -> Workload:
    """The smallest batch found that fails in the same way: fewer of everything, simpler numbers.

    Semantics: rows, adapters, columns of x and of y and ranks are taken away, by halves, quarters
    and so on, then ids, scalings and values made simpler, as long as `wrong` says the same kind of
    failure; again and again until nothing more goes. No chance in it.

    >>> case = real("demo", "y as it was", [0, 1, 0, -1], {0: 5, 1: 3}, h_in=8, h_out=9)
    >>> least = smallest(case, lambda case: case.wrong(case.y))
    >>> least.x.tolist(), least.y.tolist(), least.adapter_ids.tolist(), least.scalings
    ([[1.0]], [[0.0]], [0], {0: 1.0})
    """
    found = wrong(case)
    if found is None:
        raise ValueError(f"case: expected one that fails, got {case.name}, which passes")
    kind = found.kind
    case = replace(case, name=f"the smallest of {case.name}")

    def fails(other: Workload) -> bool:
        again = wrong(other)
        return again is not None and again.kind == kind

    while True:
        before = case
        for axis, least in ((_of_rows, 0), (_of_adapters, 0), (_of_h_in, 1), (_of_h_out, 1)):
            case = _fewer(case, axis, least, fails)
        for adapter_id in case.adapters:
            case = _fewer(case, _of_rank(adapter_id), 0, fails)
        if fails(other := _renumbered(case)):
            case = other
        for simpler in _simpler(case):
            other = simpler(case)
            if not _same(other, case) and fails(other):
                case = other
        if _same(case, before):
            return case


# An axis: how many there are, and the case with those alone that are named.
Axis = Callable[[Workload], tuple[int, Callable[[list[int]], Workload]]]


def _fewer(case: Workload, axis: Axis, least: int, fails: Callable[[Workload], bool]) -> Workload:
    """The case with as few along this axis as still fail, at least so many."""
    count, keep = axis(case)
    kept = list(range(count))
    chunk = count
    while chunk:
        start = 0
        while start < len(kept):
            rest = kept[:start] + kept[start + chunk :]
            if len(rest) >= least and fails(other := keep(rest)):
                case, kept = other, rest
            else:
                start += chunk
        chunk //= 2
    return case


def _of_rows(case: Workload) -> tuple[int, Callable[[list[int]], Workload]]:
    def keep(rows: list[int]) -> Workload:
        x, y, ids = case.x[rows], case.y[rows], case.adapter_ids[rows]
        return replace(case, x=x, y=y, adapter_ids=ids)

    return len(case.x), keep


def _of_adapters(case: Workload) -> tuple[int, Callable[[list[int]], Workload]]:
    """Those that no row uses are left out; the rows of one that is used become base only."""
    ids = list(case.adapters)

    def keep(places: list[int]) -> Workload:
        kept = [ids[place] for place in places]
        return replace(
            case,
            adapters={i: case.adapters[i] for i in kept},
            scalings={i: case.scalings[i] for i in kept},
            adapter_ids=np.where(np.isin(case.adapter_ids, kept), case.adapter_ids, -1),
        )

    return len(ids), keep


def _of_h_in(case: Workload) -> tuple[int, Callable[[list[int]], Workload]]:
    def keep(columns: list[int]) -> Workload:
        adapters = _each(case.adapters, lambda A, B: (A[:, columns], B))
        return replace(case, x=case.x[:, columns], adapters=adapters)

    return case.x.shape[1], keep


def _of_h_out(case: Workload) -> tuple[int, Callable[[list[int]], Workload]]:
    def keep(columns: list[int]) -> Workload:
        adapters = _each(case.adapters, lambda A, B: (A, B[columns]))
        return replace(case, y=case.y[:, columns], adapters=adapters)

    return case.y.shape[1], keep


def _of_rank(adapter_id: int) -> Axis:
    def axis(case: Workload) -> tuple[int, Callable[[list[int]], Workload]]:
        pair = case.adapters[adapter_id]

        def keep(kept: list[int]) -> Workload:
            A, B = pair or (np.empty(0), np.empty(0))
            return replace(case, adapters={**case.adapters, adapter_id: (A[kept], B[:, kept])})

        return 0 if pair is None else len(pair[0]), keep

    return axis


def _simpler(case: Workload) -> Sequence[Callable[[Workload], Workload]]:
    def adapter(i: int, A: float | None, B: float | None) -> Callable[[Workload], Workload]:
        def change(case: Workload) -> Workload:
            pair = case.adapters[i]
            if pair is None:
                return case
            ones = (
                pair[0] if A is None else np.full_like(pair[0], A),
                pair[1] if B is None else np.full_like(pair[1], B),
            )
            return replace(case, adapters={**case.adapters, i: ones})

        return change

    changes: list[Callable[[Workload], Workload]] = [
        lambda case: replace(case, y=np.zeros_like(case.y)),
        lambda case: replace(case, x=np.ones_like(case.x)),
        lambda case: replace(case, x=_rounded(case.x)),
    ]
    for i in case.adapters:
        changes += [adapter(i, 1.0, None), adapter(i, None, 1.0)]
        changes += [_scaling(i, 1.0), _scaling(i, 2.0)]
        changes.append(
            lambda case, i=i: replace(  # type: ignore[misc]
                case,
                adapters={
                    **case.adapters,
                    i: _each(case.adapters, lambda A, B: (_rounded(A), _rounded(B)))[i],
                },
            )
        )
    return changes


def _scaling(adapter_id: int, value: float) -> Callable[[Workload], Workload]:
    """To 1, or where the fault needs another, to 2."""

    def change(case: Workload) -> Workload:
        if case.scalings[adapter_id] == 1.0:
            return case
        return replace(case, scalings={**case.scalings, adapter_id: value})

    return change


def _renumbered(case: Workload) -> Workload:
    """The adapters' ids, in their order, from 0 on."""
    ids = {adapter_id: place for place, adapter_id in enumerate(sorted(case.adapters))}
    return replace(
        case,
        adapters={ids[i]: pair for i, pair in case.adapters.items()},
        scalings={ids[i]: case.scalings[i] for i in case.adapters},
        adapter_ids=np.array([ids.get(i, -1) for i in case.adapter_ids.tolist()], np.int64),
    )


def _rounded(values: NDArray[Any]) -> NDArray[Any]:
    """To whole numbers, 0 to 1 or -1."""
    wide = values.astype(np.float64)
    return np.where(np.abs(wide) < 1, np.sign(wide), np.round(wide)).astype(values.dtype)


def _each(
    adapters: Mapping[int, Weights | None], change: Callable[[Any, Any], Weights]
) -> dict[int, Weights | None]:
    return {i: pair and change(*pair) for i, pair in adapters.items()}


def _same(one: Workload, other: Workload) -> bool:
    return (
        one.fingerprint == other.fingerprint
        and one.x.shape == other.x.shape
        and one.y.shape == other.y.shape
        and list(one.adapters) == list(other.adapters)
        and one.scalings == other.scalings
    )


def snippet(case: Workload, kernel: str, like: str = "reference", torch: bool = False) -> str:
    """The case as a program that fails: it imports the kernel, FILE:FUNCTION, and checks it.

    >>> case = real("demo", "shows the snippet", [0], {0: 1}, h_in=1, h_out=1)
    >>> print(snippet(case, "my.py:my_kernel").splitlines()[-1])
    case.check(call(load("my.py:my_kernel"), case))
    """
    ml_dtypes = case.x.dtype.name == "bfloat16"
    lines = ["import numpy as np"]
    lines += ["import ml_dtypes"] if ml_dtypes else []
    lines += ["from reference import Workload, call, load", ""]
    kind = "ml_dtypes.bfloat16" if ml_dtypes else f"np.{case.x.dtype.name}"

    def array(values: NDArray[Any]) -> str:
        numbers = repr(values.astype(np.float64).tolist())
        numbers = numbers.replace("nan", "np.nan").replace("inf", "np.inf")
        text = f"np.array({numbers}, {kind})"
        return text if values.size else f"{text}.reshape{values.shape}"

    adapters = [
        f"        {i}: None,"
        if pair is None
        else f"        {i}: ({array(pair[0])}, {array(pair[1])}),"
        for i, pair in case.adapters.items()
    ]
    ids = case.adapter_ids.tolist()
    lines += [
        "case = Workload(",
        f"    name={case.name!r},",
        f"    why={case.why!r},",
        f"    x={array(case.x)},",
        f"    y={array(case.y)},",
        "    adapters={",
        *adapters,
        "    },",
        f"    scalings={dict(case.scalings)!r},",
        f"    adapter_ids=np.array({ids}, np.int64),",
        f"    exact={case.exact},",
        ")",
    ]
    options = "" if like == "reference" else f", like={like!r}"
    options += ", torch=True" if torch else ""
    lines += [f"case.check(call(load({json.dumps(kernel)}), case{options}))"]
    return "\n".join(lines)
