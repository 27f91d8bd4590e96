"""Views of what sgmv itself does with a batch: how rows are grouped, and how work is cut."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from sgmv import launch
from sgmv.cpu import VECTOR_BITS
from sgmv.explain.question import Facts, Question
from sgmv.ids import BASE_ONLY, NO_SLOT
from sgmv.kernels.emit import LANES
from sgmv.kernels.plan import cuts_of_both, most_blocks, row_blocks
from sgmv.kernels.records import BLOCK, RANK_UNIT
from sgmv.kernels.tasks import cut
from sgmv.kernels.tiles import COLUMN_VECTORS, MOST_ROWS, RANKS
from sgmv.table import columns_of
from sgmv.terminal import EDGE, EMPTY, FULL, Terminal, abbreviated, plural


def group(question: Question) -> Facts:
    """The rows in the batch's order and sorted, and the segments."""
    segments = question.segments
    return {
        "n": segments.n,
        "S": segments.S,
        "adapter_ids": question.ids,
        "rows": segments.rows.tolist(),
        "seq_start": segments.seq_start.tolist(),
        "segment_ids": segments.adapter_ids.tolist(),
    }


def draw_group(facts: Facts, terminal: Terminal) -> list[str]:
    """Two strips, before and after the sort, and a table of the segments."""
    ids, rows, start = facts["adapter_ids"], facts["rows"], facts["seq_start"]
    sorted_ids = [ids[row] for row in rows]
    begins = {p: str(p) for p in start}
    lines = [
        *terminal.title(f"Group: {plural(facts['n'], 'row')}, {plural(facts['S'], 'segment')}"),
        *terminal.note("The batch as it came, one adapter id per row; -1 = base only."),
        "",
        *terminal.strip({"row": _texts(range(len(ids))), "adapter_ids": _texts(ids)}, ids),
        "",
        *terminal.note("Sorted by id, stably: rows[p] is at position p."),
        "",
        *terminal.strip(
            {
                "rows": _texts(rows),
                "adapter_ids": _texts(sorted_ids),
                "seq_start": [begins.get(p, "") for p in range(len(rows))],
            },
            sorted_ids,
            start,
        ),
        "",
    ]
    table = []
    for s in abbreviated(facts["S"]):
        if s is None:
            table.append(("...",) * 4)
            continue
        first, last, adapter_id = start[s], start[s + 1], facts["segment_ids"][s]
        name = "base" if adapter_id == BASE_ONLY else str(adapter_id)
        table.append(
            (str(s), terminal.adapter(name, adapter_id), str(last - first), f"{first}:{last}")
        )
    lines += [*terminal.table(("segment", "adapter", "rows", "positions"), table), ""]
    return [
        *lines,
        *terminal.note(
            f"seq_start ends with {start[-1]}, the number of rows. Each segment is now one small "
            "matrix product, whatever order the requests came in."
        ),
    ]


def tasks(question: Question) -> Facts:
    """Row blocks, the tasks that they are cut into, and the register tiles of a task.

    Semantics: as `sgmv.launch` plans a call with float32 weights, on `threads` threads; see
    kernels/plan.py for blocks and cuts, kernels/tiles.py for tiles. Without vector tiles (see
    `sgmv.info`) the plan is the same and `tiles` is empty.
    """
    segments, threads = question.segments, question.threads
    has_adapter = segments.adapter_ids != BASE_ONLY
    slot = np.where(has_adapter, np.cumsum(has_adapter) - 1, NO_SLOT)
    rank = np.where(has_adapter, question.rank, 0)
    room = np.empty(most_blocks(segments.most), BLOCK)
    no_gains = np.empty(0, np.int64)
    blocks = room[: row_blocks(segments.seq_start, slot, rank, no_gains, threads, room)]
    panel = columns_of(np.dtype(np.float32))
    widths, panels = question.h_in + question.h_out, -(-question.h_out // panel)
    worth_sharing_ns = launch.WORTH_SHARING_NS
    shrink_cuts, expand_cuts, cost_ns = cuts_of_both(
        blocks, widths, panels, threads, worth_sharing_ns
    )
    ids = list(question.slots)
    return {
        "threads": threads,
        "shared": bool(cost_ns >= worth_sharing_ns),
        "rank": question.rank,
        "h_out": question.h_out,
        "rank_unit": RANK_UNIT,
        "panel": panel,
        "shrink_cuts": shrink_cuts,
        "expand_cuts": expand_cuts,
        "shrink_ranks": _parts(shrink_cuts, question.rank, RANK_UNIT),
        "expand_columns": _parts(expand_cuts, question.h_out, panel),
        "vector_bits": VECTOR_BITS,
        "tile_ranks": dict(RANKS) if VECTOR_BITS else {},
        "tile_columns": {m: LANES * v for m, v in COLUMN_VECTORS.items()} if VECTOR_BITS else {},
        "blocks": [
            {
                "adapter_id": ids[slot],
                "first": first,
                "last": last,
                "tiles": _tile_rows(last - first) if VECTOR_BITS else [],
            }
            for slot, _, first, last in blocks.tolist()
        ],
    }


def _parts(count: int, extent: int, unit: int) -> list[list[int]]:
    """The ranks, or columns, `low:high` of each part of a cut block."""
    return [[int(end) for end in cut(part, count, extent, unit)] for part in range(count)]


def _tile_rows(m: int) -> list[int]:
    """The rows of each tile of a block of m rows, as kernels/tiles.py takes them."""
    groups = -(-m // MOST_ROWS)
    rows: list[int] = []
    for g in range(groups):
        rows.append((m - sum(rows)) // (groups - g))
    return rows


def draw_tasks(facts: Facts, terminal: Terminal) -> list[str]:
    """A table of the row blocks with their tasks, and the tiles of the largest."""
    blocks, threads = facts["blocks"], facts["threads"]
    shrink, expand = (len(blocks) * facts[f"{kind}_cuts"] for kind in ("shrink", "expand"))
    lines = terminal.title(f"Tasks: what sgmv does here, threads: {threads}")
    if not blocks:
        return [*lines, *terminal.note("No row has an adapter: nothing is done.")]
    table = []
    for b in abbreviated(len(blocks)):
        if b is None:
            table.append(("...",) * 5)
            continue
        block = blocks[b]
        adapter = terminal.adapter(str(block["adapter_id"]), block["adapter_id"])
        positions = f"{block['first']}:{block['last']}"
        rows = block["last"] - block["first"]
        table.append((str(b), adapter, positions, str(rows), _counted(block["tiles"])))
    head = ("row block", "adapter", "positions", "rows", "rows of tiles")
    lines += [*terminal.table(head, table), ""]
    alone = "So little work is not worth sharing: one thread does it all."
    shared = "Threads claim them one by one; expand waits until all of shrink is done."
    lines += terminal.note(
        f"{plural(shrink, 'shrink task')}: {_each(facts, 'shrink')} ranks "
        f"{_spans(facts['shrink_ranks'])}. Then {plural(expand, 'expand task')}: "
        f"{_each(facts, 'expand')} columns {_spans(facts['expand_columns'])}. "
        f"{shared if facts['shared'] else alone} No cut crosses a sum, so none changes a bit."
    )
    largest = max(blocks, key=lambda block: block["last"] - block["first"])
    if largest["tiles"]:
        lines += ["", *_tile_map(facts, largest, terminal)]
    return lines


def _tile_map(facts: Facts, block: Facts, terminal: Terminal) -> list[str]:
    """Every tile of one block in shrink, one character per rank."""
    lines = terminal.note(
        f"The shrink tiles of row block {block['first']}:{block['last']}: sums that stay in vector "
        f"registers of {facts['vector_bits']} bits, over all of K."
        + (f" {EDGE} is a cut between tasks." if facts["shrink_cuts"] > 1 else "")
    )
    first = block["first"]
    width = len(f"rows {block['last']}:{block['last']}")
    for rows in block["tiles"]:
        drawn = f"{f'rows {first}:{first + rows}':{width}} "
        for low, high in facts["shrink_ranks"]:
            each = facts["tile_ranks"][rows]
            drawn += EDGE if low else " "
            drawn += " ".join(
                FULL * min(each, high - rank) + EMPTY * (each - min(each, high - rank))
                for rank in range(low, high, each)
            )
        lines.append(drawn)
        first += rows
    if max(map(len, lines)) > terminal.width:
        return []
    return lines


def _each(facts: Facts, kind: str) -> str:
    count = facts[f"{kind}_cuts"]
    return "each block's" if count == 1 else f"each block in {count}, by"


def _spans(parts: list[list[int]]) -> str:
    """Ranges as text; of many, the first three and the last.

    >>> _spans([[0, 8], [8, 16]]), _spans([[i, i + 1] for i in range(9)])
    ('0:8, 8:16', '0:1, 1:2, 2:3, ..., 8:9')
    """
    shown = [f"{low}:{high}" for low, high in parts]
    return ", ".join([*shown[:3], "...", shown[-1]] if len(shown) > 4 else shown)


def _counted(rows: list[int]) -> str:
    """Numbers of rows as a sum.

    >>> _counted([5, 6, 6]), _counted([])
    ('5 + 2×6', '-')
    """
    found = Counter(rows).items()
    return " + ".join(f"{times}×{m}" if times > 1 else str(m) for m, times in found) or "-"


def _texts(values: Any) -> list[str]:
    return [str(value) for value in values]
