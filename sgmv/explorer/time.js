// The panel of thread blocks over time: a line for each place where they are few, else how many
// blocks are at what.
"use strict";

// What a bar means, and the attributes of the shapes that it is made of. Colours are the adapters'.
const own_colour = (s) => (s === undefined ? { class: "used" } : { style: fill(s) });
const KINDS = {
  work: ["multiplies", (s) => [own_colour(s)]],
  add: ["adds the chunks of K", (s) => [own_colour(s), { class: "added" }]],
  wait: ["waits at the barrier with nothing to do", () => [{ class: "room" }, { class: "waste" }]],
  stuck: ["waits for ever", () => [{ class: "stuck" }]],
  gone: ["has returned", () => [{ class: "gone" }]],
  exit: ["finds nothing to do and leaves", () => [{ class: "exit" }]],
};
const KINDS_IN_ORDER = Object.keys(KINDS);

const kind_meant = (kind) => [KINDS[kind][0], ...KINDS[kind][1]().map(sample_of)];

const MOST_LINES = 64; // of places, one below the other; beyond that they are stripes
const MOST_COLOURS = 12; // of segments that are stacked; beyond that they are one area

let scale = null; // of the drawing: time -> x, and its right end

function draw_time() {
  const { launch, figures: f, timeline: at } = shown;
  const lines = Math.min(f.blocks, f.capacity) <= MOST_LINES;
  const each = lines
    ? "Each line is a place for one block on an SM."
    : "The higher an area, the more blocks are at it at that time.";
  $("time-look").replaceChildren(
    `${each} `,
    ...prose(
      launch.cooperative
        ? "An upright line is a *barrier* of the whole grid: it opens when every block stands at it. " +
            "Between two barriers a block sums its chunk of K, writes the sums to *tmp*, a scratch buffer " +
            "in GPU memory, and adds up what all chunks wrote."
        : "A *wave* is as many blocks as the GPU holds at once; the others wait for a place.",
    ),
  );
  now("time-now", fate, ({ figures: of, launch: { device } }) =>
    of.capacity ? `, on ${number(Math.min(of.blocks, device.sms))} of ${device.sms} SMs` : "",
  );
  $("moment").max = Math.max(at.moments.length - 1, 0);
  for (const id of ["first", "back", "next", "play", "moment"]) {
    $(id).disabled = at.moments.length < 2;
  }
  if (!at.bars.length) {
    $("time").replaceChildren();
    $("time-legend").replaceChildren();
    $("moment-text").textContent = why_no_bars(f);
    return;
  }
  const plot = lines ? lines_plot(shown) : areas_plot(shown);
  const { left, right, top, low, x } = plot;
  scale = plot;
  picture(
    $("time"),
    low + 40,
    `Thread blocks of ${kernel_name(launch.kernel)} over time: ${$("time-now").textContent}`,
    ...plot.drawn,
    line(left, low, right, low, "axis"),
    ...time_ticks(x, at.end, right, low),
    ...barriers_drawn(plot, at),
    label(0, low + 34, plot.others, "quiet"),
    label(right, low + 34, "steps of the main loop", "quiet", "end"),
    at.stuck ? label(right, 12, "∞", "alarm", "end") : null,
    box(0, top - 2, 0, low - top + 2, { class: "veil", id: "veil" }),
    shape("line", { class: "cursor", id: "cursor", y1: top - 6, y2: low + 2 }),
  );
  const kinds = KINDS_IN_ORDER.filter((kind) => at.bars.some((bar) => bar.kind === kind));
  const colours = plot.by_segment ? adapters_meant(adapters_of(launch)) : [];
  legend("time-legend", [...kinds.map(kind_meant), ...colours]);
  draw_moment();
}

function why_no_bars({ blocks, capacity }) {
  if (!blocks) return "No blocks, nothing to draw.";
  return capacity
    ? `More than ${number(MOST_BLOCKS)} blocks: too many to draw.`
    : "No block fits an SM, so nothing is drawn.";
}

function fate({ figures: f, timeline: { stuck } }) {
  if (!f.capacity) return `${count(f.blocks, "block")}, none of which fits an SM`;
  if (stuck)
    return `${count(f.blocks, "block")}, stuck at barrier ${stuck.barrier} of ${f.barriers}`;
  const how = f.cooperative
    ? `, ${f.blocks === 1 ? "" : "all at once, "}${count(f.barriers, "barrier")}`
    : ` in ${count(f.waves, "wave")}`;
  return `${count(f.blocks, "block")}${how}`;
}

function idle_sms({ sms }, blocks) {
  if (blocks >= sms) return "All SMs have blocks.";
  return blocks === sms - 1 ? `SM ${blocks} is idle.` : `SMs ${blocks} to ${sms - 1} are idle.`;
}

const of_time = (left, right, end) => (time) => left + ((right - left) * time) / end;

// SMs one below the other, each with its places.
function lines_plot({
  launch: { device },
  figures: { blocks },
  timeline: { bars, moments, places, end },
}) {
  const used = Math.min(places, blocks);
  const sms = Math.min(device.sms, used);
  const per_sm = Math.ceil(used / device.sms);
  const tall = Math.max(6, Math.min(14, Math.floor(400 / (sms * per_sm))));
  const [left, top, right] = [52, 22, $("time").clientWidth - 8];
  const x = of_time(left, right, end);
  const y = (place) =>
    top + ((place % device.sms) * per_sm + Math.floor(place / device.sms)) * tall;
  const every = even_step((step) => step * per_sm * tall >= 16);
  const names = range(Math.ceil(sms / every)).map((i) => {
    const middle = y(i * every) + (per_sm * tall) / 2;
    return label(left - 6, middle + 4, `SM ${i * every}`, "quiet", "end");
  });
  return {
    left, right, top, x,
    low: top + sms * per_sm * tall,
    by_segment: true,
    others: idle_sms(device, blocks),
    drawn: [...bars_drawn(bars, x, y, tall - 1), ...returned_named(bars, moments, x, y, tall, right), ...names],
  }; // prettier-ignore
}

// One path for all bars of a look.
function bars_drawn(bars, x, y, high) {
  const looks = new Map();
  for (const { place, kind, s, start, end } of bars) {
    const own = kind === "work" || kind === "add" ? s : "";
    const look = looks.get(kind + own) ?? { kind, s, d: "" };
    const apart = x(end) - x(start) > 3 ? 1 : 0;
    const wide = Math.max(0.5, x(end) - x(start) - apart).toFixed(1);
    look.d += `M${x(start).toFixed(1)} ${y(place)}h${wide}v${high}h-${wide}z`;
    looks.set(kind + own, look);
  }
  return [...looks.values()].flatMap(({ kind, s, d }) =>
    KINDS[kind][1](s).map((attributes) => shape("path", { d, ...attributes })),
  );
}

// The blocks of each segment that have returned, where there is room to say so.
function returned_named(bars, moments, x, y, tall, right) {
  const barriers = moments.filter(({ kind }) => kind === "arrive").map(({ time }) => x(time));
  const gone = bars.filter(({ kind }) => kind === "gone");
  return [...new Set(gone.map(({ s }) => s))].flatMap((s) => {
    const own = gone.filter((bar) => bar.s === s);
    const places = own.map(({ place }) => y(place));
    const [from, to] = [Math.min(...places), most(places) + tall];
    const text = `${count(own.length, "block")} returned`;
    const edges = [x(own[0].start), ...barriers.filter((at) => at > x(own[0].start)), right];
    const free = edges.findIndex((edge, i) => edges[i + 1] - edge > text.length * LETTER + 12);
    if (to - from < 16 || free === -1) return [];
    return [label(edges[free] + 8, (from + to) / 2 + 4, text, "halo")];
  });
}

// How many blocks are at what, of which segment where these are few.
function areas_plot({ launch, figures: { blocks, capacity }, timeline }) {
  const [left, top, right, low] = [52, 22, $("time").clientWidth - 8, 222];
  const tallest = Math.min(blocks, capacity);
  const x = of_time(left, right, timeline.end);
  const by_segment = adapters_of(launch).length <= MOST_COLOURS;
  const room_for = (blocks_at) => ((low - top) * blocks_at) / tallest;
  const colourful = ({ kind, s }) => by_segment && (kind === "work" || kind === "add");
  const layers = occupancy(timeline, (bar) => [bar.kind, colourful(bar) ? bar.s : undefined]);
  const every = even_step((step) => room_for(step) >= 36);
  const ticks = range(Math.floor(tallest / every) + 1).map((i) => i * every);
  return {
    left, right, top, low, x, by_segment,
    others: idle_sms(launch.device, blocks),
    drawn: [
      ...areas(layers, x, low, room_for),
      line(left, top, left, low, "axis"),
      ...ticks.flatMap((blocks_at) => [
        line(left - 4, low - room_for(blocks_at), left, low - room_for(blocks_at), "axis"),
        label(left - 7, low - room_for(blocks_at) + 4, number(blocks_at), "quiet", "end"),
      ]),
      label(0, 10, "blocks", "quiet"),
    ],
  }; // prettier-ignore
}

// Layers of blocks upon each other, as one shape each.
function areas({ edges, layers }, x, low, room_for) {
  const floor = edges.slice(1).map(() => 0);
  const rank = ({ key: [kind, s = 0] }) => KINDS_IN_ORDER.indexOf(kind) * 1e6 + s;
  const sorted = [...layers].sort((one, other) => rank(one) - rank(other));
  return sorted.flatMap(({ key: [kind, s], blocks }) => {
    let d = "";
    for (let i = 0; i < blocks.length; i += 1) {
      if (!blocks[i]) continue;
      let last = i;
      while (blocks[last + 1] === blocks[i] && floor[last + 1] === floor[i]) last += 1;
      const [start, end] = [x(edges[i]), x(edges[last + 1])];
      const y = low - room_for(floor[i] + blocks[i]);
      d += `M${start.toFixed(1)} ${y.toFixed(1)}H${end.toFixed(1)}v${room_for(blocks[i]).toFixed(1)}H${start.toFixed(1)}z`;
      i = last;
    }
    blocks.forEach((count_of, i) => (floor[i] += count_of));
    return KINDS[kind][1](s).map((attributes) => shape("path", { d, ...attributes }));
  });
}

// Steps of the main loop, below an axis.
function time_ticks(x, end, right, low) {
  const wide = number(Math.ceil(end)).length * LETTER;
  const every = even_step((step) => x(step) - x(0) >= wide + 14);
  return range(Math.floor(end / every) + 1).flatMap((i) => {
    const at = x(i * every);
    const anchor = at + wide / 2 > right + 6 ? "end" : "middle";
    return [
      line(at, low, at, low + 4, "axis"),
      label(at, low + 17, number(i * every), "quiet", anchor),
    ];
  });
}

function barriers_drawn({ right, left, top, low, x }, { moments }) {
  const barriers = moments.filter(({ kind }) => kind === "arrive");
  const apart = barriers.length > 1 ? x(barriers[1].time) - x(barriers[0].time) : right - left;
  const long = apart >= 72;
  const every = even_step((step) => step * apart >= (long ? 72 : 24));
  return barriers
    .flatMap(({ time, barrier, ended }) => [
      line(x(time), top - 4, x(time), low, ended ? "barrier shut" : "barrier"),
      barrier % every === 0 || ended
        ? label(
            x(time),
            12,
            long ? `barrier ${barrier}` : barrier,
            ended ? "alarm" : "quiet",
            "middle",
          )
        : null,
    ])
    .filter(Boolean);
}
