"""The CPU: its name, its cores, what it has, and what of that the system allows."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys

from sgmv.kernels import cpu
from sgmv.kernels.cpu import features
from sgmv.settings import VECTOR_BITS as FORCED_BITS

JITTED = cpu.JITTED  # False where kernels run as plain Python
VECTOR_BITS = cpu.VECTOR_BITS  # 512, 256, 128, or 0 where tiles have no vectors
SUMS_BFLOAT16 = cpu.SUMS_BFLOAT16  # whether tiles use its products of bfloat16
CPUINFO = cpu.CPUINFO
USED = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16"),
    *("amx-tile", "amx-bf16"),
)
# Linux's arch_prctl, and its request for tile registers in the threads of this process.
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA = 158, 0x1023, 18


def name() -> str:
    """As the operating system has it: LLVM's guess is the nearest CPU that LLVM knows."""
    try:
        found = re.search(r"^model name\s*: (.+)$", CPUINFO.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    except OSError:  # not Linux
        pass
    if sys.platform == "darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if name := done.stdout.strip():
            return name
    return platform.processor() or platform.machine()


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def used_features() -> str:
    """Those of the CPU's features that tiles use, as text for `info`."""
    has = features()
    found = [name for name in USED if has.get(name)]
    if not found and VECTOR_BITS:
        found = ["neon" if cpu.ARM64 else "sse2"]
    return " ".join(found) or "none that tiles could use"


def why_vectors() -> str:
    """Why tiles have vectors of this width, or none, as text for `info`."""
    if not JITTED:
        return "numba's jit is off"
    if forced := FORCED_BITS.read():
        return f"{FORCED_BITS.name}={forced}"
    if VECTOR_BITS == 512:
        return "AVX-512"
    if VECTOR_BITS == 256:
        return "AVX2"
    if cpu.ARM64:
        return "NEON"
    if not VECTOR_BITS:
        return f"no tiles for {platform.machine()}"
    fewer = cpu.compiled_for() != features()
    return f"{'numba compiles for a CPU' if fewer else 'a CPU'} without AVX2, FMA and F16C"


def has_amx() -> bool:
    """Whether it has tile products of bfloat16, and numba compiles for them."""
    has = cpu.compiled_for()
    return bool(has.get("amx-tile") and has.get("amx-bf16"))


def permits_amx() -> bool:
    """Ask the system for tile registers; it says no where it does not know them."""
    if not sys.platform.startswith("linux"):
        return False
    request = (ctypes.c_long(number) for number in (ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA))
    return int(ctypes.CDLL(None).syscall(*request)) == 0
