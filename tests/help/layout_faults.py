"""Faults planted in the fields of each engine's layout."""

from __future__ import annotations

from tests.help.layouts import Planted, launch, put, swap, to

PLACE_0 = [{"id": 0, "scale": 1.0}]

FLASHINFER: Planted = {
    "flashinfer": [
        ("seg_indptr", "unsorted", swap(1, 2)),
        ("seg_indptr", "gap", put(0, 1)),
        ("seg_indptr", "end", put(3, 5)),
        ("seg_lens", "overlap", put(0, 4)),
        ("seg_lens", "gap", put(0, 2)),
        ("seg_lens", "int32 wrap", put(0, -1)),
        ("seg_lens", "shape", lambda s: s[1:]),
        ("weight_indices", "base misplaced", put(0, -1)),
        ("weight_indices", "no weights", put(0, 6)),
        ("weight_indices", "stale", swap(0, 1)),
        ("rows", "stale", lambda r: r[:-1]),
    ],
    "flashinfer raw": [
        ("seg_lens", "stale", put(2, 1)),
    ],
}


LLAMACPP: Planted = {
    "llamacpp": [
        ("lora", "shape", put(0, 3)),
        ("lora", "shape", put(0, [{"id": 0}])),
        ("lora", "shape", put(0, [{"id": 0, "scale": float("nan")}])),
        ("lora", "base misplaced", put(2, [])),
        ("lora", "no weights", put(0, [{"id": 6, "scale": 1.0}])),
        ("lora", "no weights", put(0, [{"id": -1, "scale": 1.0}])),
        ("lora", "stale", lambda lists: lists[1:]),
        ("batches", "shape", to(3)),
        ("batches[0].rows", "shape", {"batches": put(0, {"lora": [{"id": 0, "scale": 1.0}]})}),
        ("batches[0].lora", "shape", {"batches": put(0, {"rows": [0, 1, 4]})}),
        (
            "batches[0].lora",
            "mixed lists",
            {"batches": put(0, {"rows": [0, 1, 4, 3], "lora": PLACE_0})},
        ),
        ("batches[1].lora", "mixed lists", {"batches": put(1, {"rows": [2, 7], "lora": PLACE_0})}),
        ("batches", "overlap", put(0, {"rows": [0, 1, 4, 4], "lora": PLACE_0})),
        ("batches", "gap", put(0, {"rows": [0, 1], "lora": PLACE_0})),
        ("batches", "stale", put(0, {"rows": [0, 1, 4, 8], "lora": PLACE_0})),
    ],
    "llamacpp raw": [
        ("lora", "stale", swap(0, 3)),
        ("lora", "stale", put(0, [{"id": 0, "scale": 0.5}])),
    ],
}


LORAX: Planted = {
    "lorax": [
        ("adapter_segments", "unsorted", swap(2, 3)),
        ("adapter_segments", "gap", put(0, 1)),
        ("adapter_segments", "end", put(6, 7)),
        ("adapter_segments", "int32 wrap", put(6, 8 - 2**32)),
        ("segment_indices", "shape", lambda s: s[1:]),
        ("segment_indices", "base misplaced", put(1, -1)),
        ("adapter_indices", "base misplaced", put(2, -1)),
        ("segment_indices", "no weights", put(0, 77)),
        ("segment_indices", "counts", put(0, 4)),
        ("adapter_indices", "stale", lambda a: a[:-1]),
        ("rank_data[16].s_start", "unsorted", launch(s_start=swap(0, 1), s_end=swap(0, 1))),
        ("rank_data[16].s_start", "overlap", launch(s_end=put(0, 4))),
        ("rank_data[16].s_start", "gap", launch(s_end=put(0, 1))),
        ("rank_data[16].s_start", "end", launch(s_end=put(3, 9))),
        ("rank_data[16].s_start", "base misplaced", launch(s_start=put(0, 2), s_end=put(0, 3))),
        ("rank_data[16].s_end", "shape", launch(s_end=lambda s: s[1:])),
        ("rank_data[16].s_start", "int32 wrap", launch(s_start=put(0, -(2**31)))),
        ("merged", "shape", to({1: {"ids": [3], "weights": [1]}})),
        ("merged", "no weights", to({1: {"ids": [3, 77], "weights": [1, 1]}})),
    ],
    "lorax raw": [
        ("s_start", "overlap", {"s_end": put(0, 4)}),
        ("s_start", "unsorted", {"s_start": swap(0, 1), "s_end": swap(0, 1)}),
        ("s_start", "end", {"s_end": put(1, 9)}),
        ("s_end", "int32 wrap", put(1, 7 - 2**32)),
    ],
}


PEFT: Planted = {
    "peft": [
        ("adapter_names", "no weights", put(0, "no-such-tenant")),
        ("adapter_names", "base misplaced", put(2, None)),
        ("adapter_names", "stale", swap(0, 3)),
        ("adapter_names", "stale", lambda a: a[1:]),
    ],
}


PUNICA: Planted = {
    "punica": [
        ("s", "unsorted", swap(1, 2)),
        ("s", "gap", put(0, 1)),
        ("s", "end", put(3, 5)),
        ("s", "int32 wrap", put(3, 2**31 + 6)),
        ("s", "int32 wrap", put(3, 6 - 2**32)),
        ("s", "shape", lambda s: []),
        ("wa_ptr", "shape", lambda p: p[:-1]),
        ("wa_ptr", "no weights", put(1, 0)),
        ("wb_ptr", "no weights", put(1, 0)),
        ("wb_ptr", "no weights", put(1, 64)),
        ("wa_ptr", "no weights", put(1, 64)),
        ("wa_ptr", "stale", swap(0, 1)),
        ("rows", "stale", put(0, 8)),
        ("rows", "overlap", put(0, 6)),
        ("rows", "stale", lambda r: r[:-1]),
    ],
    "punica raw": [
        ("s", "end", put(3, 5)),
        ("s", "gap", to([2])),
    ],
    "lens": [
        ("indptr", "unsorted", to([0, 6, 5])),
        ("indptr", "gap", to([1, 3, 5])),
        ("indptr", "end", to([0, 3, 4])),
        ("indptr", "int32 wrap", to([0, 3, 5 - 2**32])),
        ("indptr", "counts", to([0, 2, 5])),
        ("indptr", "shape", {"prefills": to([5])}),
        ("decode", "stale", to(4)),
        ("doff", "counts", {"indptr": to(None)}),
    ],
}


SGLANG: Planted = {
    "csgmv": [
        ("weight_indices", "unsorted", swap(0, 1)),
        ("weight_indices", "base misplaced", put(3, -1)),
        ("weight_indices", "no weights", put(3, 8)),
        ("weight_indices", "int32 wrap", put(3, -9)),
        ("weight_indices", "shape", lambda w: w[1:]),
        ("seg_indptr", "unsorted", swap(1, 2)),
        ("seg_indptr", "gap", put(0, 1)),
        ("seg_indptr", "end", put(4, 7)),
        ("seg_indptr", "int32 wrap", put(4, 8 - 2**32)),
        ("max_len", "counts", to(2)),
        ("permutation", "overlap", put(0, 1)),
        ("permutation", "gap", put(0, 1)),
        ("permutation", "stale", lambda p: [*p, 8]),
        ("weight_indices", "stale", {"permutation": swap(0, 7)}),
    ],
    "triton": [
        ("seg_lens", "overlap", put(0, 2)),
        ("seg_lens", "gap", put(0, 0)),
        ("seg_lens", "stale", {"seg_lens": put(7, 2), "seg_indptr": put(8, 9)}),
        ("seg_indptr", "unsorted", swap(1, 2)),
        ("weight_indices", "base misplaced", put(2, -1)),
        ("weight_indices", "no weights", put(0, 8)),
        ("weight_indices", "stale", swap(0, 3)),
    ],
}


VLLM: Planted = {
    "vllm_v0": [
        ("b_seq_start_loc", "unsorted", swap(1, 2)),
        ("b_seq_start_loc", "overlap", {"seq_len_tensor": put(0, 3)}),
        ("b_seq_start_loc", "gap", {"seq_len_tensor": put(0, 1)}),
        ("b_seq_start_loc", "gap", put(0, 1)),
        ("b_seq_start_loc", "end", {"seq_len_tensor": put(5, 2)}),
        ("seq_len_tensor", "int32 wrap", put(5, -1)),
        ("lora_indices_tensor", "no weights", put(0, 6)),
        ("lora_indices_tensor", "int32 wrap", put(0, -(2**31))),
        ("lora_indices_tensor", "stale", swap(0, 2)),
        ("token_nums", "stale", to(7)),
        ("max_seq_length", "counts", to(3)),
        ("no_lora", "counts", to(True)),
        ("seq_len_tensor", "shape", lambda s: s[1:]),
    ],
    "vllm_v0 sorted": [
        ("lora_indices_tensor", "base misplaced", swap(0, 1)),
        ("lora_indices_tensor", "unsorted", swap(2, 3)),
        ("rows", "overlap", put(0, 7)),
        ("rows", "gap", put(0, 7)),
        ("rows", "stale", put(0, 8)),
    ],
    "vllm_v1": [
        ("token_indices_sorted_by_lora_ids", "unsorted", swap(1, 2)),
        ("token_indices_sorted_by_lora_ids", "unsorted", swap(0, 1)),
        ("token_indices_sorted_by_lora_ids", "overlap", put(0, 7)),
        ("token_indices_sorted_by_lora_ids", "gap", put(0, 7)),
        ("token_indices_sorted_by_lora_ids", "stale", put(7, 11)),
        ("token_indices_sorted_by_lora_ids", "shape", lambda r: r[1:]),
        ("token_lora_mapping", "stale", lambda m: m[1:]),
        ("token_lora_mapping", "int32 wrap", put(0, -(2**31))),
        ("token_lora_mapping", "no weights", put(0, 6)),
        ("token_lora_mapping", "no weights", put(0, 7)),
        (
            "active_lora_ids",
            "active ids",
            {"active_lora_ids": swap(1, 2), "num_tokens_per_lora": swap(1, 2)},
        ),
        ("active_lora_ids", "active ids", put(4, 6)),
        ("active_lora_ids", "active ids", put(3, 6)),
        ("active_lora_ids", "base misplaced", swap(0, 1)),
        ("num_tokens_per_lora", "shape", {"active_lora_ids": lambda a: a[:-1]}),
        (
            "num_tokens_per_lora",
            "counts",
            {"num_tokens_per_lora": swap(0, 1), "lora_token_start_loc": put(1, 3)},
        ),
        ("num_tokens_per_lora", "counts", put(5, 1)),
        ("num_tokens_per_lora", "int32 wrap", put(0, -1)),
        ("lora_token_start_loc", "unsorted", swap(1, 2)),
        ("lora_token_start_loc", "overlap", put(1, 1)),
        ("lora_token_start_loc", "gap", put(1, 3)),
        ("lora_token_start_loc", "end", put(4, 7)),
        ("lora_token_start_loc", "counts", put(5, 8)),
        ("lora_token_start_loc", "int32 wrap", put(4, 8 - 2**32)),
        ("lora_token_start_loc", "shape", lambda s: s[:-1]),
        ("num_active_loras_cpu", "counts", to([3])),
        ("num_active_loras_cpu", "shape", to([])),
        ("no_lora_flag_cpu", "stale", to([True])),
        ("num_tokens_per_lora", "counts", {"no_lora_flag_cpu": to([True])}),
        ("no_lora_flag_cpu", "base misplaced", {"token_lora_mapping": lambda m: [-1] * 8}),
    ],
}
