// When each thread block runs: a model, one unit of time being one step of a kernel's main loop.
//
// Blocks are dispatched in their order, x running fastest, each to the place that is free first;
// neighbouring places are on different SMs. Where the grid has barriers all blocks are resident.
"use strict";

const EXIT = 0.25; // how long a block is drawn that finds nothing to do

function timeline(launch) {
  const resident = resident_blocks(launch.device, threads_of(launch), launch.shared_memory);
  const places = launch.device.sms * resident;
  const blocks = blocks_of(launch);
  if (!places || !blocks) return { bars: [], moments: [], end: 0, places, stuck: null };
  return launch.cooperative
    ? with_barriers(launch, blocks, places)
    : in_waves(launch, blocks, places);
}

const index_of = ([gx, gy], i) => [i % gx, Math.floor(i / gx) % gy, Math.floor(i / gx / gy)];

function in_waves(launch, blocks, places) {
  const bars = [];
  const free = heap(Math.min(places, blocks));
  for (let i = 0; i < blocks; i += 1) {
    const [at, place] = free.first();
    let time = at;
    const pieces = launch.pieces(index_of(launch.grid, i));
    for (const [s, length] of pieces) {
      bars.push({ place, block: i, s, kind: "work", start: time, end: time + length });
      time += length;
    }
    if (!pieces.length) {
      bars.push({ place, block: i, s: null, kind: "exit", start: time, end: time + EXIT });
      time += EXIT;
    }
    free.replace_first(time);
  }
  const end = bars.reduce((last, bar) => Math.max(last, bar.end), 0);
  const times = [...new Set(bars.flatMap((bar) => [bar.start, bar.end]))].sort((a, b) => a - b);
  return { bars, end, places, stuck: null, moments: times.map((time) => ({ time, kind: "wave" })) };
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
    moments.push({ time, kind: "open", barrier, blocks, returning });
  }
  return { bars, moments, end: time, places, stuck };
}

// How many blocks run, have ended and have not begun at a time; of launches without barriers.
function progress(line, blocks, time) {
  const ended = new Set();
  const begun = new Set();
  for (const bar of line.bars) {
    if (bar.start <= time) begun.add(bar.block);
    if (bar.end <= time) ended.add(bar.block);
    else ended.delete(bar.block); // a walker's next tile
  }
  return { running: begun.size - ended.size, ended: ended.size, to_come: blocks - begun.size };
}
