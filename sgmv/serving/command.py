"""`python -m sgmv simulate`: the simulator for each policy and number of slots."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sgmv.serving.report import figure, table
from sgmv.serving.residency import POLICIES
from sgmv.serving.simulate import Costs, simulate
from sgmv.serving.traces import draw_trace

COSTS = Costs()
# name, default, help
TRACE = (
    ("requests", 50_000, "how many"),
    ("adapters", 10_000, "how many there are"),
    ("rate", 6.0, "requests per second"),
    ("alpha", 1.0, "Zipf's exponent of their popularity"),
    ("burst", 1.0, "mean requests per arrival, all for one adapter; 1 = Poisson arrivals"),
    ("mean-tokens", 64.0, "mean tokens per request"),
    ("seed", 0, "of the trace"),
)
SERVER = (
    ("max-cpu-loras", 256, "adapters in host memory"),
    ("max-num-seqs", 64, "requests that run at once"),
    ("max-overtakes", 256, "how often a waiting request may be overtaken"),
)
PRICES = (
    ("step-us", COSTS.step_us, "microseconds of a step"),
    ("row-us", COSTS.row_us, "and of each request in it"),
    ("adapter-bytes", COSTS.adapter_bytes, "bytes of one adapter"),
    ("load-rate", COSTS.load_rate, "bytes per second from host memory into slots"),
    ("read-rate", COSTS.read_rate, "bytes per second from disk into host memory"),
)


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], str]:
    """Add the arguments, and return what runs them."""
    parser.add_argument(
        "--slots", type=_counts, default="1,2,4,8,16,32,64", help="numbers of slots (%(default)s)"
    )
    parser.add_argument(
        "--policy", choices=POLICIES, nargs="+", default=POLICIES, help="who is evicted (all)"
    )
    for name, default, text in (*TRACE, *SERVER, *PRICES):
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{text} (%(default)s)"
        )
    parser.add_argument("--figure", metavar="FILE", help="draw it as well (needs matplotlib)")
    return run


def run(given: argparse.Namespace) -> str:
    """The table; the figure is written on the way."""
    trace = draw_trace(**_given(given, TRACE))
    costs = Costs(**_given(given, PRICES))
    outcomes = [
        simulate(trace, slots, policy, costs=costs, **_given(given, SERVER))
        for slots in given.slots
        for policy in given.policy
    ]
    if given.figure:
        figure(outcomes, given.figure)
    return table(outcomes)


def _given(given: argparse.Namespace, options: tuple[tuple[str, Any, str], ...]) -> dict[str, Any]:
    names = [name.replace("-", "_") for name, _, _ in options]
    return {name: getattr(given, name) for name in names}


def _counts(text: str) -> list[int]:
    """Whole numbers, from a text such as 1,8,64."""
    return [int(part) for part in text.split(",")]
