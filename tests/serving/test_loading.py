"""The loading thread: no step waits for an adapter that none of its rows names."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import reference
import sgmv
from sgmv.errors import DtypeError, ServingError, StaleStepError
from sgmv.serving import AdapterSlots, LoRAMixture, LoRARequest, Scheduler, next_step
from tests.help.planting import Fault, outcome, verdict
from tests.help.served import ROOM, lora, make_slots, read
from tests.help.serving_model import LAYERS, Room, weights

PATIENCE = 60  # seconds until a test gives up: none is decided by how long something takes


class Gate:
    """A reader that waits, for the paths that are closed, until they are opened."""

    def __init__(self, room: Room = ROOM, closed: tuple[str, ...] = ()) -> None:
        self.room, self.closed = room, {path: threading.Event() for path in closed}
        self.paths: list[str] = []
        self.threads: set[int] = set()

    def __call__(self, path: str) -> Any:
        self.paths.append(path)
        self.threads.add(threading.get_ident())
        if path in self.closed:
            assert self.closed[path].wait(PATIENCE)
        if path.startswith("bad"):
            raise OSError("disk on fire")
        return {name: self.room.sgmv.Adapter(*pair) for name, pair in weights(path).items()}

    def open(self, path: str) -> None:
        self.closed.pop(path).set()


def until(what: Callable[[], Any]) -> Any:
    """What comes of it, once it is something."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.001)
    raise AssertionError("it never came")


def rest(slots: Any) -> None:
    """Until the loading thread has nothing left to do."""
    until(lambda: slots._loader._thread is None)


def check_rows(step: Any, loras: dict[Any, Any]) -> None:
    """Every row is what its own request's adapter gives, at every layer."""
    for name, (h_in, h_out) in LAYERS.items():
        if name not in step.adapter_slots.modules:
            continue
        x = np.arange(step.n * h_in, dtype="f").reshape(step.n, h_in)
        y = step.add_lora(name, np.zeros((step.n, h_out), "f"), x)
        for request_id, rows in step.rows.items():
            asked = loras[request_id]
            pair = weights(asked.lora_path).get(name) if asked else None
            if pair is None:
                assert not y[rows].any()
                continue
            expected = reference.lora_delta(x[rows], *pair)
            np.testing.assert_array_equal(y[rows], expected)


# Scenarios: each is run on the package, and on copies with faults planted


def others_run_meanwhile(room: Room) -> None:
    gate = Gate(room, ("2/0",))
    slots = room.serving.AdapterSlots(3, 3, 3, modules=LAYERS, read=gate)
    scheduler = room.serving.Scheduler(3)
    loras = {"base": None, "a": room.lora(1), "slow": room.lora(2), "too": room.lora(1)}
    for request_id, asked in loras.items():
        scheduler.add(request_id, asked)

    def step() -> Any:
        made = room.serving.next_step(scheduler, slots, wait=False)
        check_rows(made, loras)
        assert {*made.rows, *made.loading} == set(loras)
        assert made.failed == ()
        return made

    assert list(step().rows) == ["base"]
    until(lambda: list(step().rows) == ["base", "a", "too"])
    for _ in range(5):
        assert step().loading == ("slow",)
    gate.open("2/0")
    until(lambda: list(step().rows) == ["base", "a", "slow", "too"])
    assert threading.get_ident() not in gate.threads
    assert sorted(gate.paths) == ["1/0", "2/0"]
    assert slots.counters.slot_misses == slots.counters.host_misses == 2
    assert slots.bytes_read == slots.bytes_loaded
    assert not slots._weights.packed


def what_steps_need_goes_first_and_stays(room: Room) -> None:
    """Beside a flood of adapters that are only expected, and more than host memory holds."""
    gate = Gate(room, ("9/0",))
    slots = room.serving.AdapterSlots(1, 3, 3, modules=LAYERS, read=gate)
    scheduler = room.serving.Scheduler(1)
    slots.prefetch([room.lora(9)])
    until(lambda: gate.paths)
    for i in (4, 5, 6):
        slots.prefetch([room.lora(i)])
    scheduler.add("a", room.lora(1))
    scheduler.add("base")
    loras = {"a": room.lora(1), "base": None}
    assert room.serving.next_step(scheduler, slots, wait=False).loading == ("a",)
    gate.open("9/0")
    until(lambda: "a" in room.serving.next_step(scheduler, slots, wait=False).rows)
    assert gate.paths.index("1/0") == 1
    step = room.serving.next_step(scheduler, slots, wait=False)
    for i in range(10, 30):  # none of which may push it out, though it has not been used since
        slots.prefetch([room.lora(i)])
        if i % 3 == 0:
            rest(slots)
        check_rows(step, loras)
    rest(slots)
    assert slots.active == [1]
    assert len(slots.loaded) == 3


def failures_are_told_once(room: Room) -> None:
    gate = Gate(room)
    slots = room.serving.AdapterSlots(3, 3, 3, modules=LAYERS, read=gate)
    scheduler = room.serving.Scheduler(3)
    bad = room.serving.LoRARequest("a2", 2, "bad/0")
    loras = {"base": None, "bad": bad, "a": room.lora(1)}
    for request_id, asked in loras.items():
        scheduler.add(request_id, asked)
    failed: list[Any] = []

    def runs() -> bool:
        step = room.serving.next_step(scheduler, slots, wait=False)
        check_rows(step, loras)
        failed.extend(step.failed)
        assert "bad" not in step.rows
        return bool(failed) and "a" in step.rows

    until(runs)
    [(request_id, asked, error)] = failed
    assert (request_id, asked, str(error)) == ("bad", bad, "disk on fire")
    assert sorted(scheduler.running) == ["a", "base"]
    assert room.serving.next_step(scheduler, slots, wait=False).failed == ()
    assert (slots.active.count(None), slots.loaded) == (2, [1])
    assert gate.paths.count("bad/0") == 1
    scheduler.add("again", bad)  # it is tried again
    failed = until(lambda: room.serving.next_step(scheduler, slots, wait=False).failed)
    assert [request_id for request_id, *_ in failed] == ["again"]
    assert gate.paths.count("bad/0") == 2


def a_replaced_adapter_is_not_packed(room: Room) -> None:
    """One that was packed for a step, and is another before it has a slot."""
    slots = room.serving.AdapterSlots(1, 3, 3, modules=LAYERS, read=Gate(room))
    scheduler = room.serving.Scheduler(1)
    scheduler.add("base")
    scheduler.add("a", room.lora(1))
    assert room.serving.next_step(scheduler, slots, wait=False).loading == ("a",)
    until(lambda: slots._weights.packed)
    rest(slots)
    slots.load(room.lora(1, 1))
    check_rows(room.serving.make_step(slots, {"a": room.lora(1, 1)}), {"a": room.lora(1, 1)})


def a_version_in_use_stays(room: Room) -> None:
    gate = Gate(room)
    slots = room.serving.AdapterSlots(1, 3, 3, modules=LAYERS, read=gate)
    step = room.serving.make_step(slots, {"a": room.lora(1)})
    slots.prefetch([room.lora(1, 1)])
    rest(slots)
    check_rows(step, {"a": room.lora(1)})
    room.serving.make_step(slots, {"base": None})  # now no step uses it
    slots.prefetch([room.lora(1, 1)])
    rest(slots)
    assert (slots.loaded, slots.active) == ([1], [None])
    check_rows(room.serving.make_step(slots, {"a": room.lora(1, 1)}), {"a": room.lora(1, 1)})


SCENARIOS = {
    one.__name__: one
    for one in (
        others_run_meanwhile,
        what_steps_need_goes_first_and_stays,
        failures_are_told_once,
        a_replaced_adapter_is_not_packed,
        a_version_in_use_stays,
    )
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario(name: str) -> None:
    SCENARIOS[name](ROOM)


FAULTS = {
    "a step reads by itself": (
        others_run_meanwhile,
        Fault(
            "serving.slots",
            "for i, one in wanted.items() if i not in unready}",
            "for i, one in wanted.items()}",
        ),
    ),
    "requests whose adapters are read are lost": (
        others_run_meanwhile,
        Fault("serving.step", "            absent.append(request_id)\n", "            pass\n"),
    ),
    "packed layers of what was replaced": (
        a_replaced_adapter_is_not_packed,
        Fault("serving.weights", "del self.hosted[i]\n                self.packed.pop(i, None)",
              "del self.hosted[i]"),
    ),
    "packed layers are kept": (
        others_run_meanwhile,
        Fault("serving.weights", "        self.packed.pop(i, None)\n        self.generation",
              "        self.generation"),
    ),
    "what a step needs waits for its turn": (
        what_steps_need_goes_first_and_stays,
        Fault("serving.loading", "{**asked, **self._asked} if first",
              "{**self._asked, **asked} if first"),
    ),
    "what a step needs is evicted for what is expected": (
        what_steps_need_goes_first_and_stays,
        Fault("serving.slots", "keep = self._pinned | self._needed.keys() | {i}",
              "keep = self._pinned | {i}"),
    ),
    "failures are forgotten": (
        failures_are_told_once,
        Fault("serving.loading", "self._failed[lora_request] = failure\n", "pass\n"),
    ),
    "failures are told for ever": (
        failures_are_told_once,
        Fault("serving.loading", "{i: self._failed.pop(one, None)", "{i: self._failed.get(one)"),
    ),
    "a version in use is replaced": (
        a_version_in_use_stays,
        Fault("serving.slots", "is_in_use = self._needed", "is_in_use = False and self._needed"),
    ),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, fault = FAULTS[name]
    monkeypatch.setitem(globals(), "PATIENCE", 3)

    def check(modules: dict[str, ModuleType]) -> None:
        scenario(Room(modules["sgmv"], modules["sgmv.serving"]))

    said = verdict(check, fault, name="sgmv.serving")
    assert said.startswith(("AssertionError", "StaleStepError"))


@pytest.mark.once
@pytest.mark.parametrize("name", SCENARIOS)
def test_without_a_fault_nothing_is_seen(name: str) -> None:
    def check(modules: dict[str, ModuleType]) -> None:
        SCENARIOS[name](Room(modules["sgmv"], modules["sgmv.serving"]))

    assert verdict(check, name="sgmv.serving") == "nothing"


# The calls


@pytest.mark.once
def test_prefetched_adapters_are_in_host_memory_and_not_read_again() -> None:
    gate = Gate()
    slots = make_slots(1, 3, modules=LAYERS, read=gate)
    mixture = LoRAMixture([(lora(1), 0.5), (lora(2), 1.0)])
    slots.prefetch([None, mixture, lora(1)])
    until(lambda: slots.loaded == [1, 2])
    rest(slots)
    assert (slots.active, slots.counters.host_misses, slots.counters.slot_misses) == ([None], 2, 0)
    assert slots.bytes_read > 0
    slots.prefetch([lora(2)])
    slots.activate([lora(2)])
    assert slots.counters.host_hits == 1
    assert gate.paths == ["1/0", "2/0"]


@pytest.mark.once
def test_where_nothing_else_runs_the_step_waits_for_the_first_adapter() -> None:
    gate = Gate(closed=("1/0", "2/0"))
    slots, scheduler = make_slots(2, 4, modules=LAYERS, read=gate), Scheduler[str](2)
    loras: dict[str, Any] = {"a": lora(1), "b": lora(2)}
    for request_id, asked in loras.items():
        scheduler.add(request_id, asked)
    timer = threading.Timer(0.05, gate.open, ["1/0"])
    timer.start()
    step = next_step(scheduler, slots, wait=False)
    assert (list(step.rows), step.loading) == (["a"], ("b",))
    check_rows(step, loras)
    gate.open("2/0")
    timer.join()
    step = until(lambda: (made := next_step(scheduler, slots, wait=False)).n == 2 and made)
    check_rows(step, loras)


@pytest.mark.once
def test_a_mixture_waits_for_all_of_its_adapters() -> None:
    gate = Gate(closed=("2/0",))
    slots, scheduler = make_slots(2, 4, modules=LAYERS, read=gate), Scheduler[str](2)
    scheduler.add("mixed", LoRAMixture([(lora(1), 1.0), (lora(2), 1.0)]))
    scheduler.add("plain", lora(1))
    until(lambda: next_step(scheduler, slots, wait=False).n == 1)
    step = next_step(scheduler, slots, wait=False)
    assert (list(step.rows), step.loading) == (["plain"], ("mixed",))
    gate.open("2/0")
    step = until(lambda: (made := next_step(scheduler, slots, wait=False)).n == 2 and made)
    assert step.slots.shape == (2, 2)


@pytest.mark.once
def test_of_a_mixture_one_that_fails_beside_one_that_is_read() -> None:
    """Nothing else runs: the failure is told, and not lost while the step waits."""
    gate = Gate(closed=("2/0",))
    slots, scheduler = make_slots(2, 4, modules=LAYERS, read=gate), Scheduler[str](2)
    bad = LoRARequest("a1", 1, "bad/0")
    scheduler.add("mixed", LoRAMixture([(bad, 1.0), (lora(2), 1.0)]))
    step = next_step(scheduler, slots, wait=False)
    assert [(request_id, one) for request_id, one, _ in step.failed] == [("mixed", bad)]
    assert not scheduler.running
    gate.open("2/0")
    rest(slots)
    assert slots.loaded == [2]


@pytest.mark.once
def test_an_adapter_evicted_from_its_slot_is_packed_by_the_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is in host memory needs no reading; steps do not copy its weights either."""
    slots, scheduler = make_slots(1, 4, modules=LAYERS), Scheduler[str](1)
    slots.activate([lora(1)])
    slots.activate([lora(2)])
    threads = set()
    pack = sgmv.AdapterStack._packed

    def noted(self: sgmv.AdapterStack, adapter: sgmv.Adapter) -> Any:
        threads.add(threading.get_ident())
        return pack(self, adapter)

    monkeypatch.setattr(sgmv.AdapterStack, "_packed", noted)
    scheduler.add("base")
    scheduler.add("a", lora(1))
    assert next_step(scheduler, slots, wait=False).loading == ("a",)
    step = until(lambda: (made := next_step(scheduler, slots, wait=False)).n == 2 and made)
    check_rows(step, {"base": None, "a": lora(1)})
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.once
def test_pinned_adapters_are_neither_evicted_nor_replaced() -> None:
    slots = make_slots(1, 2, modules=LAYERS)
    slots.load(lora(1))
    slots.pin(1)
    slots.prefetch([lora(2)])
    rest(slots)
    slots.prefetch([lora(3)])
    rest(slots)
    assert (slots.loaded, slots.active) == ([1, 3], [1])
    slots.prefetch([lora(1, "1/1")])
    rest(slots)
    slots.activate([lora(1)])
    scheduler = Scheduler[str](1)
    scheduler.add("base")
    scheduler.add("a", lora(1, "1/1"))
    [(request_id, _, error)] = until(lambda: next_step(scheduler, slots, wait=False).failed)
    assert request_id == "a"
    assert "unpin it first" in str(error)


@pytest.mark.once
def test_a_failure_of_the_past_is_not_told() -> None:
    """Read since by a call that waits; or prefetched again."""
    found: dict[str, Any] = {}
    slots = make_slots(1, 2, modules=LAYERS, read=lambda path: found[path])
    for mend in (lambda: slots.load(lora(1)), lambda: slots.activate([lora(1)])):
        found.clear()
        slots.prefetch([lora(1)])
        rest(slots)
        assert slots.loaded == []
        found["1/0"] = read("1/0")
        mend()
        slots.unload(1)
        scheduler = Scheduler[str](1)
        scheduler.add("a", lora(1))
        assert list(next_step(scheduler, slots, wait=False).rows) == ["a"]
        slots.unload(1)


@pytest.mark.once
def test_only_the_last_failures_are_kept() -> None:
    slots = make_slots(1, 200, read=Gate())
    for i in range(1, 201):
        slots.prefetch([lora(i, f"bad/{i}")])
    rest(slots)
    assert len(slots._loader._failed) == 64


@pytest.mark.once
def test_a_reader_that_exits_is_a_failure() -> None:
    """Else its request would wait for ever for a thread that has ended."""

    def exits(path: str) -> Any:
        raise SystemExit(3)

    slots, scheduler = make_slots(read=exits), Scheduler[str](1)
    scheduler.add("a", lora(1))
    [(_, _, error)] = next_step(scheduler, slots, wait=False).failed
    assert "SystemExit(3)" in str(error)


@pytest.mark.once
def test_layers_that_are_taught_meanwhile() -> None:
    """Two adapters disagree about a width, and the one read ahead comes second: it fails."""
    gate = threading.Event()

    def reads(path: str) -> Any:
        if path == "late":
            assert gate.wait(PATIENCE)
            return {"q": sgmv.Adapter(np.ones((1, 5), "f"), np.ones((4, 1), "f"))}
        return {"q": sgmv.Adapter(np.ones((1, 3), "f"), np.ones((4, 1), "f"))}

    slots, scheduler = make_slots(2, 4, read=reads), Scheduler[str](2)
    slots.prefetch([lora(2, "late")])
    slots.load(lora(1))
    gate.set()
    rest(slots)
    assert slots.loaded == [1]
    scheduler.add("a", lora(1))
    scheduler.add("late", lora(2, "late"))
    [(request_id, _, error)] = until(lambda: next_step(scheduler, slots, wait=False).failed)
    assert request_id == "late"
    assert "h_in = 3" in str(error)


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="priorities are the process's there")
def test_the_thread_leaves_cores_to_the_steps() -> None:
    """Its priority is lower, and that of no other thread."""
    found: list[int] = []

    def reads(path: str) -> Any:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return read(path)

    own = os.getpriority(os.PRIO_PROCESS, 0)
    slots = make_slots(read=reads)
    slots.prefetch([lora(1)])
    rest(slots)
    assert found == [min(own + 10, 19)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


@pytest.mark.once
def test_prefetch_refuses_what_there_is_no_room_for() -> None:
    slots = make_slots(1, 2)
    with pytest.raises(ServingError, match=r"at most max_cpu_loras = 2 adapters"):
        slots.prefetch([lora(1), lora(2), lora(3)])
    with pytest.raises(ServingError, match="one adapter for each id"):
        slots.prefetch([lora(1), lora(1, "1/1")])
    with pytest.raises(DtypeError, match="lora_request"):
        slots.prefetch([7])  # type: ignore[list-item]
    assert slots._loader._thread is None
    assert slots.loaded == []


@pytest.mark.once
def test_a_child_reads_what_its_parent_was_reading() -> None:
    """The thread is the parent's alone."""
    gate = Gate(closed=("1/0",))
    slots, scheduler = make_slots(2, 4, modules=LAYERS, read=gate), Scheduler[str](2)
    scheduler.add("a", lora(1))
    scheduler.add("base")
    assert next_step(scheduler, slots, wait=False).loading == ("a",)
    until(lambda: gate.paths)

    def child() -> None:
        gate.open("1/0")
        until(lambda: next_step(scheduler, slots, wait=False).n == 2)

    assert outcome(child) == "nothing"
    gate.open("1/0")
    until(lambda: next_step(scheduler, slots, wait=False).n == 2)


def test_servers_and_prefetches_on_the_same_slots() -> None:
    """Each add_lora gives its own step's answer, or is refused; every request comes to run."""
    slots = make_slots(4, 6, modules=LAYERS)
    done, wrong = Counter[str](), []

    def serve(seed: int) -> None:
        rng = random.Random(seed)
        scheduler, loras = Scheduler[int](2), {}
        try:
            for number in range(40):
                loras[number] = rng.choice([None, lora(rng.randint(1, 9))])
                scheduler.add(number, loras[number])
            while scheduler.waiting or scheduler.running:
                slots.prefetch([lora(rng.randint(1, 9))])
                step = next_step(scheduler, slots, wait=rng.random() < 0.1)
                assert step.failed == ()
                try:
                    check_rows(step, loras)
                except StaleStepError:
                    done["stale"] += 1
                    continue
                done["rows"] += step.n
                for request_id in step.rows:
                    scheduler.finish(request_id)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert done["rows"] == 2 * 40


@pytest.mark.once
def test_slots_go_with_their_last_name() -> None:
    """The thread keeps them only while it reads."""
    slots = make_slots()
    slots.prefetch([lora(1)])
    rest(slots)
    known = weakref.ref(slots)
    del slots
    until(lambda: known() is None)


@pytest.mark.once
def test_results_are_those_of_steps_that_wait() -> None:
    """The same requests, in the same rows at the end, with the same bits."""
    loras: dict[str, LoRARequest | None] = {"a": lora(3), "b": None, "c": lora(5)}
    found = []
    for wait in (True, False):
        slots, scheduler = AdapterSlots(2, 2, 3, modules=LAYERS, read=read), Scheduler[str](2)
        for request_id, asked in loras.items():
            scheduler.add(request_id, asked)
        step = until(lambda: (made := next_step(scheduler, slots, wait=wait)).n == 3 and made)  # noqa: B023
        x = np.random.default_rng(0).standard_normal((3, 3)).astype("f")
        found.append(step.add_lora("q", np.zeros((3, 4), "f"), x).tobytes())
    assert found[0] == found[1]
