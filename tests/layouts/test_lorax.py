"""LoRAX's layout against a plain form of its rule, and faults planted in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

import sgmv
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


def test_each_list_of_ids_and_weights_is_merged_once() -> None:
    """As the router numbers them: another order, or other weights, is another adapter."""
    ids = [[9, 3], [3, -1], [9, 3], [3, 9], [9, 3], [-1, -1]]
    weights = [[0.5, 1], [1, 0], [0.5, 1], [0.5, 1], [1, 1], [1, 1]]
    layout = layouts.lorax(ids, STACK, weights)
    first, alone, again, turned, heavier, none = layout.adapter_indices.tolist()
    assert (first, alone, none) == (again, 3 + 1, 0)
    assert len({first, turned, heavier, alone, none}) == 5
    told = {number: (one.ids, one.weights) for number, one in layout.merged.items()}
    assert told == {
        first: ((9, 3), (0.5, 1)),
        turned: ((3, 9), (0.5, 1)),
        heavier: ((9, 3), (1, 1)),
    }
    assert layout.adapter_ids().tolist() == ids
    assert layout.weights().tolist() == [[0.5, 1], [1, 0], [0.5, 1], [0.5, 1], [1, 1], [0, 0]]
    assert layouts.check(layout, ids, slots=STACK, weights=weights) == []
    assert list(layout.rank_data) == [16]
    assert layout.rank_data[16].s_end.tolist() == [1, 2, 3, 4, 5]


def test_metadata_of_another_mixture_is_found() -> None:
    layout = layouts.lorax([[9, 3], [3, -1]], STACK, [[0.5, 1], [1, 0]])
    [finding] = layouts.check(layout, [[9, 3], [3, -1]], slots=STACK)
    assert (finding.field, finding.fault) == ("adapter_indices", "stale")
    assert finding.what == "expected 9: 1, 3: 1, got 9: 0.5, 3: 1"


def test_numbers_of_merged_adapters_are_no_ids() -> None:
    layout = layouts.lorax([[0, 1], [0, -1], [1, -1]], 8)
    assert layout.adapter_indices.tolist() == [3, 1, 2]


def test_merging_the_factors_is_not_a_mixture() -> None:
    """B A of the sums has the square of each weight, and products of one's B with the other's A."""
    rng = np.random.default_rng(0)
    A, B = rng.integers(-3, 4, (2, 8, 24)).astype("f"), rng.integers(-3, 4, (2, 70, 8)).astype("f")
    x, w = rng.integers(-3, 4, (1, 24)).astype("f"), np.array([[0.5, 2.0]], "f")
    [merged] = layouts.lorax([[0, 1]], 8, w).merged.values()
    one = sum(weight * A[i] for i, weight in zip(merged.ids, merged.weights, strict=True))
    other = sum(weight * B[i] for i, weight in zip(merged.ids, merged.weights, strict=True))
    pairs = [(i, j, float(w[0, i] * w[0, j])) for i in (0, 1) for j in (0, 1)]
    np.testing.assert_array_equal(
        x @ one.T @ other.T, sum(weight * (x @ A[i].T @ B[j].T) for i, j, weight in pairs)
    )
    stack = sgmv.AdapterStack.from_adapters({i: (A[i], B[i]) for i in (0, 1)})
    mixture = sgmv.add_lora(np.zeros((1, 70), "f"), x, stack, [[0, 1]], weights=w)
    assert not np.array_equal(mixture, x @ one.T @ other.T)


REFUSALS: Refusals = {
    "adapters of two ranks in a row": (
        lambda: layouts.lorax([[3, 5]], STACK),
        errors.ValueRangeError,
        ["ranks: ", "one rank", "[8, 17] in row 0", "one rank"],
    ),
    "a weight of one adapter": (
        lambda: layouts.lorax([[3, 9], [3, -1]], STACK, [[1, 1], [0.5, 0]]),
        errors.ValueRangeError,
        ["weights: ", "1 for a row of one adapter", "0.5 in row 1", "scale"],
    ),
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
