// sgmv/emulator in the page: the same names, the same integers. tests/test_explorer.py holds every
// figure of every kernel equal to Python's. Nothing here knows of the page.
"use strict";

const BASE_ONLY = -1;
const HALF = 2;
const SINGLE = 4; // bytes

const ceil_div = (a, b) => Math.ceil(a / b);
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const most = (numbers) => numbers.reduce((largest, number) => Math.max(largest, number), 0);
const range = (count) => Array.from({ length: count }, (_, i) => i);

// --- segment.py, and the popularities of Punica's paper (section 7) ---------------------------

function segment(adapter_ids) {
  const rows = range(adapter_ids.length).sort((a, b) => adapter_ids[a] - adapter_ids[b] || a - b);
  const seq_start = [];
  const ids = [];
  rows.forEach((row, p) => {
    if (p === 0 || adapter_ids[row] !== ids[ids.length - 1]) {
      seq_start.push(p);
      ids.push(adapter_ids[row]);
    }
  });
  seq_start.push(rows.length);
  return { rows, seq_start, adapter_ids: ids, n: rows.length, S: ids.length };
}

const POPULARITIES = ["distinct", "uniform", "skewed", "identical"];
const RATIO = 1.5; // of the sizes of neighbouring segments, skewed

// Rows of each adapter, the most popular first.
function popularity(kind, n) {
  if (kind === "distinct") return Array(n).fill(1);
  if (kind === "identical") return [n];
  if (kind === "uniform") {
    const adapters = Math.ceil(Math.sqrt(n));
    return range(adapters).map((i) => Math.floor(n / adapters) + (i < n % adapters ? 1 : 0));
  }
  const lengths = [];
  let left = n;
  for (let size = 1; Math.floor(size) < left; size *= RATIO) {
    lengths.push(Math.floor(size));
    left -= Math.floor(size);
  }
  return [...lengths, left].sort((a, b) => b - a);
}

// --- device.py: the figures of each device come from Python -----------------------------------

const RESERVED = 1024;

function resident_blocks(device, threads, shared_memory) {
  if (shared_memory > device.shared_memory_per_block) return 0;
  return Math.min(
    device.blocks_per_sm,
    Math.floor(device.threads_per_sm / threads),
    Math.floor(device.shared_memory_per_sm / (shared_memory + RESERVED)),
  );
}

const roofline_s = (device, flops, moved) =>
  Math.max(flops / device.fp16_peak, moved / device.bandwidth);

// --- launch.py --------------------------------------------------------------------------------

// The segments that have an adapter, and how many rows each has.
function laid_out(segments) {
  const lengths = range(segments.S).map((s) => segments.seq_start[s + 1] - segments.seq_start[s]);
  const parts = segments.adapter_ids.map((id, s) => ({ adapter_id: id, rows: lengths[s] }));
  return parts.filter((part) => part.adapter_id !== BASE_ONLY);
}

const blocks_of = (launch) => launch.grid[0] * launch.grid[1] * launch.grid[2];
const threads_of = (launch) => launch.block[0] * launch.block[1] * launch.block[2];

// FLOP and bytes of one launch with every operand through memory once: Punica, section 7.1.
function traffic(rows, segments, x_width, k, width) {
  const flops = 2 * rows * k * width;
  const io_bytes = HALF * (rows * (x_width + width) + segments * k * width);
  return { flops, io_bytes, intensity: io_bytes ? flops / io_bytes : 0 };
}

function figures(launch) {
  const { device, work } = launch;
  const rows = sum(work.map((w) => w.rows));
  const { flops, io_bytes, intensity } = traffic(
    rows,
    work.length,
    launch.x_width,
    launch.k,
    launch.width,
  );
  const useful = flops / 2;
  const row_slots = sum(work.map((w) => w.row_slots));
  const resident = resident_blocks(device, threads_of(launch), launch.shared_memory);
  const capacity = device.sms * resident;
  const [inner, outer] = launch.shrinks ? ["h_in", "r"] : ["r", "h_out"];
  return {
    kernel: launch.kernel,
    device: device.name,
    n: launch.segments.n,
    S: work.length,
    [inner]: launch.k,
    [outer]: launch.width,
    grid_x: launch.grid[0],
    grid_y: launch.grid[1],
    grid_z: launch.grid[2],
    block_x: launch.block[0],
    block_y: launch.block[1],
    block_z: launch.block[2],
    blocks: blocks_of(launch),
    threads: threads_of(launch),
    early_exits: launch.early_exits,
    shared_memory: launch.shared_memory,
    shared_memory_estimated: launch.estimated,
    resident_blocks: resident,
    capacity,
    waves: capacity ? ceil_div(blocks_of(launch), capacity) : 0,
    split_k: launch.split_k,
    cooperative: launch.cooperative,
    barriers: most(work.map((w) => w.barriers)),
    deterministic: !(race(launch) || (launch.atomics && launch.split_k > 1)),
    tmp_bytes: launch.tmp,
    rows,
    row_slots,
    wasted_rows: row_slots - rows,
    lanes: launch.lanes,
    useful_lanes: useful,
    wasted_lanes: launch.lanes - useful,
    flops,
    io_bytes,
    intensity,
    bytes_read: launch.bytes_read,
    bytes_written: launch.bytes_written,
    roofline_us: roofline_s(device, flops, io_bytes) * 1e6,
    ...own_figures(launch),
    adapter_ids: work.map((w) => w.adapter_id),
    rows_per_segment: work.map((w) => w.rows),
    row_slots_per_segment: work.map((w) => w.row_slots),
    blocks_per_segment: work.map((w) => w.blocks),
    barriers_per_segment: work.map((w) => w.barriers),
    faults: faults(launch, capacity),
  };
}

function own_figures(launch) {
  if (launch.chunk_ids) return { chunk: launch.chunk };
  if (launch.kernel !== "punica_sgmv_shrink") return {};
  return {
    release: launch.release,
    chunk: launch.chunk,
    split_k_segments: launch.split_k_segments,
    tmp_limit: TMP_LIMIT,
    deadlock: deadlock(launch) !== null,
    race: race(launch),
  };
}

function faults(launch, capacity) {
  const found = [...launch.unsupported];
  if (!capacity && !launch.estimated) {
    found.push(`no block of ${launch.shared_memory} bytes fits an SM of ${launch.device.name}`);
  }
  const stuck = deadlock(launch);
  if (stuck) found.push(told(stuck));
  if (race(launch)) {
    found.push(
      `race: no barrier stands between reading tmp and the next ${STEP_ROWS} rows' writes`,
    );
  }
  if (launch.tmp > TMP_LIMIT) {
    found.push(`overflow: tmp takes ${launch.tmp} bytes of ${TMP_LIMIT}`);
  }
  return found;
}

// Launches differ from this only in what they name.
const LAUNCH = {
  shrinks: false,
  early_exits: 0,
  shared_memory: 0,
  split_k: 1,
  cooperative: false,
  tmp: 0,
  unsupported: [],
  atomics: false,
  estimated: false,
};

// --- punica.py --------------------------------------------------------------------------------

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

// --- bgmv.py ----------------------------------------------------------------------------------

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

// --- vllm.py: slots are the adapters' places in ascending order -------------------------------

const SHRINK_ROWS = 32;
const SHRINK_COLUMNS = 16;
const FEW_ROWS = 128; // from so many rows of the batch on, shrink splits K less
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

// --- sglang.py --------------------------------------------------------------------------------

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

const KERNELS = {
  punica_sgmv_shrink,
  punica_bgmv_shrink,
  vllm_v1_shrink,
  sglang_csgmv_shrink,
  punica_cutlass_expand,
  punica_bgmv_expand,
  vllm_v1_expand,
  sglang_csgmv_expand,
};
