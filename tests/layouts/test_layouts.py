"""Layouts against plain forms of each engine's rule; the ways back; check, and what it must find.

The plain forms are loops over Python lists, written from the engines' rules and not from the code.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import reference
import sgmv
from sgmv import errors, layouts
from sgmv.layouts.check import EXAMINERS
from sgmv.layouts.finding import REMEDY, Fault
from sgmv.layouts.rows import Layout
from tests.help.engines_page import PAGE, blocks, rendered

H_IN, H_OUT = 24, 70  # 70 columns: a panel and a narrower one
RANKS = {0: 8, 2: 8, 3: 8, 4: 0, 5: 17, 9: 8}
SCALINGS = {0: 1.0, 2: 0.5, 3: 2.0, 4: 1.0, 5: 1.0, 9: 0.1}


def adapter(adapter_id: int, r: int) -> sgmv.Adapter:
    rng = np.random.default_rng(adapter_id)
    A, B = rng.standard_normal((r, H_IN), "f"), rng.standard_normal((H_OUT, r), "f")
    return sgmv.Adapter(A, B, SCALINGS[adapter_id])


# Slots are not in the order of the ids.
STACK = sgmv.AdapterStack(H_IN, H_OUT, slots=6, max_rank=17)
for _id in (9, 3, 5, 0, 4, 2):
    STACK.load(_id, adapter(_id, RANKS[_id]))
SLOT_OF = dict(STACK.table.slot_of)
NAMES = {adapter_id: f"tenant-{adapter_id}" for adapter_id in RANKS}

ids_lists = st.one_of(
    st.lists(st.sampled_from([-1, *RANKS]), max_size=30),
    st.integers(60, 300).map(lambda n: [-1, 9, 9, 3][: n % 5] * (n // 4)),  # csgmv's longer chunks
    st.integers(0, 9).map(lambda n: [-1] * n),
)
batches = settings(max_examples=50)


def of_slots(ids: list[int]) -> list[int]:
    return [-1 if i == -1 else SLOT_OF[i] for i in ids]


def merged(values: list[int]) -> list[tuple[int, int, int]]:
    """(start, length, value) of each run of equal neighbours."""
    found: list[tuple[int, int, int]] = []
    for i, value in enumerate(values):
        if found and found[-1][2] == value:
            start, length, _ = found.pop()
            found.append((start, length + 1, value))
        else:
            found.append((i, 1, value))
    return found


def in_order(values: list[int]) -> list[int]:
    """Rows in a stable order of their values."""
    return [row for value in sorted(set(values)) for row, v in enumerate(values) if v == value]


def equal(layout: object, **expected: Any) -> None:
    for name, value in expected.items():
        got = getattr(layout, name)
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == value, name


def dtypes(layout: object) -> dict[str, str]:
    arrays = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
    return {n: a.dtype.name for n, a in arrays.items() if isinstance(a, np.ndarray)}


# The plain forms


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


@batches
@given(ids_lists)
def test_peft_names_every_sample(ids: list[int]) -> None:
    named = tuple("__base__" if i == -1 else NAMES[i] for i in ids)
    layout = layouts.peft(ids, NAMES)
    assert layout.adapter_names == named
    assert layout.adapter_ids(NAMES).tolist() == ids
    assert layouts.peft(ids).adapter_ids().tolist() == ids


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


# What all of them share

MAKERS: dict[str, Callable[[list[int]], Layout]] = {
    "punica": lambda ids: layouts.punica(ids, STACK, 8),
    "lorax": lambda ids: layouts.lorax(ids, STACK),
    "vllm_v0": lambda ids: layouts.vllm_v0(ids, STACK),
    "vllm_v0 sorted": lambda ids: layouts.vllm_v0(ids, STACK, sort=True),
    "vllm_v1": lambda ids: layouts.vllm_v1(ids, 7, STACK),
    "csgmv": lambda ids: layouts.sglang(ids, STACK),
    "triton": lambda ids: layouts.sglang(ids, STACK, backend="triton"),
    "torch_native": lambda ids: layouts.sglang(ids, STACK, backend="torch_native"),
    "flashinfer": lambda ids: layouts.flashinfer(ids, STACK),
    "peft": lambda ids: layouts.peft(ids, NAMES),
}
every_layout = pytest.mark.parametrize("maker", MAKERS)


def test_ids_that_a_stack_holds_as_base_only_come_back_as_minus_one() -> None:
    """Every layout that names slots or addresses has only one kind of base-only row."""
    stack = sgmv.AdapterStack.from_adapters({3: adapter(3, 8), 4: None, 6: None})
    ids, back = [3, 4, 6, -1, 3], [3, -1, -1, -1, 3]
    for layout in (
        layouts.vllm_v0(ids, stack),
        layouts.vllm_v1(ids, 1, stack),
        layouts.sglang(ids, stack),
    ):
        assert layout.adapter_ids(stack).tolist() == back
        assert layouts.check(layout, ids, slots=stack) == []
    for layout in (layouts.flashinfer(ids, stack), layouts.punica(ids, stack)):
        assert layout.rows.tolist() == [0, 4]
        assert layout.adapter_ids(5, stack).tolist() == back
        assert layouts.check(layout, ids, slots=stack) == []
    assert layouts.lorax(ids, stack).rank_data[16].s_end.tolist() == [1, 5]


@every_layout
def test_segments_give_what_ids_give_and_nothing_changes_it(maker: str) -> None:
    ids = [3, 9, -1, 3]
    layout = MAKERS[maker](ids)
    assert str(MAKERS[maker](sgmv.segment(ids))) == str(layout)
    for field in dataclasses.fields(layout):
        value = getattr(layout, field.name)
        if isinstance(value, np.ndarray):
            assert not value.flags.writeable, field.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(layout, field.name, value)


@every_layout
def test_str_lists_the_fields_by_the_engines_names(maker: str) -> None:
    layout = MAKERS[maker]([3] * 100 + [-1])
    lines = str(layout).splitlines()
    names = [f.name for f in dataclasses.fields(layout) if f.repr]
    assert [line.split()[0] for line in lines] == names
    assert max(map(len, lines)) < 400


@pytest.mark.parametrize("large", [2**31, 2**62])
def test_ids_that_int32_does_not_hold(large: int) -> None:
    """Fine wherever the engine names slots or keeps int64; refused where they would wrap."""
    ids = [large, -1, large]
    for_slots = {large: 1}
    assert layouts.vllm_v0(ids).lora_indices_tensor.tolist() == ids
    assert layouts.flashinfer(ids).weight_indices.tolist() == [large]
    assert layouts.lorax(ids, 16).adapter_ids().tolist() == ids
    assert layouts.peft(ids).adapter_ids().tolist() == ids
    layout = layouts.vllm_v1(ids, 2, for_slots)
    assert layout.token_lora_mapping.tolist() == [1, -1, 1]
    assert layout.adapter_ids(for_slots).tolist() == ids
    with pytest.raises(errors.ValueRangeError, match="below 2\\*\\*31"):
        layouts.vllm_v1(ids, large + 1)


REFUSALS: dict[str, tuple[Callable[[], Any], type[errors.SgmvError], list[str]]] = {
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
    "an id without a slot": (
        lambda: layouts.vllm_v0([3, 6], STACK),
        errors.UnknownAdapterError,
        ["adapter_ids: ", "have a slot", "[6]", "load"],
    ),
    "a slot of two ids": (
        lambda: layouts.vllm_v0([3], {3: 0, 4: 0}),
        errors.ValueRangeError,
        ["slots: ", "of its own", "[0]", "another slot"],
    ),
    "a slot without an id": (
        lambda: layouts.vllm_v0([5]).adapter_ids({3: 0}),
        errors.UnknownAdapterError,
        ["slots: ", "every slot", "[5]", "made with"],
    ),
    "no slot number": (
        lambda: layouts.vllm_v0([3], {3: 0.5}),
        errors.DtypeError,
        ["slots: ", "integer", "float", "whole number"],
    ),
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
    "an id below -1": (
        lambda: layouts.flashinfer([0, -2]),
        errors.ValueRangeError,
        ["adapter_ids: ", "-1 for base only", "[-2]"],
    ),
    "metadata of no engine": (
        lambda: layouts.check({"segments": [0, 3]}),
        errors.DtypeError,
        ["metadata: ", "one of the fields", "dict", "engine's names"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_clear_message(name: str) -> None:
    call, kind, parts = REFUSALS[name]
    with pytest.raises(kind) as refusal:
        call()
    message = str(refusal.value)
    assert re.fullmatch(r".+: expected .+, got .+; .+", message), message
    at = 0
    for part in parts:
        assert part in message[at:], f"{part!r} is not in {message[at:]!r}"
        at = message.index(part, at)


# check


def check(layout: Any, ids: list[int]) -> list[layouts.Finding]:
    return layouts.check(layout, ids, slots=STACK, names=NAMES)


def raw(layout: Layout) -> dict[str, Any]:
    """The layout's fields by name, as somebody else's metadata: lists, and launches likewise."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(layout):
        value = getattr(layout, field.name)
        if field.name == "rank_data":
            value = {rank: raw(launch) for rank, launch in value.items()}
        if field.repr:
            found[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
    return found


@every_layout
@batches
@given(ids_lists)
def test_right_metadata_gives_no_findings(maker: str, ids: list[int]) -> None:
    layout = MAKERS[maker](ids)
    for metadata in (layout, raw(layout)):
        assert check(metadata, ids) == []
        assert layouts.check(metadata) == []
        assert layouts.check(metadata, n=len(ids)) == []


@every_layout
@batches
@given(ids_lists, ids_lists)
def test_metadata_of_another_batch_is_found(maker: str, ids: list[int], earlier: list[int]) -> None:
    if maker == "punica":  # which holds the rows of one rank alone
        assume([i for i in ids if RANKS.get(i) == 8] or [i for i in earlier if RANKS.get(i) == 8])
        ids, earlier = ([i if RANKS.get(i) == 8 else -1 for i in b] for b in (ids, earlier))
    assume(ids != earlier)
    if maker in ("punica", "flashinfer", "vllm_v1"):  # trailing base-only rows are in no field
        assume(any(a != b for a, b in zip(padded(ids), padded(earlier), strict=True)))
    assert check(MAKERS[maker](earlier), ids)


def padded(ids: list[int]) -> list[int]:
    return ids + [-1] * (300 - len(ids))


# Fields in which a change can be right: the flag's case reads no row field, counts may be rounded
# up, bs is told nowhere else; ranks, scalings and wb are the stack's business, not the batch's.
FREE = {"bs", "lora_ranks", "scalings", "wb_ptr", "lora_rank", "num_active_loras_cpu", "max_len"}


@every_layout
@batches
@given(st.lists(st.sampled_from([-1, *RANKS]), min_size=1, max_size=12), st.data())
def test_any_single_number_that_is_changed_is_found(
    maker: str, ids: list[int], data: st.DataObject
) -> None:
    assume(any(RANKS.get(i) == 8 for i in ids))
    fields = raw(MAKERS[maker](ids))
    launches = fields.get("rank_data", {})
    if launches and data.draw(st.booleans()):
        fields["rank_data"] = dict(launches)
        rank = data.draw(st.sampled_from(sorted(launches)))
        fields["rank_data"][rank] = changed(launches[rank], {"rank"}, data)
    else:
        fields = changed(fields, {*FREE, "rank_data"}, data)
    assert check(fields, ids)


def changed(fields: Mapping[str, Any], free: set[str], data: st.DataObject) -> dict[str, Any]:
    """The fields with one number, or name, replaced by another."""
    names = [n for n, v in fields.items() if n not in free and v is not None and np.size(v)]
    name = data.draw(st.sampled_from(names))
    value = fields[name]
    if not isinstance(value, list | tuple):
        return {**fields, name: data.draw(st.integers(-2, 50).filter(lambda new: new != value))}
    at = data.draw(st.integers(0, len(value) - 1))
    others = st.integers(-2, 50) if not isinstance(value[at], str) else st.just("no-such-tenant")
    others = st.one_of(others, st.just(2**31)) if not isinstance(value[at], str) else others
    new = data.draw(others.filter(lambda new: new != value[at]))
    return {**fields, name: [*value[:at], new, *value[at + 1 :]]}


IDS = [9, 9, -1, 3, 9, 2, 2, -1]  # slots 0 0 -1 1 0 5 5 -1


def put(at: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [*values[:at], value, *values[at:][1:]]


def swap(i: int, j: int) -> Callable[[list[Any]], list[Any]]:
    return lambda v: [v[j] if k == i else v[i] if k == j else x for k, x in enumerate(v)]


def to(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def launch(**changes: Callable[[list[Any]], Any]) -> dict[str, Callable[[Any], Any]]:
    return {"rank_data": lambda data: {16: altered(data[16], changes)}}


def altered(fields: Mapping[str, Any], changes: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    return {**fields, **{name: change(fields[name]) for name, change in changes.items()}}


# Right metadata of IDS: every layout's, and what people have without an object around it.
RIGHT: dict[str, dict[str, Any]] = {
    **{maker: raw(make(IDS)) for maker, make in MAKERS.items()},
    "punica raw": {"s": [0, 2, 3, 6]},
    "lorax raw": {"s_start": [0, 3], "s_end": [2, 7]},
    "flashinfer raw": {"seg_lens": [3, 1, 2], "weight_indices": [0, 1, 5]},
    "lens": {"prefills": [3, 2], "decode": 3, "indptr": [0, 3, 5], "doff": 5},
    "segments": {
        "rows": [2, 7, 5, 6, 3, 0, 1, 4],
        "seq_start": [0, 2, 4, 5, 8],
        "adapter_ids": [-1, 2, 3, 9],
    },
}

# By layout: the field that must be named, the fault, and the change of that field (or of others).
PLANTED: dict[str, list[tuple[str, Fault, Any]]] = {
    "punica": [
        ("s", "unsorted", swap(1, 2)),
        ("s", "gap", put(0, 1)),
        ("s", "end", put(3, 5)),
        ("s", "int32 wrap", put(3, 2**31 + 6)),
        ("s", "int32 wrap", put(3, 6 - 2**32)),
        ("s", "shape", lambda s: []),
        ("wa_ptr", "shape", lambda p: p[:-1]),
        ("wa_ptr", "no weights", put(1, 0)),
        ("wb_ptr", "no weights", put(1, 0)),
        ("wb_ptr", "no weights", put(1, 64)),
        ("wa_ptr", "no weights", put(1, 64)),
        ("wa_ptr", "stale", swap(0, 1)),
        ("rows", "stale", put(0, 8)),
        ("rows", "overlap", put(0, 6)),
        ("rows", "stale", lambda r: r[:-1]),
    ],
    "punica raw": [
        ("s", "end", put(3, 5)),
        ("s", "gap", to([2])),
    ],
    "lens": [
        ("indptr", "unsorted", to([0, 6, 5])),
        ("indptr", "gap", to([1, 3, 5])),
        ("indptr", "end", to([0, 3, 4])),
        ("indptr", "int32 wrap", to([0, 3, 5 - 2**32])),
        ("indptr", "counts", to([0, 2, 5])),
        ("indptr", "shape", {"prefills": to([5])}),
        ("decode", "stale", to(4)),
        ("doff", "counts", {"indptr": to(None)}),
    ],
    "lorax": [
        ("adapter_segments", "unsorted", swap(2, 3)),
        ("adapter_segments", "gap", put(0, 1)),
        ("adapter_segments", "end", put(6, 7)),
        ("adapter_segments", "int32 wrap", put(6, 8 - 2**32)),
        ("segment_indices", "shape", lambda s: s[1:]),
        ("segment_indices", "base misplaced", put(1, -1)),
        ("adapter_indices", "base misplaced", put(2, -1)),
        ("segment_indices", "no weights", put(0, 77)),
        ("segment_indices", "counts", put(0, 4)),
        ("adapter_indices", "stale", lambda a: a[:-1]),
        ("rank_data[16].s_start", "unsorted", launch(s_start=swap(0, 1), s_end=swap(0, 1))),
        ("rank_data[16].s_start", "overlap", launch(s_end=put(0, 4))),
        ("rank_data[16].s_start", "gap", launch(s_end=put(0, 1))),
        ("rank_data[16].s_start", "end", launch(s_end=put(3, 9))),
        ("rank_data[16].s_start", "base misplaced", launch(s_start=put(0, 2), s_end=put(0, 3))),
        ("rank_data[16].s_end", "shape", launch(s_end=lambda s: s[1:])),
        ("rank_data[16].s_start", "int32 wrap", launch(s_start=put(0, -(2**31)))),
    ],
    "lorax raw": [
        ("s_start", "overlap", {"s_end": put(0, 4)}),
        ("s_start", "unsorted", {"s_start": swap(0, 1), "s_end": swap(0, 1)}),
        ("s_start", "end", {"s_end": put(1, 9)}),
        ("s_end", "int32 wrap", put(1, 7 - 2**32)),
    ],
    "vllm_v0": [
        ("b_seq_start_loc", "unsorted", swap(1, 2)),
        ("b_seq_start_loc", "overlap", {"seq_len_tensor": put(0, 3)}),
        ("b_seq_start_loc", "gap", {"seq_len_tensor": put(0, 1)}),
        ("b_seq_start_loc", "gap", put(0, 1)),
        ("b_seq_start_loc", "end", {"seq_len_tensor": put(5, 2)}),
        ("seq_len_tensor", "int32 wrap", put(5, -1)),
        ("lora_indices_tensor", "no weights", put(0, 6)),
        ("lora_indices_tensor", "int32 wrap", put(0, -(2**31))),
        ("lora_indices_tensor", "stale", swap(0, 2)),
        ("token_nums", "stale", to(7)),
        ("max_seq_length", "counts", to(3)),
        ("no_lora", "counts", to(True)),
        ("seq_len_tensor", "shape", lambda s: s[1:]),
    ],
    "vllm_v0 sorted": [
        ("lora_indices_tensor", "base misplaced", swap(0, 1)),
        ("lora_indices_tensor", "unsorted", swap(2, 3)),
        ("rows", "overlap", put(0, 7)),
        ("rows", "gap", put(0, 7)),
        ("rows", "stale", put(0, 8)),
    ],
    "vllm_v1": [
        ("token_indices_sorted_by_lora_ids", "unsorted", swap(1, 2)),
        ("token_indices_sorted_by_lora_ids", "unsorted", swap(0, 1)),
        ("token_indices_sorted_by_lora_ids", "overlap", put(0, 7)),
        ("token_indices_sorted_by_lora_ids", "gap", put(0, 7)),
        ("token_indices_sorted_by_lora_ids", "stale", put(7, 11)),
        ("token_indices_sorted_by_lora_ids", "shape", lambda r: r[1:]),
        ("token_lora_mapping", "stale", lambda m: m[1:]),
        ("token_lora_mapping", "int32 wrap", put(0, -(2**31))),
        ("token_lora_mapping", "no weights", put(0, 6)),
        ("token_lora_mapping", "no weights", put(0, 7)),
        (
            "active_lora_ids",
            "active ids",
            {"active_lora_ids": swap(1, 2), "num_tokens_per_lora": swap(1, 2)},
        ),
        ("active_lora_ids", "active ids", put(4, 6)),
        ("active_lora_ids", "active ids", put(3, 6)),
        ("active_lora_ids", "base misplaced", swap(0, 1)),
        ("num_tokens_per_lora", "shape", {"active_lora_ids": lambda a: a[:-1]}),
        (
            "num_tokens_per_lora",
            "counts",
            {"num_tokens_per_lora": swap(0, 1), "lora_token_start_loc": put(1, 3)},
        ),
        ("num_tokens_per_lora", "counts", put(5, 1)),
        ("num_tokens_per_lora", "int32 wrap", put(0, -1)),
        ("lora_token_start_loc", "unsorted", swap(1, 2)),
        ("lora_token_start_loc", "overlap", put(1, 1)),
        ("lora_token_start_loc", "gap", put(1, 3)),
        ("lora_token_start_loc", "end", put(4, 7)),
        ("lora_token_start_loc", "counts", put(5, 8)),
        ("lora_token_start_loc", "int32 wrap", put(4, 8 - 2**32)),
        ("lora_token_start_loc", "shape", lambda s: s[:-1]),
        ("num_active_loras_cpu", "counts", to([3])),
        ("num_active_loras_cpu", "shape", to([])),
        ("no_lora_flag_cpu", "stale", to([True])),
        ("num_tokens_per_lora", "counts", {"no_lora_flag_cpu": to([True])}),
        ("no_lora_flag_cpu", "base misplaced", {"token_lora_mapping": lambda m: [-1] * 8}),
    ],
    "csgmv": [
        ("weight_indices", "unsorted", swap(0, 1)),
        ("weight_indices", "base misplaced", put(3, -1)),
        ("weight_indices", "no weights", put(3, 8)),
        ("weight_indices", "int32 wrap", put(3, -9)),
        ("weight_indices", "shape", lambda w: w[1:]),
        ("seg_indptr", "unsorted", swap(1, 2)),
        ("seg_indptr", "gap", put(0, 1)),
        ("seg_indptr", "end", put(4, 7)),
        ("seg_indptr", "int32 wrap", put(4, 8 - 2**32)),
        ("max_len", "counts", to(2)),
        ("permutation", "overlap", put(0, 1)),
        ("permutation", "gap", put(0, 1)),
        ("permutation", "stale", lambda p: [*p, 8]),
        ("weight_indices", "stale", {"permutation": swap(0, 7)}),
    ],
    "triton": [
        ("seg_lens", "overlap", put(0, 2)),
        ("seg_lens", "gap", put(0, 0)),
        ("seg_lens", "stale", {"seg_lens": put(7, 2), "seg_indptr": put(8, 9)}),
        ("seg_indptr", "unsorted", swap(1, 2)),
        ("weight_indices", "base misplaced", put(2, -1)),
        ("weight_indices", "no weights", put(0, 8)),
        ("weight_indices", "stale", swap(0, 3)),
    ],
    "flashinfer": [
        ("seg_indptr", "unsorted", swap(1, 2)),
        ("seg_indptr", "gap", put(0, 1)),
        ("seg_indptr", "end", put(3, 5)),
        ("seg_lens", "overlap", put(0, 4)),
        ("seg_lens", "gap", put(0, 2)),
        ("seg_lens", "int32 wrap", put(0, -1)),
        ("seg_lens", "shape", lambda s: s[1:]),
        ("weight_indices", "base misplaced", put(0, -1)),
        ("weight_indices", "no weights", put(0, 6)),
        ("weight_indices", "stale", swap(0, 1)),
        ("rows", "stale", lambda r: r[:-1]),
    ],
    "flashinfer raw": [
        ("seg_lens", "stale", put(2, 1)),
    ],
    "peft": [
        ("adapter_names", "no weights", put(0, "no-such-tenant")),
        ("adapter_names", "base misplaced", put(2, None)),
        ("adapter_names", "stale", swap(0, 3)),
        ("adapter_names", "stale", lambda a: a[1:]),
    ],
    "segments": [
        ("seq_start", "unsorted", to([0, 4, 2, 5, 8])),
        ("seq_start", "end", to([0, 2, 4, 5, 7])),
        ("adapter_ids", "unsorted", to([-1, 3, 2, 9])),
        ("adapter_ids", "base misplaced", to([2, -1, 3, 9])),
        ("adapter_ids", "no weights", to([-1, 2, 3, 77])),
        ("adapter_ids", "stale", to([-1, 0, 3, 9])),
        ("rows", "overlap", to([2, 7, 5, 6, 3, 0, 1, 1])),
        ("adapter_ids", "shape", to([-1, 2, 3])),
    ],
}


CASES = [(layout, *case) for layout, cases in PLANTED.items() for case in cases]


@pytest.mark.parametrize(
    ("layout", "field", "fault", "change"),
    CASES,
    ids=[f"{layout}-{field}-{fault}-{i}" for i, (layout, field, fault, _) in enumerate(CASES)],
)
def test_a_planted_fault_is_found_and_named(
    layout: str, field: str, fault: Fault, change: Any
) -> None:
    changes = change if isinstance(change, dict) else {field: change}
    found = check(altered(RIGHT[layout], changes), IDS)
    assert (field, fault) in {(f.field, f.fault) for f in found}, "\n".join(map(str, found))
    for finding in found:
        assert finding.remedy == REMEDY[finding.fault]
        assert str(finding).startswith(f"{finding.field}: {finding.fault}: ")


@pytest.mark.parametrize(
    ("layout", "field", "fault", "change"),
    CASES,
    ids=[f"{layout}-{field}-{fault}-{i}" for i, (layout, field, fault, _) in enumerate(CASES)],
)
def test_a_finding_says_what_was_expected_and_what_came(
    layout: str, field: str, fault: Fault, change: Any
) -> None:
    changes = change if isinstance(change, dict) else {field: change}
    for told in (IDS, None):
        found = layouts.check(altered(RIGHT[layout], changes), told, slots=STACK, names=NAMES)
        for finding in found:
            assert re.fullmatch(r"expected .+, got .+", finding.what), finding


# Changed alone these leave two fields that disagree, or numbers that the batch does not tell.
NOT_TO_BE_TOLD = {
    ("lorax raw", "s_end"),  # a slice that ends late, or the next that starts early
    ("punica", "lora_rank"),  # no row of the batch has it: another call's
    ("csgmv", "lora_ranks"),
    ("triton", "lora_ranks"),
    ("torch_native", "lora_ranks"),
}


@pytest.mark.parametrize("layout", RIGHT)
def test_a_field_that_alone_is_wrong_is_named_first(layout: str) -> None:
    tried = 0
    for field, value in RIGHT[layout].items():
        values = value if isinstance(value, list) else [value]
        if field in {"rank_data", "adapter_names"} or (layout, field) in NOT_TO_BE_TOLD:
            continue
        for at, number in enumerate(values):
            for by in (1, -1, 5, -5) if isinstance(number, int) else ():
                changed = [*values[:at], number + by, *values[at + 1 :]]
                metadata = {**RIGHT[layout], field: changed if value is values else changed[0]}
                found = check(metadata, IDS)
                assert not found or found[0].field == field, [metadata, *map(str, found)]
                tried += bool(found)
    assert tried or layout == "peft"


def test_without_the_batch_the_field_that_fewer_others_bear_out_is_named_first() -> None:
    """The rows, the ids and the counts agree; one number of the mapping does not."""
    metadata = altered(RIGHT["vllm_v1"], {"token_lora_mapping": put(0, 1)})
    first = layouts.check(metadata)[0]
    assert (first.field, first.what, first.where) == (
        "token_lora_mapping",
        "expected 0, got 1",
        "at 0",
    )
    metadata = altered(RIGHT["vllm_v0"], {"seq_len_tensor": put(0, 3)})
    assert layouts.check(metadata, n=8)[0].field == "seq_len_tensor"


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


def test_every_fault_has_a_remedy_and_is_planted() -> None:
    assert set(REMEDY) == set(get_args(Fault)) == {fault for _, _, fault, _ in CASES}


def test_every_examiner_has_faults_planted() -> None:
    reached = {
        next(e.fields for e in EXAMINERS if all(RIGHT[layout].get(f) is not None for f in e.fields))
        for layout in PLANTED
    }
    assert reached == {examiner.fields for examiner in EXAMINERS}


@pytest.mark.parametrize("layout", RIGHT)
def test_what_faults_are_planted_in_is_right(layout: str) -> None:
    assert check(RIGHT[layout], IDS) == []


def test_segments_and_lengths_themselves_are_right() -> None:
    assert check(sgmv.segment(IDS), IDS) == []
    assert layouts.check(layouts.BatchLenInfo([], 3), n=3) == []


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


# docs/engines.md


def test_the_page_of_engines_is_fresh() -> None:
    """Remedy: python -m tests.help.engines_page."""
    page = PAGE.read_text()
    assert rendered(page) == page
    for name in blocks():
        assert f"<!-- {name}:begin -->" in page


def test_a_stale_page_is_seen() -> None:
    page = PAGE.read_text()
    assert "[0, 2, 3, 4, 5, 7, 8]" in page
    assert rendered(page.replace("[0, 2, 3, 4, 5, 7, 8]", "[0, 2, 3, 4, 5, 8, 8]")) == page
