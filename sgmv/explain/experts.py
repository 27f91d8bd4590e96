"""View of the batch in a layer of experts: why a GPU multiplies mostly zeros there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv import emulator
from sgmv.explain.question import Facts, Question
from sgmv.ids import BASE_ONLY, Integers
from sgmv.popularity import POPULARITIES, popularity
from sgmv.terminal import EMPTY, Terminal, abbreviated, plural

SIZES = (1, 16, 64, 256, 1024, 4096)  # rows of the batches of the table


def experts(question: Question) -> Facts:
    """The shrink of vLLM on experts: this batch's groups, and zeros by rows and popularity."""
    E, k = question.experts, question.top_k
    slots = [question.slots.get(i, BASE_ONLY) for i in question.ids]
    routed = _routed(len(slots), E, k)
    launch = _shrink(question, slots, routed, question.max_loras)
    pairs_of = np.zeros((len(question.slots), E), np.int64)
    for work in launch.work:
        pairs_of[divmod(work.adapter_id, E)] = work.rows
    return launch.figures() | {
        "top_k": k,
        "tokens": len(slots),
        "routed": routed.tolist(),
        "adapters": list(question.slots),
        "pairs_of": pairs_of.tolist(),
        "max_loras": question.max_loras,
        "zeros": {
            kind: [_zeros(question, popularity(kind, n)) for n in SIZES] for kind in POPULARITIES
        },
    }


def _routed(tokens: int, experts: int, top_k: int) -> npt.NDArray[np.int64]:
    """(tokens, top_k) experts, drawn alike: what a router is trained to come near."""
    drawn = np.random.default_rng(0).random((tokens, experts))
    return np.argsort(drawn, axis=1)[:, :top_k]


def _shrink(
    question: Question, slots: Sequence[int] | Integers, routed: Any, max_loras: int
) -> emulator.Launch:
    return emulator.vllm_moe_shrink(
        slots, routed, question.h_in, question.rank, question.experts, max_loras, question.device
    )


def _zeros(question: Question, ids: Integers) -> float:
    """The share of zeros among the rows that blocks multiply."""
    routed = _routed(len(ids), question.experts, question.top_k)
    launch = _shrink(question, ids, routed, max(question.max_loras, int(ids.max()) + 1))
    figures = launch.figures()
    return float(figures["wasted_rows"] / figures["row_slots"])


def draw_experts(facts: Facts, terminal: Terminal) -> list[str]:
    """Groups as a map of adapters and experts, what padding costs, and how it goes with rows."""
    E, k, block = facts["experts"], facts["top_k"], facts["block_rows"]
    lines = terminal.title(f"Experts: {k} of {E} for each row, {facts['kernel']}")
    lines += terminal.note(
        f"A router sends each row to {k} of {E} experts, and an adapter has an A and a B for each. "
        "So pairs of a row and an expert share weights only where adapter and expert are the same: "
        "a group. How many pairs each group has, by adapter and expert:"
    )
    lines += ["", *_map(facts, terminal), ""]
    if facts["S"]:
        each = facts["rows"] / facts["S"]
        lines += terminal.note(
            f"{plural(facts['rows'], 'pair')} in {plural(facts['S'], 'group')}, {each:.1f} each. A "
            f"block multiplies {block} rows, so a group is filled up to {block}, or a multiple, "
            f"with zeros: {facts['row_slots']:,} rows, "
            f"{facts['wasted_rows'] / facts['row_slots']:.0%} of them zeros."
        )
    lines += terminal.note(
        f"And the grid is fixed before the groups are known: {_grid(facts)}, of which "
        f"{facts['early_exits']:,} find nothing to do."
    )
    head = ("rows", *(f"{kind}\nzeros %" for kind in facts["zeros"]))
    table = [
        (f"{n:,}", *(f"{100 * shares[i]:.0f}" for shares in facts["zeros"].values()))
        for i, n in enumerate(SIZES)
    ]
    lines += [
        "",
        *terminal.note("Zeros by the number of rows, and by how these share adapters:"),
        "",
    ]
    lines += [*terminal.table(head, table), ""]
    groups = max(len(facts["adapters"]), 1) * E
    return [
        *lines,
        *terminal.note(
            "More rows first make more groups, up to adapters × experts: of this batch's adapters "
            f"{groups:,}. Only then do they fill: each has {block} pairs from some "
            f"{groups * block // k:,} rows on. On a CPU no row is padded."
        ),
    ]


def _grid(facts: Facts) -> str:
    """The grid in words."""
    blocks = plural(facts["blocks"], "block")
    if not facts["sorted"]:
        return f"{blocks}, one for each pair, as pairs are so few that vLLM does not sort them"
    return (
        f"{blocks}, as many as an adapter needs that has all pairs, for each of max_loras + 1 = "
        f"{facts['max_loras'] + 1}"
    )


def _map(facts: Facts, terminal: Terminal) -> list[str]:
    """A line for each adapter, a character for each expert."""
    labels = [f"adapter {adapter_id}" for adapter_id in facts["adapters"]]
    if not labels:
        return ["no row has an adapter"]
    wide = max(map(len, labels))
    columns = max(min(facts["experts"], terminal.width - wide - 1), 1)
    lines = []
    for s in abbreviated(len(labels)):
        if s is None:
            lines.append("...")
            continue
        pairs = facts["pairs_of"][s][:columns]
        drawn = "".join(EMPTY if not n else str(n) if n < 10 else "+" for n in pairs)
        adapter_id = facts["adapters"][s]
        lines.append(f"{labels[s]:{wide}} {terminal.adapter(drawn, adapter_id)}")
    if columns < facts["experts"]:
        lines.append(terminal.faint(f"{'':{wide}} and {facts['experts'] - columns} experts more"))
    return lines
