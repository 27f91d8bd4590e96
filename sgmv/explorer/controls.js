// The controls: what they hold, whether it can be shown, and how they change each other.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const DEVICES = Object.fromEntries(DATA.devices.map((device) => [device.name, device]));
const MOST_ROWS = DATA.most.n;
const COUNTS = ["n", "h_in", "r", "h_out", "max_loras", "max_lora_chunk_size", "experts", "top_k"];
const CHOICES = ["popularity", "kernel", "release", "device", "versus"];

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
      throw new Error(`Expected an id such as 7, -1 or 0*132, got “${part}”.`);
    }
    const times = found[2] === undefined ? 1 : Number(found[2]);
    if (ids.length + times > MOST_ROWS) {
      throw new Error(`Expected at most ${number(MOST_ROWS)} rows, got more.`);
    }
    for (let i = 0; i < times; i += 1) ids.push(Number(found[1]));
  }
  if (!ids.length) throw new Error("Expected at least one row, got none.");
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

// Tells at the field what is wrong with it; returns whether nothing is.
function told_at(name, problem) {
  $(name).setAttribute("aria-invalid", String(problem !== ""));
  $(`${name}-problem`).textContent = problem;
  return problem === "";
}

// A control that the kernel hides may hold anything: it gets back its last value.
function counted(name) {
  const input = $(name);
  if (input.closest("[hidden]") && !input.checkValidity()) put(name, (state ?? FIVE_ROWS)[name]);
  const right = input.value && input.checkValidity();
  return told_at(
    name,
    right
      ? ""
      : `${name}: expected a whole number from ${input.min} to ${number(Number(input.max))}, got “${input.value}”.`,
  );
}

// The controls' values, ids as a list; null where one cannot be shown.
function controls_read() {
  const next = {};
  for (const name of CHOICES) next[name] = $(name).value;
  for (const name of COUNTS) next[name] = $(name).valueAsNumber;
  let right = COUNTS.map(counted).every(Boolean);
  try {
    next.ids = parsed($("ids").value);
    told_at("ids", "");
  } catch (error) {
    right = told_at("ids", error.message);
  }
  return right ? next : null;
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
  const kind = $("popularity").value;
  if (!kind && values.ids !== undefined) put("n", rows_typed(values.ids));
  if (kind && $("n").value && $("n").checkValidity()) {
    put("ids", written(mixed(kind, $("n").valueAsNumber)));
  }
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
  const [kind, n] = [$("popularity").value, $("n").valueAsNumber];
  const sized = $("n").value && $("n").checkValidity();
  if (name === "ids") controls_write({ popularity: "", ids: $("ids").value });
  else if (kind && sized) controls_write({ popularity: kind, n });
  else if (name === "n" && sized) controls_write({ popularity: "", ids: repeated(state.ids, n) });
  else controls_write({});
  update();
}
