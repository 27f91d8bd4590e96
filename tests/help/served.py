"""Adapters, slots and steps for the tests of serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

import sgmv
from sgmv import serving
from sgmv.errors import ServingError, ShapeError, StackError
from sgmv.serving import AdapterSlots, LoRARequest
from tests.help.serving_model import Room, weights

ROOM = Room(sgmv, serving)
FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
randoms = st.randoms(use_true_random=False)


def lora(adapter_id: int, path: str = "") -> LoRARequest:
    return LoRARequest(f"a{adapter_id}", adapter_id, path or f"{adapter_id}/0")


def read(path: str) -> dict[str, sgmv.Adapter]:
    return {name: sgmv.Adapter(*pair) for name, pair in weights(path).items()}


def make_slots(max_loras: int = 2, max_cpu_loras: int = 4, **options: Any) -> AdapterSlots:
    return AdapterSlots(max_loras, max_cpu_loras, 3, **{"read": read, **options})


BAD = {
    "a rank above max_lora_rank": ({"q": ((4, 3), (4, 4))}, StackError, "at most max_lora_rank = "),
    "another width": ({"q": ((1, 5), (4, 1))}, ShapeError, "h_in = 3"),
    "no layer": ({}, ServingError, "without any"),
    "a layer of another model": ({"k": ((1, 3), (4, 1))}, ServingError, "'q'"),
}


def layers_of(shapes: dict[str, tuple[tuple[int, int], tuple[int, int]]]) -> Any:
    return {n: sgmv.Adapter(np.ones(a, "f"), np.ones(b, "f")) for n, (a, b) in shapes.items()}
