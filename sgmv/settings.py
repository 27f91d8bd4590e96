"""The environment variables that sgmv reads; docs/api.md has them as a table."""

from __future__ import annotations

import os
from typing import NamedTuple


class Setting(NamedTuple):
    """A variable, what it may be, what holds where it is not set, and what it decides."""

    name: str
    values: str
    default: str
    about: str

    def read(self) -> str | None:
        """What the environment says now; None if it says nothing."""
        return os.environ.get(self.name)


NUM_THREADS = Setting(
    "SGMV_NUM_THREADS",
    "`1` to `1024`",
    "the cores that the process may use",
    "The threads of a call, the calling one included. `set_num_threads` overrides it.",
)
BACKEND = Setting(
    "SGMV_BACKEND",
    "`amx`, `tiles`, `loops`",
    "`amx`",
    "The kernels of calls that name no backend: these, or the next in this order that can run.",
)
AMX = Setting(
    "SGMV_AMX",
    "`0`, `emulate`",
    "on, where the CPU has it",
    "`0` leaves tile products to the tiles; `emulate` computes their bits, slowly, on any CPU.",
)
VECTOR_BITS = Setting(
    "SGMV_VECTOR_BITS",
    "`0`, `128`, `256`, `512`",
    "the CPU's",
    "The width of the vectors that tiles are compiled for; `0`: the plain loops alone.",
)
BFLOAT16 = Setting(
    "SGMV_BFLOAT16",
    "`exact`",
    "the CPU's products: AMX, or an AMD's AVX512_BF16",
    "`exact`: bfloat16 is multiplied as float32, which keeps subnormal numbers and is slower.",
)
VLLM = Setting(
    "SGMV_VLLM",
    "`0`, `compile`",
    "on",
    "`0`: vLLM's CPU engine keeps its own LoRA products. `compile`: it keeps torch.compile on.",
)
# VECTOR_BITS and BFLOAT16 are read by kernels/cpu.py, VLLM by compat/vllm/entry, installed apart:
# both import nothing of sgmv.
SETTINGS = (NUM_THREADS, BACKEND, AMX, VECTOR_BITS, BFLOAT16, VLLM)
