"""vLLM's two layouts against plain forms of its rules, and faults planted in them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgmv import errors, layouts
from tests.help.layout_faults import VLLM
from tests.help.layouts import (
    IDS,
    RIGHT,
    STACK,
    PlantedFault,
    Refusals,
    batches,
    check,
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
def test_vllm_v0_merges_neighbours_or_sorts(ids: list[int]) -> None:
    slots = of_slots(ids)
    rows = in_order(slots)
    for sort, values in ((False, slots), (True, [slots[row] for row in rows])):
        layout, plain = layouts.vllm_v0(ids, STACK, sort=sort), merged(values)
        equal(
            layout,
            b_seq_start_loc=[start for start, _, _ in plain],
            seq_len_tensor=[length for _, length, _ in plain],
            lora_indices_tensor=[value for _, _, value in plain],
            batches=len(plain),
            max_seq_length=max((length for _, length, _ in plain), default=0),
            token_nums=len(ids),
            no_lora=[value for _, _, value in plain] == [-1],
            rows=rows if sort else None,
        )
        assert set(dtypes(layout).values()) == {"int64"}
        assert layout.adapter_ids(STACK).tolist() == ids
        assert layout.adapter_ids().tolist() == slots


@batches
@given(ids_lists, st.integers(0, 3))
def test_vllm_v1_sorts_and_pads(ids: list[int], spare: int) -> None:
    slots, max_loras = of_slots(ids), STACK.slots + spare
    active = sorted(set(slots))
    counts = [slots.count(slot) for slot in active]
    no_lora = all(slot == -1 for slot in slots)
    if no_lora:
        active, counts = [], []
    starts = [sum(counts[:s]) for s in range(len(counts) + 1)]
    layout = layouts.vllm_v1(ids, max_loras, STACK)
    equal(
        layout,
        token_lora_mapping=slots,
        token_indices_sorted_by_lora_ids=in_order(slots),
        active_lora_ids=active + [-1] * (max_loras + 1 - len(active)),
        num_tokens_per_lora=counts + [0] * (max_loras + 1 - len(counts)),
        lora_token_start_loc=starts + [0] * (max_loras + 2 - len(starts)),
        no_lora_flag_cpu=[no_lora],
        num_active_loras_cpu=[len(active)],
    )
    assert {"int32", "bool"} == set(dtypes(layout).values())
    assert layout.adapter_ids(STACK).tolist() == ids


def test_vllm_v1s_own_example() -> None:
    """The base only, then slots 0, 1, 2, with 3, 10, 2 and 5 rows."""
    layout = layouts.vllm_v1([-1] * 3 + [0] * 10 + [1] * 2 + [2] * 5, max_loras=3)
    equal(
        layout,
        active_lora_ids=[-1, 0, 1, 2],
        num_tokens_per_lora=[3, 10, 2, 5],
        lora_token_start_loc=[0, 3, 13, 15, 20],
    )


def test_vllm_v1_of_base_only_rows_reads_no_row_field() -> None:
    layout = layouts.vllm_v1([-1, -1], max_loras=3)
    earlier = dataclasses.replace(
        layout,
        token_lora_mapping=np.array([2, 0], np.int32),
        token_indices_sorted_by_lora_ids=np.array([7, 7], np.int32),
    )
    assert earlier.adapter_ids().tolist() == [-1, -1]
    assert layouts.check(earlier, [-1, -1]) == []


def test_a_count_rounded_up_to_a_captured_one_is_right() -> None:
    metadata = {**RIGHT["vllm_v1"], "num_active_loras_cpu": [8]}
    assert check(metadata, IDS) == []


def test_metadata_of_torch_is_read_without_importing_it() -> None:
    torch = pytest.importorskip("torch")
    fields = {
        name: torch.tensor(value) if isinstance(value, list) else value
        for name, value in RIGHT["vllm_v1"].items()
    }
    assert check(fields, IDS) == []
    fields["lora_token_start_loc"][1] += 1
    assert {f.fault for f in check(fields, IDS)} == {"gap", "overlap"}  # before it, and after


REFUSALS: Refusals = {
    "V1 slots beyond max_loras": (
        lambda: layouts.vllm_v1([0, 3], max_loras=3),
        errors.ValueRangeError,
        ["adapter_ids: ", "slots 0..2", "[3]", "slots"],
    ),
    "V1 without slots": (
        lambda: layouts.vllm_v1([0], max_loras=0),
        errors.ValueRangeError,
        ["max_loras: ", "at least 1", "0"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_clear_message(name: str) -> None:
    refused(*REFUSALS[name])


@every_fault_of(VLLM)
def test_a_planted_fault_is_found_and_named(planted: PlantedFault) -> None:
    found_and_named(*planted)


@every_fault_of(VLLM)
def test_a_finding_says_what_was_expected_and_what_came(planted: PlantedFault) -> None:
    expected_and_got(*planted)
