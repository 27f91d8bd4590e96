// In the page what sgmv/emulator/bgmv.py is in Python.
"use strict";

const BGMV_RANKS = [8, 16, 32, 64];
const BGMV_WIDTHS = [
  768, 1024, 2048, 2560, 3072, 4096, 5120, 7168, 8192, 9216, 10240, 11008, 12288, 13824, 16384,
  20480, 28672, 36864, 49152,
];
const VECTOR = 8; // half-precision numbers in a load of 16 bytes
const BGMV_TILE_K = LANES * WARPS * VECTOR;

function bgmv_unsupported(width, r) {
  const found = [];
  if (!BGMV_RANKS.includes(r)) {
    found.push(`rank ${r}: there are kernels for (${BGMV_RANKS.join(", ")})`);
  }
  if (!BGMV_WIDTHS.includes(width)) {
    found.push(`width ${width}: there are kernels for ${BGMV_WIDTHS.length} others`);
  }
  return found;
}

const bgmv_work = (parts, blocks_per_row) =>
  parts.map((part) => ({
    ...part,
    row_slots: part.rows,
    blocks: part.rows * blocks_per_row,
    barriers: 0,
  }));
const segment_of_row = (parts) => parts.flatMap((part, s) => Array(part.rows).fill(s));

function punica_bgmv_shrink(segments, { h_in, r, device }) {
  const parts = laid_out(segments);
  const of_row = segment_of_row(parts);
  const n = of_row.length;
  const k_slots = ceil_div(h_in, BGMV_TILE_K) * BGMV_TILE_K;
  return {
    ...LAUNCH,
    kernel: "punica_bgmv_shrink",
    shrinks: true,
    device,
    segments,
    x_width: h_in,
    k: h_in,
    width: r,
    grid: [r, n, 1],
    block: [LANES, WARPS, 1],
    work: bgmv_work(parts, r),
    lanes: n * r * k_slots,
    shared_memory: STAGES * 2 * BGMV_TILE_K * HALF + WARPS * SINGLE,
    bytes_read: HALF * n * r * (2 * h_in + 1),
    bytes_written: HALF * n * r,
    unsupported: bgmv_unsupported(h_in, r),
    tile: { rows: 1, column_slots: r, columns: r, k_slots, splits: 1 },
    pieces: ([, row]) => [[of_row[row], k_slots / BGMV_TILE_K]],
  };
}

function punica_bgmv_expand(segments, { r, h_out, device }) {
  const parts = laid_out(segments);
  const of_row = segment_of_row(parts);
  const n = of_row.length;
  const tx = Math.max(Math.floor(r / VECTOR), 1);
  const block = [tx, Math.max(Math.floor(LANES / tx), 1), WARPS];
  const tiles = Math.floor(h_out / (block[1] * block[2]));
  return {
    ...LAUNCH,
    kernel: "punica_bgmv_expand",
    device,
    segments,
    x_width: r,
    k: r,
    width: h_out,
    grid: [tiles, n, 1],
    block,
    work: bgmv_work(parts, tiles),
    lanes: n * h_out * r,
    bytes_read: HALF * n * (tiles * r + h_out * r + h_out),
    bytes_written: HALF * n * h_out,
    unsupported: bgmv_unsupported(h_out, r),
    tile: { rows: 1, column_slots: h_out, columns: tiles, k_slots: r, splits: 1 },
    pieces: ([, row]) => [[of_row[row], 1]],
  };
}
