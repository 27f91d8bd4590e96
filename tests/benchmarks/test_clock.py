"""Variants take turns, and timing ends when its time is up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from benchmarks.clock import Budget, Variant, alternate
from tests.help.benched import Clock

pytestmark = pytest.mark.once


def test_timing_ends_after_the_round_in_which_time_is_up() -> None:
    clock, calls = Clock(), list[str]()

    def call(name: str) -> None:
        calls.append(name)
        clock.seconds += 1.0

    variants = [Variant(name, partial(call, name), settles=False) for name in "AB"]
    times = alternate(variants, Budget(rounds=4, turn_s=0.0), clock.until(3.0))
    assert "".join(calls) == "ABAB"
    assert {name: timing.calls for name, timing in times.items()} == {"A": 2, "B": 2}
    alternate(variants, Budget(rounds=4, turn_s=0.0), clock.until(-1.0))
    assert "".join(calls) == "ABABAB"


def test_variants_take_turns_after_untimed_calls() -> None:
    calls: list[str] = []
    variants = [
        Variant(name, partial(calls.append, name), partial(calls.append, f"set {name}"), 0.0)
        for name in "AB"
    ]
    times = alternate(variants, Budget(rounds=3, turn_s=0.0))
    assert calls == ["set A", "A", "A", "set B", "B", "B"] * 3
    calls.clear()
    alternate([replace(variant, settles=False) for variant in variants], Budget(1, 0.0))
    assert calls == ["set A", "A", "set B", "B"]
    assert {name: timing.calls for name, timing in times.items()} == {"A": 3, "B": 3}
    assert all(0 < t.q20 <= t.q50 <= t.q80 for t in times.values())
