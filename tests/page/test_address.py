"""The page's address brings every state back, and undoes none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reference.workloads import POPULARITIES, popularity
from sgmv.explorer.write import FIVE_ROWS
from tests.help.chromium import Page
from tests.help.explored import (
    CLIFF,
    HANG,
    choose,
    follow,
    needs_chromium,
    stories,
    text,
)

pytestmark = pytest.mark.once


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
        "experts": 16,
        "top_k": 4,
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
