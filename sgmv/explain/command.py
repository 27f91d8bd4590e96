"""`python -m sgmv explain`: arguments -> question -> views, as a drawing, JSON or an HTML page."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection
from itertools import chain
from typing import NamedTuple

import numpy as np

from sgmv import explain
from sgmv.checks import fits_memory
from sgmv.console import at_least, counts
from sgmv.emulator import DEVICES, Device
from sgmv.errors import SgmvError
from sgmv.explain import cpu, engines, experts, launches, mixes, punica
from sgmv.explain.question import Facts, Question
from sgmv.ids import Integers, as_integers
from sgmv.models import LAYERS, MODELS
from sgmv.popularity import POPULARITIES, popularity
from sgmv.segment import segment
from sgmv.terminal import Terminal
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
    "experts": View(experts.experts, experts.draw_experts),
}
SHOWN = ("group", "launches")
VIEW_COLUMN = " " * 16
BATCH = [2, 0, -1, 2, 0]


def command(parser: ArgumentParser) -> Callable[[Namespace], str]:
    """Add the arguments, and return what runs them."""
    parser.description = _fitted(explain.__doc__ or "")
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument(
        "views", nargs="*", type=_view, help=f"which of these ({' '.join(SHOWN)})", metavar="VIEW"
    )
    parser.add_argument("--all", action="store_true", help="all of them")
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument(
        "--ids",
        type=counts(-1),
        help=f"one adapter id per row, -1 = base only ({','.join(map(str, BATCH))})",
    )
    batch.add_argument(
        "--lengths", type=counts(0), help="rows of adapter 0, 1, ..., in this order, as in 1,132"
    )
    batch.add_argument(
        "--popularity", choices=POPULARITIES, help="as Punica's paper mixes --n rows (skewed)"
    )
    parser.add_argument("--n", type=at_least(0), help="rows for --popularity (64)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the shuffle (%(default)s)")
    parser.add_argument(
        "--layer",
        type=_layer,
        metavar="'MODEL LAYER'",
        help=f"widths of a model's layer: {', '.join(MODELS)}; {', '.join(LAYERS)}",
    )
    parser.add_argument(
        "--h-in", type=at_least(1), default=4096, help="or the input width (%(default)s)"
    )
    parser.add_argument(
        "--h-out", type=at_least(1), default=4096, help="and output width (%(default)s)"
    )
    parser.add_argument("--rank", type=at_least(1), default=16, help="of adapters (%(default)s)")
    parser.add_argument(
        "--device", type=_device, default="A100", help=f"{', '.join(DEVICES)} (%(default)s)"
    )
    parser.add_argument(
        "--max-loras",
        type=at_least(1),
        help="slots of the server (one for each adapter)",
    )
    parser.add_argument(
        "--experts", type=at_least(1), default=8, help="of a layer of experts (%(default)s)"
    )
    parser.add_argument(
        "--top-k", type=at_least(1), default=2, help="of which each row has (%(default)s)"
    )
    parser.add_argument("--threads", type=at_least(1), help="of this machine (sgmv's own)")
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
        experts=given.experts,
        top_k=given.top_k,
    )
    if given.html:
        return _write_html(given.html, question)
    if given.all and given.views:
        raise SgmvError(
            "--all", "no VIEW beside it", " ".join(given.views), "leave one of them out"
        )
    views = {name: VIEWS[name] for name in given.views or (VIEWS if given.all else SHOWN)}
    facts = {name: view.facts(question) for name, view in views.items()}
    if "layout" in facts:
        facts["layout"] = {name: facts["layout"][name] for name in given.engines}
    if given.json:
        return json.dumps(facts)
    terminal = Terminal.of_stdout(question.slots, question.headline)
    drawn = [terminal.text(view.draw(facts[name], terminal)) for name, view in views.items()]
    if not given.views and not given.all:
        hidden = ", ".join(name for name in VIEWS if name not in SHOWN)
        further = f"Further: {hidden}; --all; --html FILE."
        drawn.append(terminal.text(terminal.note(further)))
    return "\n\n".join(drawn)


def _batch(given: Namespace) -> Integers:
    """(n,) the ids that one of the three ways to tell a batch means."""
    has_batch = given.ids is not None or given.lengths is not None
    if given.popularity or (given.n is not None and not has_batch):
        n = 64 if given.n is None else given.n
        return popularity(given.popularity or "skewed", n, given.seed)
    if given.n is not None:
        raise SgmvError("--n", "--popularity beside it", "a batch", "leave one of them out")
    if given.lengths is None:
        return as_integers("ids", given.ids if has_batch else BATCH)
    with fits_memory("lengths", sum(given.lengths)):
        np.empty(sum(given.lengths), np.int64)  # numpy's repeat does not look whether it fits
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
            experts=question.experts,
            top_k=question.top_k,
        )
    except OSError as error:
        raise SgmvError(
            "--html", "a file that can be written", str(error), "name another place"
        ) from error
    return f"written: {path}"


def _fitted(text: str) -> str:
    """The list of the views, wrapped under its second column."""
    terminal = Terminal.of_stdout()
    wrapped = (
        terminal.note(line, VIEW_COLUMN if line.startswith(" ") else "") or [""]
        for line in text.splitlines()
    )
    return "\n".join(chain.from_iterable(wrapped))


def _view(text: str) -> str:
    return _known(text, VIEWS)


def _engines(text: str) -> list[str]:
    return [_known(name.strip(), engines.ENGINES) for name in text.split(",")]


def _known(text: str, names: Collection[str]) -> str:
    if text not in names:
        raise ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
    return text


def _device(text: str) -> Device:
    """By its name, in any case, with or without a space."""
    by_name = {name.lower().replace(" ", ""): device for name, device in DEVICES.items()}
    try:
        return by_name[text.lower().replace(" ", "").replace("_", "").replace("-", "")]
    except KeyError:
        raise ArgumentTypeError(f"expected one of {', '.join(DEVICES)}, got {text!r}") from None


def _layer(text: str) -> tuple[int, int]:
    """(h_in, h_out) of a model's layer, from a text such as 'Llama-3-8B q'."""
    model, _, layer = text.rpartition(" ")
    if model not in MODELS or layer not in LAYERS:
        known = f"one of {', '.join(MODELS)} with one of {', '.join(LAYERS)}"
        raise ArgumentTypeError(f"expected {known}, as in 'Llama-3-8B q'; got {text!r}")
    return MODELS[model].layer(layer)
