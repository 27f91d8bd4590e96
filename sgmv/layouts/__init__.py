"""One batch in every engine's metadata, and back.

    adapter ids (n,)  ┬─ punica ──────> s, wa_ptr, wb_ptr                    sorted, addresses
    or Segments       ├─ lorax ───────> s_start, s_end per padded rank       neighbours merged
                      ├─ llamacpp ────> lora, batches of equal lists         a decode for each list
                      ├─ vllm_v0 ─────> b_seq_start_loc, seq_len_tensor, ..  neighbours merged
                      ├─ vllm_v1 ─────> LoRAKernelMeta                       sorted, padded
                      ├─ sglang ──────> LoRABatchInfo                        by backend
                      ├─ flashinfer ──> seg_indptr, weight_indices           sorted
                      └─ peft ────────> adapter_names                        in the rows' order

Fields bear the engine's own names and dtypes; `str` lists them. What is not the engine's says so:
`rows` (n,) is the permutation that engines without one leave to their caller, which passes x[rows].

Most engines name slots, not ids. `slots` tells which: an AdapterStack, a mapping id -> slot, or
None where the ids are slots already. `adapter_ids` of each layout is the way back, and what it
takes is what the metadata lacks: slots, the number of rows, names. `sgmv.segment` does the rest.

Of several weighted adapters per row, (n, k) ids, llama.cpp decodes each list by itself, and LoRAX
merges their matrices; the other engines have no metadata for them, and refuse.

`check` reads anybody's metadata and names what is wrong with it. `python -m sgmv explain layout`
prints one batch in every layout.
"""

from sgmv.layouts.check import check
from sgmv.layouts.finding import Finding
from sgmv.layouts.flashinfer import FlashInfer, flashinfer
from sgmv.layouts.llamacpp import LlamaBatch, LlamaCpp, llamacpp
from sgmv.layouts.lorax import Lorax, MergedAdapters, RankSegments, lorax
from sgmv.layouts.peft import AdapterNames, peft
from sgmv.layouts.punica import BatchLenInfo, Punica, punica
from sgmv.layouts.sglang import LoRABatchInfo, sglang
from sgmv.layouts.vllm import LoRAKernelMeta, VllmV0, vllm_v0, vllm_v1

__all__ = [
    "AdapterNames",
    "BatchLenInfo",
    "Finding",
    "FlashInfer",
    "LlamaBatch",
    "LlamaCpp",
    "LoRABatchInfo",
    "LoRAKernelMeta",
    "Lorax",
    "MergedAdapters",
    "Punica",
    "RankSegments",
    "VllmV0",
    "check",
    "flashinfer",
    "llamacpp",
    "lorax",
    "peft",
    "punica",
    "sglang",
    "vllm_v0",
    "vllm_v1",
]
