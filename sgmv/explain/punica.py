"""Views of Punica's two SGMV launches: the shrink, its split of K and barrier, the expand."""

from __future__ import annotations

from collections.abc import Sequence

from sgmv import emulator
from sgmv.emulator.punica import (
    CHUNK,
    RELEASES,
    STEP_ROWS,
    TILE_COLUMNS,
    TILE_ROWS,
    TMP_LIMIT,
    WALKERS,
)
from sgmv.explain.launches import KIB, wasted
from sgmv.explain.question import Facts, Question
from sgmv.terminal import FULL, Terminal, abbreviated, plural

BARRIER = "┃"


def shrink(question: Question) -> Facts:
    """The figures of Punica's shrink, and the rows that each of its steps holds."""
    launch = _punica_shrink(question, RELEASES[-1])
    return launch.figures() | {
        "unsupported": list(launch.unsupported),
        "step_rows": STEP_ROWS,
        "rows_per_step": [_filled(work.rows, STEP_ROWS) for work in launch.work],
    }


def draw_shrink(facts: Facts, terminal: Terminal) -> list[str]:
    """Each segment's steps of 64 rows: the part that rows fill, and the part that zeros fill."""
    step, chunks = facts["step_rows"], facts["split_k"]
    lines = terminal.title(f"Shrink: {facts['kernel']} on {facts['device']}")
    lines += _refused(facts["unsupported"], terminal)
    lines += terminal.note(
        f"Grid ({facts['grid_x']}, {facts['grid_y']}, {facts['grid_z']}): for each segment "
        + (
            f"{chunks} blocks, one for each {facts['chunk']} of the {facts['h_in']} columns of x. "
            if facts["cooperative"]
            else f"one block for all {facts['h_in']} columns of x. "
        )
        + f"A block of {facts['threads']} threads takes {step} rows a step; rows that are not "
        "there are multiplied all the same, as zeros."
    )
    lines += ["", *_bars(facts, facts["rows_per_step"], step, "step", terminal), ""]
    return [
        *lines,
        *terminal.note(
            f"{plural(facts['rows'], 'row')} in {facts['row_slots']:,} row slots: "
            f"{wasted(facts)} of the multiply-adds are of zeros. "
            f"{facts['shared_memory'] // KIB} KiB of shared memory per block, so "
            f"{facts['resident_blocks']} blocks fit an SM and {facts['capacity']} the device; "
            f"{facts['blocks']} blocks are {_waves(facts)}."
        ),
    ]


def barrier(question: Question) -> Facts:
    """Both releases' figures, and how many barriers the blocks of each segment pass."""
    launches = {release: _punica_shrink(question, release) for release in RELEASES}
    newest = launches[RELEASES[-1]]
    return {
        "unsupported": list(newest.unsupported),
        "chunks": -(-question.h_in // CHUNK),
        "steps": [work.row_slots // STEP_ROWS for work in newest.work],
        "tmp_limit": TMP_LIMIT,
        "releases": {release: launch.figures() for release, launch in launches.items()},
        "waits": {
            release: str(launch.deadlock).removeprefix("deadlock: ")
            for release, launch in launches.items()
            if launch.deadlock
        },
    }


def draw_barrier(facts: Facts, terminal: Terminal) -> list[str]:
    """Blocks over time in both releases, and how many segments fit before K is no longer split."""
    first = facts["releases"][RELEASES[0]]
    lines = terminal.title(f"Split K and the barrier: {first['kernel']} on {first['device']}")
    lines += _refused(facts["unsupported"], terminal)
    wanted = facts["chunks"] * first["S"]
    lines += terminal.note(
        f"The blocks of a segment each sum {CHUNK} of its {first['h_in']} products and leave the "
        "sums in tmp; then all blocks of the grid wait for each other, add the chunks in "
        "ascending order, and block 0 stores. So all of them must be on the device at once:"
    )
    lines += [
        "",
        f"{wanted:,} blocks of {first['capacity']:,} that fit  "
        + terminal.bar(min(wanted, first["capacity"]), first["capacity"], 20),
        "",
    ]
    cliff = (
        f"{first['device']} takes up to {first['split_k_segments']} segments at "
        f"h_in = {first['h_in']} and r = {first['r']}."
    )
    if not first["cooperative"]:
        why = "There are no segments." if not wanted else f"They do not fit. {cliff}"
        return [
            *lines,
            *terminal.note(
                f"{why} K is not split: one block per segment, no barrier, another order of "
                "summation, so other last bits than the same rows get in a smaller batch."
            ),
        ]
    lines += terminal.note(
        f"They fit: K is split. {cliff} tmp takes {first['tmp_bytes'] // KIB:,} of its "
        f"{facts['tmp_limit'] // KIB:,} KiB."
    )
    for release, figures in facts["releases"].items():
        lines += ["", terminal.bold(f"release {release}"), *_timeline(facts, figures, terminal)]
        if release in facts["waits"]:
            lines += terminal.note(f"The call never returns: {facts['waits'][release]}.")
        else:
            lines += terminal.note(f"All blocks pass {plural(figures['barriers'], 'barrier')}.")
    if first["race"]:
        lines += [
            "",
            *terminal.note(
                "In both, a fast block may write its next step's sums to tmp while a slow one "
                "still reads this step's: no barrier stands between."
            ),
        ]
    return lines


def _timeline(facts: Facts, figures: Facts, terminal: Terminal) -> list[str]:
    """One line for all segments of as many steps: work, barriers, and what comes after."""
    steps, stuck = facts["steps"], figures["deadlock"]
    # A grid that hangs gets as far as the first barrier that not all blocks come to.
    last = min(steps) + 1 if stuck else max(steps)
    shown = abbreviated(last, max(terminal.width // 12, 1))
    label, line = {}, {}
    for count in sorted(set(steps)):
        members = [s for s, each in enumerate(steps) if each == count]
        label[count] = f"{_named(members, figures['adapter_ids'])}: {plural(count, 'step')}"
        waits = stuck and count >= last
        line[count] = "".join(
            "..." if step is None else _moment(step, count, takes_part=not stuck) for step in shown
        ) + ("  waits for ever" if waits else "  returns")
    width = max(map(len, label.values()))
    beside = width + 2 + max(map(len, line.values())) <= terminal.width
    lines = []
    for count, drawn in line.items():
        lines += [f"{label[count]:{width}}  {drawn}"] if beside else [label[count], f"  {drawn}"]
    return [*lines, terminal.faint(f"{FULL * 2} {STEP_ROWS} rows  {BARRIER} barrier")]


def _moment(step: int, count: int, takes_part: bool) -> str:
    """What blocks with `count` steps do before a barrier, and whether they come to it."""
    if step < count:
        return FULL * 2 + BARRIER
    return "  " + BARRIER if takes_part else ""


def expand(question: Question) -> Facts:
    """The figures of Punica's CUTLASS expand, and the rows that each row of its tiles holds."""
    launch = emulator.punica_cutlass_expand(
        question.segments, question.rank, question.h_out, question.device
    )
    across = -(-question.h_out // TILE_COLUMNS)
    filled = [_filled(work.rows, TILE_ROWS) for work in launch.work]
    return launch.figures() | {
        "unsupported": list(launch.unsupported),
        "tile": [TILE_ROWS, TILE_COLUMNS],
        "tiles_across": across,
        "tiles": across * sum(map(len, filled)),
        "rows_per_tile": filled,
    }


def draw_expand(facts: Facts, terminal: Terminal) -> list[str]:
    """Each segment's tiles of 32 rows, and how 512 blocks share all tiles."""
    rows, columns = facts["tile"]
    lines = terminal.title(f"Expand: {facts['kernel']} on {facts['device']}")
    lines += _refused(facts["unsupported"], terminal)
    lines += terminal.note(
        f"CUTLASS cuts every segment of y into tiles of {rows} rows × {columns} columns. The bars "
        f"are tiles from top to bottom; each is there {facts['tiles_across']} times, once for each "
        f"{columns} of the {facts['h_out']} columns."
    )
    lines += ["", *_bars(facts, facts["rows_per_tile"], rows, "tile", terminal), ""]
    each = -(-facts["tiles"] // WALKERS)
    walk = (
        f"{facts['early_exits']} of the {WALKERS} blocks find none left"
        if facts["early_exits"]
        else f"each of the {WALKERS} blocks walks up to {each} of them"
    )
    return [
        *lines,
        *terminal.note(
            f"{facts['tiles']:,} tiles; block w takes tiles w, w + {WALKERS}, ...: {walk}. "
            f"{wasted(facts)} of the multiply-adds are of zeros. Nobody waits for anybody: K is "
            f"only r = {facts['r']}, so no tile needs to share its sums."
        ),
    ]


def _punica_shrink(question: Question, release: str) -> emulator.punica.SgmvShrink:
    return emulator.punica_sgmv_shrink(
        question.segments, question.h_in, question.rank, question.device, release
    )


def _filled(rows: int, limit: int) -> list[int]:
    """The rows of each of the pieces of a segment.

    >>> _filled(132, 64)
    [64, 64, 4]
    """
    return [min(limit, rows - first) for first in range(0, rows, limit)]


def _bars(
    facts: Facts, pieces: Sequence[Sequence[int]], limit: int, piece: str, terminal: Terminal
) -> list[str]:
    """One line per segment: a bar for each piece of at most `limit` rows."""
    lines, cells = [], 8
    width = max((len(str(adapter_id)) for adapter_id in facts["adapter_ids"]), default=1)
    for s in abbreviated(len(pieces)):
        if s is None:
            lines.append("...")
            continue
        adapter_id, filled = facts["adapter_ids"][s], pieces[s]
        label = terminal.adapter(f"{adapter_id:>{width}}", adapter_id)
        shown = abbreviated(len(filled), max((terminal.width - 34) // (2 * cells + 2), 1))
        drawn = [
            "..." if i is None else terminal.bar(filled[i], limit, cells, adapter_id) for i in shown
        ]
        tail = f"{sum(filled)} of {len(filled) * limit} row slots"
        lines.append(f"adapter {label} {' '.join(drawn)}  {tail}")
    return lines or [f"no {piece}: no row has an adapter"]


def _refused(unsupported: Sequence[str], terminal: Terminal) -> list[str]:
    """Why there is no such kernel, if so: the picture then shows what it would do."""
    if not unsupported:
        return []
    return [*terminal.note(f"No such kernel ({'; '.join(unsupported)}). If there were:"), ""]


def _waves(facts: Facts) -> str:
    return plural(facts["waves"], "wave")


def _named(segments: Sequence[int], adapter_ids: Sequence[int], limit: int = 4) -> str:
    """Adapters by id, the first few of them."""
    ids = [str(adapter_ids[s]) for s in segments[:limit]]
    more = ", ..." if len(segments) > limit else ""
    return f"{'adapter' if len(segments) == 1 else 'adapters'} {', '.join(ids)}{more}"
