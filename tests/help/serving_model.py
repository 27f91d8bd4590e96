"""The serving room's rules in their plainest form, and random sequences that hold it to them.

Nothing here is clever: the scheduler is a list that is read from the front, eviction compares
times. `drive_scheduler` and `drive_slots` run one random sequence against the room given to them,
which is ours, or one with a fault planted.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import reference

BASE = 0


class Room(NamedTuple):
    """The package under test and its serving room."""

    sgmv: ModuleType
    serving: ModuleType

    def lora(self, adapter_id: int, version: int = 0) -> Any:
        """The adapter of this id, or what has taken its place."""
        if adapter_id == BASE:
            return None
        return self.serving.LoRARequest(f"a{adapter_id}", adapter_id, f"{adapter_id}/{version}")

    def asked(self, ids: frozenset[int], version: int = 0) -> Any:
        """What a request for these adapters names: none, one, or several with weights."""
        loras = [self.lora(i, version) for i in sorted(ids)]
        if len(loras) < 2:
            return loras[0] if loras else None
        return self.serving.LoRAMixture([(lora, 2.0**-k) for k, lora in enumerate(loras)])


# The scheduler


@dataclass
class Waiting:
    request_id: int
    ids: frozenset[int]
    overtaken: int = 0
    deferred: bool = False


@dataclass
class PlainScheduler:
    max_loras: int
    max_num_seqs: int
    max_overtakes: int
    waiting: list[Waiting] = field(default_factory=list)
    running: dict[int, frozenset[int]] = field(default_factory=dict)  # request -> adapters
    deferrals: int = 0
    most_overtaken: int = 0

    def schedule(self, pinned: frozenset[int]) -> list[int]:
        while (one := self.admissible(pinned)) is not None:
            self.waiting.remove(one)
            self.running[one.request_id] = one.ids
            self.deferrals += one.deferred
        if len(self.running) < self.max_num_seqs:
            for other in self.waiting:
                other.deferred = True
        having: set[int] = set(pinned)
        chosen = []
        for request_id, ids in self.running.items():
            if len(having | ids) <= max(self.max_loras, len(having)):
                having |= ids
                chosen.append(request_id)
        return chosen

    def admissible(self, pinned: frozenset[int]) -> Waiting | None:
        """The oldest waiting request that fits, unless it may overtake no more."""
        if len(self.running) == self.max_num_seqs:
            return None
        using = pinned.union(*self.running.values())
        for place, one in enumerate(self.waiting):
            if one.ids <= using or len(using | one.ids) <= self.max_loras:
                for older in self.waiting[:place]:
                    older.overtaken += 1
                    older.deferred = True
                    self.most_overtaken = max(self.most_overtaken, older.overtaken)
                return one
            if one.overtaken >= self.max_overtakes:
                return None
        return None

    def finish(self, request_id: int) -> None:
        self.running.pop(request_id, None)
        self.waiting = [one for one in self.waiting if one.request_id != request_id]


def drive_scheduler(room: Room, rng: random.Random, operations: int = 60) -> Counter[str]:
    """Random arrivals, steps, ends and pins: the scheduler does what the plain one does."""
    limits = rng.randint(1, 3), rng.choice([2, 4, 9, 20]), rng.choice([0, 1, 2, 5, 100])
    plain, real = PlainScheduler(*limits), room.serving.Scheduler(*limits)
    pinned: frozenset[int] = frozenset()
    seen: Counter[str] = Counter()
    adapters, several = rng.randint(1, 7), rng.choice([0, 0.3])
    for number in range(operations):
        way = rng.random()
        if way < 0.45:
            first = min(rng.randint(0, adapters), rng.randint(0, adapters))
            ids = frozenset({first} - {BASE})
            if rng.random() < several:
                more = rng.sample(range(1, adapters + 1), min(adapters, plain.max_loras))
                ids = frozenset(more[: rng.randint(1, plain.max_loras)])
                seen["several"] += len(ids) > 1
            plain.waiting.append(Waiting(number, ids))
            real.add(number, room.asked(ids))
        elif way < 0.7:
            expected = plain.schedule(pinned)
            assert list(real.schedule(pinned)) == expected
            seen["sat out"] += len(plain.running) - len(expected)
            running = [room.asked(ids) for ids in plain.running.values()]
            assert list(real.running.values()) == running
        elif way < 0.95:
            known = [*plain.running, *(one.request_id for one in plain.waiting)]
            if known:
                early = rng.random() < 0.8 and plain.running
                request_id = rng.choice([*plain.running] if early else known)
                plain.finish(request_id)
                real.finish(request_id)
        else:
            pinned = frozenset(rng.sample(range(1, 8), rng.randint(0, plain.max_loras)))
        assert list(real.waiting) == [one.request_id for one in plain.waiting]
    assert real.deferrals == plain.deferrals
    assert plain.most_overtaken <= plain.max_overtakes
    seen["overtaken as often as may be"] += 0 < plain.most_overtaken == plain.max_overtakes
    seen["deferred"] += plain.deferrals
    return seen


# The slots

LAYERS = {"q": (3, 4), "up": (2, 5)}


def weights(path: str) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """What stands at a path: integers, so that every result is exact."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    found = {}
    for name, (h_in, h_out) in LAYERS.items():
        r = int(rng.integers(0, 4))
        A, B = rng.integers(-3, 4, (r, h_in)), rng.integers(-3, 4, (h_out, r))
        found[name] = A.astype("f"), B.astype("f"), float(2.0 ** rng.integers(-2, 3))
    if rng.random() < 0.4:
        del found[str(rng.choice(list(LAYERS)))]
    return found


@dataclass
class PlainSlots:
    """Who is where, and since when."""

    max_loras: int
    max_cpu_loras: int
    policy: str
    clock: int = 0
    path: dict[int, str] = field(default_factory=dict)  # of the ids in host memory
    slot: dict[int, int] = field(default_factory=dict)
    entered: dict[int, int] = field(default_factory=dict)  # its slot, and when
    came: dict[int, tuple[int, int]] = field(default_factory=dict)  # to host memory
    used: dict[int, tuple[int, int]] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    reads: int = 0
    evictions: int = 0
    host_evictions: int = 0

    def refuses(self, wanted: dict[int, str], room: int) -> bool:
        replaced = {i for i, path in wanted.items() if self.path.get(i, path) != path}
        return len(self.pinned | wanted.keys()) > room or bool(replaced & self.pinned)

    def to_host(self, wanted: dict[int, str]) -> None:
        for i, path in wanted.items():
            if self.path.get(i, path) != path:
                self.forget(i)
        missing = sorted(wanted.keys() - self.path.keys())
        self.reads += len(missing)
        while len(self.path) + len(missing) > self.max_cpu_loras:
            order = self.used if self.policy == "lru" else self.came
            goer = min(self.path.keys() - self.pinned - wanted.keys(), key=order.__getitem__)
            self.host_evictions += 1
            self.evictions += goer in self.slot
            self.forget(goer)
        for i in missing:
            self.path[i], self.came[i] = wanted[i], (self.clock, i)

    def load(self, wanted: dict[int, str]) -> None:
        self.clock += 1
        self.to_host(wanted)
        self.used.update({i: (self.clock, i) for i in wanted})

    def activate(self, wanted: dict[int, str]) -> None:
        self.clock += 1
        self.to_host(wanted)
        missing = sorted(wanted.keys() - self.slot.keys())
        while len(self.slot) + len(missing) > self.max_loras:

            def order(i: int) -> tuple[int, int]:
                return self.used[i] if self.policy == "lru" else (self.entered[i], i)

            self.evictions += 1
            self.leave(min(self.slot.keys() - self.pinned - wanted.keys(), key=order))
        for i in missing:
            self.slot[i] = min({*range(self.max_loras)} - {*self.slot.values()})
            self.entered[i] = self.clock
        self.used.update({i: (self.clock, i) for i in wanted})

    def leave(self, i: int) -> None:
        del self.slot[i], self.entered[i]

    def forget(self, i: int) -> None:
        del self.path[i]
        if i in self.slot:
            self.leave(i)


@dataclass
class OldStep:
    """A step, what it was made of, and its answers."""

    step: Any
    entered: dict[int, int]
    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]


class SlotsDriver:
    """AdapterSlots beside the plain form, and the steps made so far."""

    def __init__(self, room: Room, rng: random.Random) -> None:
        self.room, self.rng = room, rng
        most = rng.randint(1, 4)
        self.plain = PlainSlots(most, most + rng.randint(0, 3), rng.choice(["lru", "fifo"]))
        self.slots = room.serving.AdapterSlots(
            most,
            self.plain.max_cpu_loras,
            3,
            modules=rng.choice([LAYERS, None]),
            policy=self.plain.policy,
            read=self.read,
        )
        self.reads = 0
        self.version: Counter[int] = Counter()
        self.steps: list[OldStep] = []
        self.seen: Counter[str] = Counter()

    def read(self, path: str) -> dict[str, Any]:
        self.reads += 1
        return {name: self.room.sgmv.Adapter(*pair) for name, pair in weights(path).items()}

    def some_ids(self) -> list[int]:
        return self.rng.sample(range(1, 9), self.rng.randint(1, self.plain.max_loras + 1))

    def asked(self, ids: list[int]) -> tuple[list[Any], dict[int, str]]:
        loras = [self.room.lora(i, self.version[i]) for i in ids]
        return loras, {lora.lora_int_id: lora.lora_path for lora in loras}

    def refused(self, call: Any, *arguments: Any) -> None:
        """The call is refused, and all is as it was."""
        before = str(self.slots), self.slots.active, self.slots.loaded, self.slots.counters
        try:
            call(*arguments)
        except self.room.sgmv.errors.ServingError:
            assert before == (
                str(self.slots), self.slots.active, self.slots.loaded, self.slots.counters
            )  # fmt: skip
            self.seen["refused"] += 1
            return
        raise AssertionError(f"{call.__name__}{arguments} was not refused")

    def load(self) -> None:
        (i, *_) = self.some_ids()
        if self.rng.random() < 0.4:  # a new version takes the old one's place
            self.version[i] += 1
        (lora,), wanted = self.asked([i])
        if self.plain.refuses(wanted, self.plain.max_cpu_loras):
            self.refused(self.slots.load, lora)
            return
        known = self.plain.path.get(i) == lora.lora_path
        self.plain.load(wanted)
        assert self.slots.load(lora) is not known

    def activate(self) -> None:
        loras, wanted = self.asked(self.some_ids())
        if self.plain.refuses(wanted, self.plain.max_loras):
            self.refused(self.slots.activate, loras)
            return
        self.plain.activate(wanted)
        active = self.slots.activate([None, *loras])
        assert {i: place.slot for i, place in active.items()} == {
            i: self.plain.slot[i] for i in wanted
        }

    def one_of(self, known: Any) -> int:
        return self.rng.choice(sorted(known) or [3]) if self.rng.random() < 0.8 else 5

    def deactivate(self) -> None:
        i = self.one_of(self.plain.slot)
        if i not in self.plain.slot or i in self.plain.pinned:
            self.refused(self.slots.deactivate, i)
            return
        self.plain.leave(i)
        self.slots.deactivate(i)

    def unload(self) -> None:
        i = self.one_of(self.plain.path)
        if i not in self.plain.path or i in self.plain.pinned:
            self.refused(self.slots.unload, i)
            return
        self.plain.forget(i)
        self.slots.unload(i)

    def pin(self) -> None:
        i = self.one_of(self.plain.path)
        wanted = {i: self.plain.path.get(i, "")}
        if i not in self.plain.path or self.plain.refuses(wanted, self.plain.max_loras):
            self.refused(self.slots.pin, i)
            return
        self.plain.activate(wanted)
        self.plain.pinned.add(i)
        self.slots.pin(i)

    def unpin(self) -> None:
        i = self.one_of(self.plain.pinned)
        if i not in self.plain.pinned:
            self.refused(self.slots.unpin, i)
            return
        self.plain.pinned.remove(i)
        self.slots.unpin(i)

    def step(self) -> None:
        loras, wanted = self.asked(self.some_ids())
        requests = {f"r{k}": lora for k, lora in enumerate([None, *loras, *loras[:1]])}
        if self.rng.random() < 0.5:
            members = [(lora, self.rng.choice([-1.0, 0.5, 2.0])) for lora in [*loras, *loras[:1]]]
            requests["mixed"] = self.room.serving.LoRAMixture(members)
            self.seen["mixed"] += 1
        if self.plain.refuses(wanted, self.plain.max_loras):
            self.refused(self.room.serving.make_step, self.slots, requests)
            return
        self.plain.activate(wanted)
        tokens = {name: self.rng.randint(0, 3) for name in requests if self.rng.random() < 0.5}
        step = self.room.serving.make_step(self.slots, requests, tokens)
        self.check_rows(step, requests, tokens)
        self.steps = [*self.steps[-3:], self.answers(step, requests)]
        self.run(self.steps[-1])

    def check_rows(self, step: Any, requests: dict[str, Any], tokens: dict[str, int]) -> None:
        assert list(step.rows) == list(requests)
        start = 0
        for name, lora in requests.items():
            end = start + tokens.get(name, 1)
            assert step.rows[name] == slice(start, end)
            slots = [self.plain.slot[one.lora_int_id] for one, _ in members_of(lora)] or [-1]
            width = 1 if step.slots.ndim == 1 else step.slots.shape[1]
            slots += [-1] * (width - len(slots))
            assert (step.slots[start:end].reshape(-1, width) == slots).all()
            start = end
        assert step.n == len(step.slots) == start

    def answers(self, step: Any, requests: dict[str, Any]) -> OldStep:
        """Inputs for the step, and what each layer must give, by the definition."""
        rng = np.random.default_rng(self.rng.randrange(2**32))
        most = max(len(members_of(asked)) for asked in requests.values()) or 1
        ids, factors = np.zeros((step.n, most), np.int64), np.ones((step.n, most), np.float32)
        adapters: dict[int, Any] = {BASE: {}}
        for name, asked in requests.items():
            for j, (lora, weight) in enumerate(members_of(asked)):
                ids[step.rows[name], j], factors[step.rows[name], j] = lora.lora_int_id, weight
                adapters[lora.lora_int_id] = weights(lora.lora_path)
        x, y, expected = {}, {}, {}
        for name in self.slots.modules:
            h_in, h_out = LAYERS[name]
            x[name] = rng.integers(-3, 4, (step.n, h_in)).astype("f")
            y[name] = rng.integers(-3, 4, (step.n, h_out)).astype("f")
            layer = {i: its.get(name, (None, None, 1.0)) for i, its in adapters.items()}
            pairs = {i: None if A is None else (A, B) for i, (A, B, _) in layer.items()}
            scalings = {i: scaling for i, (_, _, scaling) in layer.items()}
            given = y[name], x[name], pairs, ids, scalings
            expected[name] = reference.add_lora(*given, weights=factors)
        entered = {i: self.plain.entered[i] for i in adapters if i != BASE}
        return OldStep(step, entered, x, y, expected)

    def run_step(self) -> None:
        if self.steps:
            self.run(self.rng.choice(self.steps))

    def run(self, old: OldStep) -> None:
        """Any step made so far gives its own answer, or is refused as stale: never another's."""
        gone = {i for i, k in old.entered.items() if self.plain.entered.get(i) != k}
        used = {lora.lora_int_id for lora in used_adapters(old.step)}
        for name, y in old.y.items():
            got = y.copy()
            stale: Any = None
            try:
                old.step.add_lora(name, got, old.x[name])
            except self.room.sgmv.errors.StaleStepError as error:
                stale = error
            assert bool(gone & used) == bool(stale), f"{gone} of {used} are gone: {stale}"
            assert all(f"a{i}" in str(stale) for i in gone & used)
            np.testing.assert_array_equal(got, y if stale else old.expected[name])
            self.seen["stale" if stale else "run"] += 1

    def check(self) -> None:
        plain, slots = self.plain, self.slots
        id_of = {slot: i for i, slot in plain.slot.items()}
        assert slots.active == [id_of.get(slot) for slot in range(plain.max_loras)]
        order = plain.used if plain.policy == "lru" else plain.came
        assert slots.loaded == sorted(plain.path, key=order.__getitem__)
        assert slots.pinned == plain.pinned
        assert self.reads == plain.reads
        counters = slots.counters
        assert counters.host_misses == plain.reads
        assert counters.slot_evictions == plain.evictions
        assert counters.host_evictions == plain.host_evictions
        for module in slots.modules:
            assert len(slots.stack(module)) == len(plain.slot)


def members_of(asked: Any) -> Any:
    """The adapters that a request asks for, with their weights."""
    if asked is None:
        return ()
    return getattr(asked, "members", ((asked, 1.0),))


def used_adapters(step: Any) -> list[Any]:
    """The adapters that have rows in the step."""
    return [step.adapters[i] for i in step.segments.adapter_ids.tolist() if i != -1]


def drive_slots(room: Room, rng: random.Random, operations: int = 60) -> Counter[str]:
    """Random loads, steps, pins, evictions: slots hold what they should, steps give their own."""
    driver = SlotsDriver(room, rng)
    calls = [driver.load, driver.activate, driver.step, driver.run_step]
    rare = [driver.deactivate, driver.unload, driver.pin, driver.unpin]
    for _ in range(operations):
        rng.choice(calls if rng.random() < 0.75 else rare)()
        driver.check()
    return driver.seen
