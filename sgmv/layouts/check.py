"""check: what is wrong with metadata that somebody's engine made, by field and place.

Each engine's room has the examiners of its layouts; this one has that of `Segments`. They look for
the faults that broke real systems.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from sgmv.errors import DtypeError, SgmvError, ShapeError, some
from sgmv.ids import BASE_ONLY, Integers
from sgmv.layouts.exam import Exam, Examiner
from sgmv.layouts.finding import Finding
from sgmv.layouts.flashinfer import EXAMINERS as FLASHINFER
from sgmv.layouts.llamacpp import EXAMINERS as LLAMACPP
from sgmv.layouts.lorax import EXAMINERS as LORAX
from sgmv.layouts.peft import EXAMINERS as PEFT
from sgmv.layouts.peft import checked_names
from sgmv.layouts.punica import EXAMINERS as PUNICA
from sgmv.layouts.rows import Batch, Slots, as_segments, mixture, row_ids, slot_table, spread
from sgmv.layouts.sglang import EXAMINERS as SGLANG
from sgmv.layouts.vllm import EXAMINERS as VLLM


def check(
    metadata: object,
    adapter_ids: Batch | None = None,
    *,
    n: int | None = None,
    slots: Slots = None,
    names: Mapping[int, str] | None = None,
    weights: npt.ArrayLike | None = None,
) -> list[Finding]:
    """What is wrong with an engine's metadata; nothing is if the list is empty.

    Semantics: every field is held against the engine's rules, the other fields, and what is
    known of the batch. If a change of one field alone would make all of it right, that field's
    finding is the first. No form raises: to have one, raise what is in the list.

    metadata     a layout of this package, Segments, the engine's own object (of numpy arrays or
                 torch's CPU tensors), or a mapping of raw fields by the engine's names
    adapter_ids  (n,) the ids of this batch, to find metadata of another one; (n, k) for llama.cpp
                 and LoRAX
    n            its rows, where the ids are not at hand. Of Punica and FlashInfer without `rows`:
                 the rows that the call gets
    slots        which ids have weights: an AdapterStack or a mapping id -> slot
    names        PEFT's: a mapping id -> name
    weights      (n, k) of adapter_ids, for llama.cpp and LoRAX; left out: 1

    Raises DtypeError for what has no field of any layout; ShapeError for several adapters per row,
    or weights, and another engine; as `segment` and `add_lora` do for adapter_ids and weights.
    Source: the faults are those of the engines' own issue trackers.

    >>> for finding in check({"s": [0, 3, 2, 5]}, n=8):
    ...     print(finding)
    s: unsorted: expected the next to start at 3 or later, got 2 (segment 1); sort the rows by \
slot, stably, before making the metadata
    s: end: expected the end at 8, the number of rows, got 5 (segment 2); end the last segment at \
the number of rows
    """
    batch = None if adapter_ids is None else mixture(adapter_ids, weights)
    exam = Exam(metadata, batch, n, slots, checked_names(names))
    for examiner in EXAMINERS:
        if all(exam.get(field) is not None for field in examiner.fields):
            if not examiner.mixtures and batch is not None:
                as_segments(batch[0], "adapter_ids")
            if weights is not None and (batch is None or not examiner.mixtures):
                expected = "adapter_ids beside them, and metadata of llama.cpp or LoRAX"
                raise ShapeError("weights", expected, "other metadata", "leave the weights out")
            examiner.examine(exam)
            return _culprit_first(exam, examiner)
    known = (examiner.fields[0] for examiner in EXAMINERS)
    raise DtypeError(
        "metadata",
        f"an object or a mapping with one of the fields {some(dict.fromkeys(known))}",
        type(metadata).__name__,
        "pass a layout of sgmv.layouts, or raw fields under the engine's names",
    )


def _segments(exam: Exam) -> None:
    seq_start = exam.array("seq_start", 0, int32=False)
    ids = exam.array("adapter_ids", BASE_ONLY, int32=False)
    rows = exam.array("rows", 0, int32=False)
    if not exam.has_length("adapter_ids", len(ids), len(seq_start) - 1):
        return
    exam.has_rows("rows", len(rows))
    exam.indptr("seq_start", seq_start)
    exam.each_once("rows", rows)
    exam.ascending("adapter_ids", ids, "unsorted", strictly=True)
    if exam.slots is not None:
        known = np.isin(ids, slot_table(exam.slots)[0]) | (ids == BASE_ONLY)
        exam.add_at("adapter_ids", "no weights", "ids that are loaded", ids, "segment", ~known)
    if exam.segments is not None and not exam.found:
        wanted = row_ids(exam.segments)
        exam.same_rows("adapter_ids", spread(ids, np.diff(seq_start), rows, len(rows)), wanted)


def _culprit_first(exam: Exam, examiner: Examiner) -> list[Finding]:
    """The findings; those of one field come first if its repair alone makes everything right.

    Where no field's repair does, or that of several, the order stays.
    """
    if not exam.found:
        return []
    culprits = []
    for field, (fault, derived) in examiner.repairs.items():
        if exam.get(field) is None:
            continue
        with suppress(ValueError, IndexError, SgmvError):
            value = derived(exam)
            again = exam.repaired(field, value)
            examiner.examine(again)
            if not again.found:
                culprits.append((field, fault, value))
    if len(culprits) != 1:
        return exam.found
    [(field, fault, value)] = culprits
    first = [finding for finding in exam.found if finding.field == field]
    rest = [finding for finding in exam.found if finding.field != field]
    if not first:
        exam.found = []
        right, got = np.atleast_1d(value), exam.ints(field)
        if len(right) != len(got):
            exam.add(field, fault, some(right.tolist()), some(got.tolist()))
        elif len(right) == 1:
            exam.add(field, fault, right[0], got[0])
        else:
            exam.add_at(field, fault, right, got, "at", right != got)
        first = exam.found
    return [*first, *rest]


def _of_batch(field: str) -> Callable[[Exam], Integers]:
    """The field of this batch's Segments."""

    def derived(exam: Exam) -> Integers:
        if exam.segments is None:
            raise ValueError("no adapter_ids were passed")
        return np.asarray(getattr(exam.segments, field))

    return derived


EXAMINERS = (
    Examiner(
        ("seq_start",),
        _segments,
        {field: ("stale", _of_batch(field)) for field in ("seq_start", "adapter_ids", "rows")},
    ),
    *PUNICA,
    *LLAMACPP,
    *LORAX,
    *VLLM,
    *SGLANG,  # before FlashInfer, which has one of its two fields
    *FLASHINFER,
    *PEFT,
)
