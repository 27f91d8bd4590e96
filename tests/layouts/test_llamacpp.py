"""llama.cpp's lists and batches against a plain form of its rule, and faults planted in them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sgmv
from sgmv import errors, layouts
from tests.help.layout_faults import LLAMACPP
from tests.help.layouts import (
    H_IN,
    H_OUT,
    RANKS,
    SLOT_OF,
    STACK,
    PlantedFault,
    Refusals,
    batches,
    every_fault_of,
    expected_and_got,
    found_and_named,
    refused,
)

pairs_lists = st.integers(1, 3).flatmap(
    lambda k: st.lists(
        st.lists(
            st.tuples(st.sampled_from([-1, *RANKS]), st.sampled_from([0.0, 1.0, 0.5, -0.25])),
            min_size=k,
            max_size=k,
        ),
        max_size=12,
    )
)


def parted(rows: list[list[tuple[int, float]]]) -> tuple[Any, Any]:
    """(n, k) ids and weights."""
    k = len(rows[0]) if rows else 1
    ids = np.array([[i for i, _ in row] for row in rows], np.int64).reshape(len(rows), k)
    weights = np.array([[w for _, w in row] for row in rows], np.float32).reshape(len(rows), k)
    return ids, weights


def scales_of(row: list[tuple[int, float]]) -> dict[int, float]:
    """What a row's adapters add up to, by slot."""
    sums: dict[int, float] = {}
    for i, weight in row:
        if i != -1:
            sums[SLOT_OF[i]] = sums.get(SLOT_OF[i], 0) + weight
    return {slot: scale for slot, scale in sums.items() if scale}


@batches
@given(pairs_lists)
def test_rows_of_equal_lists_are_a_batch(rows: list[list[tuple[int, float]]]) -> None:
    ids, weights = parted(rows)
    layout = layouts.llamacpp(ids, weights, STACK)
    asked = [scales_of(row) for row in rows]
    for lora, scales in zip(layout.lora, asked, strict=True):
        assert {one["id"]: one["scale"] for one in lora if one["scale"]} == scales
        assert lora, "an empty list has the server's own scales"
        assert [one["id"] for one in lora] == sorted(one["id"] for one in lora)
    plain: list[list[int]] = []
    for row, scales in enumerate(asked):
        same = next((batch for batch in plain if asked[batch[0]] == scales), None)
        plain.append([row]) if same is None else same.append(row)
    assert [batch.rows.tolist() for batch in layout.batches] == plain
    assert all(batch.lora == layout.lora[batch.rows[0]] for batch in layout.batches)
    assert layouts.check(layout, ids, slots=STACK, weights=weights) == []


@batches
@given(pairs_lists)
def test_the_way_back_is_the_same_mixture(rows: list[list[tuple[int, float]]]) -> None:
    ids, weights = parted(rows)
    layout = layouts.llamacpp(ids, weights, STACK)
    x = np.arange(len(rows) * H_IN, dtype="f").reshape(len(rows), H_IN) % 7
    whole = sgmv.AdapterStack.from_adapters(
        {i: (np.full((2, H_IN), i + 1, "f"), np.full((H_OUT, 2), i - 3, "f")) for i in RANKS}
    )
    y = np.zeros((len(rows), H_OUT), "f")
    expected = sgmv.add_lora(y.copy(), x, whole, ids, weights=weights)
    back = layout.adapter_ids(STACK)
    got = sgmv.add_lora(y.copy(), x, whole, back, weights=layout.weights())
    np.testing.assert_array_equal(got, expected)  # whole numbers, quarters of which are exact
    again = layouts.llamacpp(back, layout.weights(), STACK)
    assert (again.lora, str(again)) == (layout.lora, str(layout))


def test_a_request_takes_the_list_as_it_is() -> None:
    layout = layouts.llamacpp([[9, 3], [-1, -1]], [[0.5, 1], [1, 1]], STACK)
    assert json.dumps(layout.lora) == (
        '[[{"id": 0, "scale": 0.5}, {"id": 1, "scale": 1.0}], [{"id": 0, "scale": 0.0}]]'
    )


def test_each_mixture_is_a_decode() -> None:
    """As many batches as different lists, base only among them."""
    mixed = [[0, 9], [9, 0], [0, 3], [-1, -1], [0, -1]]
    assert len(layouts.llamacpp(mixed, slots=STACK).batches) == 4


def test_metadata_of_another_mixture_is_found() -> None:
    ids, weights = [[9, 3], [2, -1]], [[0.5, 0.5], [1, 0]]
    layout = layouts.llamacpp(ids, weights, STACK)
    for other in ([[0.5, 0.25], [1, 0]], [[0.5, 0.5], [2, 0]]):
        [finding] = layouts.check(layout, ids, slots=STACK, weights=other)
        assert (finding.field, finding.fault) == ("lora", "stale")
    [finding] = layouts.check(layout, [[9, 3], [9, 3]], slots=STACK, weights=[[0.5, 0.5]] * 2)
    assert (finding.what, finding.where) == ("expected 0: 0.5, 1: 0.5, got 5: 1", "row 1")


def test_the_last_of_an_id_counts_for_the_server() -> None:
    """Which is why the layout adds them up."""
    twice = {"lora": [[{"id": 0, "scale": 0.5}, {"id": 0, "scale": 0.5}]]}
    assert layouts.check(twice, [9], slots=STACK, weights=[0.5]) == []
    assert layouts.check(twice, [[9, 9]], slots=STACK, weights=[[0.5, 0.5]])
    assert layouts.llamacpp([[9, 9]], [[0.5, 0.5]], STACK).lora == (({"id": 0, "scale": 1.0},),)


REFUSALS: Refusals = {
    "an id without a place": (
        lambda: layouts.llamacpp([[3, 6]], slots=STACK),
        errors.UnknownAdapterError,
        ["adapter_ids: ", "have a slot", "[6]", "load"],
    ),
    "a sum that float32 does not hold": (
        lambda: layouts.llamacpp([[3, 3]], [[3e38, 3e38]]),
        errors.ValueRangeError,
        ["weights: ", "a sum", "slot 3", "once"],
    ),
    "fewer weights than ids": (
        lambda: layouts.llamacpp([[3, 3]], [[1]]),
        errors.ShapeError,
        ["weights: ", "(1, 2)", "(1, 1)"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_clear_message(name: str) -> None:
    refused(*REFUSALS[name])


@every_fault_of(LLAMACPP)
def test_a_planted_fault_is_found_and_named(planted: PlantedFault) -> None:
    found_and_named(*planted)


@every_fault_of(LLAMACPP)
def test_a_finding_says_what_was_expected_and_what_came(planted: PlantedFault) -> None:
    expected_and_got(*planted)
