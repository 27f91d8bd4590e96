// Steps through the time line: moments, and what happens at each.
"use strict";

let moment = 0; // place in the timeline's moments
let playing = null; // the timer that steps

const MOST_STEPS = 40; // that Play takes from the first moment to the last
const PACE = 1100; // milliseconds for each

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
    `${blocks === 1 ? "The only block starts," : `All ${number(blocks)} blocks start, each`} on a chunk of K of one segment, ` +
    `${STEP_ROWS} rows at a time.`,
  arrive: ({ barrier, here, busy, ended, blocks }) => {
    const idle = here > busy ? `, ${number(here - busy)} of them with no rows left` : "";
    const verb = here === 1 ? "stands" : "stand";
    const outcome = ended
      ? `. The other ${number(ended)} returned after barrier ${barrier - 1}.`
      : ": it opens.";
    const stand = `${number(here)} of ${count(blocks, "block")} ${verb} at barrier ${barrier}`;
    return `Step ${barrier} is summed. ${stand}${idle}${outcome}`;
  },
  open: ({ blocks, returning }) => {
    const few = `${count(returning, "block")} ${returning === 1 ? "returns" : "return"}: no more rows in their segment.`;
    const outcome = returning === blocks ? "All blocks return: the launch is done." : few;
    const added = "The blocks add the chunks of K from tmp, and block 0 of each segment stores.";
    const late = "No barrier stands before the next step’s writes: who is late still reads tmp.";
    if (!returning) return shown.figures.race ? `${added} ${late}` : added;
    return `${added} ${outcome}`;
  },
  stuck: ({ barrier, waiting, returned }) =>
    `Nothing moves any more. ${count(waiting, "block")} ${waiting === 1 ? "waits" : "wait"} at barrier ${barrier} for ` +
    `${number(returned)} that will not come.`,
  wave: ({ time }) => {
    const { figures: f, timeline: at } = shown;
    const { running, ended, to_come } = progress(at, time);
    if (ended === f.blocks)
      return ended === 1 ? "The only block is done." : `All ${number(ended)} blocks are done.`;
    const places = `${count(running, "block")} in ${count(at.places, "place")}`;
    return `${places}, ${number(ended)} done, ${number(to_come)} yet to find a place.`;
  },
};

function go(to) {
  moment = Math.max(0, Math.min(shown.timeline.moments.length - 1, to));
  draw_moment();
  save_soon();
}

function pause() {
  clearInterval(playing);
  playing = null;
  $("play").setAttribute("aria-pressed", "false");
  $("play").textContent = "Play";
}

function play() {
  if (playing) return pause();
  const last = shown.timeline.moments.length - 1;
  const stride = Math.ceil(last / MOST_STEPS);
  if (moment === last) go(0);
  $("play").setAttribute("aria-pressed", "true");
  $("play").textContent = "Pause";
  playing = setInterval(() => {
    go(moment + stride);
    if (moment === last) pause();
  }, PACE);
  return undefined;
}
