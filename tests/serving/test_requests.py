"""Requests: what a LoRARequest takes, and ids that two of them share."""

from __future__ import annotations

from typing import Any

import pytest

from sgmv.errors import ServingError, SgmvError
from sgmv.serving import LoRARequest
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
