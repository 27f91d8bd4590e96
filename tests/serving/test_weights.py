"""Weights in host memory and in slots: an adapter that fails changes nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

import sgmv
from sgmv import serving
from sgmv.errors import PeftError, ServingError, ShapeError, StackError, ValueRangeError
from tests.help.peft_files import form
from tests.help.served import BAD, layers_of, lora, make_slots, read
from tests.help.serving_model import LAYERS


@pytest.mark.once
@pytest.mark.parametrize("case", BAD)
def test_one_bad_adapter_changes_nothing(case: str) -> None:
    layers, error, part = BAD[case]

    def reads(path: str) -> dict[str, sgmv.Adapter]:
        if path != "bad":
            return read(path)
        return {n: sgmv.Adapter(np.ones(a, "f"), np.ones(b, "f")) for n, (a, b) in layers.items()}

    slots = make_slots(2, 2, modules=LAYERS, read=reads)
    step = serving.make_step(slots, {"r1": lora(1), "r2": lora(2)})
    before = str(slots), slots.active, slots.loaded, slots.counters
    with pytest.raises(error, match=part) as caught:
        slots.activate([lora(3), lora(4, "bad")])
    assert "a4" in str(caught.value)
    assert before == (str(slots), slots.active, slots.loaded, slots.counters)
    y = np.zeros((2, 4), "f")
    step.add_lora("q", y, np.ones((2, 3), "f"))


@pytest.mark.once
def test_weights_too_large_for_the_slots_change_nothing() -> None:
    huge = {"q": sgmv.Adapter(np.full((1, 3), 1e30, "f"), np.ones((4, 1), "f"))}
    slots = make_slots(read=lambda path: huge, dtype="float16")
    with pytest.raises(ValueRangeError, match="float16"):
        slots.activate([lora(1)])
    assert slots.loaded == []
    assert slots.modules == []


@pytest.mark.once
def test_widths_that_adapters_disagree_about() -> None:
    slots = make_slots(
        read=lambda path: {"q": sgmv.Adapter(np.ones((1, int(path)), "f"), np.ones((4, 1), "f"))}
    )
    with pytest.raises(ShapeError, match="h_in = 3"):
        slots.activate([lora(1, "3"), lora(2, "5")])
    assert slots.modules == slots.loaded == []


@pytest.mark.once
@pytest.mark.parametrize("fatal", [1, 2, 3, 4])
def test_failing_while_loading_leaves_no_adapter_half_loaded(
    fatal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = make_slots(2, 2, modules=LAYERS)
    slots.activate([lora(1)])
    load, calls = sgmv.AdapterStack.load, Counter[str]()

    def fails(self: sgmv.AdapterStack, *arguments: Any) -> None:
        calls["load"] += 1
        if calls["load"] == fatal:  # each of two adapters is loaded into two layers
            raise MemoryError
        load(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sgmv.AdapterStack, "load", fails)
        with pytest.raises(MemoryError):
            slots.activate([lora(2), lora(3)])
    held = sum(i is not None for i in slots.active)
    assert held == (fatal - 1) // 2
    assert all(len(slots.stack(module)) == held for module in LAYERS)
    slots.activate([lora(2), lora(3)])
    assert set(slots.active) == {2, 3}
    assert all(len(slots.stack(module)) == 2 for module in LAYERS)


@pytest.mark.once
def test_an_adapter_that_fails_teaches_no_layers() -> None:
    """Else its widths would be those that the right ones are held to."""
    found = {
        "bad": layers_of({"q": ((1, 7), (4, 1)), "up": ((9, 2), (5, 9))}),  # a rank of 9
        "good": layers_of({"q": ((1, 3), (4, 1))}),
    }
    slots = make_slots(read=found.__getitem__)
    active, failed = slots.try_activate([lora(1, "bad"), None, lora(2, "good")])
    assert (list(active), list(failed)) == ([2], [1])
    assert type(failed[1]) is StackError
    assert slots.modules == ["q"]
    assert slots.stack("q").h_in == 3


@pytest.mark.once
def test_a_reader_that_fails_is_told_with_its_adapter() -> None:
    slots = make_slots(read=sgmv.load_peft)
    for call in (slots.load, lambda one: slots.activate([one])):
        with pytest.raises(PeftError, match=r"LoRARequest\(lora_name='a7', .*no such directory"):
            call(lora(7, "no-such-place"))


@pytest.mark.once
def test_an_adapter_that_replaces_parts_of_the_model_is_refused() -> None:
    """A classification head's rows would be the base model's; the others of the step run."""
    heads = {"a7": form("head"), "a8": form("embedding-alone")}
    slots = make_slots(read=lambda path: sgmv.load_peft(heads[path]))
    active, failed = slots.try_activate([lora(7, "a7"), lora(8, "a8")])
    assert (list(active), list(failed)) == ([8], [7])
    for part in ("a7", "score.weight", "replaces in the model", "leaves it out"):
        assert part in str(failed[7])
    slots = make_slots(read=lambda path: dict(sgmv.load_peft(heads[path])))
    assert list(slots.activate([lora(7, "a7")])) == [7]


ELSEWHERE = [
    ("layers.0.q", "model.layers.0.q"),
    ("model.layers.0.q", "model.language_model.layers.0.q"),
    ("language_model.model.layers.1.q", "model.layers.0.up"),
    ("transformer.h.0.q", "model.layers.0.q"),
    ("wrapped.q", "q"),
]


@pytest.mark.once
@pytest.mark.parametrize("names", [*ELSEWHERE, *(pair[::-1] for pair in ELSEWHERE)])
def test_names_under_another_prefix_are_refused(names: tuple[str, str]) -> None:
    """Else both would be layers, and one adapter's rows base only at those that the model calls."""
    found = {name: layers_of({name: ((1, 3), (4, 1))}) for name in names}
    slots = make_slots(read=found.__getitem__)
    active, failed = slots.try_activate([lora(1, names[0]), lora(2, names[1])])
    assert (list(active), list(failed), slots.modules) == ([1], [2], [names[0]])
    with pytest.raises(ServingError, match=r"prefix of the adapters before.*a2.*its modules"):
        slots.load(lora(2, names[1]))
    told = make_slots(read=found.__getitem__, modules=dict.fromkeys(names, (3, 4)))
    assert list(told.activate([lora(1, names[0]), lora(2, names[1])])) == [1, 2]


@pytest.mark.once
@pytest.mark.parametrize(
    "second",
    [["model.layers.3.mlp.up"], ["model.layers.0.attn.q", "visual.blocks.0.q"], ["lm_head"]],
)
def test_adapters_of_one_model_need_share_no_layer(second: list[str]) -> None:
    names = {"first": ["model.layers.0.attn.q"], "second": second}
    slots = make_slots(read=lambda path: layers_of(dict.fromkeys(names[path], ((1, 3), (4, 1)))))
    slots.activate([lora(1, "first"), lora(2, "second")])
    assert set(slots.modules) == {"model.layers.0.attn.q", *second}
