// Controls -> state -> shown, and the address that keeps the state. The page starts here.
"use strict";

let state = {}; // by name of a control, "" for all; and how the tables are sorted
let shown = null; // the record chosen, its cases that pass, and sgmv's variant
let saved = null; // the address that was written last

function update() {
  const record = offer_all();
  for (const part of document.querySelectorAll(".of-grid")) part.hidden = !record;
  if (record) {
    const { grid } = record;
    const cases = passing(grid.cases);
    shown = { record, grid, cases, variant: variant_of(grid, state.threads) };
  }
  save();
  draw();
  if (record) $("announcement").textContent = $("verdict-title").textContent;
}

function draw() {
  if (!document.querySelector(".of-grid").hidden) {
    for (const drawn of [
      draw_verdict,
      draw_summary,
      draw_latency,
      draw_roof,
      draw_cases,
      draw_beside,
    ])
      drawn();
  }
  draw_growth();
  draw_studies();
  draw_records();
}

function save() {
  if (saved !== null && location.hash !== saved) return;
  const kept = [...CHOICES, ...TABLES]
    .filter((name) => state[name])
    .map((name) => [name, state[name]]);
  saved = `#${new URLSearchParams(kept)}`;
  history.replaceState(null, "", saved);
}

// What an address does not name, or what there is not, is as the page begins.
function read_address() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = Object.fromEntries([...CHOICES, ...TABLES].map((name) => [name, given.get(name) ?? ""]));
  saved = location.hash;
  update();
}

function start() {
  $("controls").addEventListener("input", ({ target }) => {
    state[target.id] = target.value;
    update();
  });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("reset").addEventListener("click", () => {
    for (const name of Object.keys(AXES)) state[name] = "";
    update();
  });
  for (const link of document.querySelectorAll(".skip, .jumps a")) {
    link.addEventListener("click", (event) => {
      event.preventDefault(); // a fragment would take the state's place in the address
      const aim = document.querySelector(link.getAttribute("href"));
      aim.focus({ preventScroll: true });
      aim.scrollIntoView();
    });
  }
  if (matchMedia("(max-width: 900px)").matches) $("fold").open = false;
  addEventListener("resize", draw);
  addEventListener("hashchange", () => {
    if (location.hash !== saved) read_address();
  });
  draw_machines();
  $("peers").replaceChildren(text_table(DATA.peers_table));
  read_address();
}

start();
