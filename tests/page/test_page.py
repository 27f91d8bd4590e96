"""The page in a browser: its stories, its controls, and what it tells of wrong ones."""

from __future__ import annotations

import json

import pytest

from reference.workloads import POPULARITIES, popularity
from sgmv import emulator
from sgmv.explorer.write import FIVE_ROWS, KERNELS, MOST_ROWS
from tests.help.chromium import Page
from tests.help.explored import (
    CLIFF,
    DISTINCT,
    EXPERTS,
    FIX,
    HANG,
    HUNG,
    Case,
    choose,
    click,
    follow,
    needs_chromium,
    stories,
    text,
)

pytestmark = pytest.mark.once


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
        "This launch runs, but takes at least 2.81 times as long as identical.",
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
    seen = "[...document.querySelectorAll('section:not([hidden]) > .now')]"
    panels = explorer.evaluate(f"{seen}.map((p) => p.innerText)")
    assert len(panels) == 5
    assert all("Before: " in panel for panel in panels)


@needs_chromium
def test_the_panel_of_experts_shows_the_emulators_groups(explorer: Page) -> None:
    """There for kernels on experts alone: a box for each group, its zeros in words."""
    assert explorer.evaluate("document.getElementById('experts-panel').hidden")
    follow(explorer, EXPERTS)
    figures = explorer.evaluate("shown.figures")
    case = Case(
        explorer.evaluate("state.ids"), "vllm_moe_shrink", 2048, 16, 4096, "A100", "1.1.0",
        8, 16, 128, 8,
    )  # fmt: skip
    assert figures == json.loads(json.dumps(case.launch().figures()))
    told = text(explorer, "experts-now")
    assert told.startswith(f"512 pairs in {figures['S']} groups, each padded to 32 rows")
    zeros = round(100 * figures["wasted_rows"] / figures["row_slots"])
    assert f"{figures['row_slots']:,} rows, {zeros} % of them zeros" in told
    assert f"{zeros} % of all rows" in text(explorer, "story-body")
    boxes = "document.querySelector('#experts-map .waste').getAttribute('d').match(/M/g).length"
    assert explorer.evaluate(boxes) == figures["S"]
    rows = explorer.evaluate(
        "[...document.querySelectorAll('#experts-table tbody tr')].map((tr) =>"
        " [...tr.children].map((cell) => cell.textContent))"
    )
    assert [row[0] for row in rows] == ["1", "4", "16", "64", "256", "1,024"]
    assert rows[3][3] == f"{zeros} %"  # this batch's own: 64 rows, uniform
    choose(explorer, "top_k", 16)
    choose(explorer, "experts", 4)
    assert "top_k is taken to be 4, all experts." in text(explorer, "verdict")
    choose(explorer, "kernel", "vllm_v1_shrink")
    assert explorer.evaluate("document.getElementById('experts-panel').hidden")


@needs_chromium
def test_too_many_blocks_are_told(explorer: Page) -> None:
    choose(explorer, "kernel", "vllm_moe_expand")
    choose(explorer, "experts", 256)
    choose(explorer, "top_k", 8)
    choose(explorer, "n", 2048)
    choose(explorer, "max_loras", 400)
    assert explorer.evaluate("shown.figures.blocks") > 4e6
    assert "too many to draw" in text(explorer, "moment-text")


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
def test_the_most_rows_are_taken(explorer: Page) -> None:
    choose(explorer, "n", MOST_ROWS)
    assert MOST_ROWS >= 2048
    for kernel in ("punica_sgmv_shrink", "vllm_v1_expand"):  # the least and the most blocks
        choose(explorer, "kernel", kernel)
        choose(explorer, "popularity", "distinct")
        assert explorer.evaluate("shown.figures.S") == MOST_ROWS
        choose(explorer, "popularity", "skewed")
        assert explorer.evaluate("shown.figures.n") == MOST_ROWS
