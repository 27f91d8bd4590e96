"""The explorer: every figure of the page against the emulator's, and the page in a real browser.

Figures need Chromium or node, the page needs Chromium; without, these tests are skipped and say so.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import sgmv
from reference.workloads import POPULARITIES, popularity
from sgmv import emulator, layouts
from sgmv.__main__ import main
from sgmv.emulator import DEVICES, DeadlockError, Launch
from sgmv.emulator.punica import RELEASES
from sgmv.errors import SgmvError
from sgmv.explorer.write import DOCS, FIVE_ROWS, KERNELS, MOST_ROWS, write_html
from tests.help.chromium import FOUND, Page, chromium
from tests.help.planting import replaced

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "sgmv" / "explorer"
SCRIPT = "".join(
    (FOLDER / f"{name}.js").read_text()
    for name in (
        "batch",
        "launch",
        "punica",
        "bgmv",
        "vllm",
        "sglang",
        "kernels",
        "timeline",
        "layouts",
    )
)
HUNG = [1] * 50 + [0] + [1] * 82  # segments of 1 and 132 rows
NODE = shutil.which("node")
NO_CHROMIUM = "no Chromium on the path: apt-get install chromium"
needs_chromium = pytest.mark.skipif(FOUND is None, reason=NO_CHROMIUM)
Javascript = Callable[[str, str], Any]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if FOUND is None:
        pytest.skip(NO_CHROMIUM)
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def javascript(request: pytest.FixtureRequest) -> Javascript:
    """(script, expression) -> the expression's value, after the script."""
    if FOUND is None and NODE is None:
        pytest.skip("needs Chromium or node")

    def in_chromium(script: str, expression: str) -> Any:
        page = request.getfixturevalue("page")
        return json.loads(
            page.evaluate(f"(() => {{{script}\nreturn JSON.stringify({expression})}})()")
        )

    def in_node(script: str, expression: str) -> Any:
        program = f"{script}\nprocess.stdout.write(JSON.stringify({expression}))"
        done = subprocess.run([str(NODE), "-"], input=program, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return in_chromium if FOUND else in_node


class Case(NamedTuple):
    """One launch, as the page names its parts."""

    ids: list[int]
    kernel: str
    h_in: int
    r: int
    h_out: int
    device: str
    release: str
    max_loras: int
    max_lora_chunk_size: int

    def launch(self) -> Launch:
        """The emulator's."""
        slots = slots_of(self.ids)
        own: dict[str, dict[str, Any]] = {
            "punica_sgmv_shrink": {"release": self.release},
            "vllm_v1": {"slots": slots, "max_loras": max(self.max_loras, len(slots))},
            "sglang": {"max_lora_chunk_size": self.max_lora_chunk_size},
        }
        named = next((own[name] for name in own if self.kernel.startswith(name)), {})
        shrinks = self.kernel.endswith("shrink")
        widths = {"h_in": self.h_in, "r": self.r} if shrinks else {"r": self.r, "h_out": self.h_out}
        made: Launch = getattr(emulator, self.kernel)(
            self.ids, **widths, device=DEVICES[self.device], **named
        )
        return made


def slots_of(ids: list[int]) -> dict[int, int]:
    """The page's slots: the places of the adapters in ascending order."""
    return {adapter_id: s for s, adapter_id in enumerate(sorted(set(ids) - {-1}))}


def cases() -> list[Case]:
    """Batches of all kinds, each with every kernel; widths, ranks and devices at random."""
    rng = np.random.default_rng(5)
    batches = [[7], [-1, -1], HUNG, [2, 0, -1, 2, 0], [5] * 64, [5] * 65, [-1, *range(40)]]
    batches += [list(range(n)) for n in (26, 27, 28, 33, 127, 128, 129)]
    batches += [popularity(k, n).tolist() for k in POPULARITIES for n in (1, 8, 64, 133, 600)]
    batches += [popularity("skewed", 256).tolist()]
    batches += [rng.integers(-1, 9, int(rng.integers(1, 400))).tolist() for _ in range(10)]
    ranks, widths = (8, 16, 17, 32, 64, 96, 128), (16, 768, 3424, 3584, 4096, 4099, 11008, 20480)
    overflow = Case(list(range(33)), "punica_sgmv_shrink", 2048, 128, 16, "H100", "1.1.0", 8, 16)
    return [overflow] + [
        Case(
            ids, kernel, int(rng.choice(widths)), int(rng.choice(ranks)), int(rng.choice(widths)),
            str(rng.choice(list(DEVICES))), str(rng.choice(RELEASES)),
            int(rng.choice((1, 8, 64))), int(rng.choice((16, 32, 128))),
        )
        for ids in batches
        for kernel in KERNELS
        for _ in range(3)
    ]  # fmt: skip


CASES = cases()
DATA = {name: vars(device) for name, device in DEVICES.items()}


def of_each(expression: str, chosen: list[Case]) -> str:
    """JavaScript: the expression's value for the launch of each case."""
    given = json.dumps({"devices": DATA, "cases": [c._asdict() for c in chosen]})
    return (
        f"(({{devices, cases}}) => cases.map((c) => {{ const values = {{...c, device: devices["
        "c.device], max_loras: Math.max(c.max_loras, laid_out(segment(c.ids)).length)}; "
        "const launch = KERNELS[c.kernel](segment(c.ids), values); "
        f"return {expression}; }}))({given})"
    )


@cache
def emulators() -> list[dict[str, Any]]:
    """The emulator's figures of every case, as JSON would bring them."""
    figures: list[dict[str, Any]] = json.loads(json.dumps([c.launch().figures() for c in CASES]))
    return figures


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
    ],
)
def test_a_fault_in_the_page_is_found(javascript: Javascript, text: str, instead: str) -> None:
    got = javascript(replaced(SCRIPT, text, instead), of_each("figures(launch)", CASES))
    assert got != emulators()


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
    chosen = CASES[::11]  # 11 and 8 kernels have no common factor
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


# --- the file ---------------------------------------------------------------------------------


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    text = write_html(tmp_path / "explorer.html").read_text()
    paper = (
        "https://arxiv.org/abs/2310.18547"  # a link, which asks for nothing until it is followed
    )
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg", paper}
    assert not re.search(r"<link[^>]+stylesheet|<script[^>]+src=|@import|url\((?!#)", text)
    start = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["start"]  # type: ignore[index]
    assert start["ids"] == "2, 0, -1, 2, 0"


def test_the_page_links_to_the_documents_beside_it(tmp_path: Path) -> None:
    path = write_html(tmp_path / "explorer.html")
    linked = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text())[1])["docs"]  # type: ignore[index]
    assert [each["text"] for each in linked] == list(DOCS.values())
    for each, name in zip(linked, DOCS, strict=True):
        assert (tmp_path / each["href"]).resolve() == ROOT / name


def test_a_device_of_ones_own_stands_in_the_page(tmp_path: Path) -> None:
    toy = emulator.Device("</script>toy", 2, 102400, 101376, 16, 1536, 10**11, 10**13)
    text = write_html(tmp_path / "explorer.html", [3, -1], device=toy).read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])  # type: ignore[index]
    assert data["devices"][-1]["name"] == data["start"]["device"] == toy.name
    assert [each["name"] for each in data["devices"][:-1]] == list(DEVICES)


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("batch", {"batch": []}),
        ("batch", {"batch": [0] * (MOST_ROWS + 1)}),
        ("batch", {"batch": [10**9]}),
        ("adapter_ids", {"batch": [-2]}),
        ("h_in", {"h_in": 0}),
        ("r", {"r": 1025}),
        ("h_out", {"h_out": 1.5}),
        ("kernel", {"kernel": "half_v_error"}),
        ("release", {"release": "1.2.0"}),
        ("device", {"device": "A100"}),
    ],
)
def test_refusals_come_before_the_file(
    tmp_path: Path, argument: str, given: dict[str, Any]
) -> None:
    with pytest.raises(SgmvError) as refused:
        write_html(tmp_path / "explorer.html", **given)
    assert refused.value.argument == argument
    assert not list(tmp_path.iterdir())


def test_the_command_writes_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "explorer.html"
    main(["explorer", str(path), "--no-open"])
    assert capsys.readouterr().out == f"written: {path.as_uri()}\n"
    assert path.read_text() == write_html(tmp_path / "again.html").read_text()


def test_the_command_refuses_a_place_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["explorer", str(tmp_path / "nowhere" / "explorer.html"), "--no-open"])
    said = capsys.readouterr().err
    assert said.startswith("sgmv: error: PATH: expected a file that can be written")


def test_the_command_opens_the_page_where_there_is_a_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "explorer.html", []
    monkeypatch.setattr("webbrowser.open", lambda uri: opened.append(uri) or len(opened) == 1)
    monkeypatch.setenv("DISPLAY", ":0")
    for told in ("opened: ", "written; open it in a browser: "):  # the second time it fails
        main(["explorer", str(path)])
        assert capsys.readouterr().out == f"{told}{path.as_uri()}\n"
    assert opened == [path.as_uri()] * 2


def test_a_wheel_takes_the_page_along() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    [globs] = re.findall(r'"sgmv.explorer" = \[(.*)\]', declared)
    taken = {path for glob in re.findall(r'"(.*?)"', globs) for path in FOLDER.glob(glob)}
    assert taken == {path for path in FOLDER.iterdir() if path.suffix in (".html", ".css", ".js")}
    assert '"sgmv.explorer"' in declared.split("packages =")[1].split("]")[0]


# --- the page in a browser --------------------------------------------------------------------


@pytest.fixture
def explorer(page: Page, tmp_path: Path) -> Iterator[Page]:
    """The page as `make explorer` writes it; whatever a test does, nothing may go wrong in it."""
    page.errors.clear()
    page.requests.clear()
    page.view(1280)
    page.open(write_html(tmp_path / "explorer.html").as_uri())
    yield page
    assert page.errors == []
    outside = [url for url in page.requests if not url.startswith(("file:", "about:", "data:"))]
    assert outside == []


def text(page: Page, name: str) -> str:
    return str(page.evaluate(f"document.getElementById({name!r}).innerText"))


def choose(page: Page, name: str, value: object) -> None:
    page.evaluate(
        f"(() => {{ const c = document.getElementById({name!r}); c.value = {json.dumps(value)};"
        "c.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def stories(page: Page) -> int:
    return int(page.evaluate("STORIES.length"))


def click(page: Page, link: str, story: int) -> None:
    """Click a link to a story; its state is there once the browser has noticed the new address."""
    page.evaluate(
        f"(async () => {{ document.querySelector({json.dumps(link)}).click();"
        f"while (story_of(state) !== {story})"
        "await new Promise((done) => setTimeout(done, 5)); })()"
    )


def follow(page: Page, story: int) -> None:
    click(page, f"#stories li:nth-child({story + 1}) a", story)


HANG, FIX, CLIFF, DISTINCT = 4, 5, 6, 2  # places of stories


@needs_chromium
def test_the_page_opens_on_five_rows_and_leads_through_all_stories(explorer: Page) -> None:
    assert text(explorer, "story-title") == "What is seq_start?"
    assert "seq_start = [0, 1, 3, 5]" in text(explorer, "segments-now")
    assert explorer.evaluate("state.ids") == FIVE_ROWS
    met = []
    for _ in range(stories(explorer)):
        met.append(explorer.evaluate("document.querySelector('#stories [aria-current]').innerText"))
        click(explorer, "#story-next", len(met) % stories(explorer))
    assert met == explorer.evaluate("STORIES.map(({ title }) => title)")
    assert explorer.evaluate("story_of(state)") == 0  # and round again


@needs_chromium
def test_the_hang_is_shown_and_says_why(explorer: Page) -> None:
    follow(explorer, HANG)
    told = text(explorer, "verdict")
    assert "This launch hangs." in told
    assert "adapter 0, 1 row: 1 step of 64 rows, so its blocks come to the barrier once" in told
    assert (
        "adapter 1, 132 rows: 3 steps of 64 rows, so its blocks come to the barrier 3 times" in told
    )
    deadlock = emulator.punica_sgmv_shrink(HUNG, 4096, 16, release="1.0.0").deadlock
    assert str(deadlock) in told
    explorer.evaluate("go(shown.timeline.moments.length - 1)")
    assert "16 blocks wait at barrier 2 for 16 that will not come" in text(explorer, "moment-text")
    assert "16 blocks returned" in explorer.evaluate("document.getElementById('time').textContent")
    explorer.evaluate("document.querySelector('#verdict button').click()")
    assert "This launch runs" in text(explorer, "verdict")


@needs_chromium
def test_the_page_shows_the_emulators_figures(explorer: Page) -> None:
    choose(explorer, "ids", "1*50, 0, 1*82")
    choose(explorer, "release", "1.0.0")
    for kernel in KERNELS:
        choose(explorer, "kernel", kernel)
        case = Case(HUNG, kernel, 4096, 16, 4096, "A100", "1.0.0", 8, 16)
        shown = explorer.evaluate("shown.figures")
        assert shown == json.loads(json.dumps(case.launch().figures()))


@needs_chromium
def test_every_story_runs_and_says_what_it_promises(explorer: Page) -> None:
    verdicts = []
    for i in range(stories(explorer)):
        follow(explorer, i)
        assert explorer.evaluate("document.querySelectorAll('#stories [aria-current]').length") == 1
        verdicts.append(text(explorer, "verdict-title"))
    assert verdicts == [
        "This launch runs.",
        "This launch runs.",
        "This launch runs, but takes at least 13.6 times as long as identical.",
        "This launch runs.",
        "This launch hangs.",
        "This launch runs, with a race.",
        "This launch runs, but K is no longer split.",
        "This launch runs, with a race.",
        "This launch runs.",
    ]


@needs_chromium
def test_stories_answer_with_the_emulators_figures(explorer: Page) -> None:
    """What a story says and shows, against what Python makes of the same two launches."""
    mixes = {name: popularity(name, 64).tolist() for name in POPULARITIES}
    follow(explorer, DISTINCT)
    for name, side in (("distinct", "shown"), ("identical", "beside")):
        figures = explorer.evaluate(f"{side}.figures")
        expected = emulator.punica_cutlass_expand(mixes[name], 16, 4096).figures()
        for each in ("S", "blocks", "io_bytes", "roofline_us", "lanes", "bytes_read"):
            assert figures[each] == expected[each], (name, each)
    follow(explorer, CLIFF)
    over, within = (emulator.punica_sgmv_shrink(range(n), 4096, 16).figures() for n in (28, 27))
    assert explorer.evaluate("shown.figures.blocks") == over["blocks"] == 28
    assert explorer.evaluate("beside.figures.blocks") == within["blocks"] == 432
    assert "32 steps on 28 SMs, in place of 3 steps on 108" in text(explorer, "story-body")
    follow(explorer, FIX)
    assert explorer.evaluate("beside.timeline.stuck.barrier") == 2
    assert explorer.evaluate("shown.timeline.stuck") is None


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


@needs_chromium
def test_no_kernel_no_block_no_adapter_are_told(explorer: Page) -> None:
    choose(explorer, "r", 17)
    assert "There is no such kernel." in text(explorer, "verdict")
    assert "rank 17: there are kernels for (16, 32, 64, 96, 128)" in text(explorer, "verdict")
    choose(explorer, "r", 16)
    choose(explorer, "ids", "-1*4")
    assert "Nothing is launched" in text(explorer, "verdict")
    assert "nothing to draw" in text(explorer, "moment-text")
    choose(explorer, "ids", "0*300")
    choose(explorer, "kernel", "sglang_csgmv_shrink")
    choose(explorer, "max_lora_chunk_size", 128)
    choose(explorer, "device", "L4")
    assert "do not fit an SM of L4" in text(explorer, "verdict")
    assert "none of which fits an SM" in text(explorer, "time-now")
    assert "0 waves" not in explorer.evaluate("document.body.innerText")


@needs_chromium
def test_what_is_typed_wrong_is_told_at_its_field_and_changes_nothing(explorer: Page) -> None:
    before = explorer.evaluate("shown.figures")
    for name, value, told in (
        ("ids", "0, x", "Expected an id such as 7, -1 or 0*132, got “x”"),
        ("ids", "0*5000", "at most 2,048 rows"),
        ("ids", " ", "at least one row"),
        ("h_in", "0", "h_in: expected a whole number from 1 to 65,536, got “0”"),
        ("r", "1.5", "r: expected a whole number from 1 to 1,024, got “1.5”"),
        ("n", "", "n: expected a whole number"),
    ):
        choose(explorer, name, value)
        assert told in text(explorer, f"{name}-problem")
        below = (
            f"document.getElementById('{name}-problem').getBoundingClientRect().top"
            f" - document.getElementById({name!r}).getBoundingClientRect().bottom"
        )
        assert 0 <= explorer.evaluate(below) < 12
        assert f"{name}-problem" in explorer.evaluate(
            f"document.getElementById({name!r}).getAttribute('aria-describedby')"
        )
        assert explorer.evaluate(f"document.getElementById({name!r}).ariaInvalid") == "true"
        explorer.view(1000 if explorer.evaluate("innerWidth") == 1280 else 1280)  # draws anew
        explorer.evaluate("new Promise((done) => setTimeout(done, 50))")
        assert explorer.evaluate("shown.figures") == before
        assert text(explorer, "verdict-title").startswith("Not drawn")
        assert explorer.evaluate("document.getElementById('verdict').className") == "verdict"
        for part in ("panels", "story", "verdict-body"):
            assert explorer.evaluate(f"document.getElementById({part!r}).inert")
            opacity = f"Number(getComputedStyle(document.getElementById({part!r})).opacity)"
            assert explorer.evaluate(opacity) < 0.5
        choose(explorer, "ids", "0")
        choose(explorer, "h_in", "4096")
        choose(explorer, "r", "16")
        assert explorer.evaluate("document.querySelectorAll('[aria-invalid=true]').length") == 0
        assert text(explorer, "verdict-title") == "This launch runs."
        assert not explorer.evaluate("document.getElementById('panels').inert")
        choose(explorer, "ids", "2, 0, -1, 2, 0")


@needs_chromium
@pytest.mark.parametrize("still", [False, True])
def test_rows_move_unless_the_reader_wants_no_motion(explorer: Page, still: bool) -> None:
    explorer.view(1280, still=still)
    choose(explorer, "ids", "0, 2, -1, 2, 0")
    moving = explorer.evaluate("document.getAnimations().length")
    assert moving == (0 if still else 5 + 1)  # the rows, and the point under the roof


@needs_chromium
def test_every_panel_tells_what_changed(explorer: Page) -> None:
    choose(explorer, "popularity", "distinct")
    panels = explorer.evaluate("[...document.querySelectorAll('.now')].map((p) => p.innerText)")
    assert len(panels) == 5
    assert all("Before: " in panel for panel in panels)


STATE = (
    "({ state, figures: shown.figures, moment, beside: beside && beside.figures,"
    " title: document.getElementById('story-title').innerText,"
    " told: document.getElementById('moment-text').innerText,"
    " cells: document.getElementById('segments').querySelectorAll('rect, path').length,"
    " controls: [...document.querySelectorAll('#controls :is(select, input, textarea)')]"
    ".map((control) => [control.id, control.value]) })"
)


def reloaded(page: Page) -> tuple[Any, Any]:
    """The state, and what it is after a reload of the same address."""
    page.evaluate("save()")
    before = page.evaluate(STATE)
    page.open(page.evaluate("location.href"))
    return before, page.evaluate(STATE)


@needs_chromium
def test_every_story_comes_back_from_its_address(explorer: Page) -> None:
    for i in range(stories(explorer)):
        follow(explorer, i)
        before, after = reloaded(explorer)
        assert before == after
        assert explorer.evaluate("story_of(state)") == i


@needs_chromium
@pytest.mark.parametrize("kind", POPULARITIES)
def test_every_popularity_comes_back_from_its_address(explorer: Page, kind: str) -> None:
    choose(explorer, "n", 37)
    choose(explorer, "popularity", kind)
    before, after = reloaded(explorer)
    assert before == after
    assert (after["state"]["popularity"], after["figures"]["n"]) == (kind, 37)
    lengths = sorted(after["figures"]["rows_per_segment"], reverse=True)
    assert lengths == np.bincount(popularity(kind, 37)).tolist()


@needs_chromium
def test_every_control_comes_back_from_the_address(explorer: Page) -> None:
    """Each at values that it does not begin with, all choices of a list included."""
    numbers = {
        "n": 70,
        "h_in": 2048,
        "r": 32,
        "h_out": 1024,
        "max_loras": 5,
        "max_lora_chunk_size": 32,
    }
    controls = explorer.evaluate(
        "[...document.querySelectorAll('#controls :is(select, input, textarea)')]"
        ".map((control) => [control.id, [...(control.options ?? [])].map(({ value }) => value)])"
    )
    assert {name for name, _ in controls} == {
        *numbers, "ids", "popularity", "kernel", "release", "device", "versus",
    }  # fmt: skip
    for name, choices in controls:
        for value in choices or [numbers.get(name, "3*2, -1, 4*70")]:
            choose(explorer, name, value)
            before, after = reloaded(explorer)
            assert before == after, (name, value)
            assert dict(after["controls"])[name] == str(value)
    follow(explorer, HANG)
    explorer.evaluate("go(3)")
    before, after = reloaded(explorer)
    assert before == after
    assert after["moment"] == 3


@needs_chromium
def test_the_way_back_is_the_browsers(explorer: Page) -> None:
    follow(explorer, HANG)
    follow(explorer, CLIFF)
    explorer.evaluate(
        "(async () => { history.back(); while (story_of(state) !== "
        f"{HANG}) await new Promise((done) => setTimeout(done, 5)); }})()"
    )
    assert text(explorer, "verdict-title") == "This launch hangs."


@needs_chromium
def test_a_moment_that_is_kept_late_does_not_undo_a_link(explorer: Page) -> None:
    follow(explorer, HANG)
    explorer.evaluate("go(2)")
    link = f"document.querySelectorAll('#stories a')[{CLIFF}]"
    explorer.evaluate(f"(() => {{ {link}.click(); save(); }})()")
    explorer.evaluate("new Promise((done) => setTimeout(done, 400))")
    assert explorer.evaluate("story_of(state)") == CLIFF
    assert explorer.evaluate("location.hash") == explorer.evaluate(f"{link}.hash")


@needs_chromium
def test_links_inside_the_page_leave_the_address_alone(explorer: Page) -> None:
    follow(explorer, CLIFF)
    address = explorer.evaluate("location.hash")
    explorer.evaluate("document.querySelector('.skip').click()")
    explorer.evaluate(
        "document.querySelectorAll('#story-ways button').forEach((each) => each.click())"
    )
    explorer.evaluate("pause()")
    explorer.evaluate("go(0)")
    explorer.evaluate("save()")
    assert explorer.evaluate("location.hash") == address


@needs_chromium
@pytest.mark.parametrize(
    "asked", ["n=x&popularity=distinct", "ids=0,y", "h_in=0", "n=99999&popularity=identical"]
)
def test_an_address_that_asks_for_too_much_is_told_at_the_field(explorer: Page, asked: str) -> None:
    url = explorer.evaluate("location.href").split("#")[0]
    explorer.open(f"{url}#{asked}")
    assert explorer.evaluate("shown.figures.n") == len(FIVE_ROWS)
    name = asked.split("=")[0]
    assert "xpected" in text(explorer, f"{name}-problem")
    assert text(explorer, "verdict-title").startswith("Not drawn")


@needs_chromium
def test_unknown_choices_in_an_address_leave_the_controls_alone(explorer: Page) -> None:
    url = explorer.evaluate("location.href").split("#")[0]
    explorer.open(f"{url}#kernel=none&device=none&popularity=none&moment=x&versus=none&what=1")
    assert text(explorer, "story-title") == "What is seq_start?"


@needs_chromium
def test_the_moving_picture_is_one_click_away_and_begins_at_its_beginning(explorer: Page) -> None:
    follow(explorer, HANG)
    assert text(explorer, "moment-text").startswith("1 of ")
    top = "document.getElementById('watch').getBoundingClientRect().top + scrollY"
    assert explorer.evaluate(top) < 900  # on the first screen
    explorer.evaluate("document.getElementById('watch').click()")
    seen = "document.getElementById('time-title').getBoundingClientRect().top"
    assert 0 <= explorer.evaluate(seen) < 100
    assert explorer.evaluate("playing !== null")
    assert explorer.evaluate("document.activeElement.id") == "play"
    explorer.evaluate("new Promise((done) => setTimeout(done, PACE * 1.5))")
    assert text(explorer, "moment-text").startswith("2 of ")


@needs_chromium
def test_a_keyboard_reaches_and_steps_through_everything(explorer: Page) -> None:
    follow(explorer, HANG)
    explorer.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(80):
        explorer.press("Tab")
        reached.append(
            explorer.evaluate("document.activeElement.id || document.activeElement.tagName")
        )
        if reached[-1] == "moment":
            break
    for name in ("popularity", "n", "ids", "h_in", "r", "h_out", "kernel", "release", "device"):
        assert name in reached
    last = text(explorer, "moment-text")
    explorer.press("ArrowRight")
    assert text(explorer, "moment-text") != last
    explorer.press("Home")
    assert text(explorer, "moment-text").startswith("1 of ")
    explorer.evaluate("document.getElementById('next').focus()")
    explorer.press("Enter")
    assert text(explorer, "moment-text").startswith("2 of ")


@needs_chromium
def test_a_screen_reader_hears_names_for_all(explorer: Page) -> None:
    follow(explorer, HANG)
    heard = explorer.accessible()
    for role in ("combobox", "spinbutton", "slider", "button", "textbox", "image", "heading"):
        named = [node["name"] for node in heard if node["role"] == role]
        assert named, role
        assert all(named), role
    images = [node["name"] for node in heard if node["role"] == "image"]
    assert len(images) == 6  # one for each drawing
    assert any("stuck at barrier 2" in name for name in images)


BEYOND = """[...document.querySelectorAll("figure svg text")].filter((text) => {
  const [a, b] = [text, text.closest("figure")].map((each) => each.getBoundingClientRect());
  return a.left < b.left - 6 || a.right > b.right + 6; }).map((text) => text.textContent)"""
CHECKS = (Path(__file__).parent / "page_checks.js").read_text()
UNUSUAL: list[dict[str, object]] = [  # beside the stories
    {"ids": "0"},
    {"ids": "7, 0*132, -1*3, 999999999*2", "kernel": "punica_bgmv_expand"},
    {"popularity": "distinct", "n": 300, "kernel": "vllm_v1_expand", "versus": "identical"},
    {"popularity": "uniform", "n": 2048, "versus": "unsorted"},
    {"popularity": "skewed", "n": 1000, "kernel": "punica_bgmv_shrink", "versus": "skewed"},
    {"ids": "0*300", "kernel": "sglang_csgmv_shrink", "max_lora_chunk_size": 128, "device": "L4"},
    {"ids": "-1*9", "r": 17},
    {"ids": "0, 1*65, 2*129", "release": "1.0.0", "versus": "release"},
]


def examined(page: Page, *names: str) -> dict[str, list[str]]:
    """What the named functions of page_checks.js find."""
    calls = ", ".join(f"{name}: {name}()" for name in names)
    found: dict[str, list[str]] = page.evaluate(f"(() => {{{CHECKS}\nreturn {{{calls}}}}})()")
    return {name: wrong for name, wrong in found.items() if wrong}


def states(page: Page) -> Iterator[str]:
    """The page in the state of each story, at the end of its time line, then in unusual ones."""
    home = page.evaluate("location.href").split("#")[0]
    for i in range(stories(page)):
        follow(page, i)
        page.evaluate("go(shown.timeline.moments.length - 1)")
        yield f"story {i}"
    for changes in UNUSUAL:
        page.open(home)
        for name, value in changes.items():
            choose(page, name, value)
        page.evaluate("go(shown.timeline.moments.length - 1)")
        yield str(changes)


LOOKS = ("faint_texts", "faint_labels", "faint_shapes", "overlaps", "wrong_numbers")


@needs_chromium
@pytest.mark.parametrize(
    ("width", "dark"), [(390, False), (390, True), (820, False), (1280, True), (1920, False)]
)
def test_it_fits_and_can_be_read(explorer: Page, width: int, dark: bool) -> None:
    explorer.view(width, dark=dark)
    for state in states(explorer):
        assert explorer.evaluate("document.documentElement.scrollWidth") <= width, state
        assert explorer.evaluate(BEYOND) == [], state
        assert examined(explorer, *LOOKS) == {}, state
    assert examined(explorer, "clipped_rings", "hidden_cells") == {}


@needs_chromium
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("faint_texts", "document.getElementById('story-body').style.opacity = 0.6"),
        ("faint_texts", "document.getElementById('n').style.color = '#aaa'"),
        ("faint_labels", "document.querySelector('#segments g text').style.fill = '#777'"),
        ("faint_shapes", "document.documentElement.style.setProperty('--base', '#9aa0aa')"),
        ("faint_shapes", "document.querySelector('.written').style.opacity = 0.3"),
        ("faint_shapes", "document.getElementById('kernel').style.borderColor = '#ccc'"),
        ("overlaps", "document.querySelector('#bytes .once').setAttribute('y1', 0)"),
        ("overlaps", "document.querySelector('#segments text').setAttribute('y', 40)"),
        ("clipped_rings", "document.getElementById('controls').style.padding = '3px'"),
        ("hidden_cells", "document.getElementById('layouts').style.width = '120px'"),
        ("wrong_numbers", "document.getElementById('segments-now').textContent = '1 segments'"),
    ],
)
def test_the_checks_of_looks_can_fail(explorer: Page, name: str, spoil: str) -> None:
    assert examined(explorer, name) == {}
    explorer.evaluate(spoil)
    assert list(examined(explorer, name)) == [name]


@needs_chromium
def test_words_are_defined_where_they_are_first_met(explorer: Page) -> None:
    """Along the path, paragraph by paragraph; and all of them in the list of words."""
    defined: list[str] = []
    for i in range(stories(explorer)):
        follow(explorer, i)
        met = explorer.evaluate(f"(() => {{{CHECKS}\nreturn undefined_words({defined})}})()")
        assert met["early"] == [], i
        defined = met["defined"]
    words = explorer.evaluate("Object.keys(WORDS)")
    assert sorted(defined) == sorted(words)
    explorer.evaluate("document.getElementById('words').open = true")
    assert all(word in text(explorer, "words-list") for word in words)


@needs_chromium
def test_64_adapters_have_64_colours(explorer: Page) -> None:
    for dark in (False, True):
        explorer.view(1280, dark=dark)
        choose(explorer, "n", 64)
        choose(explorer, "popularity", "distinct")
        colours = explorer.evaluate(
            "range(64).map((s) => { const made = chip(s); document.body.append(made);"
            "const found = getComputedStyle(made).backgroundColor; made.remove();"
            "return found.match(/[0-9.]+/g).map(Number); })"
        )
        lab = [oklab(np.array(colour) / 255) for colour in colours]
        apart = [float(np.linalg.norm(a - b)) for i, a in enumerate(lab) for b in lab[:i]]
        assert min(apart) > 0.02  # the least difference that is seen
        beside = [float(np.linalg.norm(a - b)) for a, b in pairwise(lab)]
        assert min(beside) > 0.15


def oklab(srgb: np.ndarray) -> np.ndarray:
    """Björn Ottosson's OKLab, in which equal distances look alike."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    found: np.ndarray = to_lab @ np.cbrt(lms @ linear)
    return found


@needs_chromium
def test_legends_explain_every_colour(explorer: Page) -> None:
    looks = """((at, legend) => {
      const look = (e) => ["fill", "stroke"].map((name) => getComputedStyle(e)[name]).join();
      const of = (selector) => new Set([...document.querySelectorAll(selector)].map(look));
      const explained = of(`${legend} svg :is(rect, path, circle, line)`);
      const drawn = of(`${at} :is(path, rect:not(.veil))`);
      return [...drawn].filter((each) => !explained.has(each)); })"""
    for i in range(stories(explorer)):
        follow(explorer, i)
        if explorer.evaluate("shown.figures.S") <= 6:
            assert explorer.evaluate(f"{looks}('#time', '#time-legend')") == [], i
            assert explorer.evaluate(f"{looks}('#tiles', '#tiles-legend')") == [], i
        if explorer.evaluate("beside !== null"):
            assert "multiplies" in text(explorer, "compare-legend")
        assert text(explorer, "bytes-legend").split("\n") == [
            "read",
            "written",
            "every operand once",
        ]


@needs_chromium
def test_both_sides_are_drawn_on_one_scale(explorer: Page) -> None:
    follow(explorer, CLIFF)
    wide = "[...document.querySelectorAll('#compare .read')].map((bar) => bar.width.baseVal.value)"
    for_bytes = explorer.evaluate(f"{wide}.slice(0, 2)")
    moved = explorer.evaluate("[shown, beside].map(moved)")
    assert for_bytes[0] / for_bytes[1] == pytest.approx(moved[0] / moved[1])
    bound = explorer.evaluate(f"{wide}.slice(2, 4)")
    us = explorer.evaluate("[shown, beside].map(({ figures }) => figures.roofline_us)")
    assert bound[0] / bound[1] == pytest.approx(us[0] / us[1])
    areas = "[...document.querySelectorAll('#compare path')].map((path) => path.getBBox())"
    right = explorer.evaluate(f"{areas}.map(({{ x, width }}) => x + width)")
    left = explorer.evaluate(f"{areas}[0].x")
    assert (max(right[1:]) - left) / (right[0] - left) == pytest.approx(3 / 32, abs=0.001)
    tall = explorer.evaluate(f"{areas}.map(({{ height }}) => height)")
    assert tall[0] / tall[1] == pytest.approx(28 / 432, abs=0.002)


@needs_chromium
def test_every_comparison_says_what_it_compares(explorer: Page) -> None:
    """Each choice of each half: shown, or a word on why there is nothing."""
    for kernel in ("punica_sgmv_shrink", "punica_cutlass_expand", "vllm_v1_shrink"):
        choose(explorer, "kernel", kernel)
        for versus in explorer.evaluate("[...$('versus').options].map(({ value }) => value)"):
            choose(explorer, "versus", versus)
            shown = explorer.evaluate("document.getElementById('compare-panel').checkVisibility()")
            helped = text(explorer, "versus-help")
            assert shown != (helped != "" or versus == ""), (kernel, versus)
            assert explorer.evaluate("beside !== null") == shown
            same_half = versus.split("_")[-1] == kernel.split("_")[-1]
            if versus in KERNELS:
                assert shown == (same_half and versus != kernel)


@needs_chromium
def test_ticks_are_even(explorer: Page) -> None:
    ticks = """((figure, from) => [...document.querySelectorAll(`#${figure} text`)]
      .filter((text) => Math.abs(text.y.baseVal[0].value - from) < 1)
      .map((text) => Number(text.textContent.replace(/adapter |,/g, "")))
      .filter((tick) => !Number.isNaN(tick)))"""
    for width in (390, 1280):
        explorer.view(width)
        for n in (9, 64, 300, 2048):
            choose(explorer, "n", n)
            choose(explorer, "popularity", "distinct")
            starts = explorer.evaluate(f"{ticks}('segments', STRIP.low + STRIP.tall + 20)")
            assert len(set(np.diff(starts[:-1]))) <= 1, starts
            assert (starts[0], starts[-1]) == (0, n)
            names = explorer.evaluate(f"{ticks}('segments', STRIP.low + STRIP.tall + 38)")
            assert len(names) > 3
            assert len(set(np.diff(names))) == 1, names
        follow(explorer, HANG)
        steps = explorer.evaluate(f"{ticks}('time', scale.low + 17)")
        assert len(steps) > 4
        assert len(set(np.diff(steps))) == 1, steps


@needs_chromium
def test_many_blocks_are_drawn_as_areas_few_as_lines(explorer: Page) -> None:
    follow(explorer, DISTINCT)
    assert explorer.evaluate("shown.figures.blocks") == 512
    assert explorer.evaluate("document.querySelectorAll('#time path').length") == 1
    ticks = "[...document.querySelectorAll('#time text')].map((text) => text.textContent)"
    assert {"0", "100", "500", "blocks"} <= set(explorer.evaluate(ticks))
    follow(explorer, HANG)
    assert "SM 0" in explorer.evaluate(ticks)


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


@needs_chromium
def test_the_most_rows_are_taken(explorer: Page) -> None:
    choose(explorer, "n", MOST_ROWS)
    assert MOST_ROWS >= 2048
    for kernel in ("punica_sgmv_shrink", "vllm_v1_expand"):  # the least and the most blocks
        choose(explorer, "kernel", kernel)
        choose(explorer, "popularity", "distinct")
        assert explorer.evaluate("shown.figures.S") == MOST_ROWS
        choose(explorer, "popularity", "skewed")
        assert explorer.evaluate("shown.figures.n") == MOST_ROWS
