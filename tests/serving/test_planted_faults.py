"""Random sequences of requests: what they reach, and the planted faults that they find."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import pytest

from tests.help.planting import Fault, verdict
from tests.help.served import ROOM
from tests.help.serving_model import Room, drive_scheduler, drive_slots


def test_the_sequences_reach_what_they_are_for() -> None:
    seen: Counter[str] = Counter()
    for seed in range(80):
        seen += drive_scheduler(ROOM, random.Random(seed))
        seen += drive_slots(ROOM, random.Random(seed))
    rare = (
        "several",
        "mixed",
        "overtaken as often as may be",
        "deferred",
        "sat out",
        "refused",
        "stale",
        "run",
    )
    assert all(seen[name] >= 10 for name in rare), seen


Drive = Callable[[Room, random.Random], object]

FAULTS = {
    "overtaken once too often": Fault(
        "serving.scheduler", ">= self.max_overtakes", "> self.max_overtakes"
    ),
    "those that gave up count as overtaking": Fault(
        "serving.scheduler", "- came - len(self._given_up)", "- came"
    ),
    "one adapter too many": Fault("serving.scheduler", "if need <= max(room, 0):", "if True:"),
    "the base model takes a slot": Fault(
        "serving.scheduler",
        "room = self.max_loras + 1 - len",
        "room = self.max_loras - len",
    ),
    "a line without its first is forgotten": Fault(
        "serving.scheduler", "if line and was_oldest:", "if False:"
    ),
    "pins are not seen": Fault(
        "serving.scheduler", "if pinned == self._pinned:", "if pinned is not None:"
    ),
    "waiting requests behind are not tried": Fault(
        "serving.scheduler", "if oldest is not fitting and self", "if oldest is not fitting or self"
    ),
    "a mixture needs one slot": Fault(
        "serving.scheduler",
        "return sum(i not in self._holding for i in ids)",
        "return int(any(i not in self._holding for i in ids))",
    ),
    "lines of a mixture are not looked at again": Fault(
        "serving.scheduler", "self._lines_of.get(i, ())}", "[(i,)]}"
    ),
    "a mixture lets go of one alone": Fault(
        "serving.scheduler",
        "self._holding.difference_update(gone)",
        "self._holding.difference_update(gone[:1])",
    ),
    "weights of a mixture are lost": Fault(
        "serving.step", "active[lora.lora_int_id], weight", "active[lora.lora_int_id], 1"
    ),
    "a mixture's first adapter alone": Fault(
        "serving.step", "enumerate(each):", "enumerate(each[:1]):"
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


def drive(modules: dict[str, ModuleType], sequences: int, *drives: Drive) -> None:
    room = Room(modules["sgmv"], modules["sgmv.serving"])
    for seed in range(sequences):
        for one in drives:
            one(room, random.Random(seed))


@pytest.mark.once
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str) -> None:
    fault = FAULTS[name]
    one = drive_scheduler if fault.module == "serving.scheduler" else drive_slots
    said = verdict(lambda modules: drive(modules, 100, one), fault, name="sgmv.serving")
    assert said.startswith(("AssertionError", "KeyError"))


@pytest.mark.once
def test_without_a_fault_nothing_is_seen() -> None:
    both = drive_scheduler, drive_slots
    said = verdict(lambda modules: drive(modules, 20, *both), name="sgmv.serving")
    assert said == "nothing"
