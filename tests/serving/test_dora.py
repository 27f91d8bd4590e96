"""Adapters with DoRA in a served step: loaded with the model's W, alone in their rows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import sgmv
from sgmv.errors import DtypeError, ServingError
from sgmv.serving import AdapterSlots, LoRAMixture, LoRARequest, Scheduler, make_step, next_step
from tests.help.acceptance import assert_same_bits
from tests.help.peft_files import FIXTURES

NAME = "gpt2-conv1d-f32"
LAYERS = json.loads((FIXTURES / "dora.json").read_text())["cases"][NAME]["layers"]
DORA = LoRARequest("dora", 1, str(FIXTURES / "dora" / NAME))
PLAIN = LoRARequest("plain", 2, str(FIXTURES / "gpt2" / "conv1d-f32"))


@pytest.fixture
def base() -> dict[str, Any]:
    with np.load(FIXTURES / "dora.npz") as file:
        return {
            layer: (file[f"{NAME}/{layer}/W"], file[f"{NAME}/{layer}/bias"]) for layer in LAYERS
        }


def slots_of(base: dict[str, Any] | None) -> AdapterSlots:
    return AdapterSlots(max_loras=2, max_cpu_loras=2, max_lora_rank=8, base=base)


def test_a_step_is_the_stacks_own_result(base: dict[str, Any]) -> None:
    slots = slots_of(base)
    step = make_step(slots, {"a": DORA, "b": None, "c": PLAIN}, {"a": 2})
    rng = np.random.default_rng(0)
    for layer in LAYERS:
        W, bias = base[layer]
        adapters = [sgmv.load_peft(request.lora_path)[layer] for request in (DORA, PLAIN)]
        stack = sgmv.AdapterStack.from_adapters(adapters, W=W, bias=bias)
        x = rng.standard_normal((4, W.shape[1]), np.float32)
        y = rng.standard_normal((4, W.shape[0]), np.float32)
        expected = sgmv.add_lora(y.copy(), x, stack, [0, 0, -1, 1])
        assert_same_bits(step.add_lora(layer, y, x), expected, layer)
    gains = sum(4 * 2 * len(base[layer][0]) for layer in LAYERS)
    adapter = sgmv.load_peft(DORA.lora_path)
    weights = sum(one.A.nbytes + one.B.nbytes for one in adapter.values())
    slots.unload(PLAIN.lora_int_id)
    read = slots.bytes_read
    slots.unload(DORA.lora_int_id)
    slots.load(DORA)
    assert slots.bytes_read - read == weights + gains


def test_it_comes_back_without_its_W_being_read_again(base: dict[str, Any]) -> None:
    slots = slots_of(base)
    slots.activate([DORA])
    slots.deactivate(DORA.lora_int_id)
    for layer in LAYERS:
        base[layer] = (None, None)
    slots.activate([DORA])
    assert slots.loaded == [1]


def test_without_W_or_in_a_mixture_it_fails_alone(base: dict[str, Any]) -> None:
    mixture = LoRAMixture([(DORA, 1.0), (PLAIN, 0.5)])
    halved = LoRAMixture([(DORA, 0.5)])
    for given, asked, part in (
        (None, DORA, "whose W is known"),
        (base, mixture, "in a mixture"),
        (base, halved, "in a mixture"),
    ):
        slots, scheduler = slots_of(given), Scheduler(max_loras=2)
        scheduler.add("bad", asked)
        scheduler.add("good", PLAIN)
        step = next_step(scheduler, slots)
        assert list(step.rows) == ["good"]
        assert part in str(step.failed[0][2])
        with pytest.raises(ServingError, match=part):
            make_step(slots, {"bad": asked})
    assert make_step(slots_of(base), {"one": LoRAMixture([(DORA, 1.0)])}).n == 1
    for wrong in ([1], {"up": np.ones((2, 2))}):
        with pytest.raises(DtypeError, match="base: expected"):
            slots_of(wrong)  # type: ignore[arg-type]
