"""The views of this package's own kernels are of a real call."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sgmv
from sgmv import workspace
from sgmv.explain import cpu
from sgmv.kernels.jit import records
from sgmv.kernels.records import BLOCK
from tests.conftest import JITTED
from tests.help.explained import ask, check_group, check_tasks, few, ids_lists

pytestmark = pytest.mark.once


@few
@given(ids_lists)
def test_group_tells_every_row_once(ids: list[int]) -> None:
    check_group(cpu, ask(ids), ids)


def plan_of_a_call(ids: list[int], rank: int, h_out: int, threads: int) -> dict[str, Any]:
    """The row blocks and cuts that a real call has left in its workspace."""
    used = sorted({i for i in ids if i != -1})
    A, B = np.zeros((rank, 8), "f"), np.zeros((h_out, rank), "f")
    stack = sgmv.AdapterStack.from_adapters(dict.fromkeys(used, (A, B)), h_in=8, h_out=h_out)
    sgmv.set_num_threads(threads)
    y = np.zeros((len(ids), h_out), "f")
    sgmv.add_lora(y, np.zeros((len(ids), 8), "f"), stack, np.array(ids, np.int64))
    [call] = workspace._idle[-1].call
    blocks = records(BLOCK, call.blocks, call.block_count)
    return {
        "blocks": [(used[slot], first, last) for slot, _, first, last in blocks.tolist()],
        "shrink_cuts": call.shrink_cuts,
        "expand_cuts": call.expand_cuts,
    }


@pytest.mark.skipif(not JITTED, reason="the plain loops would take long")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tasks_are_those_of_a_real_call(
    threads: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small work, which one thread does alone, and of more."""
    monkeypatch.setattr(sys.modules["sgmv.launch"], "WORTH_SHARING_NS", 20_000)
    shared = set()
    for rank, h_out in ((16, 200), (17, 70), (64, 4096)):
        for n in (1, 5, 60, 400):
            ids = rng.integers(-1, rng.integers(1, 6), n).tolist()
            if max(ids) == -1:
                continue
            told = cpu.tasks(ask(ids, rank=rank, h_in=8, h_out=h_out, threads=threads))
            real = plan_of_a_call(ids, rank, h_out, threads)
            blocks = [(each["adapter_id"], each["first"], each["last"]) for each in told["blocks"]]
            assert blocks == real["blocks"]
            assert told["shrink_cuts"] == real["shrink_cuts"]
            assert told["expand_cuts"] == real["expand_cuts"]
            shared.add(told["shared"])
    assert shared == {False, True}


@few
@given(ids_lists, st.integers(1, 130), st.integers(1, 500), st.integers(1, 8))
def test_tasks_and_tiles_hold_everything_once(
    ids: list[int], rank: int, h_out: int, threads: int
) -> None:
    check_tasks(cpu, ask(ids, rank=rank, h_out=h_out, threads=threads), ids)
