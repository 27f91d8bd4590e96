// Controls -> state -> shown: what was asked for, and what follows from it. The page starts here.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const DEVICES = Object.fromEntries(DATA.devices.map((device) => [device.name, device]));
const MOST_ROWS = DATA.most.n;
const COUNTS = ["n", "h_in", "r", "h_out", "max_loras", "max_lora_chunk_size"];
const CHOICES = ["popularity", "kernel", "release", "device"];

// Ids as runs: "7, 0*132".
function written(ids) {
  const runs = [];
  for (const id of ids) {
    const last = runs[runs.length - 1];
    if (last && last.id === id) last.times += 1;
    else runs.push({ id, times: 1 });
  }
  return runs.map(({ id, times }) => (times === 1 ? `${id}` : `${id}*${times}`)).join(", ");
}

function parsed(text) {
  const ids = [];
  for (const part of text.split(/[\s,;]+/).filter(Boolean)) {
    const found = /^(-1|\d{1,9})(?:[*×](\d{1,6}))?$/.exec(part);
    if (!found) {
      throw new Error(`Adapter ids: expected an id such as 7, -1 or 0*132, got “${part}”.`);
    }
    const times = found[2] === undefined ? 1 : Number(found[2]);
    if (ids.length + times > MOST_ROWS) {
      throw new Error(`Adapter ids: expected at most ${number(MOST_ROWS)} rows, got more.`);
    }
    for (let i = 0; i < times; i += 1) ids.push(Number(found[1]));
  }
  if (!ids.length) throw new Error("Adapter ids: expected at least one row, got none.");
  return ids;
}

// The same ids again and again, up to n rows.
const repeated = (ids, n) => written(range(n).map((row) => ids[row % ids.length]));

// A popularity's ids, in an order that is the same each time.
function mixed(kind, n) {
  const ids = popularity(kind, n).flatMap((rows, id) => Array(rows).fill(id));
  let seed = 20231106;
  for (let i = ids.length - 1; i > 0; i -= 1) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    const j = Math.floor((seed / 2 ** 32) * (i + 1));
    [ids[i], ids[j]] = [ids[j], ids[i]];
  }
  return ids;
}

const FIVE_ROWS = {
  ids: "2, 0, -1, 2, 0",
  popularity: "",
  h_in: 4096,
  r: 16,
  h_out: 4096,
  device: "A100",
  kernel: "punica_sgmv_shrink",
  release: "1.1.0",
  max_loras: 8,
  max_lora_chunk_size: 16,
};
const STORIES = [
  [
    "Five rows",
    FIVE_ROWS,
    "Five rows, two adapters, one row of the base model alone. " +
      "Punica knows no base-only rows: they stay out of its launch.",
  ],
  [
    "Why [1, 132] hung",
    { ...FIVE_ROWS, ids: "1*50, 0, 1*82", release: "1.0.0" },
    "Segments of 1 and 132 rows, in Punica before 1.1.0. " +
      "Step through the blocks’ time line below, and watch barrier 2.",
  ],
  [
    "…and its fix",
    { ...FIVE_ROWS, ids: "1*50, 0, 1*82", release: "1.1.0" },
    "Since 1.1.0 every block passes as many barriers as the longest segment needs. " +
      "A block whose rows are done comes to them with empty hands.",
  ],
  [
    "The split-K cliff",
    { ...FIVE_ROWS, popularity: "distinct", n: 28 },
    "With 27 segments all chunks of K fit the A100 at once. The 28th makes the launch drop " +
      "its split of K: one block per segment now sums all 4,096 products, and most SMs stand idle.",
  ],
  [
    "A race on tmp",
    { ...FIVE_ROWS, popularity: "identical", n: 130 },
    "Beyond 64 rows a block takes several steps. " +
      "It may write its next partial sums to tmp while another still reads the last ones.",
  ],
  [
    "Blocks with nothing to do",
    { ...FIVE_ROWS, popularity: "skewed", n: 64, kernel: "vllm_v1_shrink", max_loras: 16 },
    "vLLM lays out the grid for the worst case, as if each slot might hold all rows, and " +
      "lets the surplus blocks leave at once. At 4,096 products 48 of its 64 splits of K multiply zeros.",
  ],
  [
    "Why distinct hurts",
    { ...FIVE_ROWS, popularity: "distinct", n: 64, h_in: 16, kernel: "punica_cutlass_expand" },
    "64 rows, 64 adapters: every row brings a weight matrix of its own, and each tile of 32 rows holds one.",
  ],
];

let state = null; // the controls' values, ids as a list
let shown = null; // what the panels show: launch, figures and what follows
let before = null; // the same, of the last change
let soon = null; // the timer after which a change is announced

function controls_read() {
  const problems = [];
  const next = {};
  for (const name of CHOICES) next[name] = $(name).value;
  for (const name of COUNTS) {
    const input = $(name);
    next[name] = Number(input.value);
    if (!input.value || !input.checkValidity()) {
      problems.push(
        `${name}: expected a whole number from ${input.min} to ${number(Number(input.max))}, ` +
          `got “${input.value}”.`,
      );
    }
    input.setAttribute("aria-invalid", String(!input.checkValidity() || !input.value));
  }
  try {
    next.ids = parsed($("ids").value);
    $("ids").setAttribute("aria-invalid", "false");
  } catch (error) {
    problems.push(error.message);
    $("ids").setAttribute("aria-invalid", "true");
  }
  $("problem").textContent = problems.join(" ");
  return problems.length ? null : next;
}

// Where a control has no such choice it stays as it is.
function put(name, value) {
  const control = $(name);
  const held = control.value;
  control.value = value;
  if (control.selectedIndex === -1) control.value = held;
}

// A popularity makes the ids; ids that are typed count the rows.
function controls_write(values) {
  for (const name of [...CHOICES, ...COUNTS, "ids"]) {
    if (values[name] !== undefined) put(name, values[name]);
  }
  if (values.popularity) put("ids", written(mixed(values.popularity, values.n)));
  else if (values.ids !== undefined) put("n", rows_typed(values.ids));
  for (const part of document.querySelectorAll("[data-kernels]")) {
    part.hidden = !part.dataset.kernels.split(" ").includes($("kernel").value);
  }
}

function rows_typed(text) {
  try {
    return parsed(text).length;
  } catch {
    return $("n").value; // what is wrong is told beside the field
  }
}

function changed({ target: { id: name } }) {
  const [kind, n] = [$("popularity").value, Number($("n").value)];
  const sized = $("n").value && $("n").checkValidity();
  if (name === "ids") controls_write({ popularity: "", ids: $("ids").value });
  else if (kind && sized) controls_write({ popularity: kind, n });
  else if (name === "n" && sized) controls_write({ popularity: "", ids: repeated(state.ids, n) });
  else controls_write({});
  update();
}

// The address keeps what is shown, so that it can be kept or sent.
const address = (values) => {
  const kept = { ...values, ids: written(values.ids) };
  if (values.popularity) delete kept.ids;
  return `#${new URLSearchParams(kept)}`;
};

function launched(values) {
  const segments = segment(values.ids);
  const adapters = laid_out(segments).length;
  const known = { ...values, device: DEVICES[values.device] };
  known.max_loras = Math.max(values.max_loras, adapters); // a server has a slot for each it serves
  const launch = KERNELS[values.kernel](segments, known);
  return { values: known, segments, launch, figures: figures(launch), timeline: timeline(launch) };
}

function update() {
  const next = controls_read();
  if (!next) return;
  before = shown;
  state = next;
  shown = launched(state);
  pause();
  moment = Math.max(shown.timeline.moments.length - 1, 0);
  history.replaceState(null, "", address(state));
  for (const button of $("stories").children) {
    button.setAttribute("aria-pressed", String(button.dataset.address === address(state)));
  }
  draw(true);
  clearTimeout(soon);
  soon = setTimeout(() => {
    $("announcement").textContent = announced();
  }, 500);
}

const announced = () =>
  `${$("verdict-title").textContent} ` +
  `${share(shown.figures.useful_lanes, shown.figures.lanes)} of the lanes are useful.`;

function draw(moving) {
  draw_device();
  draw_verdict();
  draw_segments(moving);
  draw_tiles();
  draw_time();
  draw_roof(moving);
  draw_bytes();
  draw_layouts();
  draw_figures();
}

function start() {
  for (const [name, most_of] of Object.entries(DATA.most)) $(name).max = most_of;
  $("device").append(...DATA.devices.map(({ name }) => node("option", {}, name)));
  for (const [title, values] of STORIES) {
    const button = node(
      "button",
      {
        type: "button",
        "aria-pressed": "false",
        click: () => {
          controls_write(values);
          update();
        },
      },
      title,
    );
    const ids = values.popularity ? mixed(values.popularity, values.n) : parsed(values.ids);
    button.dataset.address = address(in_order({ ...values, n: ids.length, ids }));
    $("stories").append(button);
  }
  const kept = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  controls_write({ ...FIVE_ROWS, ...DATA.start });
  controls_write(kept);
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
  addEventListener("resize", () => draw(false));
  update();
}

// The order in which controls_read gives the values, so that addresses can be compared.
function in_order(values) {
  return Object.fromEntries([...CHOICES, ...COUNTS, "ids"].map((name) => [name, values[name]]));
}

start();
