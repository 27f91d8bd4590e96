// What a launch is: its figures, and what is wrong with it. The figures of each device come from Python.
"use strict";

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
  if (launch.experts) {
    return {
      experts: launch.experts,
      block_rows: launch.block_rows,
      sorted: Number(launch.is_sorted),
    };
  }
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

// What the colours of a launch are: its adapters, which with experts have several entries of work.
const adapters_of = (launch) => launch.adapters ?? launch.work;

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
