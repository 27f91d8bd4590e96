"""check: nothing in right metadata, something in any other, and which field it names first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import sgmv
from sgmv import errors, layouts
from sgmv.layouts.check import EXAMINERS
from sgmv.layouts.finding import REMEDY, Fault
from tests.help.layout_faults import FLASHINFER, LLAMACPP, LORAX, PEFT, PUNICA, SGLANG, VLLM
from tests.help.layouts import (
    IDS,
    MAKERS,
    RANKS,
    RIGHT,
    Planted,
    PlantedFault,
    Refusals,
    altered,
    batches,
    check,
    every_fault_of,
    expected_and_got,
    found_and_named,
    ids_lists,
    put,
    raw,
    refused,
    to,
)

every_layout = pytest.mark.parametrize("maker", MAKERS)


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
    assert tried or layout in {"peft", "llamacpp", "llamacpp raw"}


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


@pytest.mark.parametrize("layout", RIGHT)
def test_what_faults_are_planted_in_is_right(layout: str) -> None:
    assert check(RIGHT[layout], IDS) == []


def test_segments_and_lengths_themselves_are_right() -> None:
    assert check(sgmv.segment(IDS), IDS) == []
    assert layouts.check(layouts.BatchLenInfo([], 3), n=3) == []


REFUSALS: Refusals = {
    "several adapters per row of an engine that has none": (
        lambda: layouts.check(RIGHT["vllm_v1"], [[9, 3]] * 8),
        errors.ShapeError,
        ["adapter_ids: ", "one adapter per row", "2", "one at a time"],
    ),
    "weights of an engine that has none": (
        lambda: layouts.check(RIGHT["vllm_v1"], IDS, weights=np.ones(8)),
        errors.ShapeError,
        ["weights: ", "llama.cpp or LoRAX", "leave the weights out"],
    ),
    "weights without ids": (
        lambda: layouts.check(RIGHT["lorax"], weights=np.ones(8)),
        errors.ShapeError,
        ["weights: ", "adapter_ids beside them"],
    ),
    "metadata of no engine": (
        lambda: layouts.check({"segments": [0, 3]}),
        errors.DtypeError,
        ["metadata: ", "one of the fields", "dict", "engine's names"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_clear_message(name: str) -> None:
    refused(*REFUSALS[name])


PLANTED: Planted = {
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


@every_fault_of(PLANTED)
def test_a_planted_fault_is_found_and_named(planted: PlantedFault) -> None:
    found_and_named(*planted)


@every_fault_of(PLANTED)
def test_a_finding_says_what_was_expected_and_what_came(planted: PlantedFault) -> None:
    expected_and_got(*planted)


EVERY_PLANTED = PLANTED | FLASHINFER | LLAMACPP | LORAX | PEFT | PUNICA | SGLANG | VLLM


def test_every_fault_has_a_remedy_and_is_planted() -> None:
    assert (
        set(REMEDY)
        == set(get_args(Fault))
        == {fault for cases in EVERY_PLANTED.values() for _, fault, _ in cases}
    )


def test_every_examiner_has_faults_planted() -> None:
    reached = {
        next(e.fields for e in EXAMINERS if all(RIGHT[layout].get(f) is not None for f in e.fields))
        for layout in EVERY_PLANTED
    }
    assert reached == {examiner.fields for examiner in EXAMINERS}
