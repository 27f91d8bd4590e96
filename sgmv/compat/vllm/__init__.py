"""vLLM's LoRA operations, on the CPU: those of `torch_ops`, and the wrapper that its layers call.

    bgmv_shrink, bgmv_expand, bgmv_expand_slice     an index per row
    sgmv_shrink, sgmv_expand, sgmv_expand_slice     an index per run of rows
    PunicaWrapper                                   the metadata of a step, made once for all layers

The arguments are vLLM's, and outputs are written in place, as there. Operands are numpy arrays, or
torch tensors on the CPU, which are not copied. Weights are stacked, (num_loras, r, h_in) and
(num_loras, h_out, r), or with a middle axis of 1. They are read where they are stored; vLLM gathers
one for every row.

Rows of index -1 are base only: shrink sets them to 0, expand never writes them. Operands are
widened, not cast to the output's type: a half y gets a sum of float32, rounded once.

Source: vLLM, vllm/lora/ops/torch_ops/lora_ops.py, vllm/lora/punica_wrapper/punica_cpu.py.
"""

from sgmv.compat.vllm.ops import (
    bgmv_expand,
    bgmv_expand_slice,
    bgmv_shrink,
    sgmv_expand,
    sgmv_expand_slice,
    sgmv_shrink,
)
from sgmv.compat.vllm.wrapper import LoRAMapping, PunicaWrapper

__all__ = [
    "LoRAMapping",
    "PunicaWrapper",
    "bgmv_expand",
    "bgmv_expand_slice",
    "bgmv_shrink",
    "sgmv_expand",
    "sgmv_expand_slice",
    "sgmv_shrink",
]
