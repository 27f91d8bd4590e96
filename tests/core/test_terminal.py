"""What fits a terminal: its width, its colours, and characters that its encoding has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgmv import emulator
from sgmv.explain.command import VIEWS
from sgmv.terminal import ESCAPE, PLAIN, Terminal
from tests.help.explained import ask, command, drawn, few, ids_lists, lengths, on_a_terminal, widths

pytestmark = pytest.mark.once


def test_bars_show_full_only_what_is_full() -> None:
    terminal = Terminal()
    for total in (1, 32, 64, 1000):
        for used in {0, 1, total // 2, total - 1, total}:
            bar = terminal.bar(used, total, 8)
            assert len(bar) == 8
            assert ("█" in bar) == (used > 0)
            assert ("░" not in bar) == (used == total)


@settings(max_examples=60)
@given(
    ids_lists,
    widths,
    st.booleans(),
    st.sampled_from([1, 8, 16, 17, 64, 128]),
    st.sampled_from([1, 70, 4096, 11008]),
    st.sampled_from(sorted(emulator.DEVICES)),
)
def test_every_view_fits_every_width(
    ids: list[int], width: int, colour: bool, rank: int, h: int, device: str
) -> None:
    question = ask(ids, rank=rank, h_in=h, h_out=h, device=emulator.DEVICES[device])
    for view in VIEWS:
        json.dumps(VIEWS[view].facts(question), allow_nan=False)
        for line in drawn(view, question, width, colour).splitlines():
            assert len(ESCAPE.sub("", line)) <= width, (view, line)


@few
@given(ids_lists, widths)
def test_colour_only_repeats_what_the_text_says(ids: list[int], width: int) -> None:
    """Without its escapes a coloured view is the plain one, whose titles are underlined."""
    question = ask(ids)
    for view in VIEWS:
        plain = drawn(view, question, width).splitlines()
        coloured = ESCAPE.sub("", drawn(view, question, width, colour=True)).splitlines()
        underlined = [line for line in plain if not line or set(line) != {"─"}]
        assert [line.rstrip() for line in coloured] == underlined, view


def test_an_adapter_has_one_colour_everywhere() -> None:
    question = ask([50, 90, -1, 50, 90, 90])
    for view in ("group", "tasks", "layout", "shrink", "expand"):
        text = drawn(view, question, colour=True)
        cells = set(re.findall(r"\x1b\[30;48;5;(\d+)m *(50|90)\x1b", text))
        assert len(cells) == 2, view
        assert len({colour for colour, _ in cells}) == 2, view


def test_long_batches_are_cut_short() -> None:
    text = drawn("group", ask([0, 1] * 2000))
    assert "more" in text
    assert len(text.splitlines()) < 60
    assert len(drawn("layout", ask(range(1000))).splitlines()) < 300


def test_colours_on_a_terminal_alone() -> None:
    assert "\x1b[" in on_a_terminal(NO_COLOR="unset")
    assert "\x1b[" not in on_a_terminal(NO_COLOR="1")
    assert "\x1b[" not in on_a_terminal(NO_COLOR="unset", TERM="dumb")
    assert b"\x1b[" not in command("group").stdout


def test_without_box_characters_where_the_encoding_has_none() -> None:
    done = command("shrink", "barrier", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "#......." in text
    assert "##|" in text


def test_every_character_that_is_drawn_has_a_plain_one() -> None:
    question = ask(lengths(1, 132, 3))
    for view in VIEWS:
        assert drawn(view, question).translate(PLAIN).isascii(), view


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `python -m sgmv explain | head -1`."""
    program = [sys.executable, "-m", "sgmv", "explain", "layout", "--ids", "0"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(program, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert done.stderr == b""
