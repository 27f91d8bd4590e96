"""PEFT: the name of an adapter for each sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sgmv.checks import check_count, check_several
from sgmv.errors import DtypeError, UnknownAdapterError, ValueRangeError, some
from sgmv.ids import BASE_ONLY, Integers
from sgmv.layouts.exam import Exam, Examiner
from sgmv.layouts.rows import Batch, Layout, as_segments, row_ids, spread

BASE_NAME = "__base__"


@dataclass(frozen=True, eq=False)
class AdapterNames(Layout):
    """PEFT's argument `adapter_names` of a mixed batch.

    Semantics: sample i uses the adapter of that name, "__base__" the base model alone.

    adapter_names  (n,) a tuple of str, in the order of the samples

    Source: peft, src/peft/tuners/lora/layer.py, `_mixed_batch_forward`.
    """

    adapter_names: tuple[str, ...]

    def shown(self, name: str) -> str:
        """The first names."""
        return some(self.adapter_names, 16)

    def adapter_ids(self, names: Mapping[int, str] | None = None) -> Integers:
        """(n,) the id of each sample; names as in `peft`.

        Raises UnknownAdapterError for a name that no id has.
        """
        id_of = {name: i for i, name in _checked(names).items()}
        if names is None:
            id_of = {
                str(int(name)): int(name) for name in set(self.adapter_names) if name.isdecimal()
            }
        id_of[BASE_NAME] = BASE_ONLY
        unknown = [name for name in dict.fromkeys(self.adapter_names) if name not in id_of]
        if unknown:
            raise UnknownAdapterError(
                "names",
                "an id for every name of the batch",
                f"none for {some(unknown)}",
                "pass the mapping id -> name that the layout was made with",
            )
        return np.fromiter(map(id_of.__getitem__, self.adapter_names), np.int64)


def peft(batch: Batch, names: Mapping[int, str] | None = None) -> AdapterNames:
    """The batch as PEFT's `model(..., adapter_names=...)` and `generate` take it.

    Semantics: one name for each sample: PEFT counts samples, so one id here is one sequence.

    batch  (n,) adapter ids of the samples, or Segments
    names  a mapping id -> name; left out, the id in decimal

    Raises UnknownAdapterError for ids without a name, ValueRangeError for a name of two ids or of
    the base model; DtypeError as `segment` does.
    Source: peft, src/peft/tuners/lora/layer.py, `_mixed_batch_forward`.

    >>> peft([7, -1, 7], {7: "fr"}).adapter_names
    ('fr', '__base__', 'fr')
    """
    segments = as_segments(batch)
    ids = segments.adapter_ids.tolist()
    named = {i: str(i) for i in ids} if names is None else dict(_checked(names))
    named[BASE_ONLY] = BASE_NAME
    unknown = [i for i in ids if i not in named]
    if unknown:
        raise UnknownAdapterError(
            "names",
            "a name for every adapter of the batch",
            f"none for {some(unknown)}",
            "add them to the mapping, or name -1 for base only",
        )
    called = np.array([named[i] for i in ids], object)
    which = spread(np.arange(segments.S), segments.lengths, segments.rows, segments.n)
    return AdapterNames(tuple(called[which].tolist()))


def checked_names(names: Mapping[int, str] | None) -> Mapping[int, str] | None:
    """The mapping, if it is one of ids to names."""
    if names is None:
        return None
    if not isinstance(names, Mapping):
        kind = type(names).__name__
        raise DtypeError("names", "a mapping id -> name", kind, "pass a dict")
    for i, name in names.items():
        check_count("names", i, BASE_ONLY)
        if not isinstance(name, str):
            raise DtypeError("names", "names that are str", repr(name), "name each adapter")
    return names


def _checked(names: Mapping[int, str] | None) -> Mapping[int, str]:
    """The mapping, if it gives every id a name of its own."""
    names = checked_names(names) or {}
    if len({BASE_NAME, *names.values()}) <= len(names):
        raise ValueRangeError(
            "names",
            f"a name of its own for every id, and {BASE_NAME} for none",
            some(names.values()),
            "give each adapter another name",
        )
    return names


def _peft(exam: Exam) -> None:
    adapter_names = exam.get("adapter_names")
    try:
        check_several("adapter_names", adapter_names, "a name for each sample")
    except DtypeError as error:
        exam.add("adapter_names", "shape", error.expected, error.received)
        return
    adapter_names = list(adapter_names)
    exam.has_rows("adapter_names", len(adapter_names))
    nameless = [not isinstance(name, str) for name in adapter_names]
    given, field = np.array(adapter_names, object), "adapter_names"
    expected = f"names, {BASE_NAME!r} for base only"
    exam.add_at(field, "base misplaced", expected, given, "sample", nameless)
    if exam.names is not None:
        known = {BASE_NAME, *exam.names.values()}
        lost = [isinstance(name, str) and name not in known for name in adapter_names]
        expected = "names of adapters; PEFT passes over others"
        exam.add_at(field, "no weights", expected, given, "sample", lost)
    if exam.segments is not None and not exam.found:
        named = exam.names or {}
        ids = row_ids(exam.segments).tolist()
        wanted = [BASE_NAME if i == BASE_ONLY else named.get(i, str(i)) for i in ids]
        exam.same_rows(field, given, np.array(wanted, object))


EXAMINERS = (Examiner(("adapter_names",), _peft, {}),)
