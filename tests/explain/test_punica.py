"""Punica's kernels, drawn: the barrier, the cliff, the steps of shrink; and the tour."""

from __future__ import annotations

import re

import pytest

from sgmv import emulator
from sgmv.explain import punica
from tests.help import punica_page
from tests.help.explained import ask, drawn, lengths

pytestmark = pytest.mark.once


def test_the_barrier_is_drawn_for_both_releases() -> None:
    text = drawn("barrier", ask(lengths(1, 132)))
    before, after = text.split("release 1.1.0")
    assert "adapter 0: 1 step   ██┃  returns" in before
    assert "adapter 1: 3 steps  ██┃██┃  waits for ever" in before
    assert "The call never returns" in before
    assert "adapter 0: 1 step   ██┃  ┃  ┃  returns" in after
    assert "never" not in after
    assert "race" in punica.barrier(ask(lengths(1, 132)))["releases"]["1.1.0"]


def test_no_deadlock_is_drawn_where_there_is_none() -> None:
    for rows in ([65, 128], [3, 60], [200]):
        text = drawn("barrier", ask(lengths(*rows)))
        assert "for ever" not in text
        assert "never" not in text


@pytest.mark.parametrize("device", ["A100", "H100"])
def test_the_cliff_is_where_the_drawing_says(device: str) -> None:
    where = emulator.DEVICES[device]
    [told] = re.findall(
        r"takes up to (\d+) segments", drawn("barrier", ask([0], device=where), 500)
    )
    assert "They fit: K is split" in drawn("barrier", ask(range(int(told)), device=where), 500)
    over = drawn("barrier", ask(range(int(told) + 1), device=where), 500)
    assert "They do not fit" in over
    assert "K is not split" in over


def test_shrinks_bars_are_its_steps() -> None:
    text = drawn("shrink", ask(lengths(1, 132, 64)))
    assert "adapter 0 █░░░░░░░  1 of 64 row slots" in text
    assert "adapter 1 ████████ ████████ █░░░░░░░  132 of 192 row slots" in text
    assert "adapter 2 ████████  64 of 64 row slots" in text


def test_a_kernel_that_there_is_not_is_named() -> None:
    assert "No such kernel (rank 8" in drawn("shrink", ask([0], rank=8), 500)
    assert "No such kernel" not in drawn("shrink", ask([0]), 500)
    text = drawn("launches", ask([0], h_in=3424), 500)
    assert "punica_bgmv_shrink ! " in text
    assert "punica_bgmv_shrink: width 3424" in text
    assert "!" not in drawn("launches", ask([0]), 500)


def test_the_tour_is_fresh() -> None:
    page = punica_page.PAGE.read_text()
    assert punica_page.rendered(page) == page, "run `python -m tests.help.punica_page`"


def test_the_tour_has_a_picture_for_each_of_six_steps() -> None:
    steps = re.split(r"^## (?=\d)", punica_page.PAGE.read_text(), flags=re.MULTILINE)[1:]
    views = [command for step in steps for command in punica_page.COMMAND.findall(step)]
    assert [view.split()[1] for view in views] == [
        "group", "layout", "shrink", "barrier", "expand", "popularity",
    ]  # fmt: skip
    assert len(steps) == 6
