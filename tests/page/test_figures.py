"""Every figure of the page against the emulator's."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import chain
from typing import Any

import numpy as np
import pytest

import sgmv
from reference.workloads import POPULARITIES, popularity
from sgmv import emulator, layouts
from sgmv.emulator import DEVICES, DeadlockError
from sgmv.emulator.punica import RELEASES
from sgmv.explorer.write import KERNELS
from tests.help.explored import (
    CASES,
    FOLDER,
    HUNG,
    SCRIPT,
    Case,
    Javascript,
    emulators,
    of_each,
    routed,
    slots_of,
)
from tests.help.planting import replaced

pytestmark = pytest.mark.once


def test_every_figure_is_the_emulators(javascript: Javascript) -> None:
    got = javascript(SCRIPT, of_each("figures(launch)", CASES))
    for case, figures, expected in zip(CASES, got, emulators(), strict=True):
        assert figures == expected, case
        assert list(figures) == list(expected), case


def test_the_cases_hold_what_they_hunt() -> None:
    told = " ".join(fault for figures in emulators() for fault in figures["faults"])
    assert set(re.findall(r"\b(deadlock|race|overflow|rank|width)\b", told)) >= {
        "deadlock", "race", "overflow", "rank", "width",
    }  # fmt: skip
    for name in ("cooperative", "deterministic"):
        assert {figures[name] for figures in emulators()} == {True, False}
    for name in ("early_exits", "waves", "barriers"):
        assert any(figures[name] > 1 for figures in emulators())


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("const STEP_ROWS = WARPS * 16;", "const STEP_ROWS = WARPS * 8;"),
        ("Math.ceil(a / b)", "Math.floor(a / b) + 1"),
        ("chunks * S <= capacity", "chunks * S < capacity"),
        ("const RESERVED = 1024;", "const RESERVED = 0;"),
        ('(release === "1.1.0" ? most(steps) : steps[s])', "most(steps)"),
        ("segments.n < FEW_ROWS", "segments.n <= FEW_ROWS"),
        ("n >= 256 ? 128", "n > 256 ? 128"),
        ("(split_k > 1 ? added : 0)", "0"),
        ("pairs.n + experts * (rows - 1)", "pairs.n + experts * rows"),
        ("const SPARSE = 8;", "const SPARSE = 64;"),
        ("if (rows <= 96) return 32;", "if (rows < 64) return 32;"),
        ("(s - bases) * experts + chosen[pair]", "chosen[pair]"),
    ],
)
def test_a_fault_in_the_page_is_found(javascript: Javascript, text: str, instead: str) -> None:
    got = javascript(replaced(SCRIPT, text, instead), of_each("figures(launch)", CASES))
    assert got != emulators()


def test_random_experts_are_the_emulators(javascript: Javascript) -> None:
    """Whatever a router chose: experts that no row has, and rows that have fewer."""
    rng = np.random.default_rng(7)
    chosen, ids_of_all = [], []
    for kernel in ("vllm_moe_shrink", "vllm_moe_expand"):
        for _ in range(60):
            rows, k, experts = (int(rng.integers(1, most)) for most in (300, 9, 130))
            ids = rng.integers(-1, int(rng.integers(1, 12)), rows).tolist()
            wide, deep = (int(rng.choice((64, 768, 3584))) for _ in range(2))
            r, max_loras = int(rng.choice((8, 17, 64))), int(rng.choice((1, 8, 64)))
            device = str(rng.choice(list(DEVICES)))
            case = Case(ids, kernel, wide, r, deep, device, "1.1.0", max_loras, 16, experts, k)
            chosen.append(case)
            ids_of_all.append(rng.integers(-1, experts, (rows, k)).tolist())
    script = f"{SCRIPT}\nconst chosen = {json.dumps([flat(ids) for ids in ids_of_all])};"
    expression = (
        "figures(KERNELS[c.kernel](segment(c.ids), {...values, expert_ids: chosen.shift()}))"
    )
    for case, ids, got in zip(
        chosen, ids_of_all, javascript(script, of_each(expression, chosen)), strict=True
    ):
        assert got == json.loads(json.dumps(case.launch_of(ids).figures())), case
    assert {
        case.launch_of(ids).figures()["sorted"]
        for case, ids in zip(chosen, ids_of_all, strict=True)
    } == {0, 1}


def test_the_router_gives_each_row_different_experts(javascript: Javascript) -> None:
    for rows, experts, k in ((1, 1, 1), (70, 8, 2), (33, 128, 8), (9, 256, 16), (5, 4, 4)):
        got = javascript(SCRIPT, f"routed({rows}, {experts}, {k})")
        assert got == flat(routed(rows, experts, k))
        assert all(len(set(of)) == k for of in routed(rows, experts, k))
    often = np.bincount(flat(routed(2048, 8, 2)))
    assert all(450 < rows < 575 for rows in often)  # of 512


def flat(ids: list[list[int]]) -> list[int]:
    """The experts of all rows, one after another."""
    return list(chain.from_iterable(ids))


def test_tiles_make_up_the_lanes(javascript: Javascript) -> None:
    tiles = javascript(SCRIPT, of_each("launch.tile", CASES))
    for case, tile, figures in zip(CASES, tiles, emulators(), strict=True):
        slots = figures["row_slots"] * tile["column_slots"] * tile["k_slots"]
        assert slots == figures["lanes"], case
        assert all(slots % tile["rows"] == 0 for slots in figures["row_slots_per_segment"]), case
        tiles_in_all = figures["row_slots"] // tile["rows"] * tile["columns"] * tile["splits"]
        if case.kernel not in ("punica_cutlass_expand", "punica_sgmv_shrink"):  # several per block
            assert figures["blocks"] - figures["early_exits"] == tiles_in_all, case


TIMELINE = """(() => { const t = timeline(launch); const placed = new Map(); let overlaps = 0;
  for (const b of t.bars) { if (b.start < (placed.get(b.place) ?? 0) - 1e-9) overlaps += 1;
    placed.set(b.place, b.end); }
  const exits = t.bars.filter((b) => b.kind === "exit").reduce((all, b) => all + b.blocks, 0);
  const others = t.bars.filter((b) => b.kind !== "exit").map((b) => b.block);
  return { blocks: new Set(others).size + exits, places: placed.size, overlaps,
    exits, opened: t.moments.filter((m) => m.kind === "open").length,
    stuck: t.stuck, end: t.end, last: t.moments.length ? t.moments.at(-1).time : 0 };
})()"""


def test_timelines_hold_every_block_once(javascript: Javascript) -> None:
    chosen = CASES[::11]  # 11 and 10 kernels have no common factor
    for case, line in zip(chosen, javascript(SCRIPT, of_each(TIMELINE, chosen)), strict=True):
        launch = case.launch()
        if not launch.capacity:
            assert line["blocks"] == 0, case
            continue
        assert (line["blocks"], line["exits"]) == (launch.blocks, launch.early_exits), case
        assert line["places"] == min(launch.blocks, launch.capacity), case
        assert line["overlaps"] == 0, case
        assert line["last"] == line["end"], case
        deadlock = launch.deadlock
        assert (line["stuck"] is None) == (deadlock is None), case
        if deadlock is not None:
            assert line["stuck"] == {
                "barrier": deadlock.barrier,
                "waiting": len(deadlock.waiting),
                "returned": len(deadlock.returned),
            }, case


@pytest.mark.parametrize("release", RELEASES)
def test_the_timeline_ends_as_the_blocks_do(javascript: Javascript, release: str) -> None:
    """Against the emulator's execution, block by block."""
    rng = np.random.default_rng(1)
    batches = [HUNG, [0] * 3 + [1] * 70, [0, 1, 2], [0] * 65 + [1] * 66, [0, *[1] * 200, 2]]
    chosen = [
        Case(ids, "punica_sgmv_shrink", 512, 16, 16, "A100", release, 8, 16) for ids in batches
    ]
    for case, line in zip(chosen, javascript(SCRIPT, of_each(TIMELINE, chosen)), strict=True):
        x = rng.standard_normal((len(case.ids), 512)).astype(np.float16)
        weights = {i: rng.standard_normal((16, 512)).astype(np.float16) for i in set(case.ids)}
        launch = case.launch()
        if line["stuck"] is None:
            assert launch.run(x, weights).barriers == line["opened"], case
        else:
            with pytest.raises(DeadlockError) as hung:
                launch.run(x, weights)
            assert hung.value.deadlock.barrier == line["stuck"]["barrier"] == line["opened"] + 1
    expected = {"1.0.0": 3, "1.1.0": 0}  # how many of them hang
    assert sum(case.launch().deadlock is not None for case in chosen) == expected[release]


def test_popularities_are_the_papers(javascript: Javascript) -> None:
    sizes = [*range(1, 70), 128, 333, 1024]
    got = javascript(SCRIPT, f"POPULARITIES.map((kind) => {sizes}.map((n) => popularity(kind, n)))")
    for kind, by_size in zip(POPULARITIES, got, strict=True):
        for n, lengths in zip(sizes, by_size, strict=True):
            assert lengths == np.bincount(popularity(kind, n)).tolist(), (kind, n)


def test_rooflines_are_segments_stats(javascript: Javascript) -> None:
    for kind in POPULARITIES:
        for n in (1, 8, 64):
            segments = sgmv.segment(popularity(kind, n))
            expected = segments.stats(4096, 11008, 16).expand
            got = javascript(SCRIPT, f"traffic({n}, {segments.S}, 16, 16, 11008)")
            assert got["flops"] == expected.flops
            assert got["io_bytes"] == expected.bytes_read + expected.bytes_written
            assert got["intensity"] == expected.intensity


def test_layouts_are_each_engines(javascript: Javascript) -> None:
    chosen = [case for case in CASES if case.kernel == KERNELS[0]][::2]
    got = javascript(SCRIPT, of_each("layouts(segment(c.ids), c.ids, values)", chosen))
    for case, of_engine in zip(chosen, got, strict=True):
        slots = slots_of(case.ids)
        S, stack = len(slots), sgmv.AdapterStack(8, 8, slots=max(len(slots), 1), max_rank=8)
        for adapter_id in slots:
            stack.load(adapter_id, (np.ones((8, 8), "f"), np.ones((8, 8), "f")))
        segments = sgmv.segment(case.ids)
        most = case.max_lora_chunk_size
        csgmv = layouts.sglang(case.ids, stack, max_lora_chunk_size=most)
        launches = list(layouts.lorax(case.ids, 8).rank_data.values())
        held: dict[str, Any] = {
            "sgmv": segments,
            "punica": layouts.punica(case.ids, stack),
            "vllm_v1": layouts.vllm_v1(case.ids, max(case.max_loras, S, 1), slots),
            "sglang": csgmv,
            "lorax": launches[0] if launches else None,
        }
        for engine, layout in held.items():
            for name, (dtype, values) in of_engine[engine].items():
                if layout is None:
                    assert values == []
                    continue
                array = getattr(layout, name)
                assert (dtype, len(values)) == (str(array.dtype), len(array)), (engine, name)
                if name.endswith("_ptr"):  # the page names whose weights they point to
                    assert [int(v.split()[-1]) for v in values] == list(slots)
                elif name == "weight_indices":  # the page's base slot follows its own slots
                    base = len(csgmv.lora_ranks) - 1
                    assert [base if v == S else v for v in values] == array.tolist()
                elif not (name == "token_indices_sorted_by_lora_ids" and S == 0):
                    assert values == array.tolist(), (engine, name, case)


def test_unsorted_is_a_segment_for_each_run(javascript: Javascript) -> None:
    """Python sorts; so to Python each run is an adapter of its own."""
    compare = (FOLDER / "compare.js").read_text().split("function unsorted")[1].split("\n}\n")[0]
    script = f"{SCRIPT}\nfunction unsorted{compare}\n}}"
    expression = "figures(KERNELS[c.kernel](unsorted(c.ids), values))"
    chosen = [
        case for case in CASES if case.kernel in ("punica_sgmv_shrink", "punica_cutlass_expand")
    ]
    chosen = [case for case in chosen if -1 not in case.ids]
    for case, got in zip(chosen, javascript(script, of_each(expression, chosen)), strict=True):
        runs = np.cumsum(np.diff(case.ids, prepend=case.ids[0]) != 0).tolist()
        expected = json.loads(json.dumps(case._replace(ids=runs).launch().figures()))
        got["adapter_ids"] = expected["adapter_ids"]
        assert got == expected, case


def test_unsplit_is_the_launch_of_a_device_that_holds_too_few_blocks(
    javascript: Javascript,
) -> None:
    chosen = [case for case in CASES if case.kernel == "punica_sgmv_shrink" and max(case.ids) >= 0]
    expression = "figures(KERNELS[c.kernel](segment(c.ids), {...values, whole: true}))"
    of_the_device = ("capacity", "waves", "device", "roofline_us", "split_k_segments")
    for case, got in zip(chosen, javascript(SCRIPT, of_each(expression, chosen)), strict=True):
        device = dataclasses.replace(DEVICES[case.device])
        object.__setattr__(device, "sms", 0)  # fewer than a device may have
        launch = emulator.punica_sgmv_shrink(
            case.ids, case.h_in, case.r, device=device, release=case.release
        )
        expected = json.loads(json.dumps(launch.figures()))
        for name in set(expected) - {*of_the_device, "faults"}:
            assert got[name] == expected[name], (case, name)


def test_areas_hold_every_block(javascript: Javascript) -> None:
    """Blocks times their time, of each kind: as areas and bar by bar."""
    areas = """(() => { const line = timeline(launch);
      const { edges, layers } = occupancy(line, ({ kind }) => [kind]);
      const area = (blocks) =>
        blocks.reduce((all, n, i) => all + n * (edges[i + 1] - edges[i]), 0);
      return [edges.length - 1,
      Object.fromEntries(layers.map(({ key, blocks }) => [key[0], area(blocks)])),
      line.bars.reduce((all, { kind, start, end }) =>
      ({ ...all, [kind]: (all[kind] ?? 0) + end - start }), {})]; })()"""
    chosen = CASES[::7]
    exact = 0
    for case, (spans, by_area, by_bar) in zip(
        chosen, javascript(SCRIPT, of_each(areas, chosen)), strict=True
    ):
        assert set(by_area) == set(by_bar), case
        if spans < 400:
            exact += 1
            assert by_area == pytest.approx(by_bar), case
    assert exact > 50
