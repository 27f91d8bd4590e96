// In the page what sgmv/emulator/sglang.py is in Python.
"use strict";

const MIN_CHUNK = 16;
const CSGMV_STAGES = 3;
const CSGMV_SHRINK_COLUMNS = 16;
const CSGMV_SHRINK_K = 256;
const CSGMV_EXPAND_COLUMNS = 64;
const CSGMV_EXPAND_K = 16;

const chunk_rows = (n, largest) =>
  Math.max(MIN_CHUNK, Math.min(largest, n >= 256 ? 128 : n >= 64 ? 32 : MIN_CHUNK));

// Every segment, the base-only one too, in chunks: the adapters' place of each, null for base only.
function csgmv_chunks(segments, max_lora_chunk_size) {
  const chunk = chunk_rows(segments.n, max_lora_chunk_size);
  const parts = laid_out(segments);
  const pieces = parts.map((part) => ceil_div(part.rows, chunk));
  const base_rows = segments.n - sum(parts.map((part) => part.rows));
  const chunk_ids = [
    ...Array(ceil_div(base_rows, chunk)).fill(null),
    ...pieces.flatMap((count, s) => Array(count).fill(s)),
  ];
  return { chunk, parts, pieces, chunk_ids };
}

function sglang_csgmv_shrink(segments, { h_in, r, max_lora_chunk_size, device }) {
  const { chunk, parts, pieces, chunk_ids } = csgmv_chunks(segments, max_lora_chunk_size);
  const across = ceil_div(r, CSGMV_SHRINK_COLUMNS);
  const n = sum(parts.map((part) => part.rows));
  const chunks = sum(pieces);
  const k_slots = ceil_div(h_in, CSGMV_SHRINK_K) * CSGMV_SHRINK_K;
  return {
    ...LAUNCH,
    kernel: "sglang_csgmv_shrink",
    shrinks: true,
    estimated: true,
    device,
    segments,
    x_width: h_in,
    k: h_in,
    width: r,
    grid: [across, chunk_ids.length, 1],
    block: [128, 1, 1],
    work: parts.map((part, s) => ({
      ...part,
      row_slots: pieces[s] * chunk,
      blocks: pieces[s] * across,
      barriers: 0,
    })),
    early_exits: across * (chunk_ids.length - chunks),
    lanes: chunks * across * chunk * CSGMV_SHRINK_COLUMNS * k_slots,
    shared_memory: CSGMV_STAGES * HALF * CSGMV_SHRINK_K * (chunk + CSGMV_SHRINK_COLUMNS),
    bytes_read: HALF * h_in * (n * across + chunks * r),
    bytes_written: HALF * n * r,
    chunk,
    chunk_ids,
    tile: {
      rows: chunk,
      column_slots: across * CSGMV_SHRINK_COLUMNS,
      columns: across,
      k_slots,
      splits: 1,
    },
    pieces: ([, c]) => (chunk_ids[c] === null ? [] : [[chunk_ids[c], k_slots / CSGMV_SHRINK_K]]),
  };
}

function sglang_csgmv_expand(segments, { r, h_out, max_lora_chunk_size, device }) {
  const { chunk, parts, pieces, chunk_ids } = csgmv_chunks(segments, max_lora_chunk_size);
  const across = ceil_div(h_out, CSGMV_EXPAND_COLUMNS);
  const n = sum(parts.map((part) => part.rows));
  const chunks = sum(pieces);
  const k_slots = ceil_div(r, CSGMV_EXPAND_K) * CSGMV_EXPAND_K;
  return {
    ...LAUNCH,
    kernel: "sglang_csgmv_expand",
    estimated: true,
    device,
    segments,
    x_width: r,
    k: r,
    width: h_out,
    grid: [across, 1, chunk_ids.length],
    block: [128, 1, 1],
    work: parts.map((part, s) => ({
      ...part,
      row_slots: pieces[s] * chunk,
      blocks: pieces[s] * across,
      barriers: 0,
    })),
    early_exits: across * (chunk_ids.length - chunks),
    lanes: chunks * across * chunk * CSGMV_EXPAND_COLUMNS * k_slots,
    shared_memory: CSGMV_STAGES * HALF * CSGMV_EXPAND_K * (chunk + CSGMV_EXPAND_COLUMNS),
    bytes_read: HALF * (n * across * r + chunks * r * h_out + n * h_out),
    bytes_written: HALF * n * h_out,
    chunk,
    chunk_ids,
    tile: {
      rows: chunk,
      column_slots: across * CSGMV_EXPAND_COLUMNS,
      columns: across,
      k_slots,
      splits: 1,
    },
    pieces: ([, , c]) => (chunk_ids[c] === null ? [] : [[chunk_ids[c], k_slots / CSGMV_EXPAND_K]]),
  };
}
