// In the page what sgmv/emulator/punica.py is in Python.
"use strict";

const SGMV_RANKS = [16, 32, 64, 96, 128];
const WARPS = 4;
const LANES = 32;
const STEP_ROWS = WARPS * 16; // rows that a block takes at once
const STAGE_K = 8 * 16;
const STAGES = 2;
const CHUNK = 256; // products that a block sums where K is split
const TMP_LIMIT = 8 << 20;
const WITHOUT_OPT_IN = 48 << 10; // bytes that a block may take of shared memory unasked
const ALIGNMENT = 8;

// `whole`: as where not all chunks fit, though they might.
function punica_sgmv_shrink(segments, { h_in, r, device, release, whole = false }) {
  const parts = laid_out(segments);
  const S = parts.length;
  const shared_memory = STAGES * HALF * STAGE_K * 16 * (WARPS + Math.floor(r / 16));
  const capacity = device.sms * resident_blocks(device, LANES * WARPS, shared_memory);
  let chunks = ceil_div(h_in, CHUNK);
  const cooperative = !whole && 0 < chunks * S && chunks * S <= capacity;
  if (!cooperative) chunks = 1;
  const chunk = cooperative ? CHUNK : h_in;
  const steps = parts.map((part) => ceil_div(part.rows, STEP_ROWS));
  const barriers = (s) => (release === "1.1.0" ? most(steps) : steps[s]);
  const n = sum(parts.map((part) => part.rows));
  const partial = STEP_ROWS * r * SINGLE;
  const reduced = cooperative ? sum(steps) * chunks * partial : 0;
  const unsupported = [];
  if (!SGMV_RANKS.includes(r)) {
    unsupported.push(`rank ${r}: there are kernels for (${SGMV_RANKS.join(", ")})`);
  }
  if (h_in % ALIGNMENT) {
    unsupported.push(`width ${h_in}: loads of 16 bytes need a multiple of ${ALIGNMENT}`);
  }
  const k_slots = chunks * ceil_div(chunk, STAGE_K) * STAGE_K;
  return {
    ...LAUNCH,
    kernel: "punica_sgmv_shrink",
    shrinks: true,
    device,
    segments,
    x_width: h_in,
    k: h_in,
    width: r,
    grid: [chunks, S, 1],
    block: [LANES, WARPS, 1],
    work: parts.map((part, s) => ({
      ...part,
      row_slots: steps[s] * STEP_ROWS,
      blocks: chunks,
      barriers: cooperative ? barriers(s) : 0,
    })),
    lanes: sum(steps) * STEP_ROWS * r * k_slots,
    shared_memory,
    bytes_read: HALF * (n * h_in + sum(steps) * r * h_in + n * r) + reduced * chunks,
    bytes_written: HALF * n * r + reduced,
    split_k: chunks,
    cooperative,
    tmp: cooperative ? chunks * S * partial : 0,
    unsupported,
    release,
    chunk,
    split_k_segments: Math.floor(capacity / ceil_div(h_in, CHUNK)),
    tile: { rows: STEP_ROWS, column_slots: r, columns: 1, k_slots, splits: chunks },
    pieces: ([, s]) => Array(steps[s]).fill([s, ceil_div(chunk, STAGE_K)]),
  };
}

// Before release 1.1.0 a block passed one barrier per step of its own segment.
function deadlock(launch) {
  const barriers = launch.work.map((w) => w.barriers);
  if (new Set(barriers).size < 2) return null;
  const first = Math.min(...barriers);
  const found = { barrier: first + 1, waiting: [], returned: [] };
  barriers.forEach((count, s) => {
    const blocks = count === first ? found.returned : found.waiting;
    range(launch.split_k).forEach((c) => blocks.push([c, s, 0]));
  });
  return found;
}

function race(launch) {
  const steps = Math.floor(most(launch.work.map((w) => w.row_slots)) / STEP_ROWS);
  return launch.cooperative && launch.split_k > 1 && steps > 1;
}

function told({ barrier, waiting, returned }) {
  return (
    `deadlock: blocks ${ranges(waiting)} wait at grid barrier ${barrier} for ` +
    `blocks ${ranges(returned)}, which returned after ${barrier - 1}`
  );
}

// Blocks of one y and z as a range of x; the first four of these.
function ranges(indices) {
  const groups = [];
  for (const [x, y, z] of indices) {
    const group = groups[groups.length - 1];
    if (group && group.y === y && group.z === z) group.last = x;
    else groups.push({ x, last: x, y, z });
  }
  const shown = groups
    .slice(0, 4)
    .map(({ x, last, y, z }) => `(${last > x ? `${x}..${last}` : x}, ${y}, ${z})`);
  return [...shown, ...(groups.length > 4 ? ["..."] : [])].join(", ");
}

const TILE_ROWS = 32;
const TILE_COLUMNS = 128;
const TILE_K = 16;
const WALKERS = 512;

function punica_cutlass_expand(segments, { r, h_out, device }) {
  const parts = laid_out(segments);
  const across = ceil_div(h_out, TILE_COLUMNS);
  const down = parts.map((part) => ceil_div(part.rows, TILE_ROWS));
  const tiles = sum(down) * across;
  const n = sum(parts.map((part) => part.rows));
  const unsupported = [
    ["rank", r],
    ["width", h_out],
  ]
    .filter(([, width]) => width % ALIGNMENT)
    .map(([name, width]) => `${name} ${width}: loads of 16 bytes need a multiple of ${ALIGNMENT}`);
  if (r >= h_out) unsupported.push(`rank ${r} and width ${h_out}: that is a shrink`);
  const k_slots = ceil_div(r, TILE_K) * TILE_K;
  const segment_of_tile = down.flatMap((count, s) => Array(count * across).fill(s));
  return {
    ...LAUNCH,
    kernel: "punica_cutlass_expand",
    device,
    segments,
    x_width: r,
    k: r,
    width: h_out,
    grid: [WALKERS, 1, 1],
    block: [64, 1, 1],
    work: parts.map((part, s) => ({
      ...part,
      row_slots: down[s] * TILE_ROWS,
      blocks: Math.min(down[s] * across, WALKERS),
      barriers: 0,
    })),
    early_exits: Math.max(0, WALKERS - tiles),
    lanes: tiles * TILE_ROWS * TILE_COLUMNS * k_slots,
    shared_memory: STAGES * HALF * TILE_K * (TILE_ROWS + TILE_COLUMNS),
    bytes_read: HALF * (n * across * r + sum(down) * r * h_out + n * h_out),
    bytes_written: HALF * n * h_out,
    unsupported,
    tile: {
      rows: TILE_ROWS,
      column_slots: across * TILE_COLUMNS,
      columns: across,
      k_slots,
      splits: 1,
    },
    pieces: ([walker]) => {
      const walked = range(Math.max(0, ceil_div(tiles - walker, WALKERS)));
      return walked.map((i) => [segment_of_tile[walker + i * WALKERS], k_slots / TILE_K]);
    },
  };
}
