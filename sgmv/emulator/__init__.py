"""What a GPU would do with a batch: each engine's launches, as figures and as execution.

    batch, widths, device ──> punica_sgmv_shrink(...) ──> Launch ┬─ figures()  grid, waves, waste,
                                                                 │             traffic, faults
                                                                 └─ run(x, weights)  every thread
                                                                    block, in any legal order

The kernels' names are the constructors': `punica_sgmv_shrink`, `punica_cutlass_expand`,
`punica_bgmv_shrink`, `punica_bgmv_expand`, `vllm_v1_shrink`, `vllm_v1_expand`,
`sglang_csgmv_shrink`, `sglang_csgmv_expand`, and of adapters on experts `vllm_moe_shrink`,
`vllm_moe_expand`. Devices: `A100`, `H100`, `H200`, `L4`, `RTX_4090`, or
a `Device` of your own. Nothing here is timed: a figure is a count, or follows from counts.

Start reading at punica.py; blocks.py is what makes it hang.
"""

from sgmv.emulator.accuracy import Histogram, half_v_error
from sgmv.emulator.bgmv import punica_bgmv_expand, punica_bgmv_shrink
from sgmv.emulator.blocks import Deadlock, DeadlockError
from sgmv.emulator.device import A100, DEVICES, H100, H200, L4, RTX_4090, Device
from sgmv.emulator.launch import Launch, Work
from sgmv.emulator.punica import punica_cutlass_expand, punica_sgmv_shrink
from sgmv.emulator.run import Result
from sgmv.emulator.sglang import sglang_csgmv_expand, sglang_csgmv_shrink
from sgmv.emulator.vllm import vllm_v1_expand, vllm_v1_shrink
from sgmv.emulator.vllm_experts import vllm_moe_expand, vllm_moe_shrink

__all__ = [
    "A100",
    "DEVICES",
    "H100",
    "H200",
    "L4",
    "RTX_4090",
    "Deadlock",
    "DeadlockError",
    "Device",
    "Histogram",
    "Launch",
    "Result",
    "Work",
    "half_v_error",
    "punica_bgmv_expand",
    "punica_bgmv_shrink",
    "punica_cutlass_expand",
    "punica_sgmv_shrink",
    "sglang_csgmv_expand",
    "sglang_csgmv_shrink",
    "vllm_moe_expand",
    "vllm_moe_shrink",
    "vllm_v1_expand",
    "vllm_v1_shrink",
]
