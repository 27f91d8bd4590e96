"""Which cases are timed: integers and names only, no arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.batch import DTYPES, ONE_ROW
from reference.workloads import POPULARITIES
from sgmv.models import LAYERS, MODELS

RANKS = (8, 16, 64)
FULL_ROWS = (1, 4, 16, 64, 256, 2048)
QUICK_ROWS = (1, 4, 16, 64, 256, 1024)
# --quick walks all row counts at one model, layer and rank, and the others at one row count.
QUICK_MODEL, QUICK_LAYER, QUICK_RANK, QUICK_HUB_ROWS = "Llama-3-8B", "q", 16, 64


@dataclass(frozen=True)
class Case:
    """One timed configuration; `names` are the layers of all models that have this shape."""

    h_in: int
    h_out: int
    rank: int
    rows: int
    popularity: str
    dtype: str
    names: tuple[str, ...]

    def label(self) -> str:
        return label(self.h_in, self.h_out, self.rank, self.rows, self.popularity, self.dtype)


def label(h_in: int, h_out: int, rank: int, rows: int, popularity: str, dtype: str) -> str:
    """What a case is called, on a terminal and in messages.

    >>> label(8, 16, 2, 64, "skewed", "bfloat16")
    '8>16 r=2 n=64 skewed bfloat16'
    """
    name = f"{h_in}>{h_out} r={rank} n={rows} {popularity}"
    return name if dtype == DTYPES[0] else f"{name} {dtype}"


@dataclass(frozen=True)
class Filters:
    """The values asked for on each axis; None is the mode's own choice."""

    models: Sequence[str] | None = None
    layers: Sequence[str] | None = None
    ranks: Sequence[int] | None = None
    rows: Sequence[int] | None = None
    popularities: Sequence[str] | None = None
    dtypes: Sequence[str] | None = None

    def any(self) -> bool:
        return any(vars(self).values())


def cases(mode: str, filters: Filters) -> list[Case]:
    """The cases of a mode, ordered so that those that share weights stand together.

    Semantics: "full" is the product of all axes in float32, and one layer of one model in bfloat16;
    "quick" without filters is that layer over all row counts and popularities, and from its middle
    (64 rows) every other layer and rank. A filter replaces its axis; quick with filters is the
    product of the filters and one layer.

    >>> len({case.label() for case in cases("full", Filters())})
    945
    >>> [case.label() for case in cases("quick", Filters(ranks=[8], rows=[1]))]
    ['4096>4096 r=8 n=1 one row']
    """
    full = mode == "full"
    models = filters.models or (list(MODELS) if full else [QUICK_MODEL])
    layers = filters.layers or (list(LAYERS) if full else [QUICK_LAYER])
    ranks = filters.ranks or (RANKS if full else [QUICK_RANK])
    rows = filters.rows or (FULL_ROWS if full else QUICK_ROWS)
    popularities = filters.popularities or POPULARITIES
    dtypes = filters.dtypes or DTYPES[:1]

    found = _product(models, layers, ranks, rows, popularities, dtypes)
    if full and not filters.any():
        found += _product([QUICK_MODEL], [QUICK_LAYER], ranks, rows, popularities, ["bfloat16"])
    if not full and not filters.any():
        hub_rows = [QUICK_HUB_ROWS]
        found += _product(models, LAYERS, ranks, hub_rows, popularities, dtypes)
        found += _product(models, layers, RANKS, hub_rows, popularities, dtypes)
    unique = dict.fromkeys(found)
    return sorted(unique, key=lambda c: (c.dtype, c.h_in, c.h_out, c.rank, c.rows))


def shapes(models: Sequence[str], layers: Sequence[str]) -> dict[tuple[int, int], list[str]]:
    """{(h_in, h_out): ["model layer", ...]}: layers of one shape share one entry.

    >>> shapes(["Llama-3-8B", "Mistral-7B"], ["down"])
    {(14336, 4096): ['Llama-3-8B down', 'Mistral-7B down']}
    """
    found: dict[tuple[int, int], list[str]] = {}
    for model in models:
        for layer in layers:
            found.setdefault(MODELS[model].layer(layer), []).append(f"{model} {layer}")
    return found


def _product(
    models: Sequence[str],
    layers: Sequence[str],
    ranks: Sequence[int],
    rows: Sequence[int],
    popularities: Sequence[str],
    dtypes: Sequence[str],
) -> list[Case]:
    return [
        Case(h_in, h_out, rank, n, popularity, dtype, tuple(names))
        for (h_in, h_out), names in shapes(models, layers).items()
        for dtype in dtypes
        for rank in ranks
        for n in rows
        for popularity in (popularities if n > 1 else [ONE_ROW])
    ]
