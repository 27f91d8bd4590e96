// In the page what sgmv/emulator/vllm_experts.py is in Python. A pair is a row and one of its
// experts; its id is slot * experts + expert, slots being the adapters' places in ascending order.
"use strict";

const SPARSE = 8; // with fewer pairs than one for this number of (slot, expert), none are sorted
const FEW_TOKENS = 64; // up to this number of rows, tiles are narrower and deeper
const power_of_2 = (value) => 2 ** Math.ceil(Math.log2(value));

// The experts of each row, (rows * top_k,), drawn alike; in the page where a router would be.
function routed(rows, experts, top_k) {
  let seed = 20231106;
  const below = (count) => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    return Math.floor((seed / 2 ** 32) * count);
  };
  return range(rows).flatMap(() => {
    const left = range(experts);
    return range(top_k).map(() => left.splice(below(left.length), 1)[0]);
  });
}

// The segments of the pairs: a group of one slot and one expert each.
function pair_segments(segments, { experts, top_k, expert_ids }) {
  const bases = segments.S - laid_out(segments).length;
  const chosen = expert_ids ?? routed(segments.n, experts, top_k);
  const k = segments.n ? chosen.length / segments.n : 1;
  const ids = Array(chosen.length);
  range(segments.S).forEach((s) => {
    for (let p = segments.seq_start[s]; p < segments.seq_start[s + 1]; p += 1) {
      for (let j = 0; j < k; j += 1) {
        const pair = segments.rows[p] * k + j;
        const none = s < bases || chosen[pair] === BASE_ONLY;
        ids[pair] = none ? BASE_ONLY : (s - bases) * experts + chosen[pair];
      }
    }
  });
  return { ...segment(ids), ids };
}

// Rows of a block, by the rows of the batch.
function block_rows_of(rows) {
  if (rows <= 32) return 16;
  if (rows <= 96) return 32;
  return rows <= 512 ? 64 : 128;
}

function vllm_moe(segments, values, shrinks) {
  const { r, experts, max_loras, device } = values;
  const [k, width] = shrinks ? [values.h_in, r] : [r, values.h_out];
  const few = segments.n <= FEW_TOKENS;
  const rows = block_rows_of(segments.n);
  const columns = shrinks ? Math.min(few ? 64 : 128, power_of_2(width)) : few ? 64 : 128;
  const most_deep = few ? 128 : 64;
  const depth = shrinks ? most_deep : Math.max(16, Math.min(most_deep, power_of_2(k)));
  const pairs = pair_segments(segments, values);
  const adapters = laid_out(segments);
  const is_sorted = pairs.n * SPARSE > experts * max_loras;
  const work = laid_out(pairs).map((part) => ({
    ...part,
    place: Math.floor(part.adapter_id / experts),
    expert: part.adapter_id % experts,
    tiles: is_sorted ? ceil_div(part.rows, rows) : part.rows,
  }));
  const { row_tiles, depth_z, tile_of } = is_sorted
    ? sorted_pairs(segments, pairs, work, rows, values)
    : single_pairs(pairs, experts);
  const across = ceil_div(width, columns);
  const busy = sum(work.map(({ tiles }) => tiles));
  const n = sum(work.map((part) => part.rows));
  const k_slots = ceil_div(k, depth) * depth;
  return {
    ...LAUNCH,
    kernel: shrinks ? "vllm_moe_shrink" : "vllm_moe_expand",
    shrinks,
    estimated: true,
    device,
    segments: pairs,
    x_width: k,
    k,
    width,
    grid: [row_tiles * across, 1, depth_z],
    block: [32 * (segments.n <= 128 ? 4 : 8), 1, 1],
    work: work.map((part) => ({
      ...part,
      row_slots: part.tiles * rows,
      blocks: part.tiles * across,
      barriers: 0,
    })),
    early_exits: row_tiles * across * depth_z - busy * across,
    lanes: busy * across * rows * columns * k_slots,
    shared_memory: (segments.n <= 32 ? 4 : 3) * HALF * depth * (rows + columns),
    bytes_read: HALF * (n * across * k + busy * k * width + (shrinks ? 0 : n * width)),
    bytes_written: HALF * n * width,
    experts,
    top_k: segments.n ? pairs.n / segments.n : 0,
    block_rows: rows,
    is_sorted,
    adapters,
    tile: { rows, column_slots: across * columns, columns: across, k_slots, splits: 1 },
    pieces: ([x, , z]) => {
      const place = tile_of(x % row_tiles, z);
      return place === null ? [] : [[place, k_slots / depth]];
    },
  };
}

// Each entry of the grid's z has as many tiles of rows as an adapter needs that has all pairs.
function sorted_pairs(segments, pairs, work, rows, { experts, max_loras }) {
  const padded = pairs.n < experts ? pairs.n * rows : pairs.n + experts * (rows - 1);
  const bases = segments.S - laid_out(segments).length; // the base-only entry comes first
  const tiles = Array(segments.S - bases).fill(0);
  for (const part of work) tiles[part.place] += part.tiles;
  return {
    row_tiles: ceil_div(padded, rows),
    depth_z: max_loras + 1,
    tile_of: (tile, z) => (tile < (tiles[z - bases] ?? 0) ? z - bases : null),
  };
}

// A block for each pair, in the order of the batch.
function single_pairs(pairs, experts) {
  const place = (id) => (id === BASE_ONLY ? null : Math.floor(id / experts));
  return { row_tiles: pairs.n, depth_z: 1, tile_of: (tile) => place(pairs.ids[tile]) };
}

const vllm_moe_shrink = (segments, values) => vllm_moe(segments, values, true);
const vllm_moe_expand = (segments, values) => vllm_moe(segments, values, false);
