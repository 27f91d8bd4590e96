"""What compiled code is made for: whether any is, and the vectors of this CPU."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba

CPUINFO = Path("/proc/cpuinfo")
_config: Any = numba.config
JITTED = not _config.DISABLE_JIT
_MACHINE = platform.machine().lower()
X86 = _MACHINE in ("x86_64", "amd64")
ARM64 = _MACHINE in ("aarch64", "arm64")


def features() -> dict[str, bool]:
    """What this CPU has, by LLVM's names; nothing where it is not an x86."""
    return dict(llvmlite.binding.get_host_cpu_features()) if X86 else {}


def compiled_for() -> dict[str, bool]:
    """Those of them that numba compiles for: fewer, where its settings name another CPU.

    Over an instruction that is not among them, the compiler ends the process; a fused
    multiply-add, or a conversion of float16, becomes a call of a function for each number.
    """
    has = features()
    if _config.CPU_FEATURES is not None:
        listed = _config.CPU_FEATURES.split(",")
        return {name: there and f"+{name}" in listed for name, there in has.items()}
    if not _config.ENABLE_AVX:
        return {name: there and not name.startswith("avx") for name, there in has.items()}
    return has


def _vector_bits() -> int:
    """Width of this CPU's vectors: 512, 256, 128, or 0 where there are none that tiles could use.

    Every x86 of 64 bits has vectors of 128 bits, and so has every ARM of 64 bits.
    """
    if not JITTED:
        return 0
    forced = os.environ.get("SGMV_VECTOR_BITS")
    if forced in ("0", "128", "256", "512"):
        return int(forced)
    if not (X86 or ARM64):
        return 0
    has = compiled_for()
    if not (has.get("avx2") and has.get("fma") and has.get("f16c")):
        return 128
    wide = all(has.get(f"avx512{part}") for part in ("f", "bw", "dq", "vl"))
    return 512 if wide else 256


VECTOR_BITS = _vector_bits()
# Registers that hold a vector.
REGISTERS = 32 if VECTOR_BITS == 512 or ARM64 else 16
# Whether the CPU multiplies and adds with one rounding, and converts float16. All of ARM64 does.
FUSES = ARM64 or bool(compiled_for().get("fma"))
CONVERTS_FLOAT16 = ARM64 or bool(compiled_for().get("f16c"))
# The CPU's own instructions for bfloat16: they round as the tiles do, and sum products in pairs,
# which takes subnormal numbers for 0.
ROUNDS_BFLOAT16 = VECTOR_BITS > 128 and all(
    compiled_for().get(name) for name in ("avx512bf16", "avx512vl", "avx512dq")
)


def _vendor() -> str:
    """Who made the CPU, as Linux has it; "" elsewhere."""
    try:
        found = re.search(r"^vendor_id\s*: (.+)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""


INTEL = X86 and _vendor() == "GenuineIntel"
# Intel's begins every other cycle, as many products as one of two fused multiply-adds that begin in
# every cycle: pairs of these are faster, and keep subnormal numbers (docs/kernels.md).
SUMS_BFLOAT16 = ROUNDS_BFLOAT16 and not INTEL and os.environ.get("SGMV_BFLOAT16") != "exact"
# Whether bfloat16 is taken apart into odd and even k, which vectors of 512 bits do with one
# operation for each, in place of two.
HALVES_BFLOAT16 = VECTOR_BITS == 512 and not SUMS_BFLOAT16
# Whether weights of a single row are asked for ahead of their use. Distinct rows are 1.01 times as
# fast with it within the L3 of an Emerald Rapids, 1.02 to 1.06 beyond; programs in C 1.2 times on a
# Sapphire Rapids. An EPYC Zen 4 took 1.03 times as long (docs/kernels.md).
ASKS_AHEAD = INTEL
# Whether a task of many rows widens 16-bit floats once, and not in each tile that reads them. On an
# Emerald Rapids it is 1.1 to 1.6 times as fast. A Zen 4 took 1.0 to 1.3 times as long: it widens
# beside its fused multiply-adds, which take half a vector at a time (docs/kernels.md).
WIDENS = INTEL
