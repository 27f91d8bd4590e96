"""Launches that are shown are the emulator's."""

from __future__ import annotations

import pytest

from sgmv import emulator
from sgmv.explain import launches
from tests.help.explained import ask

pytestmark = pytest.mark.once


def test_launches_are_the_emulators() -> None:
    """All its kernels of one layer, each given the widths, slots and device of the question."""
    question = ask([9, 4, -1, 9], h_in=512, h_out=1024, rank=32, max_loras=4, device=emulator.L4)
    facts = launches.launches(question)
    kernels = {name for name in emulator.__all__ if name.endswith(("shrink", "expand"))}
    assert set(facts) == {name for name in kernels if "_moe_" not in name}
    for name, figures in facts.items():
        inner, outer = ("h_in", "r") if "shrink" in name else ("r", "h_out")
        assert (figures[inner], figures[outer]) == ((512, 32) if inner == "h_in" else (32, 1024))
        assert figures["device"] == "L4"
        assert figures["adapter_ids"] == [4, 9]
    assert facts["vllm_v1_shrink"]["grid_z"] == 5
