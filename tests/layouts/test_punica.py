"""Punica's pointers and lengths against plain forms of its rules, and faults planted in them."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
import sgmv
from sgmv import errors, layouts
from tests.help.layout_faults import PUNICA
from tests.help.layouts import (
    H_IN,
    H_OUT,
    IDS,
    RANKS,
    RIGHT,
    SCALINGS,
    STACK,
    PlantedFault,
    Refusals,
    adapter,
    altered,
    batches,
    check,
    dtypes,
    equal,
    every_fault_of,
    expected_and_got,
    found_and_named,
    ids_lists,
    put,
    refused,
    to,
)


def weights_at(address: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.array((ctypes.c_float * count).from_address(int(address)), np.float32).reshape(shape)


@batches
@given(ids_lists, st.sampled_from([8, 17, 0]))
def test_punica_points_to_live_weights_of_one_rank(ids: list[int], rank: int) -> None:
    layout = layouts.punica(ids, STACK, rank)
    taken = [i for i in sorted(set(ids)) if i != -1 and RANKS[i] == rank]
    lengths = [ids.count(i) for i in taken]
    equal(
        layout,
        s=[sum(lengths[:i]) for i in range(len(lengths) + 1)],
        lora_rank=rank,
        rows=[row for i in taken for row, named in enumerate(ids) if named == i],
    )
    assert dtypes(layout) == {"s": "int32", "wa_ptr": "int64", "wb_ptr": "int64", "rows": "int64"}
    for s, i in enumerate(taken):
        A, B = adapter(i, rank).A, adapter(i, rank).B
        np.testing.assert_array_equal(weights_at(layout.wa_ptr[s], (rank, H_IN)), A)
        scaled = (np.float64(SCALINGS[i]) * B.T).astype(np.float32)
        np.testing.assert_array_equal(weights_at(layout.wb_ptr[s], (rank, H_OUT)), scaled)
    assert [array.ctypes.data for array in layout.wa] == layout.wa_ptr.tolist()
    assert [array.ctypes.data for array in layout.wb] == layout.wb_ptr.tolist()
    kept = [i if i in taken else -1 for i in ids]
    assert layout.adapter_ids(len(ids), STACK).tolist() == kept


def test_punicas_sums_by_these_pointers_are_the_references() -> None:
    """Integer-valued, so to the bit; the rows that are left out keep theirs."""
    rng = np.random.default_rng(0)

    def integers(*shape: int) -> np.ndarray:
        return rng.integers(-3, 4, shape).astype("f")

    pairs = {i: (integers(8, H_IN), integers(H_OUT, 8)) for i in (2, 7)}
    ids, scalings = [7, -1, 2, 7, -1], {2: 1.0, 7: 3.5}
    stack = sgmv.AdapterStack.from_adapters(
        {i: sgmv.Adapter(A, B, scalings[i]) for i, (A, B) in pairs.items()}
    )
    x, y, W = integers(5, H_IN), integers(5, H_OUT), np.zeros((H_OUT, H_IN), "f")
    expected = y + reference.apply_batched(x, W, pairs, ids, scalings)
    layout = layouts.punica(ids, stack)
    moved = y[layout.rows]
    for i in range(len(layout.wa_ptr)):
        part = slice(layout.s[i], layout.s[i + 1])
        v = x[layout.rows][part] @ weights_at(layout.wa_ptr[i], (8, H_IN)).T
        moved[part] += v @ weights_at(layout.wb_ptr[i], (8, H_OUT))
    y[layout.rows] = moved
    np.testing.assert_array_equal(y, expected)


def test_punicas_weights_outlive_the_stack() -> None:
    stack = sgmv.AdapterStack.from_adapters({3: adapter(3, 8)})
    layout = layouts.punica([3], stack)
    stack.load(3, adapter(9, 8))
    np.testing.assert_array_equal(weights_at(layout.wa_ptr[0], (8, H_IN)), adapter(3, 8).A)
    with pytest.raises(errors.UnknownAdapterError, match="make the pointers anew"):
        layout.adapter_ids(1, stack)
    [finding] = layouts.check(layout, [3], slots=stack)
    assert (finding.field, finding.fault) == ("wa_ptr", "no weights")


@batches
@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 5))
def test_batch_len_info(prefills: list[int], decode: int) -> None:
    lens = layouts.BatchLenInfo(prefills, decode)
    n = sum(prefills) + decode
    assert (lens.doff, lens.n) == (sum(prefills), n)
    if prefills:
        sums = [sum(prefills[:i]) for i in range(len(prefills) + 1)]
        assert lens.indptr is not None
        assert (lens.indptr.dtype, lens.indptr.tolist()) == (np.int32, sums)
    else:
        assert lens.indptr is None
    named = [*range(len(prefills)), *range(100, 100 + decode)]
    rows = lens.adapter_ids(named)
    lengths = [*prefills, *[1] * decode]
    assert rows.tolist() == [i for i, m in zip(named, lengths, strict=True) for _ in range(m)]
    back = [i if m else -1 for i, m in zip(named, lengths, strict=True)]
    assert lens.request_ids(rows).tolist() == back
    assert layouts.check(lens, n=n) == []


def test_a_bad_wb_ptr_is_found_beside_a_bad_wa_ptr() -> None:
    odd = RIGHT["punica"]["wb_ptr"][2] + 1
    metadata = altered(RIGHT["punica"], {"wa_ptr": put(0, 64), "wb_ptr": to([0, 4096, odd])})
    found = {(f.field, f.where): f.what for f in check(metadata, IDS)}
    assert found["wa_ptr", "segment 0"] == "expected an address of weights, got 64"
    assert found["wb_ptr", "segment [0, 1]"] == "expected an address of weights, got [0, 4096]"
    assert "addresses that 4 divides" in found["wb_ptr", "segment 2"]


@pytest.mark.parametrize("field", ["wa_ptr", "wb_ptr"])
def test_pointers_are_those_of_the_weights_that_the_metadata_holds(field: str) -> None:
    layout = layouts.punica(IDS, STACK, 8)
    swapped = getattr(layout, field)[[1, 0, 2]]
    found = layouts.check(dataclasses.replace(layout, **{field: swapped}))
    assert [(f.field, f.fault, f.where) for f in found] == [(field, "no weights", "segment [0, 1]")]


REFUSALS: Refusals = {
    "requests by the row": (
        lambda: layouts.BatchLenInfo([3], 1).adapter_ids([7, 7, 7, 4]),
        errors.ShapeError,
        ["request_ids: ", "2 ids", "4", "prefills first"],
    ),
    "a prefill of less than no rows": (
        lambda: layouts.BatchLenInfo([-1], 1),
        errors.ValueRangeError,
        ["prefills: ", "at least 0", "-1"],
    ),
    "Punica of two ranks": (
        lambda: layouts.punica([3, 5], STACK),
        errors.StackError,
        ["stack: ", "one rank", "[8, 17]", "each lora_rank"],
    ),
    "Punica of an unknown id": (
        lambda: layouts.punica([6], STACK),
        errors.UnknownAdapterError,
        ["adapter_ids: ", "loaded adapters", "[6]", "load"],
    ),
    "a scaling too large for float16": (
        lambda: layouts.punica(
            [1],
            sgmv.AdapterStack.from_adapters(
                {1: sgmv.Adapter(np.ones((1, 4), "e"), np.ones((4, 1), "e"), scaling=1e6)}
            ),
        ),
        errors.ValueRangeError,
        ["stack: ", "float16", "1000000", "wider"],
    ),
    "another stack's pointers": (
        lambda: layouts.punica([3], STACK).adapter_ids(
            1, sgmv.AdapterStack.from_adapters({3: adapter(3, 8)})
        ),
        errors.UnknownAdapterError,
        ["stack: ", "pointers were made for", "[0]", "anew"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_clear_message(name: str) -> None:
    refused(*REFUSALS[name])


@every_fault_of(PUNICA)
def test_a_planted_fault_is_found_and_named(planted: PlantedFault) -> None:
    found_and_named(*planted)


@every_fault_of(PUNICA)
def test_a_finding_says_what_was_expected_and_what_came(planted: PlantedFault) -> None:
    expected_and_got(*planted)
