"""Variants take turns, and timing ends when its time is up."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.clock import Budget, Variant, alternate, interval, summary
from benchmarks.machine import cpu_use
from benchmarks.record import Times
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


def rounds(*medians: float) -> Times:
    return summary([[int(median * 1000)] for median in medians])


def test_an_interval_is_as_wide_as_rounds_differ() -> None:
    """A machine that slows down hits both sides of a round, and moves no ratio."""
    double, noisy = rounds(2, 4, 6, 8), rounds(0.9, 1.1, 0.8, 1.2)
    assert interval((rounds(1, 2, 3, 4), double)) == (2.0, 2.0)
    low, high = interval((rounds(1, 1, 1, 1), noisy)) or pytest.fail("none")
    assert 0.8 <= low < 0.95 < 1.05 < high <= 1.2
    assert interval((rounds(1), rounds(2))) is None
    assert interval((rounds(1, 2), rounds(2, 4, 6))) is None, "not of the same rounds"


def test_the_interval_of_a_mean_is_that_of_all_its_ratios() -> None:
    ours, double, eightfold = (rounds(*(size * t for t in (1, 2, 3))) for size in (1, 2, 8))
    assert interval((ours, double), (ours, eightfold)) == (4.0, 4.0)


def test_intervals_hold_the_true_ratio_as_often_as_they_say() -> None:
    """Of 20 rounds with normal noise, at most a tenth of the intervals miss it."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        ours, theirs = (rounds(*(10 * (1 + rng.normal(0, 0.1, 20)))) for _ in range(2))
        low, high = interval((ours, theirs)) or pytest.fail("none")
        missed += not low <= 1 <= high
    assert missed <= 20


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not say")
def test_what_a_started_process_uses_is_not_others() -> None:
    program = "import time; end = time.perf_counter() + 0.4\nwhile time.perf_counter() < end: pass"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        before = [cpu_use(), cpu_use([process.pid])]
        time.sleep(0.2)
        after = [cpu_use(), cpu_use([process.pid])]
        pairs = zip(before, after, strict=True)
        alone, counted = (late.own - early.own for early, late in pairs if early and late)
    assert counted > alone + 0.02
