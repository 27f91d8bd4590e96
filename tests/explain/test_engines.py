"""Layouts that are shown are the engines', and mean the batch."""

from __future__ import annotations

import pytest
from hypothesis import given

from sgmv import layouts
from sgmv.explain import engines
from tests.help.explained import ask, check_layout, few, ids_lists

pytestmark = pytest.mark.once


@few
@given(ids_lists)
def test_layouts_mean_the_batch(ids: list[int]) -> None:
    check_layout(engines, ask(ids), ids)


def test_layouts_fields_are_the_engines() -> None:
    ids = [7, 7, -1, 3]
    question = ask(ids, h_in=64, h_out=32)
    facts = engines.layout(question)
    meta = layouts.vllm_v1(ids, 2, question.slots)
    assert facts["vllm_v1"]["fields"]["active_lora_ids"] == meta.active_lora_ids.tolist()
    assert facts["vllm_v1"]["shown"] == str(meta)
    assert "(16, 64)" in facts["punica"]["shown"]
    assert facts["lorax"]["fields"]["rank_data"]["16"]["s_start"] == [0, 3]
    assert facts["peft"]["fields"]["adapter_names"] == ["7", "7", "__base__", "3"]
