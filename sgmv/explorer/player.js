// The panel that shows thread blocks over time, and steps through it.
"use strict";

let moment = 0; // place in the timeline's moments
let playing = null; // the timer that steps
let scale = null; // of the drawing: time -> x, and its right end

const KINDS = {
  work: ["multiplies", (s) => ({ fill: colour(s)[0] })],
  add: ["adds the chunks of K", (s) => ({ fill: colour(s)[0], opacity: 0.45 })],
  wait: ["waits at the barrier with nothing to do", () => ({ fill: "url(#hatch)" })],
  exit: ["leaves at once", () => ({ class: "base" })],
  stuck: ["waits for ever", () => ({ fill: "url(#stuck)" })],
};

const MOST_PLACES = 96; // of blocks that are drawn, one below the other

function draw_time() {
  const { launch, figures: f, timeline: at } = shown;
  $("time-look").textContent = launch.cooperative
    ? "Each line is one thread block on its SM. " +
      "An upright line is a grid barrier: it opens when every block of the grid stands at it."
    : "Each line is a place for one block on an SM. Blocks that find none wait for the next wave.";
  now("time-now", fate, ({ figures: of, launch: { device } }) => {
    const used = Math.min(of.blocks, device.sms);
    return `, on ${used} of ${device.sms} SMs`;
  });
  $("moment").max = Math.max(at.moments.length - 1, 0);
  for (const id of ["first", "back", "next", "play", "moment"]) {
    $(id).disabled = at.moments.length < 2;
  }
  if (!at.bars.length) {
    $("time").replaceChildren();
    $("time-legend").replaceChildren();
    $("moment-text").textContent = f.blocks
      ? "No block fits an SM, so nothing is drawn."
      : "No blocks, nothing to draw.";
    return;
  }
  const plot = time_plot(launch, f, at);
  const { left, right, top, low } = plot;
  scale = plot;
  picture(
    $("time"),
    low + 26,
    `Thread blocks of ${kernel_name(launch.kernel)} over time: ${$("time-now").textContent}`,
    ...bars_drawn(plot, at.bars),
    ...time_axes(plot, at),
    label(left, low + 18, plot.others, "quiet"),
    at.stuck
      ? label(right, 12, "∞", "alarm", "end")
      : label(right, low + 18, count(Math.ceil(at.end), "step"), "quiet", "end"),
    box(0, top - 2, 0, low - top + 4, { class: "veil", id: "veil" }),
    shape("line", { class: "cursor", id: "cursor", y1: top - 6, y2: low + 2 }),
  );
  const kinds = Object.keys(KINDS).filter((kind) => at.bars.some((bar) => bar.kind === kind));
  $("time-legend").replaceChildren(...kinds.map(legend));
  draw_moment();
}

function fate({ figures: f, timeline: { stuck } }) {
  if (stuck)
    return `${count(f.blocks, "block")}, stuck at barrier ${stuck.barrier} of ${f.barriers}`;
  const barriers = f.cooperative ? `, ${count(f.barriers, "barrier")}` : "";
  return `${count(f.blocks, "block")} in ${count(f.waves, "wave")}${barriers}`;
}

// Where times and places are drawn: the first SMs, each with its places one below the other.
function time_plot({ device }, { blocks }, { places, end }) {
  const used = Math.min(device.sms, blocks);
  const per_sm = Math.ceil(Math.min(places, blocks) / device.sms);
  const sms = Math.min(used, Math.max(4, Math.floor(MOST_PLACES / per_sm)));
  const tall = Math.max(3, Math.min(14, Math.floor(400 / (sms * per_sm))));
  const [left, top, right] = [52, 22, $("time").clientWidth - 8];
  const last = device.sms - 1;
  return {
    left,
    right,
    top,
    low: top + sms * per_sm * tall,
    tall,
    sms,
    of_sm: per_sm * tall,
    others:
      sms < used
        ? `SMs ${sms} to ${used - 1} are not drawn.`
        : sms <= last
          ? `SMs ${sms} to ${last} are idle.`
          : "All SMs are drawn.",
    x: (time) => left + ((right - left) * time) / end,
    y: (place) => top + ((place % device.sms) * per_sm + Math.floor(place / device.sms)) * tall,
    holds: (place) => place % device.sms < sms,
  };
}

// One path for all bars of a look: there may be ten thousands.
function bars_drawn({ x, y, tall, holds }, bars) {
  const high = tall > 3 ? tall - 1 : tall;
  const paths = new Map();
  for (const { place, kind, s, start, end } of bars) {
    if (!holds(place)) continue;
    const look = kind === "work" || kind === "add" ? s % COLOURS.length : "";
    const path = paths.get(kind + look) ?? { kind, s, d: "" };
    const apart = x(end) - x(start) > 3 ? 1 : 0;
    const wide = Math.max(0.5, x(end) - x(start) - apart).toFixed(1);
    path.d += `M${x(start).toFixed(1)} ${y(place)}h${wide}v${high}h-${wide}z`;
    paths.set(kind + look, path);
  }
  return [...paths.values()].map(({ kind, s, d }) => shape("path", { d, ...KINDS[kind][1](s) }));
}

function time_axes({ left, right, top, low, sms, of_sm, x }, { moments }) {
  const every = Math.max(1, Math.ceil(16 / of_sm));
  const names = range(Math.ceil(sms / every)).map((i) => {
    const y = top + i * every * of_sm + Math.min(of_sm, 14) - 3;
    return label(left - 6, y, `SM ${i * every}`, "quiet", "end");
  });
  const barriers = moments.filter(({ kind }) => kind === "arrive");
  return barriers.reduce((drawn, { time, barrier, ended }) => {
    const name = right > 500 ? `barrier ${barrier}` : barrier;
    return [
      ...drawn,
      line(x(time), top - 4, x(time), low, ended ? "barrier shut" : "barrier"),
      label(x(time), 12, name, ended ? "alarm" : "quiet", "middle"),
    ];
  }, names);
}

function legend(kind) {
  const [meaning, look] = KINDS[kind];
  const sample = shape("svg", { viewBox: "0 0 18 12", "aria-hidden": "true" });
  sample.append(box(0, 0, 18, 12, look(0)));
  return node("li", {}, sample, meaning);
}

function draw_moment() {
  const { timeline: at } = shown;
  const here = at.moments[moment];
  if (!here) return;
  const x = scale.x(here.time);
  $("veil").setAttribute("x", x);
  $("veil").setAttribute("width", Math.max(0, scale.right - x + 2));
  $("cursor").setAttribute("x1", x);
  $("cursor").setAttribute("x2", x);
  $("moment").value = moment;
  $("moment").setAttribute("aria-valuetext", `moment ${moment + 1} of ${at.moments.length}`);
  $("first").disabled = $("back").disabled = moment === 0;
  $("next").disabled = moment === at.moments.length - 1;
  $("moment-text").textContent = `${moment + 1} of ${at.moments.length}. ${TOLD[here.kind](here)}`;
}

const TOLD = {
  start: ({ blocks }) =>
    `All ${count(blocks, "block")} start, each on a chunk of K of one segment, ` +
    `${STEP_ROWS} rows at a time.`,
  arrive: ({ barrier, here, busy, ended, blocks }) => {
    const idle = here > busy ? `, ${number(here - busy)} of them with no rows left` : "";
    const outcome = ended
      ? `. The other ${number(ended)} returned after barrier ${barrier - 1}.`
      : ": it opens.";
    const stand = `${number(here)} of ${count(blocks, "block")} stand at barrier ${barrier}`;
    return `Step ${barrier} is summed. ${stand}${idle}${outcome}`;
  },
  open: ({ blocks, returning }) => {
    const few = `${count(returning, "block")} return; their segment has no more rows.`;
    const outcome = returning === blocks ? "All blocks return: the launch is done." : few;
    const added = "The blocks add the chunks of K from tmp, and block 0 of each segment stores.";
    const late = "No barrier stands before the next step’s writes: who is late still reads tmp.";
    if (!returning) return shown.figures.race ? `${added} ${late}` : added;
    return `${added} ${outcome}`;
  },
  stuck: ({ barrier, waiting, returned }) =>
    `Nothing moves any more. ${count(waiting, "block")} wait at barrier ${barrier} for ` +
    `${number(returned)} that will not come.`,
  wave: ({ time }) => {
    const { figures: f, timeline: at } = shown;
    const { running, ended, to_come } = progress(at, f.blocks, time);
    if (ended === f.blocks) return `All ${number(ended)} blocks are done.`;
    const places = `${count(running, "block")} in ${count(at.places, "place")}`;
    return `${places}, ${number(ended)} done, ${number(to_come)} yet to find a place.`;
  },
};

function go(to) {
  moment = Math.max(0, Math.min(shown.timeline.moments.length - 1, to));
  draw_moment();
}

function pause() {
  clearInterval(playing);
  playing = null;
  $("play").setAttribute("aria-pressed", "false");
  $("play").textContent = "Play";
}

function play() {
  if (playing) return pause();
  if (moment === shown.timeline.moments.length - 1) go(0);
  $("play").setAttribute("aria-pressed", "true");
  $("play").textContent = "Pause";
  playing = setInterval(() => {
    go(moment + 1);
    if (moment === shown.timeline.moments.length - 1) pause();
  }, 1100);
  return undefined;
}
