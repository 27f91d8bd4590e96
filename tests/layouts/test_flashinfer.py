"""FlashInfer's layout against a plain form of its rule, and faults planted in it."""

from __future__ import annotations

import pytest
from hypothesis import given

from sgmv import errors, layouts
from tests.help.layout_faults import FLASHINFER
from tests.help.layouts import (
    STACK,
    PlantedFault,
    Refusals,
    batches,
    dtypes,
    equal,
    every_fault_of,
    expected_and_got,
    found_and_named,
    ids_lists,
    in_order,
    merged,
    of_slots,
    refused,
)


@batches
@given(ids_lists)
def test_flashinfer_leaves_base_only_rows_out(ids: list[int]) -> None:
    slots = of_slots(ids)
    rows = [row for row in in_order(slots) if slots[row] != -1]
    plain = merged([slots[row] for row in rows])
    layout = layouts.flashinfer(ids, STACK)
    equal(
        layout,
        batch_size=len(plain),
        seg_lens=[length for _, length, _ in plain],
        seg_indptr=[0, *(start + length for start, length, _ in plain)],
        weight_indices=[slot for _, _, slot in plain],
        rows=rows,
    )
    assert set(dtypes(layout).values()) == {"int64"}
    assert layout.adapter_ids(len(ids), STACK).tolist() == ids
    assert layout.adapter_ids(len(ids)).tolist() == slots


REFUSALS: Refusals = {
    "an id below -1": (
        lambda: layouts.flashinfer([0, -2]),
        errors.ValueRangeError,
        ["adapter_ids: ", "-1 for base only", "[-2]"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_clear_message(name: str) -> None:
    refused(*REFUSALS[name])


@every_fault_of(FLASHINFER)
def test_a_planted_fault_is_found_and_named(planted: PlantedFault) -> None:
    found_and_named(*planted)


@every_fault_of(FLASHINFER)
def test_a_finding_says_what_was_expected_and_what_came(planted: PlantedFault) -> None:
    expected_and_got(*planted)
