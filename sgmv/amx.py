"""Whether tile products of bfloat16 (AMX) may be used: CPU, system, environment, and one trial.

SGMV_AMX=1 turns them on: no CPU with AMX has run them yet, so they wait to be asked for.
SGMV_AMX=emulate computes the same bits without AMX, slowly, for tests.
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
from sgmv.kernels.records import BLOCK, CALL, TABLE
from sgmv.kernels.tasks import EVERY_TASK, take_part
from sgmv.settings import AMX


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
        if not cpu.has_amx():
            return "none in this CPU"
        if AMX.read() != "1":
            return "off; SGMV_AMX=1 in the environment turns it on"
        return "off; it needs the vector tiles, and Linux's permission"
    if not is_on():
        return "off, it gave wrong sums"
    return "on" if isinstance(unit(), type(CPU)) else "emulated"


def unit() -> Any:
    """What computes tile products, CPU or EMULATION; None where neither does."""
    asked = AMX.read()
    if asked not in ("1", "emulate") or not VECTOR_BITS or not JITTED:
        return None
    if asked == "emulate":
        return EMULATION
    return CPU if cpu.has_amx() and cpu.permits_amx() else None


def shrink_kernel() -> int:
    """The address of shrink on tile products; compiled on first use."""
    return amx.shrink_kernel(unit())


def expand_kernel(y_like: Any) -> int:
    """The address of expand on tile products; compiled on first use."""
    return amx_expand.expand_kernel(unit(), y_like)


def _is_right() -> bool:
    """Two K blocks, groups of rows and tiles of ranks: within the bound of sums in any order."""
    n, r, h_in = 17, 19, 1200
    rng = np.random.default_rng(0)
    wide = [rng.standard_normal((m, h_in), np.float32).view(np.uint32) for m in (n, r)]
    x, wa = ((bits >> 16).astype(np.int16) for bits in wide)
    v, rows, block = np.full((n, r), np.nan, np.float32), np.arange(n), np.zeros(1, BLOCK)
    slots, table, call = np.array([wa.ctypes.data]), np.zeros(1, TABLE), np.zeros(1, CALL)
    block["r"], block["last"] = r, n
    table["h_in"], table["wa"], table["slices"] = h_in, slots.ctypes.data, 1
    call["x"], call["x_stride"], call["v"], call["v_stride"] = (
        number for array in (x, v) for number in (array.ctypes.data, array.strides[0])
    )
    call["x_rows"], call["table"] = rows.ctypes.data, table.ctypes.data
    call["blocks"], call["block_count"] = block.ctypes.data, len(block)
    call["shrink"], call["shrink_cuts"] = shrink_kernel(), 1
    take_part(int(call.ctypes.data), EVERY_TASK)
    x64, wa64 = ((bits & 0xFFFF0000).view(np.float32).astype(np.float64) for bits in wide)
    bound = h_in * 2.0**-23 * (np.abs(x64) @ np.abs(wa64).T)
    return bool((np.abs(v - x64 @ wa64.T) <= bound).all())
