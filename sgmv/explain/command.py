"""`python -m sgmv explain`: arguments -> question -> views, as a drawing, JSON or an HTML page."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sgmv import explain
from sgmv.emulator import DEVICES, Device
from sgmv.errors import SgmvError, ValueRangeError
from sgmv.explain import cpu, engines, launches, mixes, punica
from sgmv.explain.question import Facts, Question
from sgmv.explain.terminal import Terminal
from sgmv.models import LAYERS, MODELS
from sgmv.popularity import POPULARITIES, popularity
from sgmv.segment import Integers, segment
from sgmv.workers import get_num_threads


class View(NamedTuple):
    """Facts, numbers and texts fit for JSON, and a drawing made of nothing but these."""

    facts: Callable[[Question], Facts]
    draw: Callable[[Facts, Terminal], list[str]]


VIEWS = {
    "group": View(cpu.group, cpu.draw_group),
    "layout": View(engines.layout, engines.draw_layout),
    "tasks": View(cpu.tasks, cpu.draw_tasks),
    "shrink": View(punica.shrink, punica.draw_shrink),
    "barrier": View(punica.barrier, punica.draw_barrier),
    "expand": View(punica.expand, punica.draw_expand),
    "launches": View(launches.launches, launches.draw_launches),
    "popularity": View(mixes.mixes, mixes.draw_mixes),
}
SHOWN = ("group", "tasks", "layout", "launches")
BATCH = [2, 0, -1, 2, 0]


def command(parser: ArgumentParser) -> Callable[[Namespace], str]:
    """Add the arguments, and return what runs them."""
    parser.description = explain.__doc__
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument(
        "views", nargs="*", type=_view, help=f"which of these ({' '.join(SHOWN)})", metavar="VIEW"
    )
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument(
        "--ids",
        type=_integers,
        help="one adapter id per row, -1 = base only; --ids=-1,0 if the first is "
        f"({','.join(map(str, BATCH))})",
    )
    batch.add_argument(
        "--lengths", type=_integers, help="rows of adapter 0, 1, ..., in this order, as in 1,132"
    )
    batch.add_argument(
        "--popularity", choices=POPULARITIES, help="as Punica's paper mixes --n rows (skewed)"
    )
    parser.add_argument("--n", type=int, help="rows for --popularity (64)")
    parser.add_argument("--seed", type=int, default=0, help="of their shuffle (%(default)s)")
    parser.add_argument(
        "--layer",
        type=_layer,
        metavar="'MODEL LAYER'",
        help=f"widths of a model's layer: {', '.join(MODELS)}; {', '.join(LAYERS)}",
    )
    parser.add_argument("--h-in", type=int, default=4096, help="or the input width (%(default)s)")
    parser.add_argument("--h-out", type=int, default=4096, help="and output width (%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of all adapters (%(default)s)")
    parser.add_argument(
        "--device", type=_device, default="A100", help=f"{', '.join(DEVICES)} (%(default)s)"
    )
    parser.add_argument(
        "--max-loras", type=int, help="slots of the server (as many as the batch has adapters)"
    )
    parser.add_argument("--threads", type=int, help="of this machine (those that sgmv uses)")
    parser.add_argument(
        "--engines",
        type=_engines,
        default=list(engines.ENGINES),
        help=f"whose layouts, with commas ({', '.join(engines.ENGINES)})",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="the views' facts, view by view")
    form.add_argument("--html", metavar="FILE", help="write the explorer of this batch, a web page")
    return run


def run(given: Namespace) -> str:
    """The views of the batch; of the HTML page, where it was written."""
    ids = _batch(given)
    segments = segment(ids)
    adapters = int(np.count_nonzero(segments.adapter_ids >= 0))
    h_in, h_out = given.layer or (given.h_in, given.h_out)
    question = Question(
        segments=segments,
        h_in=h_in,
        h_out=h_out,
        rank=given.rank,
        device=given.device,
        max_loras=max(adapters, 1) if given.max_loras is None else given.max_loras,
        threads=get_num_threads() if given.threads is None else given.threads,
    )
    if given.html:
        return _write_html(given.html, question)
    views = {name: VIEWS[name] for name in given.views or SHOWN}
    facts = {name: view.facts(question) for name, view in views.items()}
    if "layout" in facts:
        facts["layout"] = {name: facts["layout"][name] for name in given.engines}
    if given.json:
        return json.dumps(facts)
    terminal = Terminal.of_stdout(question.slots)
    drawn = [terminal.text(view.draw(facts[name], terminal)) for name, view in views.items()]
    if not given.views:
        others = ", ".join(name for name in VIEWS if name not in SHOWN)
        further = f"Further views: {others}. All of it as a page: --html FILE."
        drawn.append(terminal.text(terminal.note(further)))
    return "\n\n".join(drawn)


def _batch(given: Namespace) -> Integers:
    """(n,) the ids that one of the three ways to tell a batch means."""
    told = given.ids is not None or given.lengths is not None
    if given.popularity or (given.n is not None and not told):
        n = 64 if given.n is None else given.n
        return popularity(given.popularity or "skewed", n, given.seed)
    if given.n is not None:
        raise SgmvError("--n", "--popularity beside it", "a batch", "leave one of them out")
    if given.lengths is None:
        return np.array(given.ids if told else BATCH, np.int64)
    if min(given.lengths, default=0) < 0:
        raise ValueRangeError(
            "--lengths", "rows >= 0", str(min(given.lengths)), "give each adapter its rows"
        )
    return np.repeat(np.arange(len(given.lengths)), given.lengths)


def _write_html(path: str, question: Question) -> str:
    """Write the explorer, opened at this question."""
    from sgmv.explorer import write_html

    try:
        write_html(
            path,
            question.segments,
            h_in=question.h_in,
            r=question.rank,
            h_out=question.h_out,
            device=question.device,
        )
    except OSError as error:
        raise SgmvError(
            "--html", "a file that can be written", str(error), "name another place"
        ) from error
    return f"written: {path}"


def _view(text: str) -> str:
    if text not in VIEWS:
        raise ArgumentTypeError(f"{text!r} is none of {', '.join(VIEWS)}")
    return text


def _engines(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in engines.ENGINES]:
        raise ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(engines.ENGINES)}")
    return names


def _integers(text: str) -> list[int]:
    """Whole numbers, from a text such as 0,1,-1; none from an empty one."""
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not whole numbers with commas, as 0,1,-1") from None


def _device(text: str) -> Device:
    """By its name, in any case, with or without a space."""
    by_name = {name.lower().replace(" ", ""): device for name, device in DEVICES.items()}
    try:
        return by_name[text.lower().replace(" ", "").replace("_", "").replace("-", "")]
    except KeyError:
        raise ArgumentTypeError(f"{text!r} is none of {', '.join(DEVICES)}") from None


def _layer(text: str) -> tuple[int, int]:
    """(h_in, h_out) of a model's layer, from a text such as 'Llama-3-8B q'."""
    model, _, layer = text.rpartition(" ")
    if model not in MODELS or layer not in LAYERS:
        known = f"{', '.join(MODELS)} with {', '.join(LAYERS)}, as in 'Llama-3-8B q'"
        raise ArgumentTypeError(f"{text!r} is none of {known}")
    return MODELS[model].layer(layer)
