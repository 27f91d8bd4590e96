// The metadata that each engine's kernels read, as sgmv/layouts makes it. Slots are the adapters'
// places in ascending order.
"use strict";

const BYTES = { int32: 4, int64: 8, float32: 4 };
const offsets = (lengths) =>
  lengths.reduce((starts, length) => [...starts, starts[starts.length - 1] + length], [0]);

function layouts(segments, adapter_ids, { max_loras, max_lora_chunk_size }) {
  const parts = laid_out(segments);
  const S = parts.length;
  const slot_of = new Map(parts.map((part, s) => [part.adapter_id, s]));
  const slot = adapter_ids.map((id) => (id === BASE_ONLY ? BASE_ONLY : slot_of.get(id)));
  const lengths = range(segments.S).map((s) => segments.seq_start[s + 1] - segments.seq_start[s]);
  const filled = (values, count, value) => [...values, ...Array(count - values.length).fill(value)];
  const active = S
    ? segments.adapter_ids.map((id) => (id === BASE_ONLY ? id : slot_of.get(id)))
    : [];
  const counts = S ? lengths : [];
  // SGLang's base model has the slot after all others, so its rows come last.
  const chunk = chunk_rows(segments.n, max_lora_chunk_size);
  const own = parts.map((part, s) => ({ slot: s, length: part.rows }));
  const base = { slot: S, length: segments.n - sum(parts.map((part) => part.rows)) };
  const chunks = [...own, base].flatMap(({ slot: index, length }) =>
    range(ceil_div(length, chunk)).map((i) => [index, Math.min(chunk, length - i * chunk)]),
  );
  const starts = adapter_ids.flatMap((id, row) =>
    row === 0 || id !== adapter_ids[row - 1] ? [row] : [],
  );
  const ends = [...starts.slice(1), segments.n];
  const launched = range(starts.length).filter((i) => adapter_ids[starts[i]] !== BASE_ONLY);
  return {
    sgmv: {
      rows: ["int64", segments.rows],
      seq_start: ["int64", segments.seq_start],
      adapter_ids: ["int64", segments.adapter_ids],
    },
    punica: {
      s: ["int32", offsets(parts.map((part) => part.rows))],
      wa_ptr: ["int64", parts.map((part) => `wa of ${part.adapter_id}`)],
      wb_ptr: ["int64", parts.map((part) => `wb of ${part.adapter_id}`)],
    },
    vllm_v1: {
      token_lora_mapping: ["int32", slot],
      token_indices_sorted_by_lora_ids: ["int32", segments.rows],
      active_lora_ids: ["int32", filled(active, max_loras + 1, BASE_ONLY)],
      num_tokens_per_lora: ["int32", filled(counts, max_loras + 1, 0)],
      lora_token_start_loc: ["int32", filled(S ? offsets(counts) : [], max_loras + 2, 0)],
    },
    sglang: {
      seg_indptr: ["int32", offsets(chunks.map(([, length]) => length))],
      weight_indices: ["int32", chunks.map(([index]) => index)],
      permutation: [
        "int32",
        [...segments.rows.slice(base.length), ...segments.rows.slice(0, base.length)],
      ],
    },
    lorax: {
      s_start: ["int32", launched.map((i) => starts[i])],
      s_end: ["int32", launched.map((i) => ends[i])],
    },
  };
}
