"""How the page looks: it fits, can be read, and explains its colours."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from tests.help.chromium import Page
from tests.help.explored import (
    BEYOND,
    CHECKS,
    CLIFF,
    DISTINCT,
    HANG,
    choose,
    examined,
    follow,
    needs_chromium,
    stories,
    text,
)

pytestmark = pytest.mark.once


UNUSUAL: list[dict[str, object]] = [  # beside the stories
    {"ids": "0"},
    {"ids": "7, 0*132, -1*3, 999999999*2", "kernel": "punica_bgmv_expand"},
    {"popularity": "distinct", "n": 300, "kernel": "vllm_v1_expand", "versus": "identical"},
    {"popularity": "uniform", "n": 2048, "versus": "unsorted"},
    {"popularity": "skewed", "n": 1000, "kernel": "punica_bgmv_shrink", "versus": "skewed"},
    {"ids": "0*300", "kernel": "sglang_csgmv_shrink", "max_lora_chunk_size": 128, "device": "L4"},
    {"ids": "-1*9", "r": 17},
    {"ids": "0, 1*65, 2*129", "release": "1.0.0", "versus": "release"},
    {"ids": "0", "kernel": "vllm_moe_shrink", "experts": 1, "top_k": 1},
    {"popularity": "distinct", "n": 300, "kernel": "vllm_moe_expand", "experts": 256, "top_k": 16},
    {"ids": "-1*9, 999999999", "kernel": "vllm_moe_shrink", "experts": 128, "top_k": 8},
    {"ids": "-1*3", "kernel": "vllm_moe_expand"},
]


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
