"""`python -m sgmv simulate`: the simulator for each policy and number of slots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import product
from typing import Any

from sgmv import campaign
from sgmv.console import at_least, counts, number
from sgmv.errors import SgmvError
from sgmv.serving.report import figure, figures, table_of
from sgmv.serving.residency import POLICIES
from sgmv.serving.simulate import Costs, Outcome, simulate
from sgmv.serving.traces import draw_trace
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
        kind = _kind(name, default)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} ({default:,})")
    parser.add_argument(
        "--sweep",
        type=_values,
        nargs="+",
        default=[],
        metavar="NAME=V,V",
        help="several values of any of these: each with each, as in alpha=0,1 rate=4,8",
    )
    parser.add_argument("--json", action="store_true", help="the table's figures")
    parser.add_argument("--figure", metavar="FILE", help="draw it as well (needs matplotlib)")
    campaign.add_arguments(parser)
    return run


def run(given: argparse.Namespace) -> str:
    """The table, or its figures; the drawing is written on the way."""
    if not given.slots:
        raise SgmvError("slots", "numbers of slots", "none", "pass some, as in 1,8,64")
    where = campaign.chosen(given)
    if given.figure and (given.sweep or where != campaign.HERE):
        expected = "one trace, simulated in this process"
        raise SgmvError("figure", expected, "a sweep or a campaign", "leave one of them out")
    arguments = _given(given, (*TRACE, *SERVER, *PRICES))
    swept = dict(given.sweep)
    if len(swept) < len(given.sweep):
        remedy = "give all values of one at once"
        raise SgmvError("sweep", "each name once", ", ".join(n for n, _ in given.sweep), remedy)
    points = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    for point in points:
        _check_room(max(given.slots), {**arguments, **point}["max_cpu_loras"])
    asked = [
        {**arguments, **point, "slots": slots, "policy": policy}
        for point, slots, policy in product(points, given.slots, given.policy)
    ]
    if given.figure:
        outcomes = [outcome_of(each) for each in asked]
        figure(outcomes, given.figure)
        found = [figures(outcome) for outcome in outcomes]
    else:
        work = campaign.Campaign("simulations", "sgmv.serving.command:point", asked)
        found = campaign.run(work, where)
    at = [{name: each[name] for name in swept} for each in asked]
    if given.json:
        merged = [{**point, **figures} for point, figures in zip(at, found, strict=True)]
        return json.dumps({"arguments": arguments, "outcomes": merged})
    terminal = Terminal.of_stdout()
    head = terminal.text(terminal.note(_headline(given, swept)))
    return f"{head}\n\n{table_of(found, terminal, at if swept else ())}"


def point(asked: dict[str, Any]) -> dict[str, Any]:
    """The figures of one simulation: what a worker does."""
    return figures(outcome_of(asked))


def outcome_of(asked: dict[str, Any]) -> Outcome:
    """Of these arguments, slots and policy."""
    trace, costs, server = (
        {name: asked[name] for name in _names(options)} for options in (TRACE, PRICES, SERVER)
    )
    drawn = draw_trace(**trace)
    return simulate(drawn, asked["slots"], asked["policy"], costs=Costs(**costs), **server)


def _values(text: str) -> tuple[str, list[Any]]:
    """The type of an argument such as alpha=0,0.5,1."""
    flag, _, values = text.partition("=")
    defaults = {name: default for name, default, _ in (*TRACE, *SERVER, *PRICES)}
    flag = flag.replace("_", "-")
    if flag not in defaults or not values:
        names = ", ".join(defaults)
        raise argparse.ArgumentTypeError(f"expected NAME=V,V of {names}, got {text!r}")
    kind = _kind(flag, defaults[flag])
    return flag.replace("-", "_"), [kind(value) for value in values.split(",")]


def _kind(name: str, default: Any) -> Callable[[str], Any]:
    """What an argument's text is read with."""
    return at_least(LEAST.get(name, 1)) if isinstance(default, int) else number


def _check_room(slots: int, max_cpu_loras: int) -> None:
    if slots > max_cpu_loras:
        raise SgmvError(
            "max_cpu_loras",
            f"at least the {slots} of --slots, as what is in a slot is in host memory",
            str(max_cpu_loras),
            "raise it, or lower --slots",
        )


def _headline(given: argparse.Namespace, swept: dict[str, list[Any]]) -> str:
    """What was simulated, without which no figure means anything."""
    arguments = _given(given, (*TRACE, *SERVER, *PRICES))
    if swept:
        lists = "; ".join(
            f"{name} {', '.join(f'{v:,g}' for v in values)}" for name, values in swept.items()
        )
        others = (f"{name} {value:,g}" for name, value in arguments.items() if name not in swept)
        return f"Swept: {lists}. Else: {', '.join(others)}."
    trace = draw_trace(**_given(given, TRACE))
    return (
        f"{trace.n:,} requests for {trace.adapters:,} adapters, {given.rate:g} per second, seed "
        f"{given.seed}; a step takes {given.step_us / 1e3:g} ms and {given.row_us / 1e3:g} ms per "
        f"request; adapters of {given.adapter_bytes / 1e6:.3g} MB, {given.max_cpu_loras:,} in host "
        f"memory; at most {given.max_num_seqs} requests run, each is overtaken at most "
        f"{given.max_overtakes:,} times."
    )


def _names(options: tuple[tuple[str, Any, str], ...]) -> list[str]:
    return [name.replace("-", "_") for name, _, _ in options]


def _given(given: argparse.Namespace, options: tuple[tuple[str, Any, str], ...]) -> dict[str, Any]:
    return {name: getattr(given, name) for name in _names(options)}
