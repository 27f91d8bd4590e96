// The controls: which records and cases are chosen, and which choices there are.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const GRIDS = DATA.records
  .filter(({ grid }) => grid)
  .map((record) => ({ ...record, grid: unpacked(record.grid) }));
const LAYER = ({ h_in, h_out }) => `${h_in}>${h_out}`;
// The axes of the grid: of a case its value, and in words.
const AXES = {
  layer: [LAYER, (c) => `${c.h_in} → ${c.h_out}: ${c.names.join(", ")}`],
  rank: [(c) => String(c.rank), (c) => String(c.rank)],
  rows: [(c) => String(c.rows), (c) => number(c.rows)],
  popularity: [(c) => c.popularity, (c) => c.popularity],
  dtype: [(c) => c.dtype, (c) => c.dtype],
};
const CHOICES = ["machine", "a", "threads", ...Object.keys(AXES), "b"];
const TABLES = ["sort", "more", "beside_sort", "beside_more"];
const NONE = "nothing";

const of_machine = (records) =>
  records.filter(({ machine }) => state.machine === "" || String(machine) === state.machine);

// The cases that pass the filters, but for those named.
const passing = (cases, but = []) =>
  cases.filter((each) =>
    Object.entries(AXES).every(
      ([name, [value]]) => but.includes(name) || !state[name] || value(each) === state[name],
    ),
  );

// Offers these [value, text], and takes the value chosen if it is among them.
function offer(name, options, otherwise) {
  const wanted = options.some(([value]) => value === state[name]) ? state[name] : otherwise;
  const control = $(name);
  control.replaceChildren(...options.map(([value, text]) => node("option", { value }, text)));
  control.value = wanted;
  state[name] = wanted;
}

function offer_all() {
  offer(
    "machine",
    [
      ["", "all machines"],
      ...DATA.machines.map((_, place) => [String(place), machine_name(place)]),
    ],
    "",
  );
  const records = of_machine(GRIDS);
  if (!records.length) return null;
  const largest = records.reduce((a, b) => (b.grid.cases.length > a.grid.cases.length ? b : a));
  const named = ({ name, grid }) => [name, `${name}, ${count(grid.cases.length, "case")}`];
  offer("a", records.map(named), largest.name);
  const record = GRIDS.find(({ name }) => name === state.a);
  const { cases, threads } = record.grid;
  offer(
    "threads",
    [
      ["", "all that the record has"],
      ...threads.map((each) => [String(each), count(each, "thread")]),
    ],
    "",
  );
  for (const [name, [value, text]] of Object.entries(AXES)) {
    const found = new Map(cases.map((each) => [value(each), text(each)]));
    const by_number = (a, b) => parseFloat(a[0]) - parseFloat(b[0]) || 0;
    const sorted =
      name === "popularity"
        ? popularities_of(cases).map((kind) => [kind, kind])
        : [...found].sort(by_number);
    offer(name, [["", "all"], ...sorted], "");
  }
  const others = GRIDS.filter(({ name }) => name !== state.a);
  const shares = ({ grid }) => in_both(cases, grid.cases).length > 0;
  offer("b", [[NONE, NONE], ...others.map(named)], others.find(shares)?.name ?? NONE);
  return record;
}
