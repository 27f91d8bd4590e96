"""Whether tile products of bfloat16 (AMX) are used: CPU, system, environment, and one trial.

They are on where the CPU has them. SGMV_AMX=0 turns them off; SGMV_AMX=emulate computes the same
bits without AMX, slowly, for tests.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np

from sgmv import cpu
from sgmv.cpu import JITTED, VECTOR_BITS
from sgmv.kernels import amx, amx_expand
from sgmv.kernels.amx_instructions import CPU, EMULATION
from sgmv.kernels.records import BLOCK, CALL, PANEL, TABLE
from sgmv.kernels.tasks import EVERY_TASK, take_part
from sgmv.settings import AMX, BFLOAT16


@cache
def is_on() -> bool:
    """Whether tile products run here, and are right: one small call is tried, once."""
    if unit() is None:
        return False
    if not _is_right():
        warnings.warn("sgmv: AMX gave wrong sums here and stays off", RuntimeWarning, stacklevel=2)
        return False
    return True


def state() -> str:
    """For `info`: "on", "emulated", or why it is off and how to turn it on."""
    if unit() is None:
        for setting, value in ((AMX, "0"), (BFLOAT16, "exact")):
            if setting.read() == value:
                return f"off by {setting.name}={value}"
        if not cpu.has_amx():
            return "none in this CPU"
        return "off; it needs the vector tiles, and Linux's permission"
    if not is_on():
        return "off, it gave wrong sums"
    return "on; SGMV_AMX=0 turns it off" if isinstance(unit(), type(CPU)) else "emulated"


def unit() -> Any:
    """What computes tile products, CPU or EMULATION; None where neither does."""
    asked = AMX.read()
    if asked == "0" or not VECTOR_BITS or not JITTED:
        return None
    if asked == "emulate":
        return EMULATION
    if BFLOAT16.read() == "exact":
        return None
    return CPU if cpu.has_amx() and cpu.permits_amx() else None


def shrink_kernel() -> int:
    """The address of shrink on tile products; compiled on first use."""
    return amx.shrink_kernel(unit())


def expand_kernel(y_like: Any) -> int:
    """The address of expand on tile products; compiled on first use."""
    return amx_expand.expand_kernel(unit(), y_like)


def _is_right() -> bool:
    """Two K blocks, groups of rows and tiles of ranks: within the bound of sums in any order."""
    n, r, h_in, h_out = 17, 19, 1200, PANEL + 2
    rng = np.random.default_rng(0)
    shapes = (n, h_in), (r, h_in), (r, h_out)
    wide = [rng.standard_normal(shape, np.float32).view(np.uint32) for shape in shapes]
    x, wa, wb = ((bits >> 16).astype(np.int16) for bits in wide)
    panels = np.concatenate([wb[:, :PANEL].ravel(), wb[:, PANEL:].ravel()])
    v, y = np.full((n, r), np.nan, np.float32), np.zeros((n, h_out), np.float32)
    rows, ranks, scalings = np.arange(n), np.array([r]), np.ones(1)
    slots = [np.array([weights.ctypes.data]) for weights in (wa, panels)]
    block, table, call = np.zeros(1, BLOCK), np.zeros(1, TABLE), np.zeros(1, CALL)
    block["r"], block["last"] = r, n
    for field, value in (("h_in", h_in), ("h_out", h_out), ("slices", 1), ("panel_columns", PANEL)):
        table[field] = value
    for field, array in (
        ("wa", slots[0]),
        ("wb", slots[1]),
        ("ranks", ranks),
        ("scalings", scalings),
    ):
        table[field] = array.ctypes.data
    for field, array in (("x", x), ("v", v), ("y", y)):
        call[field], call[f"{field}_stride"] = array.ctypes.data, array.strides[0]
    for field, array in (("x_rows", rows), ("y_rows", rows), ("table", table), ("blocks", block)):
        call[field] = array.ctypes.data
    call["shrink"], call["expand"] = shrink_kernel(), expand_kernel(np.float32(0))
    for field in ("block_count", "band_count", "threads", "shrink_cuts", "expand_cuts"):
        call[field] = 1
    take_part(int(call.ctypes.data), EVERY_TASK)
    x64, wa64, wb64 = ((bits & 0xFFFF0000).view(np.float32).astype(np.float64) for bits in wide)
    sums = np.abs(x64) @ np.abs(wa64).T
    v_is_right = np.abs(v - x64 @ wa64.T) <= h_in * 2.0**-23 * sums
    y_is_right = np.abs(y - v.astype(np.float64) @ wb64) <= r * 2.0**-22 * (
        np.abs(v) @ np.abs(wb64)
    )
    return bool(v_is_right.all() and y_is_right.all())
