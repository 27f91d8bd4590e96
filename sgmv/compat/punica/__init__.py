"""`punica.ops`, on the CPU: the same calls and arguments; outputs are written in place, as there.

    bgmv, add_lora_bgmv                 an index per row, into stacked weights
    sgmv, add_lora_sgmv                 a pointer per segment; weights (L, outputs, inputs)
    sgmv_cutlass, add_lora_sgmv_cutlass                         weights (L, inputs, outputs)
    add_lora_sgmv_custom_cutlass        wa of the former, wb of the latter: LoraWeight's

Operands are numpy arrays, or torch tensors on the CPU, which are not copied. All float types, every
rank and width, both directions: also what Punica never finished. v is kept in float32 between the
two products, where Punica rounds it to half. Weight pointers are addresses, as in Punica: see
pointers.py. The weights behind them are of x's type.

Source: punica, src/punica/ops/__init__.py, src/punica/utils/lora.py.
"""

from sgmv.compat.punica.ops import (
    add_lora_bgmv,
    add_lora_sgmv,
    add_lora_sgmv_custom_cutlass,
    add_lora_sgmv_cutlass,
    bgmv,
    sgmv,
    sgmv_cutlass,
)
from sgmv.compat.punica.weights import BatchedLoraWeight, LoraWeight

__all__ = [
    "BatchedLoraWeight",
    "LoraWeight",
    "add_lora_bgmv",
    "add_lora_sgmv",
    "add_lora_sgmv_custom_cutlass",
    "add_lora_sgmv_cutlass",
    "bgmv",
    "sgmv",
    "sgmv_cutlass",
]
