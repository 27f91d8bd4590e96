"""The view of experts is the emulator's, and says why few rows waste nearly everything."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgmv import emulator
from sgmv.errors import ValueRangeError
from sgmv.explain import experts
from sgmv.explain.experts import SIZES
from tests.help.explained import ask, drawn, few, ids_lists

pytestmark = pytest.mark.once


@few
@given(ids_lists, st.integers(1, 20), st.integers(1, 4))
def test_groups_are_the_pairs_of_one_adapter_and_expert(ids: list[int], E: int, k: int) -> None:
    question = ask(ids, experts=max(E, k), top_k=k)
    facts = experts.experts(question)
    assert all(len(set(of)) == k for of in facts["routed"])  # no expert twice
    assert {e for of in facts["routed"] for e in of} <= set(range(max(E, k)))
    for s, adapter_id in enumerate(facts["adapters"]):
        for e, pairs in enumerate(facts["pairs_of"][s]):
            named = [
                i == adapter_id and e in of for i, of in zip(ids, facts["routed"], strict=True)
            ]
            assert pairs == sum(named)
    if ids:
        slots = [question.slots.get(i, -1) for i in ids]
        given_to = slots, facts["routed"], 4096, 16, max(E, k), question.max_loras
        figures = emulator.vllm_moe_shrink(*given_to).figures()
        assert {name: facts[name] for name in figures} == figures
    json.dumps(facts)


def test_zeros_grow_with_adapters_and_shrink_with_rows() -> None:
    """Qwen3-30B-A3B's 8 of 128: up to 64 rows nearly all is zeros, whoever shares adapters."""
    zeros = experts.experts(ask([0, 1], experts=128, top_k=8))["zeros"]
    few_rows = SIZES.index(64) + 1
    for shares in zeros.values():
        assert min(shares[:few_rows]) > 0.85
    for of_size in zip(*zeros.values(), strict=True):
        distinct, uniform, skewed, identical = of_size
        assert identical <= skewed <= distinct
        assert identical <= uniform <= distinct
    assert zeros["identical"] == sorted(zeros["identical"], reverse=True)
    assert zeros["distinct"] == sorted(zeros["distinct"])  # for blocks grow with the batch
    assert zeros["identical"][-1] < 0.2 < 0.95 < zeros["uniform"][-1]


def test_the_map_has_a_character_for_each_expert() -> None:
    text = drawn("experts", ask([5] * 9 + [7, -1], experts=2, top_k=2))
    assert "adapter 5 99\nadapter 7 11\n" in text
    assert "20 pairs in 4 groups, 5.0 each." in " ".join(text.split())
    many = drawn("experts", ask([5] * 12, experts=200, top_k=200))
    assert "adapter 5 ++++" in many
    assert "experts more" in many


@pytest.mark.parametrize("ids", [[], [-1, -1]])
def test_a_batch_without_adapters_is_drawn(ids: list[int]) -> None:
    assert "no row has an adapter" in drawn("experts", ask(ids))


def test_more_experts_for_a_row_than_there_are_are_refused() -> None:
    with pytest.raises(ValueRangeError, match="top_k: expected at most the 8 experts, got 9"):
        ask([0], top_k=9)
