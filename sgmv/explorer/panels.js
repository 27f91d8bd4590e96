// What is on the page: controls -> state -> launch -> panels. All numbers come from emulator.js.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const DEVICES = Object.fromEntries(DATA.devices.map((device) => [device.name, device]));
const MOST_ROWS = DATA.most_rows;
const COUNTS = ["n", "h_in", "r", "h_out", "max_loras", "max_lora_chunk_size"];
const CHOICES = ["popularity", "kernel", "release", "device"];
const $ = (id) => document.getElementById(id);

// --- small words ------------------------------------------------------------------------------

const number = (value) => value.toLocaleString("en-US");
const count = (value, word, plural = `${word}s`) => `${number(value)} ${value === 1 ? word : plural}`;
const share = (part, whole) => {
  const percent = whole ? (100 * part) / whole : 0;
  return `${percent >= 10 || percent === 0 ? Math.round(percent) : percent.toPrecision(2)} %`;
};
const significant = (value) => (value >= 100 ? number(Math.round(value)) : String(Number(value.toPrecision(3))));
function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = value ? Math.min(units.length - 1, Math.floor(Math.log10(value) / 3)) : 0;
  return `${significant(value / 1000 ** power)} ${units[power]}`;
}
const adapter = (id) => (id === BASE_ONLY ? "base only" : `adapter ${id}`);
const kernel_name = (kernel) => $("kernel").querySelector(`[value=${kernel}]`).textContent;

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

// --- nodes ------------------------------------------------------------------------------------

function node(name, attributes = {}, ...children) {
  return filled_in(document.createElement(name), attributes, children);
}
function shape(name, attributes = {}, ...children) {
  return filled_in(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}
function filled_in(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
const box = (x, y, width, height, attributes = {}) =>
  shape("rect", { x, y, width: Math.max(width, 0), height: Math.max(height, 0), ...attributes });
const line = (x1, y1, x2, y2, kind) => shape("line", { x1, y1, x2, y2, class: kind });
const label = (x, y, text, attributes = {}) => shape("text", { x, y, ...attributes }, String(text));

// An image of this size that says in words what it shows.
function picture(figure, height, told, ...children) {
  const width = figure.clientWidth;
  figure.replaceChildren(shape(
    "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": told }, ...children));
}

function table(head, lines) {
  const cell = (tag) => (value) => node(tag, typeof value === "number" ? { class: "number" } : {},
    value instanceof Node ? value : typeof value === "number" ? number(value) : String(value));
  return node("table", {},
    node("thead", {}, node("tr", {}, ...head.map((name) => node("th", { scope: "col" }, name)))),
    node("tbody", {}, ...lines.map(([first, ...rest]) => node("tr", {},
      filled_in(cell("th")(first), { scope: "row" }, []), ...rest.map(cell("td"))))));
}

// Six colours that stay apart for colour-blind eyes (Okabe and Ito), and ink that reads on each.
const COLOURS = [
  ["#0072b2", "#ffffff"], ["#e69f00", "#000000"], ["#009e73", "#000000"],
  ["#cc79a7", "#000000"], ["#56b4e9", "#000000"], ["#d55e00", "#000000"],
];
const BASE_COLOUR = ["var(--base)", "#000000"];
const colour = (s) => (s === null ? BASE_COLOUR : COLOURS[s % COLOURS.length]);
const chip = (s) => node("span", { class: "chip", style: `background:${colour(s)[0]}` });

// --- state ------------------------------------------------------------------------------------

const FIVE_ROWS = {
  ids: "2, 0, -1, 2, 0", popularity: "", h_in: 4096, r: 16, h_out: 4096, device: "A100",
  kernel: "punica_sgmv_shrink", release: "1.1.0", max_loras: 8, max_lora_chunk_size: 16,
};
const STORIES = [
  ["Five rows", FIVE_ROWS,
    "Five rows, two adapters, one row of the base model alone. Punica knows no base-only rows: they stay out of its launch."],
  ["Why [1, 132] hung", { ...FIVE_ROWS, ids: "1*50, 0, 1*82", release: "1.0.0" },
    "Segments of 1 and 132 rows, in Punica before 1.1.0. Step through the blocks’ time line below, and watch barrier 2."],
  ["…and its fix", { ...FIVE_ROWS, ids: "1*50, 0, 1*82", release: "1.1.0" },
    "Since 1.1.0 every block passes as many barriers as the longest segment needs. A block whose rows are done comes to them with empty hands."],
  ["The split-K cliff", { ...FIVE_ROWS, popularity: "distinct", n: 28 },
    "With 27 segments all chunks of K fit the A100 at once. The 28th makes the launch drop its split of K: one block per segment now sums all 4,096 products, and most SMs stand idle."],
  ["A race on tmp", { ...FIVE_ROWS, popularity: "identical", n: 130 },
    "Beyond 64 rows a block takes several steps. It may write its next partial sums to tmp while another still reads the last ones."],
  ["Blocks with nothing to do", { ...FIVE_ROWS, popularity: "skewed", n: 64, kernel: "vllm_v1_shrink", max_loras: 16 },
    "vLLM lays out the grid for the worst case, as if each slot might hold all rows, and lets the surplus blocks leave at once. At 4,096 products 48 of its 64 splits of K multiply zeros."],
  ["Why distinct hurts", { ...FIVE_ROWS, popularity: "distinct", n: 64, h_in: 16, kernel: "punica_cutlass_expand" },
    "64 rows, 64 adapters: every row brings a weight matrix of its own, and each tile of 32 rows holds one."],
];

let state = null; // the controls' values, ids as a list
let shown = null; // what the panels show: launch, figures and what follows
let before = null; // the same, of the last change
let moment = 0;
let playing = null; // the timer that steps
let soon = null; // the timer after which a change is announced
let scale = null; // of the time line: time -> x, and its right end

function controls_read() {
  const problems = [];
  const next = {};
  for (const name of CHOICES) next[name] = $(name).value;
  for (const name of COUNTS) {
    const input = $(name);
    next[name] = Number(input.value);
    if (!input.value || !input.checkValidity()) {
      problems.push(`${name}: expected a whole number from ${input.min} to ${number(Number(input.max))}, got “${input.value}”.`);
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
  soon = setTimeout(() => { $("announcement").textContent = announced(); }, 500);
}

const announced = () =>
  `${$("verdict-title").textContent} ${share(shown.figures.useful_lanes, shown.figures.lanes)} of the lanes are useful.`;

function draw(moving) {
  draw_verdict();
  draw_segments(moving);
  draw_tiles();
  draw_time();
  draw_roof();
  draw_bytes();
  draw_figures();
}

// A panel's sentence on this batch; the gist of it for the batch before, where that was another.
function now(id, gist, rest = () => "") {
  const last = before && gist(before) !== gist(shown) ? ` Before: ${gist(before)}.` : "";
  $(id).replaceChildren(`${gist(shown)}${rest(shown)}.`, node("span", { class: "before" }, last));
}

// --- verdict ----------------------------------------------------------------------------------

function verdict({ launch, figures: f }) {
  if (launch.unsupported.length) return ["fails", "There is no such kernel."];
  if (f.deadlock) return ["fails", "This launch hangs."];
  if (!f.blocks) return ["runs", "Nothing is launched: no row has an adapter."];
  if (!f.capacity) return ["fails", `No block fits an SM of ${f.device}.`];
  if (f.race) return ["warns", "This launch runs, with a race."];
  if (f.faults.length) return ["fails", "This launch runs, and goes wrong."];
  if (launch.kernel === "punica_sgmv_shrink" && !f.cooperative) {
    return ["warns", "This launch runs, but K is no longer split."];
  }
  return ["runs", "This launch runs."];
}

function draw_verdict() {
  const { launch, figures: f } = shown;
  const [tone, title] = verdict(shown);
  const story = STORIES[[...$("stories").children].findIndex((b) => b.getAttribute("aria-pressed") === "true")];
  const lines = [];
  if (story) lines.push(node("p", {}, story[2]));
  if (f.deadlock) lines.push(...why_it_hangs(launch));
  else if (f.faults.length) lines.push(node("ul", {}, ...f.faults.map((fault) => node("li", {}, fault))));
  if (launch.kernel === "punica_sgmv_shrink" && f.blocks && !launch.unsupported.length) {
    const chunks = ceil_div(launch.k, CHUNK);
    lines.push(node("p", {}, `${count(chunks, "chunk")} of K × ${count(f.S, "segment")} = ` +
      `${count(chunks * f.S, "block")}; ${f.device} holds ${number(f.capacity)} at once, so K is split for up to ` +
      `${count(f.split_k_segments, "segment")}.`));
    if (f.shared_memory > WITHOUT_OPT_IN) {
      lines.push(node("p", { class: "help" }, `A block takes ${number(f.shared_memory)} bytes of shared memory here. ` +
        "Punica opts in to more than 48 KiB only after it has asked how many blocks fit; where CUDA then answers none, K is not split and nothing hangs."));
    }
  } else if (f.blocks) {
    lines.push(node("p", {}, `${count(f.blocks, "block")} of ${f.threads} threads` +
      (f.early_exits ? `, ${number(f.early_exits)} of which find nothing to do` : "") +
      `; ${f.device} holds ${number(f.capacity)} at once: ${count(f.waves, "wave")}.` +
      (f.deterministic ? "" : " Atomic additions come in any order: the last bits differ from run to run.")));
  }
  $("verdict").className = `verdict ${tone}`;
  $("verdict-title").textContent = title;
  $("verdict-body").replaceChildren(...lines);
}

function why_it_hangs(launch) {
  const stuck = deadlock(launch);
  const by_barriers = new Map();
  launch.work.forEach((w, s) => by_barriers.set(w.barriers, [...(by_barriers.get(w.barriers) ?? []), s]));
  const reasons = [...by_barriers].sort(([a], [b]) => a - b).map(([barriers, members]) => {
    const few = members.slice(0, 4).map((s) => node("span", {}, chip(s), `${adapter(launch.work[s].adapter_id)}, ${count(launch.work[s].rows, "row")}`));
    const listed = few.flatMap((each, i) => (i ? ["; ", each] : [each]));
    return node("li", {}, ...listed, members.length > 4 ? `; and ${members.length - 4} more` : "",
      `: ${count(barriers, "step")} of ${STEP_ROWS} rows, so ${members.length === 1 ? "its" : "each one’s"} blocks come to the barrier `,
      node("b", {}, barriers === 1 ? "once" : `${barriers} times`), ".");
  });
  return [
    node("p", {}, "After each step the blocks meet at a barrier of the whole grid, to add up their chunks of K. It opens when ",
      node("b", {}, `all ${blocks_of(launch)} blocks`), " stand at it."),
    node("ul", {}, ...reasons),
    node("p", {}, "At barrier ", node("b", {}, stuck.barrier), `, ${count(stuck.waiting.length, "block")} wait for ` +
      `${count(stuck.returned.length, "block")} that returned after barrier ${stuck.barrier - 1}. These never come, nothing on the GPU notices, and the call never ends.`),
    node("p", {}, node("code", {}, told(stuck))),
    node("p", {}, node("button", { type: "button", click: () => { controls_write({ release: "1.1.0" }); update(); $("release").focus(); } },
      "Run it with release 1.1.0")),
  ];
}

// --- rows into segments -----------------------------------------------------------------------

const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

function draw_segments(moving) {
  const { segments } = shown;
  const { n, S, rows, seq_start, adapter_ids } = segments;
  const base = segments.S - shown.launch.work.length;
  const of_segment = (s) => (s < base ? null : s - base);
  now("segments-now", ({ segments: at }) => `${count(at.n, "row")} in ${count(at.S, "segment")}`,
    ({ segments: at }) => `: seq_start = [${written_some(at.seq_start)}]`);
  const figure = $("segments");
  const width = figure.clientWidth;
  const cell = width / n;
  const gap = cell > 6 ? 1 : 0;
  const [top, tall, apart] = [20, 26, 52];
  const low = top + tall + apart;
  const came = [];
  const links = [];
  const sorted = [];
  const under = [];
  for (let s = 0; s < S; s += 1) {
    const [fill, ink] = colour(of_segment(s));
    let threads = "";
    for (let p = seq_start[s]; p < seq_start[s + 1]; p += 1) {
      const row = rows[p];
      const from = (row + 0.5) * cell;
      const to = (p + 0.5) * cell;
      came.push(box(row * cell, top, cell - gap, tall, { fill }));
      if (cell >= 18) came.push(label(from, top + 18, adapter_ids[s], { "text-anchor": "middle", style: `fill:${ink}` }));
      threads += `M${from.toFixed(1)} ${top + tall + 2}C${from.toFixed(1)} ${top + tall + apart / 2} ${to.toFixed(1)} ${low - apart / 2} ${to.toFixed(1)} ${low - 2}`;
      const place = shape("g", {}, box(p * cell, low, cell - gap, tall, { fill }),
        cell >= 24 ? label(to, low + 18, row, { "text-anchor": "middle", style: `fill:${ink}` }) : null);
      if (moving && n <= 256 && !still()) {
        place.animate([{ transform: `translate(${(row - p) * cell}px, ${-(tall + apart)}px)` }, { transform: "none" }],
          { duration: 600, easing: "ease-in-out" });
      }
      sorted.push(place);
    }
    links.push(shape("path", { d: threads, fill: "none", stroke: fill, "stroke-width": Math.max(0.6, Math.min(2.5, cell / 4)), opacity: 0.65 }));
  }
  let free = 0;
  for (let s = 0; s <= S; s += 1) {
    const x = seq_start[s] * cell;
    const wide = 8 * String(seq_start[s]).length + 6;
    under.push(line(x, low + tall, x, low + tall + 7, "axis"));
    const from = Math.max(free, x - wide / 2); // a little aside, rather than not at all
    if (s === S) under.push(label(width, low + tall + 20, n, { "text-anchor": "end" }));
    else if (from - x < 12 && from + wide < width - 8 * String(n).length) {
      under.push(label(from, low + tall + 20, seq_start[s]));
      free = from + wide;
    }
    if (s === S) break;
    const span = (seq_start[s + 1] - seq_start[s]) * cell;
    const names = [`${adapter(adapter_ids[s])}, ${count(seq_start[s + 1] - seq_start[s], "row")}`, adapter(adapter_ids[s]), `${adapter_ids[s]}`];
    const name = names.find((text) => text.length * 6.6 + 6 < span);
    if (name) under.push(label(x + span / 2, low + tall + 38, name, { "text-anchor": "middle", class: "strong" }));
  }
  const told_rows = `${n} rows sorted into ${S} segments. seq_start: ${written_some(seq_start)}.`;
  picture(figure, low + tall + 66, told_rows,
    label(0, 12, cell >= 18 ? "x, rows as they came: adapter id of each" : "x, rows as they came", { class: "quiet" }),
    ...came, ...links,
    ...sorted, ...under,
    label(0, low + tall + 58, `sorted${cell >= 24 ? ": row of x at each position" : ""}; below it seq_start, and the segments`, { class: "quiet" }));
  $("segments-table").replaceChildren(table(["segment", "adapter", "rows", "offsets"], range(S).map((s) => [
    node("span", {}, chip(of_segment(s)), String(s)), adapter(adapter_ids[s]),
    seq_start[s + 1] - seq_start[s], `${seq_start[s]}:${seq_start[s + 1]}`])));
}

const written_some = (values, largest = 16) =>
  [...values.slice(0, largest), ...(values.length > largest ? ["…"] : [])].join(", ");

// --- tiles ------------------------------------------------------------------------------------

function draw_tiles() {
  const { launch, figures: f } = shown;
  const { tile } = launch;
  now("tiles-now", ({ figures: at }) => `${share(at.useful_lanes, at.lanes)} of the lanes are useful`,
    ({ figures: at, launch: of }) => `: ${number(at.rows)} of ${number(at.row_slots)} rows × ` +
      `${number(of.width)} of ${number(of.tile.column_slots)} columns × ${number(of.k)} of ${number(of.tile.k_slots)} products`);
  const figure = $("tiles");
  const width = figure.clientWidth;
  const children = [];
  const tiles = launch.work.flatMap((w, s) => range(w.row_slots / tile.rows).map((i) =>
    ({ s, id: w.adapter_id, used: Math.min(tile.rows, w.rows - i * tile.rows) })));
  const small = tile.rows === 1;
  const [wide, tall, pitch, step] = small ? [12, 12, 15, 16] : [46, 52, 54, 88];
  const per_line = Math.max(1, Math.floor((width + 4) / pitch));
  const drawn = tiles.slice(0, per_line * (small ? 10 : 4));
  children.push(label(0, 14, `Rows: ${count(tiles.length, "tile")} of ${count(tile.rows, "row")}, ` +
    `${number(f.rows)} of ${number(f.row_slots)} places taken`, { class: "strong" }));
  let y = 26;
  drawn.forEach((each, i) => {
    const x = (i % per_line) * pitch;
    const at = y + Math.floor(i / per_line) * step;
    const filled_to = Math.max(1.5, (tall * each.used) / tile.rows);
    children.push(box(x, at, wide, tall, { class: "room" }), box(x, at, wide, tall, { class: "waste" }),
      box(x, at, wide, filled_to, { fill: colour(each.s)[0] }));
    if (!small) {
      children.push(label(x + wide / 2, at + tall + 14, `id ${each.id}`, { "text-anchor": "middle", class: "strong" }),
        label(x + wide / 2, at + tall + 28, `${each.used}/${tile.rows}`, { "text-anchor": "middle", class: "quiet" }));
    }
  });
  y += Math.ceil(drawn.length / per_line) * step + (small ? 6 : 0);
  if (drawn.length < tiles.length) {
    children.push(label(0, y + 10, `… and ${count(tiles.length - drawn.length, "more tile", "more tiles")}`, { class: "quiet" }));
    y += 24;
  }
  const splits = tile.splits > 1 ? `, ${tile.splits} splits` : "";
  for (const [name, used, slots, pieces] of [
    [`Columns of ${launch.shrinks ? "v" : "y"}: ${number(launch.width)} of ${number(tile.column_slots)}, ${count(tile.columns, "tile")}`, launch.width, tile.column_slots, tile.columns],
    [`Products per sum (K): ${number(launch.k)} of ${number(tile.k_slots)}${splits}`, launch.k, tile.k_slots, tile.splits],
  ]) {
    children.push(label(0, y + 16, name, { class: "strong" }), box(0, y + 24, width, 18, { class: "room" }),
      box(0, y + 24, width, 18, { class: "waste" }),
      box(0, y + 24, (width * used) / slots, 18, { class: "used" }));
    const pitch_of = width / pieces;
    if (pieces > 1 && pitch_of >= 4) {
      for (let i = 1; i < pieces; i += 1) children.push(line(i * pitch_of, y + 24, i * pitch_of, y + 42, "cut"));
    }
    y += 54;
  }
  if (f.early_exits) {
    children.push(label(0, y + 14, `${number(f.early_exits)} of ${count(f.blocks, "block")} hold no tile: they leave at once`, { class: "quiet" }));
    y += 24;
  }
  picture(figure, y, `${tiles.length} tiles of ${tile.rows} rows hold ${f.rows} rows; ${share(f.useful_lanes, f.lanes)} of all lanes are useful.`, ...children);
}

// --- thread blocks over time ------------------------------------------------------------------

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
  now("time-now", ({ figures: of, timeline: line_of }) => (line_of.stuck
    ? `${count(of.blocks, "block")}, stuck at barrier ${line_of.stuck.barrier} of ${of.barriers}`
    : `${count(of.blocks, "block")} in ${count(of.waves, "wave")}${of.cooperative ? `, ${count(of.barriers, "barrier")}` : ""}`),
  ({ figures: of, launch: { device } }) => `, on ${Math.min(of.blocks, device.sms)} of ${device.sms} SMs`);
  const figure = $("time");
  const slider = $("moment");
  slider.max = Math.max(at.moments.length - 1, 0);
  for (const id of ["first", "back", "next", "play", "moment"]) $(id).disabled = at.moments.length < 2;
  if (!at.bars.length) {
    figure.replaceChildren();
    $("time-legend").replaceChildren();
    $("moment-text").textContent = f.blocks ? "No block fits an SM, so nothing is drawn." : "No blocks, nothing to draw.";
    return;
  }
  const used_sms = Math.min(launch.device.sms, f.blocks);
  const per_sm = Math.ceil(Math.min(at.places, f.blocks) / launch.device.sms);
  const sms = Math.min(used_sms, Math.max(4, Math.floor(108 / per_sm)));
  const tall = Math.max(3, Math.min(14, Math.floor(400 / (sms * per_sm))));
  const gap = tall > 3 ? 1 : 0;
  const [left, top] = [52, 22];
  const right = figure.clientWidth - 8;
  const x = (time) => left + ((right - left) * time) / at.end;
  const y = (place) => top + ((place % launch.device.sms) * per_sm + Math.floor(place / launch.device.sms)) * tall;
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
  const children = [...paths.values()].map(({ kind, s, d }) => shape("path", { d, ...KINDS[kind][1](s) }));
  const every = Math.max(1, Math.ceil(16 / (per_sm * tall)));
  for (let sm = 0; sm < sms; sm += every) {
    children.push(label(left - 6, y(sm) + Math.min(per_sm * tall, 14) - 3, `SM ${sm}`, { "text-anchor": "end", class: "quiet" }));
  }
  for (const { kind, time, barrier, ended } of at.moments) {
    if (kind !== "arrive") continue;
    children.push(line(x(time), top - 4, x(time), low, ended ? "barrier shut" : "barrier"),
      label(x(time), 12, figure.clientWidth > 500 ? `barrier ${barrier}` : barrier, { "text-anchor": "middle", class: ended ? "alarm" : "quiet" }));
  }
  if (at.stuck) children.push(label(right, 12, "∞", { "text-anchor": "end", class: "alarm" }));
  const rest = launch.device.sms - sms;
  const others = sms < used_sms ? `SMs ${sms} to ${used_sms - 1} are not drawn: they fare alike.`
    : rest ? `SMs ${sms} to ${launch.device.sms - 1} are idle.` : "All SMs are drawn.";
  if (!at.stuck) children.push(label(right, low + 18, `${number(Math.round(at.end))} steps`, { "text-anchor": "end", class: "quiet" }));
  children.push(label(left, low + 18, others, { class: "quiet" }),
    box(0, top - 2, 0, low - top + 4, { class: "veil", id: "veil" }),
    shape("line", { class: "cursor", id: "cursor", y1: top - 6, y2: low + 2 }));
  scale = { x, right };
  picture(figure, low + 26, `Thread blocks of ${kernel_name(launch.kernel)} over time: ${$("time-now").textContent}`, ...children);
  const kinds = Object.keys(KINDS).filter((kind) => at.bars.some((bar) => bar.kind === kind));
  $("time-legend").replaceChildren(...kinds.map((kind) => node("li", {},
    shape("svg", { viewBox: "0 0 18 12", "aria-hidden": "true" }, box(0, 0, 18, 12, KINDS[kind][1](0))), KINDS[kind][0])));
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
    return `Step ${here.barrier} is summed. ${number(here.here)} of ${count(here.blocks, "block")} stand at barrier ${here.barrier}` +
      (idle ? `, ${number(idle)} of them with no rows left` : "") +
      (here.ended ? `. The other ${number(here.ended)} returned after barrier ${here.barrier - 1}.` : ": it opens.");
  }
  if (here.kind === "open") {
    return `The blocks add the chunks of K from tmp, and block 0 of each segment stores.` +
      (here.returning === here.blocks ? " All blocks return: the launch is done."
        : here.returning ? ` ${count(here.returning, "block")} return; their segment has no more rows.` : "");
  }
  if (here.kind === "stuck") {
    return `Nothing moves any more. ${count(here.waiting, "block")} wait at barrier ${here.barrier} for ${number(here.returned)} that will not come.`;
  }
  const { running, ended, to_come } = progress(at, f.blocks, here.time);
  if (ended === f.blocks) return `All ${number(ended)} blocks are done.`;
  return `${count(running, "block")} in ${count(at.places, "place")}, ${number(ended)} done, ${number(to_come)} yet to find a place.` +
    (launch.kernel === "punica_cutlass_expand" ? ` ${f.early_exits ? `${f.early_exits} blocks had no tile to take.` : "Each walks from tile to tile."}` : "");
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

// --- roofline ---------------------------------------------------------------------------------

function draw_roof() {
  const { launch, figures: f } = shown;
  const { device, x_width, k, width: out } = launch;
  const at = (rows, segments) => traffic(rows, segments, x_width, k, out).intensity;
  const ridge = device.fp16_peak / device.bandwidth;
  now("roof-now", ({ figures: of }) => `${significant(of.intensity)} FLOP per byte`,
    ({ figures: of, launch: { device: its } }) => `: at best ${share(Math.min(of.intensity, ridge), ridge)} ` +
      `of the peak of ${its.name}, and at least ${significant(of.roofline_us)} µs`);
  const figure = $("roof");
  const wide = figure.clientWidth;
  const [left, top, tall, lane] = [78, 12, 220, 24];
  const right = wide - 10;
  const [x0, x1, y0, y1] = [-1, 3, 10, 15.3]; // powers of ten
  const x = (value) => left + ((Math.log10(value) - x0) / (x1 - x0)) * (right - left);
  const y = (value) => top + tall - ((Math.log10(value) - y0) / (y1 - y0)) * tall;
  const roof = (intensity) => Math.min(device.fp16_peak, intensity * device.bandwidth);
  const children = [];
  for (let power = x0; power <= x1; power += 1) {
    children.push(line(x(10 ** power), top, x(10 ** power), top + tall + 4 * lane + 16, "grid"),
      label(x(10 ** power), top + tall + 4 * lane + 32, 10 ** power, { "text-anchor": power === x1 ? "end" : "middle", class: "quiet" }));
  }
  for (const [power, name] of [[10, "10 G"], [12, "1 T"], [14, "100 T"]]) {
    children.push(line(left, y(10 ** power), right, y(10 ** power), "grid"),
      label(left - 6, y(10 ** power) + 4, name, { "text-anchor": "end", class: "quiet" }));
  }
  children.push(
    label(right, top + tall + 4 * lane + 48, "FLOP per byte", { "text-anchor": "end", class: "quiet" }),
    label(left + 6, top + 10, "FLOP/s", { class: "quiet" }),
    line(x(ridge), y(device.fp16_peak), x(ridge), top + tall, "ridge"),
    label(x(ridge) - 4, top + tall - 6, wide > 500 ? `ridge at ${significant(ridge)}` : significant(ridge), { "text-anchor": "end", class: "quiet" }),
    shape("path", { class: "roofline", d: `M${x(0.1)} ${y(roof(0.1))}L${x(ridge)} ${y(device.fp16_peak)}H${right}` }),
    label(right, y(device.fp16_peak) - 6, `${device.name}: ${significant(device.fp16_peak / 1e12)} TFLOP/s`, { "text-anchor": "end", class: "quiet" }));
  POPULARITIES.forEach((kind, i) => {
    const level = top + tall + 8 + lane * (i + 0.75);
    children.push(label(left - 6, level + 4, kind, { "text-anchor": "end", class: state.popularity === kind ? "strong" : "quiet" }));
    const sizes = [1, 2, 4, 8, 16, 32, 64];
    const points = sizes.map((n) => x(at(n, popularity(kind, n).length)));
    children.push(line(points[0], level, points[points.length - 1], level, "axis"));
    points.forEach((cx) => children.push(shape("circle", { cx, cy: level, r: 3, class: "dot" })));
    const here = x(at(f.rows || 1, popularity(kind, f.rows || 1).length));
    children.push(shape("circle", { cx: here, cy: level, r: 5, class: "dot at" },
      shape("title", {}, `${kind}, ${f.rows} rows: ${significant(at(f.rows || 1, popularity(kind, f.rows || 1).length))} FLOP per byte`)));
  });
  if (f.rows) {
    const [cx, cy] = [x(f.intensity), y(roof(f.intensity))];
    const side = cx > (left + right) / 2 ? ["end", -12] : ["start", 12];
    children.push(line(cx, cy, cx, top + tall + 4 * lane + 16, "drop"),
      shape("circle", { cx: 0, cy: 0, r: 8, class: "here moves", transform: `translate(${cx} ${cy})` }),
      label(cx + side[1], cy + (side[0] === "end" ? -6 : 18), `this batch: ${significant(f.intensity)}`, { "text-anchor": side[0], class: "strong" }));
  }
  picture(figure, top + tall + 4 * lane + 56, `Roofline of ${device.name}, ridge at ${significant(ridge)} FLOP per byte. This batch: ${significant(f.intensity)}. ` +
    POPULARITIES.map((kind) => `${kind} with as many rows: ${significant(at(f.rows || 1, popularity(kind, f.rows || 1).length))}`).join(", ") + ".", ...children);
}

// --- bytes ------------------------------------------------------------------------------------

function draw_bytes() {
  const { segments, values, launch, figures: f } = shown;
  const all = Object.keys(KERNELS).map((kernel) => KERNELS[kernel](segments, values))
    .filter((each) => each.shrinks === launch.shrinks);
  now("bytes-now", ({ figures: of }) => `${kernel_name(of.kernel)}: ${bytes(of.bytes_read)} read, ${bytes(of.bytes_written)} written`,
    ({ figures: of }) => `, ${significant((of.bytes_read + of.bytes_written) / of.io_bytes || 0)} times every operand once`);
  const figure = $("bytes");
  const width = figure.clientWidth;
  const largest = most([f.io_bytes, ...all.map((each) => each.bytes_read + each.bytes_written)]);
  const x = (value) => (largest ? (width * value) / largest : 0);
  const children = [];
  all.forEach((each, i) => {
    const y = 20 + 46 * i;
    const moved = each.bytes_read + each.bytes_written;
    const missing = each.unsupported.length ? " (no such kernel)" : "";
    children.push(
      label(0, y, `${kernel_name(each.kernel)}${missing}`, { class: each.kernel === launch.kernel ? "strong" : "" }),
      label(width, y, `${bytes(moved)}, ${significant(moved / f.io_bytes || 0)}×`, { "text-anchor": "end", class: each.kernel === launch.kernel ? "strong" : "quiet" }),
      box(0, y + 6, x(each.bytes_read), 16, { class: "read" }),
      box(x(each.bytes_read), y + 6, x(each.bytes_written), 16, { class: "written" }),
      line(x(f.io_bytes), y + 3, x(f.io_bytes), y + 25, "once"));
  });
  const low = 20 + 46 * all.length;
  children.push(label(Math.min(x(f.io_bytes), width - 260), low, `once: ${bytes(f.io_bytes)}`, { class: "quiet" }),
    box(width - 128, low - 9, 12, 10, { class: "read" }), label(width - 112, low, "read", { class: "quiet" }),
    box(width - 72, low - 9, 12, 10, { class: "written" }), label(width - 56, low, "written", { class: "quiet" }));
  picture(figure, low + 8, all.map((each) => `${kernel_name(each.kernel)}: ${bytes(each.bytes_read)} read, ${bytes(each.bytes_written)} written`).join("; ") +
    `. Every operand once: ${bytes(f.io_bytes)}.`, ...children);
  draw_layouts();
}

const ENGINES = { sgmv: "sgmv Segments", punica: "Punica", vllm_v1: "vLLM V1", sglang: "SGLang csgmv", lorax: "LoRAX" };

function draw_layouts() {
  const { segments, values } = shown;
  const lines = Object.entries(layouts(segments, values.ids, values)).flatMap(([engine, fields]) =>
    Object.entries(fields).map(([name, [dtype, held]], i) => [
      i ? "" : ENGINES[engine], node("code", {}, name), dtype, BYTES[dtype] * held.length,
      node("code", {}, `[${written_some(held, 12)}]`)]));
  $("layouts").replaceChildren(table(["engine", "field", "type", "bytes", "values"], lines));
}

function draw_figures() {
  $("figures").replaceChildren(table(["figure", "value"], Object.entries(shown.figures).map(([name, value]) => [
    node("code", {}, name),
    Array.isArray(value) ? `[${written_some(value)}]` : typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : value])));
}

// --- start ------------------------------------------------------------------------------------

function start() {
  $("device").append(...DATA.devices.map(({ name }) => node("option", {}, name)));
  for (const [title, values] of STORIES) {
    const button = node("button", { type: "button", "aria-pressed": "false", click: () => { controls_write(values); update(); } }, title);
    const ids = values.popularity ? mixed(values.popularity, values.n) : parsed(values.ids);
    button.dataset.address = address(in_order({ ...values, n: ids.length, ids }));
    $("stories").append(button);
  }
  const kept = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  controls_write({ ...FIVE_ROWS, ...DATA.start });
  controls_write(kept);
  $("controls").addEventListener("input", changed);
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("first").addEventListener("click", () => { pause(); go(0); });
  $("back").addEventListener("click", () => { pause(); go(moment - 1); });
  $("next").addEventListener("click", () => { pause(); go(moment + 1); });
  $("play").addEventListener("click", play);
  $("moment").addEventListener("input", () => { pause(); go(Number($("moment").value)); });
  addEventListener("resize", () => draw(false));
  update();
}

// The order in which controls_read gives the values, so that addresses can be compared.
function in_order(values) {
  return Object.fromEntries([...CHOICES, ...COUNTS, "ids"].map((name) => [name, values[name]]));
}

start();
