// Controls -> state -> shown: what was asked for, and what follows from it. The page starts here.
"use strict";

let state = null; // the controls' values, ids as a list
let shown = null; // what the panels show: launch, figures and what follows
let beside = null; // the same, of what it is compared with
let before = null; // the same, of the last change
let soon = null; // the timer after which a change is announced

function launched(values, { segments = segment(values.ids), whole = false } = {}) {
  const adapters = laid_out(segments).length;
  const known = { ...values, whole, device: DEVICES[values.device] };
  known.max_loras = Math.max(values.max_loras, adapters); // a server has a slot for each it serves
  known.top_k = Math.min(values.top_k, values.experts);
  const launch = KERNELS[values.kernel](segments, known);
  return { values: known, segments, launch, figures: figures(launch), timeline: timeline(launch) };
}

// `fresh`: the page says nothing of what was shown before.
function update(at_moment = 0, fresh = false) {
  const next = controls_read();
  pause();
  stale(!next);
  if (!next) return;
  before = fresh ? null : shown;
  state = next;
  shown = launched(state);
  beside = set_beside(state);
  moment = Math.max(0, Math.min(at_moment, shown.timeline.moments.length - 1));
  save();
  draw(true);
  announce_soon();
}

// While a control holds something that cannot be shown, the panels show what was there before.
function stale(is) {
  $("columns").classList.toggle("stale", is);
  for (const part of [$("story"), $("compare-panel"), $("panels"), $("verdict-body")])
    part.inert = is;
  if (!is) return;
  $("fold").open = true;
  $("verdict").className = "verdict";
  $("verdict-title").textContent = "Not drawn: a field on this page needs another value.";
  announce_soon();
}

function announce_soon() {
  clearTimeout(soon);
  soon = setTimeout(() => {
    $("announcement").textContent = $("columns").classList.contains("stale")
      ? $("verdict-title").textContent
      : announced();
  }, 500);
}

const announced = () =>
  `${$("verdict-title").textContent} ` +
  `${share(shown.figures.useful_lanes, shown.figures.lanes)} of the lanes are useful.`;

function draw(moving) {
  draw_device();
  draw_story();
  draw_compare();
  draw_verdict();
  draw_segments(moving);
  draw_time();
  draw_experts();
  draw_tiles();
  draw_roof(moving);
  draw_bytes();
  draw_layouts();
  draw_figures();
}

function start() {
  for (const [name, most_of] of Object.entries(DATA.most)) $(name).max = most_of;
  for (const name of [...COUNTS, "ids"]) {
    const problem = node("p", { class: "problem", id: `${name}-problem`, role: "alert" });
    ($(name).closest(".widths") ?? $(name)).after(problem);
    const told_by = $(name).getAttribute("aria-describedby");
    $(name).setAttribute("aria-describedby", [told_by, problem.id].filter(Boolean).join(" "));
  }
  $("device").append(...DATA.devices.map(({ name }) => node("option", {}, name)));
  for (const group of $("kernel").children) $("versus").append(group.cloneNode(true));
  for (const { href, text } of DATA.docs) $("docs").append(" · ", node("a", { href }, text));
  $("docs").append(".");
  draw_words();
  for (const story of STORIES) {
    story.address = address(story.values);
    const link = node("a", { href: story.address, click: followed }, story.title);
    $("stories").append(node("li", {}, link));
  }
  if (matchMedia("(max-width: 900px)").matches) $("fold").open = false;
  $("controls").addEventListener("input", changed);
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const [name, event, to] of [
    ["first", "click", () => 0],
    ["back", "click", () => moment - 1],
    ["next", "click", () => moment + 1],
    ["moment", "input", () => Number($("moment").value)],
  ]) {
    $(name).addEventListener(event, () => {
      pause();
      go(to());
    });
  }
  $("play").addEventListener("click", play);
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // a fragment would take the state's place in the address
    $("panels").focus();
  });
  addEventListener("resize", () => {
    draw(false);
    stale($("columns").classList.contains("stale"));
  });
  addEventListener("hashchange", () => {
    if (location.hash !== saved) read_address();
  });
  const asked = location.hash;
  controls_write({ ...FIVE_ROWS, ...DATA.start });
  update(); // what an address asks for may be wrong: then this is shown
  history.replaceState(null, "", asked || location.hash);
  read_address();
}

start();
