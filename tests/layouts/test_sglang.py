"""SGLang's layout of each backend against plain forms of its rules, and faults planted in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgmv import errors, layouts
from tests.help.layout_faults import SGLANG
from tests.help.layouts import (
    RANKS,
    SCALINGS,
    SLOT_OF,
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


def chunks(slots: list[int], size: int) -> list[tuple[int, int]]:
    """(slot, rows) of each chunk, in csgmv's order."""
    found = []
    for _, length, slot in merged(sorted(slots)):
        while length > 0:
            found.append((slot, min(size, length)))
            length -= size
    return found


@batches
@given(ids_lists, st.sampled_from([1, 16, 32, 64, 128, 1000]))
def test_csgmv_cuts_sorted_rows_into_chunks(ids: list[int], most: int) -> None:
    holds_csgmv_to_its_rule(ids, most)


@pytest.mark.parametrize("n", [15, 16, 17, 32, 63, 64, 65, 128, 255, 256, 257])
def test_csgmv_at_the_edges_of_its_chunks(n: int) -> None:
    for most in (16, 32, 1000):
        holds_csgmv_to_its_rule([9] * n, most)


def holds_csgmv_to_its_rule(ids: list[int], most: int) -> None:
    base, n = STACK.slots, len(ids)
    slots = [base if slot == -1 else slot for slot in of_slots(ids)]
    size = 128 if n >= 256 else 32 if n >= 64 else 16
    size = max(16, min(size, most))
    plain = chunks(slots, size)
    layout = layouts.sglang(ids, STACK, max_lora_chunk_size=most)
    equal(
        layout,
        bs=n,
        num_segments=len(plain),
        seg_indptr=[sum(m for _, m in plain[:i]) for i in range(len(plain) + 1)],
        seg_lens=None,
        max_len=size,
        weight_indices=[slot for slot, _ in plain],
        permutation=in_order(slots),
    )
    assert layout.adapter_ids(STACK).tolist() == ids


def test_csgmv_by_default_never_has_more_than_16_rows() -> None:
    assert np.diff(layouts.sglang([9] * 300, STACK).seg_indptr).max() == 16


requests = st.lists(st.tuples(st.sampled_from([-1, *RANKS]), st.integers(1, 5)), max_size=12)


@batches
@given(requests)
def test_sglangs_segments_of_requests(given_requests: list[tuple[int, int]]) -> None:
    lengths = [m for _, m in given_requests]
    ids = [i for i, m in given_requests for _ in range(m)]
    base = STACK.slots
    slots = [base if i == -1 else SLOT_OF[i] for i, _ in given_requests]
    layout = layouts.sglang(ids, STACK, seq_lens=lengths, backend="triton")
    equal(
        layout,
        bs=len(lengths),
        num_segments=len(lengths),
        seg_indptr=[sum(lengths[:i]) for i in range(len(lengths) + 1)],
        seg_lens=lengths,
        max_len=max(lengths, default=0),
        weight_indices=slots,
        permutation=None,
    )
    assert layout.adapter_ids(STACK).tolist() == ids
    assert set(dtypes(layout).values()) == {"int32", "float32"}
    together = layouts.sglang(ids, STACK, seq_lens=lengths, backend="torch_native")
    plain = [(slots[at], sum(lengths[at : at + k])) for at, k, _ in merged(slots)]
    equal(
        together,
        bs=len(lengths),
        weight_indices=[slot for slot, _ in plain],
        seg_lens=[m for _, m in plain],
        max_len=max((m for _, m in plain), default=0),
    )
    assert together.adapter_ids(STACK).tolist() == ids


def test_sglangs_ranks_and_scalings_stand_by_slot() -> None:
    layout = layouts.sglang([9], STACK)
    for adapter_id, slot in SLOT_OF.items():
        assert layout.lora_ranks[slot] == RANKS[adapter_id]
        assert layout.scalings[slot] == np.float32(SCALINGS[adapter_id])
    assert (layout.lora_ranks[-1], layout.scalings[-1]) == (0, 0)


REFUSALS: Refusals = {
    "int32": (
        lambda: layouts.sglang([9], STACK, seq_lens=[2**31]),
        errors.ShapeError,
        ["adapter_ids: ", str(2**31), "1", "lengths"],
    ),
    "another backend": (
        lambda: layouts.sglang([9], STACK, backend="flashinfer"),
        errors.ValueRangeError,
        ["backend: ", "csgmv", "'flashinfer'", "choose"],
    ),
    "requests of several ids": (
        lambda: layouts.sglang([9, 3, 3], STACK, seq_lens=[2, 1]),
        errors.ValueRangeError,
        ["adapter_ids: ", "one id for all rows", "request 0", "lengths"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_clear_message(name: str) -> None:
    refused(*REFUSALS[name])


@every_fault_of(SGLANG)
def test_a_planted_fault_is_found_and_named(planted: PlantedFault) -> None:
    found_and_named(*planted)


@every_fault_of(SGLANG)
def test_a_finding_says_what_was_expected_and_what_came(planted: PlantedFault) -> None:
    expected_and_got(*planted)
