"""Devices."""

from __future__ import annotations

import pytest

from sgmv import emulator

pytestmark = pytest.mark.once


def test_a_block_that_fits_no_sm() -> None:
    small = emulator.Device("small", 4, 48 << 10, 32 << 10, 16, 1024, 10**12, 10**14)
    launch = emulator.punica_sgmv_shrink([0], 512, 16, small)
    assert (launch.resident_blocks, launch.waves, launch.cooperative) == (0, 0, False)
    assert launch.faults == ("no block of 40960 bytes fits an SM of small",)
