"""What compiled code is made for: whether any is, and the vectors of this CPU."""

from __future__ import annotations

import os
import platform
from typing import Any

import llvmlite.binding
import numba

JITTED = not numba.config.DISABLE_JIT  # type: ignore[attr-defined]  # set at import
_MACHINE = platform.machine().lower()
X86 = _MACHINE in ("x86_64", "amd64")
ARM64 = _MACHINE in ("aarch64", "arm64")


def features() -> dict[str, bool]:
    """What this CPU has, by LLVM's names; nothing where it is not an x86."""
    return dict(llvmlite.binding.get_host_cpu_features()) if X86 else {}


def _vector_bits() -> int:
    """Width of this CPU's vectors: 512, 256, or 0 where there are none that tiles could use."""
    forced = os.environ.get("SGMV_VECTOR_BITS")
    if forced in ("0", "256", "512"):
        return int(forced)
    has = features() if JITTED else {}
    if not (has.get("avx2") and has.get("fma") and has.get("f16c")):
        return 0
    wide = all(has.get(f"avx512{part}") for part in ("f", "bw", "dq", "vl"))
    return 512 if wide else 256


VECTOR_BITS = _vector_bits()
# The CPU's own instructions for bfloat16: they round as the tiles do, and sum products in pairs,
# which takes subnormal numbers for 0. The compiler would end the process over them where numba is
# told to compile for another CPU.
_config: Any = numba.config
_FOR_THIS_CPU = not (_config.CPU_NAME or _config.CPU_FEATURES) and bool(_config.ENABLE_AVX)
ROUNDS_BFLOAT16 = bool(VECTOR_BITS and _FOR_THIS_CPU) and all(
    features().get(name) for name in ("avx512bf16", "avx512vl", "avx512dq")
)
SUMS_BFLOAT16 = ROUNDS_BFLOAT16 and os.environ.get("SGMV_BFLOAT16") != "exact"
