"""docs/engines.md's blocks: one batch of eight rows in every layout, printed by the code itself.

python -m tests.help.engines_page    write them anew, between `<!-- NAME:begin -->` and its end
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import sgmv
from sgmv import layouts

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
IDS = [7, 7, -1, 3, 7, 9, 9, -1]
RANKS = {3: 8, 7: 16, 9: 16}
NAMES = {3: "fr", 7: "de", 9: "sql"}
PAIRS = [[7, 9], [3, -1], [7, 9], [-1, -1], [9, 7]]
WEIGHTS = [[0.7, 0.3], [1, 0], [0.7, 0.3], [0, 0], [0.3, 0.7]]


def blocks() -> dict[str, str]:
    """What is printed, by the name of its place on the page."""
    stack = sgmv.AdapterStack.from_adapters(
        {i: (np.ones((r, 64), "f"), np.ones((32, r), "f")) for i, r in RANKS.items()}
    )
    lens = layouts.BatchLenInfo([2, 1, 2], 3)
    broken = dict(
        b_seq_start_loc=[0, 2, 4], seq_len_tensor=[2, 2, 5], lora_indices_tensor=[1, 6, 0]
    )
    printed = {
        "segments": sgmv.segment(IDS),
        "punica": layouts.punica(IDS, stack, lora_rank=16),
        "lens": f"indptr  {lens.indptr}\ndoff    {lens.doff}",
        "lorax": layouts.lorax(IDS, stack),
        "lorax_merged": layouts.lorax(PAIRS, RANKS | {3: 16}, WEIGHTS),
        "llamacpp": layouts.llamacpp(PAIRS, WEIGHTS, stack),
        "vllm_v0": layouts.vllm_v0(IDS, stack),
        "vllm_v0_sorted": layouts.vllm_v0(IDS, stack, sort=True),
        "vllm_v1": layouts.vllm_v1(IDS, max_loras=4, slots=stack),
        "csgmv": layouts.sglang(IDS, stack),
        "triton": layouts.sglang(IDS, stack, backend="triton"),
        "flashinfer": layouts.flashinfer(IDS, stack),
        "peft": layouts.peft(IDS, NAMES),
        "check": "\n".join(map(str, layouts.check(broken, IDS, slots=stack))),
    }
    return {name: str(text) for name, text in printed.items()}


def rendered(page: str) -> str:
    """The page with every block printed anew."""
    for name, text in blocks().items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n```text\n{text}\n```\n{end}{rest.split(end)[1]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
