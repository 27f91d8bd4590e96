"""`python -m sgmv simulate`: the simulator for each policy and number of slots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import product
from typing import Any

from sgmv.console import at_least, counts, number, progress
from sgmv.errors import SgmvError
from sgmv.serving.report import figure, figures, table
from sgmv.serving.residency import POLICIES
from sgmv.serving.simulate import Costs, simulate
from sgmv.serving.traces import Trace, draw_trace
from sgmv.terminal import Terminal

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
# The least of those whole numbers that may be below 1.
LEAST = {"seed": 0, "max-overtakes": 0, "row-us": 0, "adapter-bytes": 0}


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], str]:
    """Add the arguments, and return what runs them."""
    parser.add_argument(
        "--slots",
        type=counts(1),
        default="1,2,4,8,16,32,64",
        help="numbers of slots, with commas (%(default)s)",
    )
    parser.add_argument(
        "--policy", choices=POLICIES, nargs="+", default=POLICIES, help="who is evicted (all)"
    )
    for name, default, text in (*TRACE, *SERVER, *PRICES):
        kind = at_least(LEAST.get(name, 1)) if isinstance(default, int) else number
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} ({default:,})")
    parser.add_argument("--json", action="store_true", help="the table's figures")
    parser.add_argument("--figure", metavar="FILE", help="draw it as well (needs matplotlib)")
    return run


def run(given: argparse.Namespace) -> str:
    """The table, or its figures; the drawing is written on the way."""
    if not given.slots:
        raise SgmvError("slots", "numbers of slots", "none", "pass some, as in 1,8,64")
    if max(given.slots) > given.max_cpu_loras:
        raise SgmvError(
            "max_cpu_loras",
            f"at least the {max(given.slots)} of --slots, as what is in a slot is in host memory",
            str(given.max_cpu_loras),
            "raise it, or lower --slots",
        )
    trace = draw_trace(**_given(given, TRACE))
    costs = Costs(**_given(given, PRICES))
    runs = list(product(given.slots, given.policy))
    outcomes = []
    with progress() as show:
        for i, (slots, policy) in enumerate(runs, 1):
            show(f"simulating {i} of {len(runs)}: slots {slots}, {policy}")
            outcomes.append(simulate(trace, slots, policy, costs=costs, **_given(given, SERVER)))
    if given.figure:
        figure(outcomes, given.figure)
    if given.json:
        arguments = _given(given, (*TRACE, *SERVER, *PRICES))
        return json.dumps({"arguments": arguments, "outcomes": list(map(figures, outcomes))})
    terminal = Terminal.of_stdout()
    return f"{terminal.text(terminal.note(_headline(trace, given)))}\n\n{table(outcomes, terminal)}"


def _headline(trace: Trace, given: argparse.Namespace) -> str:
    """What was simulated, without which no figure means anything."""
    return (
        f"{trace.n:,} requests for {trace.adapters:,} adapters, {given.rate:g} per second, seed "
        f"{given.seed}; a step takes {given.step_us / 1e3:g} ms and {given.row_us / 1e3:g} ms per "
        f"request; adapters of {given.adapter_bytes / 1e6:.3g} MB, {given.max_cpu_loras:,} in host "
        f"memory; at most {given.max_num_seqs} requests run, each is overtaken at most "
        f"{given.max_overtakes:,} times."
    )


def _given(given: argparse.Namespace, options: tuple[tuple[str, Any, str], ...]) -> dict[str, Any]:
    names = [name.replace("-", "_") for name, _, _ in options]
    return {name: getattr(given, name) for name in names}
