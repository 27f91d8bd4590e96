"""Layers of experts (MoE): the other group-by-id, with LoRA adapters on the experts.

    expert_ids (n, k) ──segment──> pairs (row of x, expert), sorted by expert
                                     │
    x (n, h_in) ──grouped_matmul──> products (n, k, h_out), each with its expert's W
    adapter_ids (n,) ──add_lora──>   + the delta of its (expert, adapter)
    router's weights ──────────────> sum over a row's k products

`moe_layer` is all of it: gate and up, SwiGLU, down, with mixed adapters.
"""

from sgmv.adapter import ExpertAdapter
from sgmv.experts.adapters import ExpertStack, add_lora
from sgmv.experts.grouped import grouped_matmul
from sgmv.experts.layer import moe_layer, top_k

__all__ = ["ExpertAdapter", "ExpertStack", "add_lora", "grouped_matmul", "moe_layer", "top_k"]
