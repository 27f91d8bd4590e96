"""llama.cpp: a list of (id, scale) for each request, and one list for all rows of a batch.

    adapter ids   7 9   7 -   9 7   - -       weights   .5 .5   1 -   .5 .5   - -
    lists         7: .5, 9: .5    7: 1    7: .5, 9: .5    none
    batches       rows 0 2        row 1                   row 3         one `llama_decode` each

A list holds for all rows that are decoded with it, base-only rows have a list of their own, and
so a batch of n different mixtures takes n decodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sgmv.errors import ValueRangeError, some
from sgmv.ids import BASE_ONLY, Integers, is_integer
from sgmv.layouts.exam import Exam, Examiner
from sgmv.layouts.rows import (
    Batch,
    Int32,
    Layout,
    Slots,
    frozen,
    ids_of,
    mixture,
    padded,
    slot_table,
    slots_of_pairs,
)

Scale: TypeAlias = dict[str, Any]  # {"id": int, "scale": float}, as a request's JSON has it
ALL_OFF: tuple[Scale, ...] = ({"id": 0, "scale": 0.0},)
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class LlamaBatch(Layout):
    """The rows that llama.cpp's server decodes at once, and the list that is set for all of them.

    rows  (m,) int32, ascending
    lora  the scale of each adapter that is on; the server turns all others off

    Source: llama.cpp, tools/server/server-context.cpp, `can_batch_with` and the call of
    `common_set_adapter_lora` in `update_slots`.

    >>> print(llamacpp([7, -1, 7]).batches[0])
    rows  int32 (2,) [0, 2]
    lora  7: 1
    """

    rows: Int32
    lora: tuple[Scale, ...]

    def shown(self, name: str) -> str:
        """The list as `id: scale`."""
        return _as_text(self.lora) if name == "lora" else super().shown(name)


@dataclass(frozen=True, eq=False)
class LlamaCpp(Layout):
    """What llama.cpp's server is asked for, and the batches that it makes of it.

    Semantics: row i is decoded with the adapters of `lora[i]` alone, each delta times its scale.
    An id is an adapter's place on the server's command line (`--lora`).

    lora     n lists, the JSON field `lora` of each row's request. Of an empty one the server takes
             the scales that it was started with, so a base-only row has an adapter at scale 0
    batches  n or fewer LlamaBatch, those with the first rows first: rows with equal lists

    The server goes through its slots from the first one at each step: while a row of the first
    batch is generating, rows of other batches wait.

    Source: llama.cpp, tools/server/README.md, `lora`; server-common.cpp, `parse_lora_request` and
    `are_lora_equal`; server-context.cpp, `construct_lora_list`, `can_batch_with`, `update_slots`.
    """

    lora: tuple[tuple[Scale, ...], ...]
    batches: tuple[LlamaBatch, ...]

    def shown(self, name: str) -> str:
        """The first batches' rows and lists."""
        if name == "lora":
            return some([f"({_as_text(one)})" for one in self.lora], 16)
        first = [f"rows {some(one.rows)} {_as_text(one.lora)}" for one in self.batches[:8]]
        return "; ".join([*first, "..."] if self.batches[8:] else first)

    def adapter_ids(self, slots: Slots = None) -> Integers:
        """(n,) or (n, k) the ids of each row, by slot, then -1; slots as in `llamacpp`."""
        found = padded(
            [[one["id"] for one in _on(each)] for each in self.lora], BASE_ONLY, np.int64
        )
        return ids_of(found.reshape(-1), slots).reshape(found.shape)

    def weights(self) -> npt.NDArray[np.float32]:
        """(n,) or (n, k) the weight of each of these ids, 0 for -1."""
        return padded([[one["scale"] for one in _on(each)] for each in self.lora], 0, np.float32)


def llamacpp(batch: Batch, weights: npt.ArrayLike | None = None, slots: Slots = None) -> LlamaCpp:
    """The batch as llama.cpp's server takes it: a list for each row, a decode for each list.

    Semantics: a row's list has each of its adapters once, by slot; an id that a row names several
    times has the sum of its weights, for the server takes the last of them; a weight of 0 is no
    entry. Rows with equal lists are one batch.

    batch    (n,) or (n, k) adapter ids, or Segments
    weights  (n, k) the scale of each id; left out: 1
    slots    an AdapterStack or a mapping id -> place on the server's command line; None: the ids
             are places already

    Raises UnknownAdapterError for ids that have no slot; ValueRangeError for weights of one adapter
    with a sum that float32 does not hold; DtypeError, ShapeError and ValueRangeError as `segment`
    and `add_lora` do. Source: as LlamaCpp.

    >>> print(llamacpp([[0, 2], [2, -1], [2, 0]], [[0.5, 0.5], [1, 0], [0.5, 0.5]]))
    lora     [(0: 0.5, 2: 0.5), (2: 1), (0: 0.5, 2: 0.5)]
    batches  rows [0, 2] 0: 0.5, 2: 0.5; rows [1] 2: 1
    """
    segments, of_pair = mixture(batch, weights)
    lists = [
        _as_list(ids, scales)
        for ids, scales in zip(
            slots_of_pairs(segments, slots).tolist(), of_pair.tolist(), strict=True
        )
    ]
    return LlamaCpp(
        lora=tuple(lists),
        batches=tuple(
            LlamaBatch(frozen("rows", rows), lists[rows[0]]) for rows in _alike(lists).values()
        ),
    )


def _as_list(ids: list[int], scales: list[float]) -> tuple[Scale, ...]:
    """A row's list: its adapters once each, by slot."""
    sums: dict[int, float] = {}
    for i, scale in zip(ids, scales, strict=True):
        if i != BASE_ONLY:
            sums[i] = sums.get(i, 0.0) + scale
    for i, scale in sums.items():
        if abs(scale) > FLOAT32_MAX:
            raise ValueRangeError(
                "weights",
                "a sum for each adapter of a row that float32 holds",
                f"{scale} for slot {i}",
                "name the adapter once",
            )
    named = ((i, float(np.float32(sums[i]))) for i in sorted(sums))
    return tuple({"id": i, "scale": scale} for i, scale in named if scale) or ALL_OFF


def _on(lora: tuple[Scale, ...]) -> list[Scale]:
    """The entries that add something."""
    return [one for one in lora if one["scale"]]


def _key(lora: tuple[Scale, ...]) -> tuple[tuple[int, float], ...]:
    """Equal for lists that the server decodes together: the last entry of an id counts."""
    last = {one["id"]: float(np.float32(one["scale"])) for one in lora}
    return tuple(sorted((i, scale) for i, scale in last.items() if scale))


def _alike(lists: list[tuple[Scale, ...]]) -> dict[Any, list[int]]:
    """The rows of each list, in the order of their first rows."""
    found: dict[Any, list[int]] = {}
    for row, each in enumerate(lists):
        found.setdefault(_key(each), []).append(row)
    return found


def _as_text(lora: tuple[Scale, ...]) -> str:
    """A list as `id: scale`."""
    return ", ".join(f"{one['id']}: {one['scale']:g}" for one in lora)


def _llamacpp(exam: Exam) -> None:
    lists = _lists(exam, "lora", exam.get("lora"), "row")
    if exam.found:
        return
    exam.has_rows("lora", len(lists))
    keys = [_key(one) for one in lists]
    if exam.get("batches") is not None:
        _batches(exam, keys)
    if exam.mixture is not None and not exam.found:
        segments, weights = exam.mixture
        wanted = llamacpp(segments, weights, exam.slots).lora
        differ = [i for i, one in enumerate(wanted) if _key(one) != keys[i]]
        if differ:
            first = differ[0]
            where = f"row {first if len(differ) == 1 else some(differ)}"
            exam.add("lora", "stale", _as_text(wanted[first]), _as_text(lists[first]), where)


def _batches(exam: Exam, keys: list[Any]) -> None:
    """Every row is in one batch, with the list that it asks for."""
    batches, field = exam.get("batches"), "batches"
    if not isinstance(batches, list | tuple):
        exam.add(field, "shape", "a list of batches", type(batches).__name__)
        return
    rows = [np.empty(0, np.int64)]
    for b, batch in enumerate(batches):
        within = Exam(batch, None, exam.n, None, None)
        own = within.array("rows", 0)
        [lora] = _lists(within, "lora", [within.get("lora")], "") or [()]
        exam.found += [replace(f, field=f"{field}[{b}].{f.field}") for f in within.found]
        rows.append(own)
        others = [row for row in own.tolist() if row < len(keys) and keys[row] != _key(lora)]
        if others and not within.found:
            asked = ", ".join(f"{i}: {scale:g}" for i, scale in keys[others[0]]) or "no adapter"
            where = f"row {others[0] if len(others) == 1 else some(others)}"
            exam.add(f"{field}[{b}].lora", "mixed lists", asked, _as_text(lora), where)
    if not exam.found and exam.each_once(field, np.concatenate(rows), exam.n):
        missing = (exam.n or 0) - sum(map(len, rows))
        if missing:
            exam.add(field, "gap", f"all {exam.n} rows", f"{missing} fewer")


def _lists(exam: Exam, field: str, value: Any, kind: str) -> list[tuple[Scale, ...]]:
    """The lists, where each is one of {"id", "scale"}; else findings, and none."""
    if not isinstance(value, list | tuple):
        exam.add(field, "shape", 'a list of {"id", "scale"} for each row', type(value).__name__)
        return []
    known = None if exam.slots is None else set(slot_table(exam.slots)[1].tolist())
    for at, entries in enumerate(value):
        where = f"{kind} {at}" if kind else "the whole field"
        if not isinstance(entries, list | tuple) or not all(map(_is_scale, entries)):
            exam.add(field, "shape", 'a list of {"id", "scale"}', repr(entries)[:60], where)
        elif not entries:
            expected = (
                "an adapter at scale 0, as an empty list leaves on what the server began with"
            )
            exam.add(field, "base misplaced", expected, "an empty list", where)
        else:
            lost = [
                one["id"]
                for one in _on(tuple(entries))
                if known is not None and one["id"] not in known
            ]
            lost += [one["id"] for one in entries if one["id"] < 0]
            if lost:
                exam.add(field, "no weights", "places of loaded adapters", some(lost), where)
    return [] if exam.found else [tuple(entries) for entries in value]


def _is_scale(entry: object) -> bool:
    """Whether this is an entry of a list."""
    if not isinstance(entry, Mapping) or not is_integer(entry.get("id")):
        return False
    with suppress(ValueError):  # of lists
        scale = np.asarray(entry.get("scale"))
        if scale.ndim == 0 and (scale.dtype.kind in "fiu" or scale.dtype.name == "bfloat16"):
            return abs(float(scale)) <= FLOAT32_MAX  # nor NaN
    return False


EXAMINERS = (Examiner(("lora",), _llamacpp, {}, mixtures=True),)
