"""AdapterSlots: its policy against a plain form; pins, threads, forks, PEFT's directories."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import reference
import sgmv
from reference.bounds import add_lora_bound
from reference.compare import check
from sgmv import serving
from sgmv.errors import ServingError, SgmvError, StaleStepError
from sgmv.serving import AdapterSlots, LoRARequest, Scheduler
from tests.help.planting import outcome
from tests.help.served import FIXTURES, ROOM, lora, make_slots, randoms
from tests.help.serving_model import LAYERS, drive_slots, weights


@settings(max_examples=60)
@given(randoms)
def test_slots_follow_their_policy_and_no_step_gets_other_weights(rng: random.Random) -> None:
    drive_slots(ROOM, rng)


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
        assert outcome(lambda: slots.activate([lora(1)])) == "nothing"
    finally:
        forked.set()
        thread.join()


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
