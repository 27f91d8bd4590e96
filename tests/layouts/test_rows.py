"""What all layouts share: slots, segments, fields that stay as they are, numbers beyond int32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import sgmv
from sgmv import errors, layouts
from tests.help.layouts import MAKERS, STACK, Refusals, adapter, refused

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


REFUSALS: Refusals = {
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
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_clear_message(name: str) -> None:
    refused(*REFUSALS[name])
