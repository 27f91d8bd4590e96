"""View of one batch in every engine's layout: the order of its rows, its cuts, its fields."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from sgmv import layouts
from sgmv.explain.question import Facts, Question
from sgmv.layouts.rows import Layout
from sgmv.terminal import Terminal


class Engine(NamedTuple):
    """One engine's layout of a batch.

    make    its metadata
    rows    which rows it gets, in which order; None: all of them, unsorted
    starts  where its segments start in that order
    why     what sets it apart
    """

    make: Callable[[Question], Any]
    rows: Callable[[Any], Any]
    starts: Callable[[Any], Any]
    why: str


def _punica(question: Question) -> Any:
    """With the shapes that the weights of this layer have, behind addresses that nobody reads."""
    layout = layouts.punica(question.segments, question.stack, question.rank)
    wa = np.broadcast_to(np.float32(0), (question.rank, question.h_in))
    wb = np.broadcast_to(np.float32(0), (question.rank, question.h_out))
    return replace(layout, wa=(wa,) * len(layout.wa), wb=(wb,) * len(layout.wb))


def _active(layout: layouts.LoRAKernelMeta) -> Any:
    return layout.lora_token_start_loc[: int(np.count_nonzero(layout.num_tokens_per_lora))]


ENGINES = {
    "punica": Engine(
        _punica,
        lambda layout: layout.rows,
        lambda layout: layout.s[:-1],
        "sorted by the caller, base-only rows left out; weights by address, one rank per call",
    ),
    "lorax": Engine(
        lambda question: layouts.lorax(question.segments, question.stack),
        lambda layout: None,
        lambda layout: layout.adapter_segments[:-1],
        "neighbours merged, nothing sorted; a launch per padded rank; 0 = base model",
    ),
    "llamacpp": Engine(
        lambda question: layouts.llamacpp(question.segments, slots=question.slots),
        lambda layout: [row for batch in layout.batches for row in batch.rows.tolist()],
        lambda layout: np.cumsum([0, *(len(batch.rows) for batch in layout.batches)])[:-1],
        "a list of (id, scale) per request, one list per decode: its rows, then those of the next",
    ),
    "vllm_v0": Engine(
        lambda question: layouts.vllm_v0(question.segments, question.stack),
        lambda layout: None,
        lambda layout: layout.b_seq_start_loc,
        "neighbours merged, nothing sorted; slots, -1 = base only",
    ),
    "vllm_v1": Engine(
        lambda question: layouts.vllm_v1(question.segments, question.max_loras, question.stack),
        lambda layout: layout.token_indices_sorted_by_lora_ids,
        _active,
        "sorted by slot; the base-only segment first; padded to max_loras + 1",
    ),
    "sglang_csgmv": Engine(
        lambda question: layouts.sglang(question.segments, question.stack),
        lambda layout: layout.permutation,
        lambda layout: layout.seg_indptr[:-1],
        "sorted by slot, then cut into chunks; base-only rows have a slot of rank 0, the last",
    ),
    "sglang_triton": Engine(
        lambda question: layouts.sglang(question.segments, question.stack, backend="triton"),
        lambda layout: None,
        lambda layout: layout.seg_indptr[:-1],
        "a segment per request, nothing sorted",
    ),
    "flashinfer": Engine(
        lambda question: layouts.flashinfer(question.segments, question.stack),
        lambda layout: layout.rows,
        lambda layout: layout.seg_indptr[:-1],
        "sorted by the caller, base-only rows left out; an index per segment",
    ),
    "peft": Engine(
        lambda question: layouts.peft(question.segments),
        lambda layout: None,
        lambda layout: (),
        "a name per sample, in their order",
    ),
}


def layout(question: Question) -> Facts:
    """Every engine's metadata of the batch, and the rows it means."""
    found: Facts = {}
    for name, engine in ENGINES.items():
        made = engine.make(question)
        rows = engine.rows(made)
        rows = list(range(question.segments.n)) if rows is None else _plain(rows)
        found[name] = {
            "why": engine.why,
            "rows": rows,
            "starts": _plain(engine.starts(made)),
            "adapter_ids": [question.ids[row] for row in rows],
            "fields": _fields(made),
            "shown": str(made),
        }
    return found


def draw_layout(facts: Facts, terminal: Terminal) -> list[str]:
    """For each engine a strip of its rows, cut into its segments, above its fields."""
    lines = terminal.title("Layout: the same batch in every engine")
    for name, engine in facts.items():
        lines += ["", terminal.bold(name), *terminal.note(engine["why"])]
        names = {
            "rows": [str(row) for row in engine["rows"]],
            "adapter_ids": [str(adapter_id) for adapter_id in engine["adapter_ids"]],
        }
        lines += terminal.strip(names, engine["adapter_ids"], engine["starts"], limit=2)
        for line in engine["shown"].splitlines():
            lines += _wrapped(line, terminal.width)
    return lines


def _fields(layout: Layout) -> Facts:
    """The fields for JSON: arrays as lists, launches of LoRAX likewise; addresses left out."""
    listed = [field.name for field in fields(layout) if field.repr]  # type: ignore[arg-type]  # every layout is a dataclass
    return {
        name: _plain(getattr(layout, name))
        for name in listed
        if name not in ("wa_ptr", "wb_ptr")  # they differ from run to run
    }


def _plain(value: Any) -> Any:
    """Numbers, strings and lists, for JSON."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Layout):
        return _fields(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _wrapped(line: str, width: int) -> list[str]:
    """A field's line, its value's later lines below its first."""
    start = len(line) - len(line.partition("  ")[2].lstrip())
    if start > width // 2:
        start = 2
    return textwrap.wrap(line, width, subsequent_indent=" " * start)
