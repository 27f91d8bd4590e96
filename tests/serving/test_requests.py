"""Requests: what a LoRARequest takes, and ids that two of them share."""

from __future__ import annotations

from typing import Any

import pytest

from sgmv.errors import ServingError, SgmvError
from sgmv.serving import LoRAMixture, LoRARequest
from tests.help.served import lora, make_slots


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "adapter_id", "path"),
    [("", 1, "p"), (7, 1, "p"), ("a", 0, "p"), ("a", -1, "p"), ("a", True, "p"), ("a", 1, "")],
)
def test_a_request_is_checked(name: Any, adapter_id: Any, path: Any) -> None:
    with pytest.raises(SgmvError, match="lora_"):
        LoRARequest(name, adapter_id, path)


@pytest.mark.once
def test_two_adapters_under_one_id() -> None:
    slots = make_slots()
    with pytest.raises(ServingError, match="one adapter for each id"):
        slots.activate([lora(1), lora(1, "1/1")])
    assert slots.loaded == []


def test_a_mixture_is_checked() -> None:
    one, other = lora(1), lora(2)
    assert LoRAMixture([(other, 2), (one, 0.5), (other, 1)]).lora_int_ids == (1, 2)
    wrong: list[tuple[Any, str]] = [
        ([], "at least one"),
        (None, "pairs of a LoRARequest"),
        ([one], "pairs of a LoRARequest"),
        ([(1, 1.0)], "a LoRARequest in each pair"),
        ([(one, float("nan"))], "members"),
        ([(one, "1")], "members"),
        ([(one, 1.0), (lora(1, "elsewhere"), 1.0)], "one adapter for each id"),
    ]
    for members, part in wrong:
        with pytest.raises(SgmvError, match=part):
            LoRAMixture(members)
