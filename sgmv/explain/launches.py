"""View of every engine's launches on one GPU, in figures."""

from __future__ import annotations

from sgmv import emulator
from sgmv.emulator import Launch
from sgmv.explain.question import Facts, Question
from sgmv.terminal import Terminal

KIB = 1024


def launches(question: Question) -> Facts:
    """Every kernel's figures, one launch each, and why there is no such kernel, if so."""
    return {
        launch.KERNEL.name: launch.figures() | {"unsupported": list(launch.unsupported)}
        for launch in kernels(question)
    }


def kernels(question: Question) -> list[Launch]:
    """Each engine's launches of this batch, shrink before expand."""
    batch, device = question.segments, question.device
    into, out = (question.h_in, question.rank), (question.rank, question.h_out)
    max_loras, slots = question.max_loras, question.slots
    return [
        emulator.punica_sgmv_shrink(batch, *into, device),
        emulator.punica_cutlass_expand(batch, *out, device),
        emulator.punica_bgmv_shrink(batch, *into, device),
        emulator.punica_bgmv_expand(batch, *out, device),
        emulator.vllm_v1_shrink(batch, *into, max_loras, device, slots=slots),
        emulator.vllm_v1_expand(batch, *out, max_loras, device, slots=slots),
        emulator.sglang_csgmv_shrink(batch, *into, device),
        emulator.sglang_csgmv_expand(batch, *out, device),
    ]


def draw_launches(facts: Facts, terminal: Terminal) -> list[str]:
    """One row per kernel; below, what is wrong with any."""
    head = (
        "kernel", "grid\nblocks", "threads\nper block", "exits\nblocks", "waves", "wasted\n%",
        "shared\nKiB", "asked\nMB",
    )  # fmt: skip
    table = [
        (
            f"{name} !" if each["unsupported"] else name,
            f"{each['grid_x']}×{each['grid_y']}×{each['grid_z']}",
            str(each["threads"]),
            str(each["early_exits"]),
            str(each["waves"]),
            wasted(each).removesuffix("%"),
            f"{each['shared_memory'] / KIB:.1f}",
            f"{(each['bytes_read'] + each['bytes_written']) / 1e6:.2f}",
        )
        for name, each in facts.items()
    ]
    refused = [each["unsupported"] for each in facts.values()]
    into, out = (facts[name] for name in ("punica_sgmv_shrink", "punica_cutlass_expand"))
    lines = terminal.title(f"Launches: every kernel on {into['device']}")
    lines += [*terminal.table(head, table), ""]
    lines += terminal.note(
        "exits: blocks that exit early, with nothing to do. waves: times the device is filled. "
        "wasted: the part of the multiply-adds that is padding. shared: memory of each block. "
        "asked: what all blocks ask of memory, before any cache."
        + (" !: there is no such kernel, see below." if any(refused) else "")
    )
    lines += terminal.note(
        f"Every operand through memory once would be {into['io_bytes'] / 1e6:.2f} MB and "
        f"{into['roofline_us']:.2f} µs for a shrink, {out['io_bytes'] / 1e6:.2f} MB and "
        f"{out['roofline_us']:.2f} µs for an expand: no launch is as fast."
    )
    for name, each in facts.items():
        for fault in each["faults"]:
            lines += terminal.note(f"{name}: {fault}", "  ")
    return lines


def wasted(figures: Facts) -> str:
    """The part of a launch's multiply-adds that is padding."""
    return f"{figures['wasted_lanes'] / figures['lanes']:.0%}" if figures["lanes"] else "none"
