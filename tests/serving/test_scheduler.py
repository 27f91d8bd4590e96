"""The scheduler: its rule against a plain form, its promise, its refusals."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings

from sgmv.errors import DtypeError, ServingError, SgmvError
from sgmv.serving import LoRAMixture, Scheduler
from tests.help.served import ROOM, lora, randoms
from tests.help.serving_model import drive_scheduler


@settings(max_examples=150)
@given(randoms)
def test_the_scheduler_follows_its_rule(rng: random.Random) -> None:
    drive_scheduler(ROOM, rng)


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
def test_a_mixture_waits_for_all_of_its_adapters_and_holds_them() -> None:
    scheduler: Scheduler[str] = Scheduler(2)
    both = LoRAMixture([(lora(1), 0.5), (lora(2), 2.0)])
    scheduler.add("a", lora(3))
    scheduler.add("both", both)
    scheduler.add("b", lora(1))
    assert scheduler.schedule() == {"a": lora(3), "b": lora(1)}  # the mixture would be a third
    scheduler.finish("a")
    assert list(scheduler.schedule()) == ["b", "both"]
    scheduler.add("c", lora(3))
    scheduler.finish("b")
    assert scheduler.schedule() == {"both": both}
    assert scheduler.holding == {0, 1, 2}
    with pytest.raises(ServingError, match="as the other requests of id 2"):
        scheduler.add("d", lora(2, "elsewhere"))
    scheduler.finish("both")
    assert list(scheduler.schedule()) == ["c"]
    with pytest.raises(ServingError, match="at most max_loras = 2 adapters, got 3"):
        scheduler.add("e", LoRAMixture([(lora(i), 1.0) for i in (1, 2, 3)]))


@pytest.mark.once
def test_a_mixture_does_not_starve() -> None:
    """One of its adapters always runs, and others' take the slot that it needs beside it."""
    scheduler: Scheduler[int] = Scheduler(2, 4, max_overtakes=5)
    scheduler.add(0, lora(1))
    scheduler.schedule()
    scheduler.add(1, lora(3))
    scheduler.schedule()
    scheduler.add(-1, LoRAMixture([(lora(1), 1.0), (lora(2), 1.0)]))
    number, admitted = 2, 0
    while -1 not in scheduler.running:
        scheduler.add(number, lora(3))
        admitted += len(scheduler.admit())
        scheduler.finish(next(i for i in scheduler.running if scheduler.running[i] == lora(3)))
        number += 1
        assert number < 20
        scheduler.schedule()
    assert admitted <= 6
