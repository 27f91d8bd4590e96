"""Mixes are those of Punica's paper."""

from __future__ import annotations

import pytest

from sgmv import emulator
from sgmv.explain import mixes
from sgmv.popularity import popularity
from tests.help.explained import ask, lengths

pytestmark = pytest.mark.once


def test_mixes_are_the_papers() -> None:
    """Section 7.1: 64 distinct rows at 0.94 FLOP per byte, of one adapter at 12.8."""
    facts = mixes.mixes(ask(popularity("uniform", 64).tolist()))
    found = {name: each["expand"]["intensity"] for name, each in facts["batches"].items()}
    assert round(found["distinct"], 2) == 0.94
    assert round(found["identical"], 1) == 12.8
    assert found["this batch"] == found["uniform"]
    for each in facts["batches"].values():
        launch = emulator.punica_cutlass_expand(lengths(*each["rows_per_adapter"]), 16, 4096)
        expand = each["expand"]
        assert expand["weight_bytes"] + expand["row_bytes"] == launch.io_bytes
        assert expand["weight_bytes"] == 2 * each["S"] * 16 * 4096
