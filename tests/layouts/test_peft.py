"""PEFT's names of samples, and faults planted in them."""

from __future__ import annotations

import pytest
from hypothesis import given

from sgmv import errors, layouts
from tests.help.layout_faults import PEFT
from tests.help.layouts import (
    NAMES,
    PlantedFault,
    Refusals,
    batches,
    every_fault_of,
    expected_and_got,
    found_and_named,
    ids_lists,
    refused,
)


@batches
@given(ids_lists)
def test_peft_names_every_sample(ids: list[int]) -> None:
    named = tuple("__base__" if i == -1 else NAMES[i] for i in ids)
    layout = layouts.peft(ids, NAMES)
    assert layout.adapter_names == named
    assert layout.adapter_ids(NAMES).tolist() == ids
    assert layouts.peft(ids).adapter_ids().tolist() == ids


REFUSALS: Refusals = {
    "an id without a name": (
        lambda: layouts.peft([3, 6], NAMES),
        errors.UnknownAdapterError,
        ["names: ", "a name for every", "[6]", "mapping"],
    ),
    "a name of two ids": (
        lambda: layouts.peft([3], {3: "fr", 4: "fr"}),
        errors.ValueRangeError,
        ["names: ", "of its own", "[fr, fr]", "another name"],
    ),
    "the base model's name": (
        lambda: layouts.peft([3], {3: "__base__"}),
        errors.ValueRangeError,
        ["names: ", "__base__ for none", "[__base__]", "another name"],
    ),
    "a name without an id": (
        lambda: layouts.peft([3], {3: "fr"}).adapter_ids(),
        errors.UnknownAdapterError,
        ["names: ", "an id for every name", "[fr]", "mapping"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_clear_message(name: str) -> None:
    refused(*REFUSALS[name])


@every_fault_of(PEFT)
def test_a_planted_fault_is_found_and_named(planted: PlantedFault) -> None:
    found_and_named(*planted)


@every_fault_of(PEFT)
def test_a_finding_says_what_was_expected_and_what_came(planted: PlantedFault) -> None:
    expected_and_got(*planted)
