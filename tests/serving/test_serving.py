"""Serving: slots, scheduler, steps against their plain forms; the simulator against every step."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import random
import re
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
import sgmv
from reference.bounds import add_lora_bound
from reference.compare import check
from sgmv import serving
from sgmv.__main__ import COMMANDS, main
from sgmv.errors import (
    DtypeError,
    MemoryLayoutError,
    PeftError,
    ServingError,
    SgmvError,
    ShapeError,
    StackError,
    StaleStepError,
    ValueRangeError,
)
from sgmv.serving import AdapterSlots, Costs, LoRARequest, Scheduler, Trace, draw_trace, simulate
from sgmv.serving.report import figure, table
from sgmv.serving.residency import POLICIES
from sgmv.terminal import Terminal
from tests.help.planting import Fault, imported, plant, run_python
from tests.help.planting import outcome as in_child
from tests.help.serving_model import LAYERS, Room, drive_scheduler, drive_slots, weights

ROOM = Room(sgmv, serving)
FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
randoms = st.randoms(use_true_random=False)


def lora(adapter_id: int, path: str = "") -> LoRARequest:
    return LoRARequest(f"a{adapter_id}", adapter_id, path or f"{adapter_id}/0")


def read(path: str) -> dict[str, sgmv.Adapter]:
    return {name: sgmv.Adapter(*pair) for name, pair in weights(path).items()}


def make_slots(max_loras: int = 2, max_cpu_loras: int = 4, **options: Any) -> AdapterSlots:
    return AdapterSlots(max_loras, max_cpu_loras, 3, **{"read": read, **options})


# Against the plain forms


@settings(max_examples=150)
@given(randoms)
def test_the_scheduler_follows_its_rule(rng: random.Random) -> None:
    drive_scheduler(ROOM, rng)


@settings(max_examples=60)
@given(randoms)
def test_slots_follow_their_policy_and_no_step_gets_other_weights(rng: random.Random) -> None:
    drive_slots(ROOM, rng)


def test_the_sequences_reach_what_they_are_for() -> None:
    seen: Counter[str] = Counter()
    for seed in range(80):
        seen += drive_scheduler(ROOM, random.Random(seed))
        seen += drive_slots(ROOM, random.Random(seed))
    rare = ("overtaken as often as may be", "deferred", "sat out", "refused", "stale", "run")
    assert all(seen[name] >= 10 for name in rare), seen


FAULTS = {
    "overtaken once too often": Fault(
        "serving.scheduler", ">= self.max_overtakes", "> self.max_overtakes"
    ),
    "those that gave up count as overtaking": Fault(
        "serving.scheduler", "- came - len(self._given_up)", "- came"
    ),
    "one adapter too many": Fault(
        "serving.scheduler", "len(self._holding) <= self.max_loras:  #", "True:  #"
    ),
    "the base model takes a slot": Fault(
        "serving.scheduler",
        "self._holding) <= self.max_loras:  #",
        "self._holding) < self.max_loras:  #",
    ),
    "a line without its first is forgotten": Fault(
        "serving.scheduler", "if line.waiting and was_oldest:", "if False:"
    ),
    "pins are not seen": Fault(
        "serving.scheduler", "if pinned == self._pinned:", "if pinned is not None:"
    ),
    "waiting requests behind are not tried": Fault(
        "serving.scheduler", "return held[1]\n\n    def _oldest", "return None\n\n    def _oldest"
    ),
    "deferrals are not counted": Fault("serving.scheduler", "+= came < self._tried", "+= 0"),
    "LRU forgets uses": Fault("serving.residency", "self.slots.move_to_end(i)", "pass"),
    "host memory forgets uses": Fault("serving.residency", "self.host.move_to_end(i)", "pass"),
    "FIFO is LRU": Fault("serving.residency", 'if self.policy == "lru":', "if True:"),
    "pinned ones and needed ones go": Fault("serving.residency", "if i not in keep", "if True"),
    "what leaves host memory keeps its slot": Fault(
        "serving.residency", "had_slot = i in self.slots\n", "had_slot = False\n"
    ),
    "a slot's number for a generation": Fault(
        "serving.weights", "= next(self._generations), ", "= self._residency.slots[i], "
    ),
    "an evicted adapter stays in the stacks": Fault(
        "serving.weights", "self._take_out(self.generation[i])", "pass"
    ),
    "a replaced adapter stays": Fault(
        "serving.weights", "or self.hosted[i].lora_request != lora_request", ""
    ),
    "rows of another request": Fault(
        "serving.step", "zip(requests, map", "zip(reversed(requests), map"
    ),
    "the wrong slot": Fault(
        "serving.step", "return Step(rows, slot,", "return Step(rows, slot + 1,"
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FAULTS[name]
    modules = imported(plant(tmp_path, fault), monkeypatch, "sgmv.serving")
    room = Room(modules["sgmv"], modules["sgmv.serving"])
    drive = drive_scheduler if fault.module == "serving.scheduler" else drive_slots

    def sequences() -> None:
        for seed in range(100):
            drive(room, random.Random(seed))

    with pytest.raises((AssertionError, KeyError)):
        sequences()


@pytest.mark.once
def test_without_a_fault_nothing_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = imported(plant(tmp_path), monkeypatch, "sgmv.serving")
    room = Room(modules["sgmv"], modules["sgmv.serving"])
    for seed in range(20):
        drive_scheduler(room, random.Random(seed))
        drive_slots(room, random.Random(seed))


# The scheduler's promise


@pytest.mark.once
@pytest.mark.parametrize("max_overtakes", [0, 1, 7, 40])
def test_nobody_starves(max_overtakes: int) -> None:
    """One adapter's requests keep coming, and always one runs: another's is served all the same."""
    scheduler: Scheduler[str] = Scheduler(1, 2, max_overtakes)
    scheduler.add("first", lora(1))
    assert list(scheduler.schedule()) == ["first"]
    scheduler.add("other", lora(2))
    overtook, ended = 0, "first"
    while "other" not in scheduler.running:
        scheduler.add(f"r{overtook}", lora(1))
        scheduler.schedule()
        scheduler.finish(ended)  # never the last one of its adapter, while others are admitted
        if f"r{overtook}" in scheduler.running:
            ended = f"r{overtook}"
            overtook += 1
        scheduler.schedule()
        assert overtook <= max_overtakes
        if overtook == max_overtakes and ended in scheduler.running:
            scheduler.finish(ended)
            scheduler.schedule()
    assert overtook == max_overtakes
    assert scheduler.deferrals == 1


@pytest.mark.once
def test_vllms_example_of_a_scan() -> None:
    """Requests of adapters that run, and of none, pass those whose adapter does not fit."""
    adapters = [0, 0, 0, 1, 3, 2, 4, 5, 5, 5, 5, 0, 0, 1, 2, 3]
    scheduler: Scheduler[int] = Scheduler(max_loras=4)
    for number, adapter_id in enumerate(adapters, 1):
        scheduler.add(number, lora(adapter_id) if adapter_id else None)
    assert list(scheduler.schedule()) == [1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15, 16]
    assert list(scheduler.waiting) == [8, 9, 10, 11]


@pytest.mark.once
def test_requests_of_a_pinned_and_a_squeezed_adapter() -> None:
    """A pin while all slots run does not stop the server: the newest adapter sits out."""
    scheduler: Scheduler[str] = Scheduler(2)
    scheduler.add("a", lora(1))
    scheduler.add("b", lora(2))
    assert list(scheduler.schedule()) == ["a", "b"]
    assert list(scheduler.schedule(pinned={3})) == ["a"]
    scheduler.finish("a")
    assert list(scheduler.schedule(pinned={3})) == ["b"]


@pytest.mark.once
def test_the_scheduler_refuses() -> None:
    scheduler: Scheduler[str] = Scheduler(1)
    scheduler.add("a", lora(1))
    for request_id, path in (("a", ""), ("b", "elsewhere")):
        with pytest.raises(ServingError, match="expected"):
            scheduler.add(request_id, lora(1, path))
    with pytest.raises(DtypeError, match="lora_request"):
        scheduler.add("b", 1)  # type: ignore[arg-type]
    with pytest.raises(ServingError, match="finish a request once"):
        scheduler.finish("b")
    assert list(scheduler.waiting) == ["a"]
    scheduler.finish("a")
    scheduler.add("b", lora(1, "elsewhere"))  # once nobody uses the old weights
    for limits in ((0,), (1, 0), (1, 1, -1), ("2",)):
        with pytest.raises(SgmvError, match="max_"):
            Scheduler(*limits)


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "adapter_id", "path"),
    [("", 1, "p"), (7, 1, "p"), ("a", 0, "p"), ("a", -1, "p"), ("a", True, "p"), ("a", 1, "")],
)
def test_a_request_is_checked(name: Any, adapter_id: Any, path: Any) -> None:
    with pytest.raises(SgmvError, match="lora_"):
        LoRARequest(name, adapter_id, path)


# Slots


@pytest.mark.once
def test_an_adapter_of_the_step_is_never_evicted_for_another() -> None:
    slots = make_slots()
    slots.activate([lora(1)])
    slots.activate([lora(3)])
    slots.activate([lora(2), lora(1)])  # 1 is the least recently used, and needed
    assert slots.active == [1, 2]
    assert slots.counters.slot_misses == 3


@pytest.mark.once
def test_pinned_adapters_stay_and_are_told() -> None:
    slots = make_slots()
    slots.load(lora(1))
    slots.pin(1)
    for i in (2, 3, 4, 5, 6):
        slots.activate([lora(i)])
    assert slots.active == [1, 6]
    assert 1 in slots.loaded
    for call in (slots.unload, slots.deactivate):
        with pytest.raises(ServingError, match=r"not pinned, got \[1\]; unpin it first"):
            call(1)
    with pytest.raises(ServingError, match="unpin"):
        slots.load(lora(1, "1/1"))
    with pytest.raises(ServingError, match=r"max_loras = 2 .* got \[1, 2, 3\]"):
        slots.activate([lora(2), lora(3)])
    slots.unpin(1)
    slots.activate([lora(2), lora(3)])
    assert set(slots.active) == {2, 3}


BAD = {
    "a rank above max_lora_rank": ({"q": ((4, 3), (4, 4))}, StackError, "at most max_lora_rank = "),
    "another width": ({"q": ((1, 5), (4, 1))}, ShapeError, "h_in = 3"),
    "no layer": ({}, ServingError, "without any"),
    "a layer of another model": ({"k": ((1, 3), (4, 1))}, ServingError, "'q'"),
}


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
@pytest.mark.parametrize(
    "arguments",
    [
        (0, 4, 8),
        (2, 1, 8),
        (2, 4, 0),
        (2, 4, 8, {"policy": "random"}),
        (2, 4, 8, {"dtype": "int8"}),
        (2, 4, 8, {"modules": {"q": 64}}),
        (2, 4, 8, {"modules": {"q": (64, 0)}}),
    ],
)
def test_slots_refuse_settings(arguments: Any) -> None:
    *limits, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(SgmvError, match="expected"):
        AdapterSlots(*limits, **options)


@pytest.mark.once
def test_two_adapters_under_one_id() -> None:
    slots = make_slots()
    with pytest.raises(ServingError, match="one adapter for each id"):
        slots.activate([lora(1), lora(1, "1/1")])
    assert slots.loaded == []


@pytest.mark.once
def test_a_step_refuses_as_add_lora_does() -> None:
    slots = make_slots(modules=LAYERS)
    step = serving.make_step(slots, {"r0": lora(1)})
    y, x = np.zeros((1, 4), "f"), np.ones((1, 3), "f")
    with pytest.raises(ServingError, match=r"'up_proj'; there are 'q', 'up'"):
        step.add_lora("up_proj", y, x)
    with pytest.raises(ShapeError, match="x: expected"):
        step.add_lora("q", y, np.ones((2, 3), "f"))
    y.flags.writeable = False
    with pytest.raises(MemoryLayoutError, match="y: expected"):
        step.add_lora("q", y, x)
    with pytest.raises(SgmvError, match="tokens"):
        serving.make_step(slots, {"r0": None}, {"r0": -1})


def layers_of(shapes: dict[str, tuple[tuple[int, int], tuple[int, int]]]) -> Any:
    return {n: sgmv.Adapter(np.ones(a, "f"), np.ones(b, "f")) for n, (a, b) in shapes.items()}


def raising(error: Exception) -> Any:
    raise error


# What the reader does for a path, and what comes of it.
FAILING: dict[str, tuple[Any, type[Exception], str]] = {
    **{
        case: (lambda layers=layers: layers_of(layers), error, part)
        for case, (layers, error, part) in BAD.items()
    },
    "no directory": (lambda: sgmv.load_peft("no-such-place"), PeftError, "no-such-place"),
    "a reader that fails": (lambda: raising(OSError("disk on fire")), OSError, "disk on fire"),
    "a reader that gives nothing": (lambda: None, DtypeError, "NoneType for LoRARequest"),
    "a reader of raw arrays": (lambda: {"q": np.ones(3)}, DtypeError, "ndarray for 'q' of LoRAReq"),
    "the second layer of two": (
        lambda: layers_of({"q": ((1, 3), (4, 1)), "up": ((1, 9), (5, 1))}), ShapeError, "'up'",
    ),
}  # fmt: skip


def rows_alone(request_ids: list[str], loras: dict[str, LoRARequest | None]) -> Any:
    """What these requests' rows are, one each, on slots that have seen nothing else."""
    slots = make_slots(3, 4, modules=LAYERS)
    step = serving.make_step(slots, {i: loras[i] for i in request_ids})
    return answers(step)


def answers(step: Any) -> dict[str, np.ndarray]:
    return {
        name: step.add_lora(name, np.zeros((step.n, h_out), "f"), np.ones((step.n, h_in), "f"))
        for name, (h_in, h_out) in LAYERS.items()
    }


@pytest.mark.once
@pytest.mark.parametrize("case", FAILING)
def test_an_adapter_that_cannot_be_loaded_stops_no_other(case: str) -> None:
    """Its requests are dropped and listed with the reason; the others get what they get alone."""
    reads, error, part = FAILING[case]
    slots = make_slots(3, 4, modules=LAYERS, read=lambda p: reads() if p == "bad" else read(p))
    scheduler = Scheduler[str](3)
    loras = {"good": lora(1), "bad": lora(2, "bad"), "base": None, "too": lora(2, "bad"),
             "other": lora(3)}  # fmt: skip
    for request_id, lora_request in loras.items():
        scheduler.add(request_id, lora_request)
    step = serving.next_step(scheduler, slots)
    assert list(step.rows) == list(scheduler.running) == ["good", "base", "other"]
    assert [(i, one) for i, one, _ in step.failed] == [("bad", loras["bad"]), ("too", loras["bad"])]
    for *_, caught in step.failed:
        assert type(caught) is error
        assert part in str(caught)
        assert error is OSError or "a2" in str(caught)
    assert slots.active == [1, 3, None]
    assert slots.loaded == [1, 3]
    assert slots.counters.slot_misses == slots.counters.host_misses == 2
    for name, y in rows_alone(["good", "base", "other"], loras).items():
        np.testing.assert_array_equal(answers(step)[name], y)
    again = serving.next_step(scheduler, slots)
    assert list(again.rows) == ["good", "base", "other"]
    assert again.failed == ()


@pytest.mark.once
def test_all_of_a_steps_adapters_may_fail() -> None:
    slots, scheduler = make_slots(read=lambda path: {}), Scheduler[int](2)
    for number in range(4):
        scheduler.add(number, lora(1 + number))
    for first in (0, 2):  # two slots
        step = serving.next_step(scheduler, slots)
        assert (step.n, step.rows) == (0, {})
        assert [i for i, *_ in step.failed] == [first, first + 1]
    assert not scheduler.running
    assert not scheduler.waiting


@pytest.mark.once
def test_a_directory_that_is_removed_while_its_requests_wait(tmp_path: Path) -> None:
    """Requests that run keep their weights; those that come to run without them are dropped."""
    for name in ("attention-f32", "mlp-f16"):
        shutil.copytree(FIXTURES / "llama" / name, tmp_path / name)
    kept, gone = (lora(i, str(tmp_path / name)) for i, name in enumerate(os.listdir(tmp_path), 1))
    slots, scheduler = AdapterSlots(1, 1, 32), Scheduler[str](1, max_overtakes=0)
    scheduler.add("runs", gone)
    assert list(serving.next_step(scheduler, slots).rows) == ["runs"]
    for request_id, lora_request in (("kept", kept), ("waits", gone)):
        scheduler.add(request_id, lora_request)
    shutil.rmtree(gone.lora_path)
    assert list(serving.next_step(scheduler, slots).rows) == ["runs"]
    scheduler.finish("runs")
    step = serving.next_step(scheduler, slots)
    assert (list(step.rows), step.failed) == (["kept"], ())
    scheduler.finish("kept")
    step = serving.next_step(scheduler, slots)
    ((request_id, lora_request, error),) = step.failed
    assert (request_id, lora_request, type(error)) == ("waits", gone, PeftError)
    assert "no such directory" in str(error)
    assert slots.loaded == [kept.lora_int_id]


@pytest.mark.once
@pytest.mark.parametrize("fatal", [1, 2, 3, 4])
def test_an_adapter_that_fails_in_one_layer_of_many_leaves_nothing_of_it(
    fatal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, scheduler = make_slots(2, 2, modules=LAYERS), Scheduler[str](2)
    load, calls = sgmv.AdapterStack.load, Counter[str]()

    def fails(self: sgmv.AdapterStack, *arguments: Any) -> None:
        calls["load"] += 1
        if calls["load"] == fatal:
            raise MemoryError
        load(self, *arguments)

    scheduler.add("a", lora(1))
    scheduler.add("b", lora(2))
    with monkeypatch.context() as patch:
        patch.setattr(sgmv.AdapterStack, "load", fails)
        step = serving.next_step(scheduler, slots)
    bad, good = ("a", "b") if fatal <= 2 else ("b", "a")
    assert list(step.rows) == [good]
    assert [(i, type(error)) for i, _, error in step.failed] == [(bad, MemoryError)]
    assert all(len(slots.stack(module)) == 1 for module in LAYERS)
    for name, y in rows_alone([good], {"a": lora(1), "b": lora(2)}).items():
        np.testing.assert_array_equal(answers(step)[name], y)


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
def test_another_version_of_a_pinned_adapter_stops_no_other() -> None:
    slots, scheduler = make_slots(modules=LAYERS), Scheduler[str](2)
    slots.load(lora(1))
    slots.pin(1)
    scheduler.add("new version", lora(1, "1/1"))
    scheduler.add("good", lora(2))
    step = serving.next_step(scheduler, slots)
    assert list(step.rows) == ["good"]
    assert [(i, "unpin it first" in str(error)) for i, _, error in step.failed] == [
        ("new version", True)
    ]
    assert slots.active == [1, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_reach_their_own_rows_alone(value: float) -> None:
    """They load, as a model's own weights would: only the adapter's owner sees them."""

    def reads(path: str) -> dict[str, sgmv.Adapter]:
        found = layers_of({"q": ((2, 3), (4, 2)), "up": ((1, 2), (5, 1))})
        if path == "spoilt":
            for adapter in found.values():
                adapter.A[0, 1] = value
        return found

    slots, scheduler = make_slots(modules=LAYERS, read=reads), Scheduler[str](2)
    for request_id, one in (("a", lora(1)), ("spoilt", lora(2, "spoilt")), ("base", None)):
        scheduler.add(request_id, one)
    step = serving.next_step(scheduler, slots)
    assert step.failed == ()
    for y in answers(step).values():
        assert not np.isfinite(y[step.rows["spoilt"]]).any()
        assert (y[step.rows["a"]] > 0).all()
        assert (y[step.rows["base"]] == 0).all()


@pytest.mark.once
@pytest.mark.parametrize(
    ("names", "tokens", "part"),
    [
        (["r0", "r1"], {"r1": 2, "r11": 3}, r"tokens: .* got \['r11'\]; .*\(did you mean 'r1'\?\)"),
        (["r0", "r1"], {"zz": 3}, r"tokens: .* got \['zz'\]; .*\(there are 'r0', 'r1'\)"),
        ([0, 1], {7: 3}, r"tokens: .* got \[7\]; leave out .*\(there are \[0, 1\]\)"),
        (["r0", "r1"], {"r0": -1}, r"tokens\['r0'\]: expected at least 0, got -1"),
        (["r0", "r1"], {"r0": 1.5}, r"tokens\['r0'\]: expected an integer"),
    ],
)
def test_tokens_that_cannot_be_are_refused_before_anything_changes(
    names: list[Any], tokens: dict[Any, Any], part: str
) -> None:
    slots, scheduler = make_slots(), Scheduler[Any](1)
    for number, name in enumerate(names):
        scheduler.add(name, lora(1 + number))  # the second one waits in any case
    for _ in range(2):  # before the first step, and beside a running request
        before = list(scheduler.running), list(scheduler.waiting), str(slots), slots.counters
        with pytest.raises(SgmvError, match=part):
            serving.next_step(scheduler, slots, tokens)
        assert before == (
            list(scheduler.running), list(scheduler.waiting), str(slots), slots.counters
        )  # fmt: skip
        serving.next_step(scheduler, slots, {names[1]: 3})  # names of those that wait are right
    with pytest.raises(SgmvError, match=part):
        serving.make_step(slots, dict.fromkeys(names), tokens)


@pytest.mark.once
def test_a_reader_that_fails_is_told_with_its_adapter() -> None:
    slots = make_slots(read=sgmv.load_peft)
    for call in (slots.load, lambda one: slots.activate([one])):
        with pytest.raises(PeftError, match=r"LoRARequest\(lora_name='a7', .*no such directory"):
            call(lora(7, "no-such-place"))


@pytest.mark.once
def test_a_scheduler_for_more_slots_than_there_are() -> None:
    scheduler: Scheduler[str] = Scheduler(3)
    scheduler.add("a", lora(1))
    with pytest.raises(ServingError, match="scheduler: expected max_loras of at most 2"):
        serving.next_step(scheduler, make_slots(2))
    assert list(scheduler.waiting) == ["a"]


def test_threads_that_evict_while_others_run_steps() -> None:
    """Each add_lora gives its own step's answer, or is refused."""
    slots = make_slots(2, 3, modules=LAYERS)
    x = np.arange(6, dtype="f").reshape(2, 3)
    expected = {}
    for i in range(1, 6):
        pair = weights(f"{i}/0").get("q")
        adapters = {i: pair and pair[:2]}
        scalings = {i: pair[2] if pair else 1.0}
        expected[i] = reference.add_lora(np.zeros((2, 4)), x, adapters, [i, i], scalings)
    done, wrong = Counter[str](), []

    def serve(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(150):
                i = rng.randint(1, 5)
                step = serving.make_step(slots, {"r": lora(i)}, {"r": 2})
                for _ in range(rng.randint(1, 3)):
                    y = np.zeros((2, 4), "f")
                    try:
                        step.add_lora("q", y, x)
                    except StaleStepError:
                        done["stale"] += 1
                        break
                    np.testing.assert_array_equal(y, expected[i])
                    done["right"] += 1
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert done["right"] > 100


@pytest.mark.once
def test_a_child_may_use_the_slots_of_its_parent() -> None:
    """Though another thread of the parent held the lock when it was forked."""
    slots = make_slots()
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with slots._changing:
            held.set()
            forked.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert in_child(lambda: slots.activate([lora(1)])) == "nothing"
    finally:
        forked.set()
        thread.join()


# Directories that PEFT wrote


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_model_served_from_peft_directories(dtype: str, rng: np.random.Generator) -> None:
    """Requests come and go over more adapters than slots; every layer of every step is right."""
    directories = sorted((FIXTURES / "llama").iterdir())
    loras = [LoRARequest(path.name, i, str(path)) for i, path in enumerate(directories, 1)]
    slots, scheduler = AdapterSlots(2, 3, 17, dtype=dtype), Scheduler[int](2, 4, 3)
    peft = {one.lora_int_id: sgmv.load_peft(one.lora_path) for one in loras}
    left: dict[int, int] = {}
    every = np.arange(-1, len(loras))  # one adapter more than fit into host memory
    picks = rng.permutation(np.concatenate([every, rng.choice(every, 9)]))
    for number, k in enumerate(picks.tolist()):
        scheduler.add(number, None if k < 0 else loras[k])
        left[number] = int(rng.integers(1, 4))
    widths: set[tuple[int, int]] = set()
    while scheduler.waiting or scheduler.running:
        tokens = {number: int(rng.integers(1, 4)) for number in left}
        step = serving.next_step(scheduler, slots, tokens)
        ids = np.full(step.n, -1)
        for number, rows in step.rows.items():
            given = scheduler.running[number]
            ids[rows] = given.lora_int_id if given else -1
        for module in slots.modules:
            stack = slots.stack(module)
            widths.add((stack.h_in, stack.h_out))
            x = rng.standard_normal((step.n, stack.h_in), "f")
            y = rng.standard_normal((step.n, stack.h_out), "f")
            adapters = {i: stack.fitted(its[module]) for i, its in peft.items() if module in its}
            given_adapters = {**dict.fromkeys(peft), **adapters}
            exact = reference.add_lora(y, x, given_adapters, ids)
            bound = add_lora_bound(y, x, given_adapters, ids, expected=exact)
            check(step.add_lora(module, y.copy(), x), exact, bound, f"step {ids}, {module}")
        for number in step.rows:
            left[number] -= 1
            if not left[number]:
                scheduler.finish(number)
                del left[number]
    assert len(widths) >= 4
    assert slots.counters.host_evictions
    assert slots.bytes_loaded >= slots.bytes_read > 0


@pytest.mark.once
def test_a_step_in_vllms_metadata() -> None:
    from sgmv import layouts

    slots = make_slots(3)
    step = serving.make_step(slots, {"a": lora(5), "b": None, "c": lora(2), "d": lora(5)})
    meta = layouts.vllm_v1(step.slots, slots.max_loras)
    assert meta.token_lora_mapping.tolist() == step.slots.tolist() == [1, -1, 0, 1]
    assert slots.active == [2, 5, None]
    assert layouts.check(meta) == []


# The simulator


def every_step(trace: Trace, max_loras: int, policy: str, **limits: Any) -> dict[str, Any]:
    """The same by a loop over every step, with real slots and weights."""
    costs, n = limits.pop("costs"), trace.n
    scheduler: Scheduler[int] = Scheduler(
        max_loras, limits["max_num_seqs"], limits["max_overtakes"]
    )
    slots = AdapterSlots(max_loras, limits["max_cpu_loras"], 3, policy=policy, read=read)
    left, wait, now, came = trace.tokens.tolist(), [-1] * n, 0, 0
    while came < n or scheduler.waiting or scheduler.running:
        while came < n and trace.arrival_us[came] <= now:
            adapter_id = int(trace.adapter_ids[came])
            scheduler.add(came, lora(adapter_id) if adapter_id else None)
            came += 1
        before = slots.counters
        step = serving.next_step(scheduler, slots)
        if not step.rows:
            now = int(trace.arrival_us[came])
            continue
        now += (slots.counters.host_misses - before.host_misses) * costs.read_us
        now += (slots.counters.slot_misses - before.slot_misses) * costs.load_us
        for i in step.rows:
            wait[i] = now - int(trace.arrival_us[i]) if wait[i] < 0 else wait[i]
            left[i] -= 1
        now += costs.step_us + costs.row_us * len(step.rows)
        for i in step.rows:
            if not left[i]:
                scheduler.finish(i)
    counters = slots.counters
    return {
        "wait_us": wait,
        "end_us": now,
        "deferrals": scheduler.deferrals,
        "misses": (counters.slot_misses, counters.host_misses),
        "evictions": (counters.slot_evictions, counters.host_evictions),
    }


@st.composite
def small_traces(draw: Any) -> Trace:
    n = draw(st.integers(0, 25))
    gaps = draw(st.lists(st.integers(0, 400), min_size=n, max_size=n))
    ids = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    tokens = draw(st.lists(st.integers(1, 6), min_size=n, max_size=n))
    return Trace(
        np.cumsum(np.array(gaps, np.int64)), np.array(ids, np.int64), np.array(tokens, int)
    )


@pytest.mark.once
@settings(max_examples=80)
@given(small_traces(), st.integers(1, 3), st.sampled_from(POLICIES), st.data())
def test_the_simulator_is_a_loop_over_every_step(
    trace: Trace, max_loras: int, policy: str, data: Any
) -> None:
    limits = {
        "max_cpu_loras": max_loras + data.draw(st.integers(0, 2)),
        "max_num_seqs": data.draw(st.integers(1, 5)),
        "max_overtakes": data.draw(st.sampled_from([0, 1, 3, 100])),
        "costs": Costs(step_us=50, row_us=7, adapter_bytes=1000, load_rate=50e6, read_rate=10e6),
    }
    outcome = simulate(trace, max_loras, policy, **limits)
    counters = outcome.counters
    assert every_step(trace, max_loras, policy, **limits) == {
        "wait_us": outcome.wait_us.tolist(),
        "end_us": outcome.end_us,
        "deferrals": outcome.deferrals,
        "misses": (counters.slot_misses, counters.host_misses),
        "evictions": (counters.slot_evictions, counters.host_evictions),
    }


@pytest.mark.once
def test_long_requests_take_no_longer_to_simulate() -> None:
    trace = Trace([0, 5, 10**12], [1, 2, 1], [10**9, 10**9, 3])
    outcome = simulate(trace, 1, costs=Costs(step_us=1000, row_us=0))
    assert outcome.end_us > 2 * 10**12
    assert outcome.deferrals == 1


@pytest.mark.once
def test_waiting_time_by_tenant() -> None:
    trace = draw_trace(3000, 20, rate=400.0, seed=3)
    outcome = simulate(trace, 2, max_num_seqs=8)
    tenants = outcome.tenants()
    for k, i in enumerate(tenants.ids):
        waits = np.sort(outcome.wait_us[trace.adapter_ids == i]) / 1e6
        assert tenants.requests[k] == len(waits)
        for percent, got in ((50, tenants.p50_s[k]), (99, tenants.p99_s[k])):
            assert got == np.percentile(waits, percent, method="inverted_cdf")
    assert outcome.wait_s(99) == np.percentile(outcome.wait_us, 99, method="inverted_cdf") / 1e6


@pytest.mark.once
def test_a_drawn_trace_is_what_was_asked_for() -> None:
    n, burst, rate = 40_000, 5.0, 20.0
    trace = draw_trace(n, 8, rate, alpha=1.5, burst=burst, mean_tokens=10.0, seed=1)
    again = draw_trace(n, 8, rate, alpha=1.5, burst=burst, mean_tokens=10.0, seed=1)
    for name in ("arrival_us", "adapter_ids", "tokens"):
        np.testing.assert_array_equal(getattr(trace, name), getattr(again, name))
    share = np.arange(1, 9) ** -1.5
    share /= share.sum()
    found = np.bincount(trace.adapter_ids, minlength=9)[1:] / n
    # Counts of bursts are binomial; six deviations, with a geometric size's second moment.
    deviation = np.sqrt(share * (1 - share) * 2 * burst / n)
    assert (np.abs(found - share) < 6 * deviation).all()
    assert n / (trace.arrival_us[-1] / 1e6) == pytest.approx(rate, rel=6 * np.sqrt(2 * burst / n))
    assert trace.tokens.mean() == pytest.approx(10, rel=6 / np.sqrt(n))
    starts = np.flatnonzero(np.diff(trace.arrival_us)) + 1
    assert n / (len(starts) + 1) == pytest.approx(burst, rel=6 * np.sqrt(burst / n))


@pytest.mark.once
@pytest.mark.parametrize(
    "options",
    [{"rate": 0}, {"rate": float("nan")}, {"alpha": -1}, {"burst": 0.5}, {"mean_tokens": "many"},
     {"requests": -1}, {"adapters": 0}, {"seed": -1}],
)  # fmt: skip
def test_a_trace_that_cannot_be_drawn(options: dict[str, Any]) -> None:
    with pytest.raises(SgmvError, match=next(iter(options))):
        draw_trace(**options)


@pytest.mark.once
@pytest.mark.parametrize(
    "columns",
    [
        ([1, 0], [1, 1], [1, 1]),
        ([0], [1, 1], [1]),
        ([0], [-1], [1]),
        ([0], [1], [0]),
        ([0.5], [1], [1]),
    ],
)
def test_a_trace_is_checked(columns: Any) -> None:
    with pytest.raises(SgmvError, match="expected"):
        Trace(*columns)


@pytest.mark.once
@pytest.mark.parametrize(
    "costs", [{"step_us": 0}, {"row_us": -1}, {"load_rate": 0.0}, {"read_rate": float("inf")}]
)
def test_costs_are_checked(costs: dict[str, Any]) -> None:
    with pytest.raises(SgmvError, match=next(iter(costs))):
        Costs(**costs)


@pytest.mark.once
def test_an_empty_trace() -> None:
    outcome = simulate(Trace([], [], []))
    assert outcome.end_us == 0
    assert "nan" in table([outcome])


# The room


@pytest.mark.once
def test_public_names_have_contracts() -> None:
    """One line, `Semantics:`, an example; a source, where somebody else defined the thing."""
    ours = {"Counters", "Outcome", "Trace", "Scheduler.admit"}
    public = {name: getattr(serving, name) for name in serving.__all__ if name != "POLICIES"}
    for owner in (AdapterSlots, Scheduler, serving.Step):
        for name, value in vars(owner).items():
            if not name.startswith("_") and callable(value):
                public[f"{owner.__name__}.{name}"] = value
    for name, value in public.items():
        doc = value.__doc__ or ""
        assert doc.splitlines()[0].strip(), name
        assert ">>>" in doc, f"{name} has no example"
        assert "Semantics:" in doc, f"{name} has no Semantics"
        assert name in ours or "Source:" in doc, f"{name} has no source"


# The command line


@pytest.mark.once
def test_the_command_prints_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "serving.png"
    main(["simulate", "--requests", "300", "--slots", "1,4", "--figure", str(path)])
    printed = capsys.readouterr().out
    outcomes = [
        simulate(draw_trace(300, 10_000, 6.0), slots, policy)
        for slots in (1, 4)
        for policy in POLICIES
    ]
    headline, _, printed_table = printed.partition("\n\n")
    adapters = draw_trace(300, 10_000, 6.0).adapters
    assert headline.startswith(
        f"300 requests for {adapters} adapters, 6 per second, seed 0; a step"
    )
    assert printed_table.strip() == table(outcomes).strip()
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.once
def test_the_command_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--slots", "0"], "--slots: expected whole numbers of at least 1, with commas, got '0'"),
        (["--slots", "x"], "--slots: expected whole numbers of at least 1, with commas, got 'x'"),
        (["--slots", ""], "--slots: expected numbers of slots, got none"),
        (["--slots", "300"], "--max-cpu-loras: expected at least the 300 of --slots"),
        (["--requests", "0"], "--requests: expected at least 1, got 0\n"),
        (["--adapters", "0"], "--adapters: expected at least 1, got 0\n"),
        (["--rate", "x"], "--rate: expected a number, got 'x'\n"),
        (["--mean-tokens", "0"], "--mean-tokens: expected a finite number of at least 1, got 0.0"),
        (["--load-rate", "0"], "--load-rate: expected a finite number of at least 1, got 0.0"),
        (["--policy", "mru"], "--policy: expected one of lru, fifo, got 'mru'\n"),
        (["--figure", "a.xyz", "--requests", "9"], "--figure: expected a name that ends in .png"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["simulate", *arguments])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith(f"sgmv: error: {message}")
        assert len(said.splitlines()) == 1


@pytest.mark.once
def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["simulate", "--requests", "300", "--slots", "4", "--json"])
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told["arguments"]["requests"] == 300
    assert [each["policy"] for each in told["outcomes"]] == list(POLICIES)
    outcome = simulate(draw_trace(300, 10_000, 6.0), 4, "lru")
    assert told["outcomes"][0] == {
        "slots": 4,
        "policy": "lru",
        "hit_rate": outcome.hit_rate,
        "deferral_rate": outcome.deferral_rate,
        "wait_p50_s": outcome.wait_s(50),
        "wait_p99_s": outcome.wait_s(99),
        "tenant_median_p99_s": float(np.median(outcome.tenants().p99_s)),
        "tenant_worst_p99_s": float(outcome.tenants().p99_s.max()),
        "loaded_bytes": outcome.loaded_bytes,
        "read_bytes": outcome.read_bytes,
        "requests_per_s": outcome.requests_per_s,
    }


@pytest.mark.once
@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_follows_the_width(width: int) -> None:
    """Every row begins with its slots and policy; nothing is cut."""
    outcomes = [simulate(draw_trace(900), slots, max_cpu_loras=64) for slots in (2, 64)]
    text = table(outcomes, Terminal(width))
    assert max(map(len, text.splitlines())) <= width
    parts = text.split("\n\n")
    assert len(parts) == (2 if width == 60 else 1)
    for part in parts:
        assert part.splitlines()[2].split()[:2] == ["slots", "policy"]
        assert [line.split()[:2] for line in part.splitlines()[3:]] == [["2", "lru"], ["64", "lru"]]
    cells = [cell for part in parts for cell in part.splitlines()[4].split()[2:]]
    assert cells == table(outcomes[1:], Terminal(200)).splitlines()[3].split()[2:]


@pytest.mark.once
def test_a_figure_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ServingError, match="pip install matplotlib"):
        figure([], "a.png")


@pytest.mark.once
def test_commands_are_imported_when_asked_for() -> None:
    program = (
        "import json, sys; from sgmv.__main__ import main; main(['info']);"
        "print(json.dumps([m for m in sys.modules if 'serving' in m]))"
    )
    done = run_python(program)
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr
    for module, text in COMMANDS.values():
        assert hasattr(importlib.import_module(module), "command")
        assert text


# The page

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.mark.once
def test_the_page_tells_what_the_commands_print(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`SGMV_WRITE_PAGE=1 pytest -k the_page` writes it anew."""
    monkeypatch.setenv("COLUMNS", "80")
    page = PAGE.read_text()

    def shown(block: re.Match[str]) -> str:
        text = ""
        for command in re.findall(r"^\$ sgmv (.*)$", block[0], re.MULTILINE):
            main(command.split())
            text += f"$ sgmv {command}\n{capsys.readouterr().out}"
        return f"```console\n{text}```\n"

    expected, blocks = re.subn(r"```console\n\$ .*?```\n", shown, page, flags=re.DOTALL)
    assert blocks == 2
    if os.environ.get("SGMV_WRITE_PAGE"):
        PAGE.write_text(expected)
    assert page == expected


@pytest.mark.once
def test_the_page_tells_what_python_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PAGE.parent.parent)
    found = doctest.testfile(str(PAGE), module_relative=False)
    assert found.attempted > 10
    assert found.failed == 0
