"""`python -m sgmv simulate`: one server, or replicas, for each policy and number of slots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from sgmv import campaign
from sgmv.console import at_least, counts, number
from sgmv.errors import SgmvError
from sgmv.serving.arrivals import ARRIVALS
from sgmv.serving.page import write_page
from sgmv.serving.replicas import (
    RULES,
    Failure,
    Placement,
    ReplicasOutcome,
    fewest_replicas,
    simulate_replicas,
)
from sgmv.serving.report import as_text, figure, figures, table_of
from sgmv.serving.residency import POLICIES
from sgmv.serving.simulate import Costs, Outcome, simulate
from sgmv.serving.traces import RANK, draw_trace
from sgmv.terminal import Terminal

COSTS = Costs()
Options = tuple[tuple[str, Any, str], ...]  # name, default, help
TRACE = (
    ("requests", 50_000, "how many"),
    ("adapters", 10_000, "how many there are"),
    ("rate", 6.0, "requests per second"),
    ("alpha", 1.0, "Zipf's exponent of their popularity"),
    ("burst", 1.0, "mean requests per arrival, all for one adapter; 1 = Poisson arrivals"),
    ("mean-tokens", 64.0, "mean tokens per request"),
    ("arrivals", "poisson", f"one of {', '.join(ARRIVALS)}"),
    ("updates", 0.0, "adapters that get new weights, per second"),
    ("turnover", 0.0, "adapters that new ones take the place of, per second"),
    ("ranks", str(RANK), "of the adapters, with commas"),
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
    ("adapter-us", COSTS.adapter_us, "and of each adapter in it"),
    ("rank-us", COSTS.rank_us, "and of each rank of each request's adapter"),
    ("adapter-bytes", COSTS.adapter_bytes, f"bytes of an adapter of rank {RANK}"),
    ("load-rate", COSTS.load_rate, "bytes per second from host memory into slots"),
    ("read-rate", COSTS.read_rate, "bytes per second from disk into host memory"),
)
# The least of those whole numbers that may be below 1.
LEAST = dict.fromkeys(("seed", "max-overtakes", "row-us", "adapter-us", "adapter-bytes"), 0)


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], str]:
    """Add the arguments, and return what runs them."""
    parser.add_argument(
        "--slots",
        type=counts(1),
        default="1,2,4,8,16,32,64",
        help="numbers of slots, with commas (%(default)s)",
    )
    parser.add_argument(
        "--policy",
        choices=POLICIES,
        nargs="+",
        default=POLICIES,
        help="which adapter leaves first (all)",
    )
    _add_numbers(parser, "requests over time", TRACE)
    _add_numbers(parser, "a server", SERVER)
    costs = _add_numbers(parser, "what a step and an adapter cost", PRICES)
    costs.add_argument(
        "--padded", action="store_true", help="every row pays for the highest rank of its step"
    )
    costs.add_argument(
        "--costs", type=Path, metavar="FILE", help="what a step costs: a record of the study `step`"
    )
    _add_replicas(parser)
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


def _add_numbers(parser: argparse.ArgumentParser, title: str, options: Options) -> Any:
    """A group of these options; returned so that others may join it."""
    group = parser.add_argument_group(title)
    for name, default, text in options:
        shown = default if isinstance(default, str) else f"{default:,.12g}"
        fallback = None if options is PRICES else default  # a file may say it
        kind = _kind(name, default)
        group.add_argument(f"--{name}", type=kind, default=fallback, help=f"{text} ({shown})")
    return group


def _add_replicas(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("several servers behind a router").add_argument
    add("--replicas", type=counts(1), help="how many, with commas")
    add("--placement", choices=RULES, nargs="+", default=RULES, help="how requests are sent (all)")
    add("--max-ongoing", type=at_least(1), help="requests that make a replica full (no limit)")
    add("--spill", type=at_least(1), help="requests at which an adapter's home is passed over")
    add("--plan-s", type=number, help="seconds of a plan by rank (60)")
    add(
        "--fail",
        type=_failure,
        nargs="+",
        default=[],
        metavar="REPLICA:FROM:UNTIL",
        help="a replica that is down between two times, in seconds",
    )
    add(
        "--target-p99",
        type=number,
        metavar="SECONDS",
        help="the fewest of 1 to --replicas at which 99 %% of the requests wait no longer",
    )
    add("--page", metavar="FILE", help="an HTML page of all that was simulated")


def run(given: argparse.Namespace) -> str:
    """The table, or its figures; the drawing and the page are written on the way."""
    if not given.slots:
        raise SgmvError("slots", "numbers of slots", "none", "pass some, as in 1,8,64")
    where = campaign.chosen(given)
    for name in ("figure", "page"):
        if getattr(given, name) and (given.sweep or where != campaign.HERE or given.target_p99):
            expected = "one trace, simulated in this process"
            got = "a sweep, a target or a campaign"
            raise SgmvError(name, expected, got, "leave one of them out")
    arguments = _arguments(given)
    swept = dict(given.sweep)
    if len(swept) < len(given.sweep):
        remedy = "give all values of one at once"
        raise SgmvError("sweep", "each name once", ", ".join(n for n, _ in given.sweep), remedy)
    points = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    for point in points:
        _check_room(max(given.slots), {**arguments, **point}["max_cpu_loras"])
    asked = [
        {**arguments, **point, **routed, "slots": slots, "policy": policy}
        for point, routed, slots, policy in product(
            points, _routed(given), given.slots, given.policy
        )
    ]
    if given.figure or given.page:
        outcomes = [outcome_of(each) for each in asked]
        found = [figures(outcome) for outcome in outcomes]
        if given.figure:
            figure(outcomes, given.figure)
        if given.page:
            replicas = [each for each in outcomes if isinstance(each, ReplicasOutcome)]
            options = {name: arguments[name] for name in arguments if name != "base_us"}
            write_page(given.page, replicas, found, options)
    else:
        work = campaign.Campaign("simulations", "sgmv.serving.command:point", asked)
        found = campaign.run(work, where)
    at = [{name: each[name] for name in swept} for each in asked]
    if given.json:
        merged = [{**point, **figures} for point, figures in zip(at, found, strict=True)]
        return json.dumps({"arguments": arguments, "outcomes": merged})
    terminal = Terminal.of_stdout()
    head = terminal.text(terminal.note(_headline(arguments, swept)))
    return f"{head}\n\n{table_of(found, terminal, at if swept else ())}"


def _arguments(given: argparse.Namespace) -> dict[str, Any]:
    """Of the trace, a server and what it costs; costs from a file where none are given."""
    found = {name: getattr(given, name) for name in _names((*TRACE, *SERVER, *PRICES))}
    read = {} if given.costs is None else costs_of(given.costs)
    for name, default, _ in PRICES:
        key = name.replace("-", "_")
        if found[key] is None:
            found[key] = read.get(key, default)
    own = given.step_us is None and given.row_us is None
    return {**found, "padded": given.padded, "base_us": read.get("base_us", ()) if own else ()}


def costs_of(path: Path) -> dict[str, Any]:
    """The fields of Costs that a record of the study `step` has."""
    remedy = "write one with the study `step` of sgmv's benchmarks"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["costs"]
        return {name: found[name] for name in (*_names(PRICES), "base_us")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SgmvError("costs", "a record of a step's costs", str(error), remedy) from error


def _routed(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The numbers of replicas with their placements; nothing, where there is one server."""
    if given.replicas is None:
        for name in ("fail", "target_p99", "page", "max_ongoing", "spill", "plan_s"):
            if getattr(given, name) not in (None, []):
                raise SgmvError(name, "--replicas beside it", "none", "say how many")
        return [{}]
    shared = {
        "max_ongoing": given.max_ongoing,
        "spill": given.spill,
        "plan_s": 60.0 if given.plan_s is None else given.plan_s,
        "fail": [list(each) for each in given.fail],
        "target_p99": given.target_p99,
    }
    numbers = given.replicas if given.target_p99 is None else [max(given.replicas)]
    return [
        {**shared, "replicas": count, "placement": rule}
        for count, rule in product(numbers, given.placement)
    ]


def point(asked: dict[str, Any]) -> dict[str, Any]:
    """The figures of one simulation: what a worker does."""
    return figures(outcome_of(asked))


def outcome_of(asked: dict[str, Any]) -> Outcome:
    """Of these arguments, slots and policy."""
    trace, costs, server = (
        {name: asked[name] for name in _names(options)} for options in (TRACE, PRICES, SERVER)
    )
    ranks = [int(rank) for rank in str(trace.pop("ranks")).split(",")]
    drawn = draw_trace(**trace)
    if ranks != [RANK]:
        drawn = drawn.with_ranks(ranks)
    server |= {
        "max_loras": asked["slots"],
        "policy": asked["policy"],
        "costs": Costs(**costs, padded=asked["padded"], base_us=asked["base_us"]),
    }
    if "replicas" not in asked:
        return simulate(drawn, **server)
    rule, N = asked["placement"], asked["replicas"]
    placement = Placement(rule, asked["max_ongoing"], asked["spill"], asked["plan_s"])
    server["failures"] = [Failure(*each) for each in asked["fail"]]
    if asked["target_p99"] is None:
        return simulate_replicas(drawn, N, placement, **server)
    return fewest_replicas(drawn, asked["target_p99"], N, placement, **server)


def _failure(text: str) -> tuple[int, float, float]:
    """The type of an argument such as 2:60:120."""
    try:
        replica, start, end = text.split(":")
        return int(replica), float(start), float(end)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected REPLICA:FROM:UNTIL, got {text!r}") from None


def _values(text: str) -> tuple[str, list[Any]]:
    """The type of an argument such as alpha=0,0.5,1."""
    flag, _, values = text.partition("=")
    options = (*TRACE, *SERVER, *PRICES)
    defaults = {name: default for name, default, _ in options if name != "ranks"}
    flag = flag.replace("_", "-")
    if flag not in defaults or not values:
        names = ", ".join(defaults)
        raise argparse.ArgumentTypeError(f"expected NAME=V,V of {names}, got {text!r}")
    kind = _kind(flag, defaults[flag])
    return flag.replace("-", "_"), [kind(value) for value in values.split(",")]


def _kind(name: str, default: Any) -> Callable[[str], Any]:
    """What an argument's text is read with."""
    if isinstance(default, str):
        return _ranks if name == "ranks" else str
    return at_least(LEAST.get(name, 1)) if isinstance(default, int) else number


def _check_room(slots: int, max_cpu_loras: int) -> None:
    if slots > max_cpu_loras:
        raise SgmvError(
            "max_cpu_loras",
            f"at least the {slots} of --slots, as what is in a slot is in host memory",
            str(max_cpu_loras),
            "raise it, or lower --slots",
        )


def _headline(arguments: dict[str, Any], swept: dict[str, list[Any]]) -> str:
    """What was simulated, without which no figure means anything."""
    if swept:
        lists = "; ".join(f"{name} {', '.join(map(as_text, of))}" for name, of in swept.items())
        hidden = {*swept, "base_us", "padded"}
        others = (f"{name} {as_text(v)}" for name, v in arguments.items() if name not in hidden)
        return f"Swept: {lists}. Else: {', '.join(others)}."
    trace = draw_trace(**{name: arguments[name] for name in _names(TRACE) if name != "ranks"})
    texts = {name: as_text(value) for name, value in arguments.items() if name != "base_us"}
    step = f"{arguments['step_us'] / 1e3:g} ms and {arguments['row_us'] / 1e3:g} ms per request"
    if arguments["base_us"]:
        step = ", ".join(f"{us / 1e3:,.0f} ms for {rows}" for rows, us in arguments["base_us"])
    for name, of in (("adapter_us", "adapter"), ("rank_us", "rank of a request's adapter")):
        if arguments[name]:
            step += f" and {arguments[name] / 1e3:g} ms per {of}"
    return (
        f"{trace.n:,} requests for {trace.adapters:,} adapters, {texts['rate']} per second, seed "
        f"{texts['seed']}; a step takes {step}; adapters of "
        f"{arguments['adapter_bytes'] / 1e6:.3g} MB, {texts['max_cpu_loras']} in host memory; at "
        f"most {texts['max_num_seqs']} requests run, each is overtaken at most "
        f"{texts['max_overtakes']} times."
    )


def _ranks(text: str) -> str:
    """The type of --ranks: a text of numbers, checked."""
    ranks = counts(1)(text)
    if not ranks:
        raise argparse.ArgumentTypeError("expected ranks, with commas, got none")
    return ",".join(map(str, ranks))


def _names(options: Options) -> list[str]:
    return [name.replace("-", "_") for name, _, _ in options]
