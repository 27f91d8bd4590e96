"""Why a GPU wastes nearly everything on small batches of many experts.

python examples/experts_waste.py

vLLM sorts the pairs (token, expert) by (adapter, expert), and pads each group to a block of rows.
"""

import numpy as np

from sgmv import emulator

R, H_IN = 16, 2048
rng = np.random.default_rng(0)
MODELS = {"Mixtral (E = 8, k = 2)": (8, 2), "Qwen3-MoE (E = 128, k = 8)": (128, 8)}
TENANTS = {"one adapter": 1, "16 adapters": 16}

print(
    f"{'':28}{'tokens':>7}{'pairs':>7}{'groups':>8}{'rows':>8}{'zeros':>8}{'blocks':>9}{'idle':>7}"
)
for model, (experts, k) in MODELS.items():
    for tenants, count in TENANTS.items():
        for tokens in (16, 256, 4096):
            adapters = rng.integers(0, count, tokens)
            routed = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k]
            launch = emulator.vllm_moe_shrink(adapters, routed, H_IN, R, experts, 16)
            its = launch.figures()
            zeros, idle = its["wasted_rows"] / its["row_slots"], launch.early_exits / launch.blocks
            name = model if tokens == 16 and count == 1 else f"  {tenants}" if tokens == 16 else ""
            print(
                f"{name:28}{tokens:7}{its['rows']:7}{its['S']:8}{its['row_slots']:8}"
                f"{zeros:8.0%}{launch.blocks:9}{idle:7.0%}"
            )
