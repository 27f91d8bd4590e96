// In the page what sgmv/emulator/vllm.py is in Python.
// Slots are the adapters' places in ascending order.
"use strict";

const SHRINK_ROWS = 32;
const SHRINK_COLUMNS = 16;
const FEW_ROWS = 128; // from this number of rows on, shrink splits K less
const EXPAND_ROWS = 64;
const EXPAND_COLUMNS = 128;
const EXPAND_K = 16;

// Entries of the grid's z: the base-only segment first if there is one, then adapters, then none.
function vllm_entries(segments, max_loras) {
  const lengths = range(segments.S).map((s) => segments.seq_start[s + 1] - segments.seq_start[s]);
  const parts = laid_out(segments);
  const first = segments.S - parts.length;
  const depth = parts.length ? max_loras + 1 : 0; // no adapter: nothing is launched
  const own = (z) => z >= first && z < segments.S;
  return {
    parts,
    depth,
    segment_of: (z, first_row) => (own(z) && first_row < lengths[z] ? z - first : null),
  };
}

function vllm_v1_shrink(segments, { h_in, r, max_loras, device }) {
  const { parts, depth, segment_of } = vllm_entries(segments, max_loras);
  const [block_k, split_k] = segments.n < FEW_ROWS ? [256, 64] : [32, 8];
  const row_tiles = ceil_div(segments.n, SHRINK_ROWS);
  const column_tiles = ceil_div(r, SHRINK_COLUMNS);
  const down = parts.map((part) => ceil_div(part.rows, SHRINK_ROWS));
  const working = sum(down) * column_tiles * split_k;
  const n = sum(parts.map((part) => part.rows));
  const deep = ceil_div(h_in, block_k * split_k) * block_k;
  const added = SINGLE * n * r * split_k;
  return {
    ...LAUNCH,
    kernel: "vllm_v1_shrink",
    shrinks: true,
    atomics: true,
    estimated: true,
    device,
    segments,
    x_width: h_in,
    k: h_in,
    width: r,
    grid: depth ? [split_k * row_tiles * column_tiles, 1, depth] : [0, 0, 0],
    block: [128, 1, 1],
    work: parts.map((part, s) => ({
      ...part,
      row_slots: down[s] * SHRINK_ROWS,
      blocks: down[s] * column_tiles * split_k,
      barriers: 0,
    })),
    early_exits: split_k * row_tiles * column_tiles * depth - working,
    lanes: working * SHRINK_ROWS * SHRINK_COLUMNS * deep,
    shared_memory: STAGES * HALF * block_k * (SHRINK_ROWS + SHRINK_COLUMNS),
    bytes_read: HALF * h_in * (n * column_tiles + sum(down) * r) + (split_k > 1 ? added : 0),
    bytes_written: added + (depth ? SINGLE * segments.n * r : 0),
    split_k,
    tile: {
      rows: SHRINK_ROWS,
      column_slots: column_tiles * SHRINK_COLUMNS,
      columns: column_tiles,
      k_slots: split_k * deep,
      splits: split_k,
    },
    pieces: ([x, , z]) => {
      const s = segment_of(z, (Math.floor(x / split_k) % row_tiles) * SHRINK_ROWS);
      return s === null ? [] : [[s, deep / block_k]];
    },
  };
}

function vllm_v1_expand(segments, { r, h_out, max_loras, device }) {
  const { parts, depth, segment_of } = vllm_entries(segments, max_loras);
  const row_tiles = ceil_div(segments.n, EXPAND_ROWS);
  const across = ceil_div(h_out, EXPAND_COLUMNS);
  const down = parts.map((part) => ceil_div(part.rows, EXPAND_ROWS));
  const n = sum(parts.map((part) => part.rows));
  const k_slots = ceil_div(r, EXPAND_K) * EXPAND_K;
  return {
    ...LAUNCH,
    kernel: "vllm_v1_expand",
    estimated: true,
    device,
    segments,
    x_width: r,
    k: r,
    width: h_out,
    grid: depth ? [row_tiles * across, 1, depth] : [0, 0, 0],
    block: [128, 1, 1],
    work: parts.map((part, s) => ({
      ...part,
      row_slots: down[s] * EXPAND_ROWS,
      blocks: down[s] * across,
      barriers: 0,
    })),
    early_exits: row_tiles * across * depth - sum(down) * across,
    lanes: sum(down) * across * EXPAND_ROWS * EXPAND_COLUMNS * k_slots,
    shared_memory: STAGES * HALF * EXPAND_K * (EXPAND_ROWS + EXPAND_COLUMNS),
    bytes_read: SINGLE * n * across * r + HALF * (sum(down) * r * h_out + n * h_out),
    bytes_written: HALF * n * h_out,
    tile: {
      rows: EXPAND_ROWS,
      column_slots: across * EXPAND_COLUMNS,
      columns: across,
      k_slots,
      splits: 1,
    },
    pieces: ([x, , z]) => {
      const s = segment_of(z, (x % row_tiles) * EXPAND_ROWS);
      return s === null ? [] : [[s, k_slots / EXPAND_K]];
    },
  };
}
