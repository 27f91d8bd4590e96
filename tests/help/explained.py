"""Questions to explain, and what is drawn for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

import sgmv
from sgmv import emulator
from sgmv.explain import engines
from sgmv.explain.command import VIEWS
from sgmv.explain.question import Question
from sgmv.terminal import NARROWEST, Terminal

Ids = Sequence[int]
ids_lists = st.lists(st.integers(-1, 12), max_size=40) | st.lists(
    st.sampled_from([-1, 3, 2**40]), min_size=60, max_size=300
)
few = settings(max_examples=40)


def ask(ids: Ids, **changed: Any) -> Question:
    """The question that the command line's defaults ask."""
    adapters = len({i for i in ids if i != -1})
    settings = dict(h_in=4096, h_out=4096, rank=16, device=emulator.A100, threads=2)
    return Question(
        segments=sgmv.segment(ids), **{**settings, "max_loras": max(adapters, 1), **changed}
    )


def lengths(*rows: int) -> list[int]:
    return np.repeat(np.arange(len(rows)), rows).tolist()


def drawn(view: str, question: Question, width: int = 80, colour: bool = False) -> str:
    terminal = Terminal(width, colour, True, question.slots)
    return terminal.text(VIEWS[view].draw(VIEWS[view].facts(question), terminal))


def check_layout(module: Any, question: Question, ids: list[int]) -> None:
    """By the strip that is drawn: one adapter between two edges, each row once, or base only."""
    facts = module.layout(question)
    assert set(facts) == set(engines.ENGINES)
    for name, engine in facts.items():
        rows, starts = engine["rows"], engine["starts"]
        assert engine["adapter_ids"] == [ids[row] for row in rows], name
        assert len(set(rows)) == len(rows), name
        assert {ids[row] for row in set(range(len(ids))) - set(rows)} <= {-1}, name
        if not starts:  # PEFT has no segments, and vLLM launches nothing for base-only rows
            assert not rows or name == "peft" or (name == "vllm_v1" and set(ids) == {-1}), name
            continue
        assert starts[0] == 0, name
        for first, last in zip(starts, [*starts[1:], len(rows)], strict=True):
            assert len({ids[row] for row in rows[first:last]}) == 1, name


widths = st.integers(NARROWEST, 40) | st.integers(41, 220)


# The terminal


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "sgmv", "explain", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=120,
    )


def on_a_terminal(**environment: str) -> str:
    """What the command writes where standard output is a terminal."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    ours, its = pty.openpty()
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", **environment}
    variables = {name: value for name, value in variables.items() if value != "unset"}
    program = [sys.executable, "-m", "sgmv", "explain", "group"]
    with subprocess.Popen(program, stdout=its, env=variables) as process:
        os.close(its)
        read = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux's way to say that nobody writes any more
                break
            if not part:
                break
            read += part
        process.wait(60)
    os.close(ours)
    return read.decode()


def check_group(module: Any, question: Question, ids: list[int]) -> None:
    facts = module.group(question)
    assert facts["adapter_ids"] == ids
    rows = [row for i in sorted(set(ids)) for row, each in enumerate(ids) if each == i]
    assert facts["rows"] == rows
    for s, adapter_id in enumerate(facts["segment_ids"]):
        first, last = facts["seq_start"][s : s + 2]
        assert {ids[row] for row in rows[first:last]} == {adapter_id}


def check_tasks(module: Any, question: Question, ids: list[int]) -> None:
    facts = module.tasks(question)
    sorted_ids = sorted(ids)
    positions = []
    for block in facts["blocks"]:
        positions += range(block["first"], block["last"])
        assert {sorted_ids[p] for p in range(block["first"], block["last"])} == {
            block["adapter_id"]
        }
        if facts["tile_ranks"]:
            assert sum(block["tiles"]) == block["last"] - block["first"]
            assert set(block["tiles"]) <= set(facts["tile_ranks"])
    assert positions == list(range(ids.count(-1), len(ids)))
    for parts, extent in (("shrink_ranks", question.rank), ("expand_columns", question.h_out)):
        assert [i for low, high in facts[parts] for i in range(low, high)] == list(range(extent))
