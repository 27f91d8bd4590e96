"""LoRAX's layout against a plain form of its rule, and faults planted in it."""

from __future__ import annotations

import pytest
from hypothesis import given

from sgmv import errors, layouts
from tests.help.layout_faults import LORAX
from tests.help.layouts import (
    RANKS,
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
    merged,
    refused,
)


@batches
@given(ids_lists)
def test_lorax_merges_neighbours_and_launches_each_rank(ids: list[int]) -> None:
    plain = merged(ids)
    layout = layouts.lorax(ids, STACK)
    equal(
        layout,
        adapter_indices=[i + 1 for i in ids],
        adapter_segments=[*(start for start, _, _ in plain), len(ids)],
        segment_indices=tuple(value + 1 for _, _, value in plain),
    )
    launches: dict[int, list[tuple[int, int]]] = {}
    for start, length, value in plain:
        if value != -1:
            padded = max(16, (RANKS[value] + 15) // 16 * 16)
            launches.setdefault(padded, []).append((start, start + length))
    got = {
        rank: list(zip(launch.s_start.tolist(), launch.s_end.tolist(), strict=True))
        for rank, launch in layout.rank_data.items()
    }
    assert got == launches
    assert all(dtypes(launch)["s_end"] == "int32" for launch in layout.rank_data.values())
    assert layout.adapter_ids().tolist() == ids
    by_mapping = layouts.lorax(ids, RANKS)
    assert str(by_mapping) == str(layout)


def test_lorax_launches_nothing_for_an_id_without_weights() -> None:
    assert list(layouts.lorax([5, 3], {3: 40}).rank_data[48].s_start) == [1]
    assert layouts.lorax([-1], 8).rank_data == {}


REFUSALS: Refusals = {
    "LoRAX of an unknown id": (
        lambda: layouts.lorax([6], STACK),
        errors.UnknownAdapterError,
        ["adapter_ids: ", "loaded adapters", "[6]"],
    ),
    "a rank below 0": (
        lambda: layouts.lorax([3], {3: -8}),
        errors.ValueRangeError,
        ["ranks: ", "at least 0", "-8"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_clear_message(name: str) -> None:
    refused(*REFUSALS[name])


@every_fault_of(LORAX)
def test_a_planted_fault_is_found_and_named(planted: PlantedFault) -> None:
    found_and_named(*planted)


@every_fault_of(LORAX)
def test_a_finding_says_what_was_expected_and_what_came(planted: PlantedFault) -> None:
    expected_and_got(*planted)
