// When each thread block runs: a model, one unit of time being one step of a kernel's main loop.
//
// Blocks are dispatched in their order, x running fastest, each to the place that is free first;
// neighbouring places are on different SMs. Where the grid has barriers all blocks are resident.
"use strict";

const MOST_BLOCKS = 4e6; // that are laid out over time
const EXIT = 0.25; // how long a block is drawn that finds nothing to do

function timeline(launch) {
  const resident = resident_blocks(launch.device, threads_of(launch), launch.shared_memory);
  const places = launch.device.sms * resident;
  const blocks = blocks_of(launch);
  if (!places || !blocks || blocks > MOST_BLOCKS) {
    return { bars: [], moments: [], end: 0, places, stuck: null, begun: [], ended: [] };
  }
  return launch.cooperative
    ? with_barriers(launch, blocks, places)
    : in_waves(launch, blocks, places);
}

const index_of = ([gx, gy], i) => [i % gx, Math.floor(i / gx) % gy, Math.floor(i / gx / gy)];

// Neighbouring exits of a place are one bar of several blocks: grids of a million are mostly exits.
function in_waves(launch, blocks, places) {
  const bars = [];
  const leaving = new Map(); // the last bar of a place, if it is of exits
  const [begun, ended] = [new Float64Array(blocks), new Float64Array(blocks)];
  const free = heap(Math.min(places, blocks));
  for (let i = 0; i < blocks; i += 1) {
    const [at, place] = free.first();
    let time = at;
    begun[i] = at;
    const pieces = launch.pieces(index_of(launch.grid, i));
    for (const [s, length] of pieces) {
      bars.push({ place, block: i, s, kind: "work", start: time, end: time + length });
      time += length;
    }
    if (pieces.length) leaving.delete(place);
    else {
      time += EXIT;
      const last = leaving.get(place);
      if (last) {
        last.end = time;
        last.blocks += 1;
      } else {
        const bar = { place, block: i, s: null, kind: "exit", start: at, end: time, blocks: 1 };
        bars.push(bar);
        leaving.set(place, bar);
      }
    }
    ended[i] = time;
    free.replace_first(time);
  }
  ended.sort();
  const times = [...new Set([...begun, ...ended])].sort((a, b) => a - b);
  const moments = times.map((time) => ({ time, kind: "wave" }));
  return { bars, end: ended[blocks - 1], places, stuck: null, begun, ended, moments };
}

// Places by the time at which they are free, then by number.
function heap(count) {
  const items = range(count).map((place) => [0, place]);
  const before = (a, b) => a[0] < b[0] || (a[0] === b[0] && a[1] < b[1]);
  return {
    first: () => items[0],
    replace_first: (time) => {
      items[0] = [time, items[0][1]];
      let i = 0;
      for (;;) {
        let least = i;
        for (const child of [2 * i + 1, 2 * i + 2]) {
          if (child < count && before(items[child], items[least])) least = child;
        }
        if (least === i) return;
        [items[i], items[least]] = [items[least], items[i]];
        i = least;
      }
    },
  };
}

// Per step: sum own chunk, write it to tmp, wait at the barrier, add all chunks.
function with_barriers(launch, blocks, places) {
  const ADD = 1;
  const stages = ceil_div(launch.chunk, STAGE_K);
  const steps = launch.work.map((w) => w.row_slots / STEP_ROWS);
  const own = launch.work.map((w) => w.barriers);
  const every = range(blocks).map((i) => ({ i, s: index_of(launch.grid, i)[1] }));
  const bars = [];
  const moments = [{ time: 0, kind: "start", blocks }];
  const returned = new Map(); // when the blocks of a segment did
  let stuck = null;
  let time = 0;
  for (let barrier = 1; barrier <= most(own); barrier += 1) {
    const here = every.filter(({ s }) => own[s] >= barrier);
    const ended = blocks - here.length;
    const arrived = time + stages;
    const add = (kind, i, s, start, end) => bars.push({ place: i, block: i, s, kind, start, end });
    let busy = 0;
    for (const { i, s } of here) {
      if (steps[s] >= barrier) {
        add("work", i, s, time, arrived);
        busy += 1;
      } else {
        const since = steps[s] < barrier - 1 ? time - ADD : time; // the last barrier, or its own sums
        add("wait", i, s, since, arrived);
      }
    }
    moments.push({
      time: arrived,
      kind: "arrive",
      barrier,
      here: here.length,
      ended,
      busy,
      blocks,
    });
    if (ended) {
      stuck = { barrier, waiting: here.length, returned: ended };
      for (const { i, s } of here) add("stuck", i, s, arrived, arrived + 2 * stages);
      moments.push({ time: arrived + 2 * stages, kind: "stuck", ...stuck });
      time = arrived + 2 * stages;
      break;
    }
    time = arrived + ADD;
    for (const { i, s } of here) if (steps[s] >= barrier) add("add", i, s, arrived, time);
    const returning = here.filter(({ s }) => own[s] === barrier).length;
    own.forEach((last, s) => {
      if (last === barrier) returned.set(s, steps[s] < barrier ? arrived : time);
    });
    moments.push({ time, kind: "open", barrier, blocks, returning });
  }
  for (const { i, s } of every) {
    const since = returned.get(s) ?? time;
    if (since < time) bars.push({ place: i, block: i, s, kind: "gone", start: since, end: time });
  }
  return { bars, moments, end: time, places, stuck, begun: [], ended: [] };
}

// How many of these ascending numbers are at most so large.
function up_to(numbers, largest) {
  let [low, high] = [0, numbers.length];
  while (low < high) {
    const half = (low + high) >> 1;
    if (numbers[half] <= largest) low = half + 1;
    else high = half;
  }
  return low;
}

// How many blocks run, have ended and have not begun at a time; of launches without barriers.
function progress({ begun, ended }, time) {
  const [started, done] = [up_to(begun, time), up_to(ended, time)];
  return { running: started - done, ended: done, to_come: begun.length - started };
}

const MOST_SPANS = 400; // of time in which blocks are counted; beyond that at even moments

// How many blocks are at what between two edges of time, for each key of their bars.
function occupancy({ bars, end }, key_of) {
  const times = new Set([0, end]);
  for (const { start, end: until } of bars) times.add(start).add(until);
  const edges =
    times.size <= MOST_SPANS
      ? [...times].sort((a, b) => a - b)
      : range(MOST_SPANS + 1).map((i) => (end * i) / MOST_SPANS);
  const middles = edges.slice(1).map((edge, i) => (edge + edges[i]) / 2);
  const layers = new Map();
  for (const bar of bars) {
    const key = key_of(bar);
    const layer = layers.get(String(key)) ?? { key, blocks: Array(middles.length + 1).fill(0) };
    layer.blocks[up_to(middles, bar.start)] += 1;
    layer.blocks[up_to(middles, bar.end)] -= 1;
    layers.set(String(key), layer);
  }
  const summed = [...layers.values()].map(({ key, blocks }) => {
    for (let i = 1; i < blocks.length; i += 1) blocks[i] += blocks[i - 1];
    return { key, blocks: blocks.slice(0, -1) };
  });
  return { edges, layers: summed };
}
