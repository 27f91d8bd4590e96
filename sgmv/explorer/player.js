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

function draw_time() {
  const { launch, figures: f, timeline: at } = shown;
  $("time-look").textContent = launch.cooperative
    ? "Each line is one thread block on its SM. An upright line is a grid barrier: it opens when every block of the grid stands at it."
    : "Each line is a place for one block on an SM. Blocks that find no place wait for the next wave.";
  now(
    "time-now",
    ({ figures: of, timeline: line_of }) =>
      line_of.stuck
        ? `${count(of.blocks, "block")}, stuck at barrier ${line_of.stuck.barrier} of ${of.barriers}`
        : `${count(of.blocks, "block")} in ${count(of.waves, "wave")}${of.cooperative ? `, ${count(of.barriers, "barrier")}` : ""}`,
    ({ figures: of, launch: { device } }) =>
      `, on ${Math.min(of.blocks, device.sms)} of ${device.sms} SMs`,
  );
  const figure = $("time");
  const slider = $("moment");
  slider.max = Math.max(at.moments.length - 1, 0);
  for (const id of ["first", "back", "next", "play", "moment"])
    $(id).disabled = at.moments.length < 2;
  if (!at.bars.length) {
    figure.replaceChildren();
    $("time-legend").replaceChildren();
    $("moment-text").textContent = f.blocks
      ? "No block fits an SM, so nothing is drawn."
      : "No blocks, nothing to draw.";
    return;
  }
  const used_sms = Math.min(launch.device.sms, f.blocks);
  const per_sm = Math.ceil(Math.min(at.places, f.blocks) / launch.device.sms);
  const sms = Math.min(used_sms, Math.max(4, Math.floor(96 / per_sm)));
  const tall = Math.max(3, Math.min(14, Math.floor(400 / (sms * per_sm))));
  const gap = tall > 3 ? 1 : 0;
  const [left, top] = [52, 22];
  const right = figure.clientWidth - 8;
  const x = (time) => left + ((right - left) * time) / at.end;
  const y = (place) =>
    top + ((place % launch.device.sms) * per_sm + Math.floor(place / launch.device.sms)) * tall;
  const low = top + sms * per_sm * tall;
  const paths = new Map();
  for (const bar of at.bars) {
    if (bar.place % launch.device.sms >= sms) continue;
    const key = `${bar.kind} ${bar.kind === "work" || bar.kind === "add" ? bar.s % COLOURS.length : ""}`;
    const [from, to] = [x(bar.start), x(bar.end)];
    const wide = Math.max(0.5, to - from - (to - from > 3 ? 1 : 0));
    const path = paths.get(key) ?? { kind: bar.kind, s: bar.s, d: "" };
    path.d += `M${from.toFixed(1)} ${y(bar.place)}h${wide.toFixed(1)}v${tall - gap}h${(-wide).toFixed(1)}z`;
    paths.set(key, path);
  }
  const children = [...paths.values()].map(({ kind, s, d }) =>
    shape("path", { d, ...KINDS[kind][1](s) }),
  );
  const every = Math.max(1, Math.ceil(16 / (per_sm * tall)));
  for (let sm = 0; sm < sms; sm += every) {
    children.push(
      label(left - 6, y(sm) + Math.min(per_sm * tall, 14) - 3, `SM ${sm}`, {
        "text-anchor": "end",
        class: "quiet",
      }),
    );
  }
  for (const { kind, time, barrier, ended } of at.moments) {
    if (kind !== "arrive") continue;
    children.push(
      line(x(time), top - 4, x(time), low, ended ? "barrier shut" : "barrier"),
      label(x(time), 12, figure.clientWidth > 500 ? `barrier ${barrier}` : barrier, {
        "text-anchor": "middle",
        class: ended ? "alarm" : "quiet",
      }),
    );
  }
  if (at.stuck) children.push(label(right, 12, "∞", { "text-anchor": "end", class: "alarm" }));
  const rest = launch.device.sms - sms;
  const others =
    sms < used_sms
      ? `SMs ${sms} to ${used_sms - 1} are not drawn.`
      : rest
        ? `SMs ${sms} to ${launch.device.sms - 1} are idle.`
        : "All SMs are drawn.";
  if (!at.stuck)
    children.push(
      label(right, low + 18, count(Math.ceil(at.end), "step"), {
        "text-anchor": "end",
        class: "quiet",
      }),
    );
  children.push(
    label(left, low + 18, others, { class: "quiet" }),
    box(0, top - 2, 0, low - top + 4, { class: "veil", id: "veil" }),
    shape("line", { class: "cursor", id: "cursor", y1: top - 6, y2: low + 2 }),
  );
  scale = { x, right };
  picture(
    figure,
    low + 26,
    `Thread blocks of ${kernel_name(launch.kernel)} over time: ${$("time-now").textContent}`,
    ...children,
  );
  const kinds = Object.keys(KINDS).filter((kind) => at.bars.some((bar) => bar.kind === kind));
  $("time-legend").replaceChildren(
    ...kinds.map((kind) =>
      node(
        "li",
        {},
        shape(
          "svg",
          { viewBox: "0 0 18 12", "aria-hidden": "true" },
          box(0, 0, 18, 12, KINDS[kind][1](0)),
        ),
        KINDS[kind][0],
      ),
    ),
  );
  draw_moment();
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
  $("moment-text").textContent = `${moment + 1} of ${at.moments.length}. ${moment_told(here)}`;
}

function moment_told(here) {
  const { launch, figures: f, timeline: at } = shown;
  if (here.kind === "start") {
    return `All ${count(here.blocks, "block")} start, each on a chunk of K of one segment, ${STEP_ROWS} rows at a time.`;
  }
  if (here.kind === "arrive") {
    const idle = here.here - here.busy;
    return (
      `Step ${here.barrier} is summed. ${number(here.here)} of ${count(here.blocks, "block")} stand at barrier ${here.barrier}` +
      (idle ? `, ${number(idle)} of them with no rows left` : "") +
      (here.ended
        ? `. The other ${number(here.ended)} returned after barrier ${here.barrier - 1}.`
        : ": it opens.")
    );
  }
  if (here.kind === "open") {
    return (
      `The blocks add the chunks of K from tmp, and block 0 of each segment stores.` +
      (here.returning === here.blocks
        ? " All blocks return: the launch is done."
        : here.returning
          ? ` ${count(here.returning, "block")} return; their segment has no more rows.`
          : "")
    );
  }
  if (here.kind === "stuck") {
    return `Nothing moves any more. ${count(here.waiting, "block")} wait at barrier ${here.barrier} for ${number(here.returned)} that will not come.`;
  }
  const { running, ended, to_come } = progress(at, f.blocks, here.time);
  if (ended === f.blocks) return `All ${number(ended)} blocks are done.`;
  return (
    `${count(running, "block")} in ${count(at.places, "place")}, ${number(ended)} done, ${number(to_come)} yet to find a place.` +
    (launch.kernel === "punica_cutlass_expand"
      ? ` ${f.early_exits ? `${f.early_exits} blocks had no tile to take.` : "Each walks from tile to tile."}`
      : "")
  );
}

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
