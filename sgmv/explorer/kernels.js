// Every kernel by its name.
"use strict";

const KERNELS = {
  punica_sgmv_shrink,
  punica_bgmv_shrink,
  vllm_v1_shrink,
  sglang_csgmv_shrink,
  vllm_moe_shrink,
  punica_cutlass_expand,
  punica_bgmv_expand,
  vllm_v1_expand,
  sglang_csgmv_expand,
  vllm_moe_expand,
};
