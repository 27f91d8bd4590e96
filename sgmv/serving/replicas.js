// Outcomes of a simulation of replicas: a table, and three drawings of the one that is chosen.
"use strict";

const DATA = JSON.parse($("data").textContent);
const BASE_ONLY = -1; // what nodes.js calls the base model
// Okabe and Ito's colours, a dash each, by placement.
const LOOKS = [
  ["#0072B2", null],
  ["#D55E00", "7 3"],
  ["#009E73", "2 3"],
  ["#CC79A7", "8 3 2 3"],
  ["#8a5a00", "12 4"],
];
const PLACEMENTS = [...new Set(DATA.outcomes.map(({ figures }) => figures.placement))];
const look_of = (outcome) => LOOKS[PLACEMENTS.indexOf(outcome.figures.placement) % LOOKS.length];
const MARGIN = { left: 64, right: 16, top: 10 };
const parts_of = (figure) => (figure.clientWidth < 560 ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1]);

let chosen = 0;

const name_of = ({ figures }) =>
  `${count(figures.replicas, "replica")}, ${figures.placement}, ${count(figures.slots, "slot")}, ` +
  figures.policy;
function seconds(value) {
  if (value === 0) return "0";
  const [size, unit] = value >= 1 ? [1, "s"] : value >= 1e-3 ? [1e-3, "ms"] : [1e-6, "µs"];
  return `${significant(value / size)} ${unit}`;
}
function shown_value(value, scale) {
  if (value === null) return "–";
  if (typeof value === "string") return value;
  return significant(value / scale);
}

// From the smallest waiting time above 0 to the largest; 0 lies on the floor.
function log_scale_of(values, floor, top) {
  const known = values.filter((value) => value > 0);
  const low = 10 ** Math.floor(Math.log10(Math.min(...known, 1)));
  const high = 10 ** Math.ceil(Math.log10(Math.max(...known, low * 10)));
  const y = (value) =>
    floor - (Math.log10(Math.max(value, low) / low) / Math.log10(high / low)) * (floor - top);
  const ticks = [];
  for (let tick = low; tick <= high * 1.001; tick *= 10) ticks.push(tick);
  return { y, ticks };
}

function show_outcomes() {
  const heads = DATA.columns.map(([head, key]) => {
    const kind = typeof DATA.outcomes[0].figures[key] === "string" ? {} : { class: "number" };
    return node("th", { scope: "col", ...kind }, head);
  });
  const lines = DATA.outcomes.map((outcome, i) => {
    const choose = () => {
      chosen = i;
      location.hash = `outcome=${i}`;
      show();
    };
    const cells = DATA.columns.map(([, key, scale]) => {
      const value = outcome.figures[key];
      const kind = typeof value === "string" ? {} : { class: "number" };
      return node("td", kind, shown_value(value, scale));
    });
    const pressed = String(i === chosen);
    const button = node("button", { type: "button", click: choose, "aria-pressed": pressed }, "show");
    return node("tr", { "aria-selected": pressed }, node("td", {}, button), ...cells);
  });
  const head = node("thead", {}, node("tr", {}, node("th", { scope: "col" }, ""), ...heads));
  $("outcomes").replaceChildren(node("table", {}, head, node("tbody", {}, ...lines)));
}

// Shares as equal steps towards the worst: 50, 90, 99, 99.9 %.
function show_waits() {
  const figure = $("waits");
  const [height, floor] = [300, 262];
  const right = figure.clientWidth - MARGIN.right;
  const x = (percent) =>
    MARGIN.left + (-Math.log10(1 - Math.min(percent, 99.97) / 100) / 3.5) * (right - MARGIN.left);
  const { y, ticks } = log_scale_of(DATA.outcomes.flatMap(({ waits }) => waits), floor, MARGIN.top);
  const way = ({ waits }) =>
    waits.map((value, i) => `${x(DATA.percents[i]).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
  const curve = (outcome, kind) => {
    const [colour, dash] = look_of(outcome);
    const style = `stroke:${colour}`;
    return shape(
      "path",
      { class: `curve ${kind}`, d: `M${way(outcome)}`, style, "stroke-dasharray": dash },
      shape("title", {}, name_of(outcome)),
    );
  };
  picture(
    figure,
    height,
    `Waiting times of ${count(DATA.outcomes.length, "outcome")}`,
    ...ticks.flatMap((tick) => [
      line(MARGIN.left, y(tick), right, y(tick), "grid"),
      label(MARGIN.left - 6, y(tick) + 4, seconds(tick), "quiet", "end"),
    ]),
    ...(figure.clientWidth < 560 ? [0, 90, 99, 99.9] : [0, 50, 90, 99, 99.9]).flatMap((percent) => [
      line(x(percent), MARGIN.top, x(percent), floor, "grid"),
      label(x(percent), floor + 16, `${percent} %`, "quiet", "middle"),
    ]),
    label(right, floor + 33, "of the requests", "quiet", "end"),
    ...DATA.outcomes.filter((outcome) => outcome.waits.length).map((each) => curve(each, "")),
    DATA.outcomes[chosen].waits.length ? curve(DATA.outcomes[chosen], "chosen") : null,
  );
  legend(
    "waits-legend",
    PLACEMENTS.map((placement, i) => {
      const [colour, dash] = LOOKS[i % LOOKS.length];
      const style = `stroke:${colour};stroke-width:2`;
      return [placement, shape("line", { x1: 0, y1: 6, x2: 18, y2: 6, style, "stroke-dasharray": dash })];
    }),
  );
}

function show_time(outcome) {
  const figure = $("time");
  const [height, floor, bars] = [330, 200, 290];
  const right = figure.clientWidth - MARGIN.right;
  const parts = outcome.found[0].length;
  const x = (part) => MARGIN.left + (part / parts) * (right - MARGIN.left);
  const [half, most] = outcome.over_time;
  const { y, ticks } = log_scale_of([...half, ...most].filter((v) => v !== null), floor, MARGIN.top);
  const curve = (values, colour, dash) => {
    const known = values.map((value, i) => [i + 0.5, value]).filter(([, value]) => value !== null);
    const way = known.map(([i, value]) => `${x(i).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
    const style = `stroke:${colour};stroke-width:2`;
    return known.length
      ? shape("path", { class: "curve", d: `M${way}`, style, "stroke-dasharray": dash })
      : null;
  };
  const totals = outcome.found[0].map((_, i) => outcome.found.reduce((sum, row) => sum + row[i], 0));
  const largest = Math.max(...totals, 1);
  const up = (requests) => (requests / largest) * (bars - floor - 24);
  const stacks = totals.flatMap((_, i) => {
    let at = bars;
    return outcome.found.map((row, kind) => {
      at -= up(row[i]);
      return box(x(i), at, x(1) - x(0) - 0.5, up(row[i]), { style: `fill:${FOUND[kind][1]}` });
    });
  });
  picture(
    figure,
    height,
    `Waiting time and requests over ${seconds(outcome.seconds)}`,
    ...ticks.flatMap((tick) => [
      line(MARGIN.left, y(tick), right, y(tick), "grid"),
      label(MARGIN.left - 6, y(tick) + 4, seconds(tick), "quiet", "end"),
    ]),
    curve(most, "#D55E00", null),
    curve(half, "#0072B2", "7 3"),
    ...stacks,
    shape("path", { class: "axis", d: `M${MARGIN.left} ${bars}H${right}` }),
    label(MARGIN.left - 6, bars - up(largest) + 8, number(largest), "quiet", "end"),
    label(MARGIN.left - 6, bars, "0", "quiet", "end"),
    ...parts_of(figure).map((part) =>
      label(x(part * parts), bars + 16, seconds(part * outcome.seconds), "quiet", "middle"),
    ),
    label(right, bars + 33, "of arrival", "quiet", "end"),
  );
  $("time-now").textContent =
    `${name_of(outcome)}. Above: waiting time. Below: requests in each ` +
    `${seconds(outcome.seconds / parts)}, by where their adapters were.`;
  const stroke = (colour, dash) =>
    shape("line", { x1: 0, y1: 6, x2: 18, y2: 6, style: `stroke:${colour};stroke-width:2`, "stroke-dasharray": dash });
  legend("time-legend", [
    ["99 % wait no longer", stroke("#D55E00", null)],
    ["half wait no longer", stroke("#0072B2", "7 3")],
    ...FOUND.map(([text, colour]) => [text, sample_of({ style: `fill:${colour}` })]),
  ]);
}
const FOUND = [
  ["in a slot", "#56B4E9"],
  ["in host memory", "#E69F00"],
  ["on disk", "#CC79A7"],
];

function show_served(outcome) {
  const figure = $("served");
  const parts = outcome.served[0].length;
  const each = Math.max(6, Math.min(22, 420 / outcome.served.length));
  const [left, right] = [64, figure.clientWidth - 150];
  const x = (part) => left + (part / parts) * (right - left);
  const largest = Math.max(...outcome.served.flat(), 1);
  const cells = outcome.served.flatMap((row, r) =>
    row.map((requests, i) =>
      box(x(i), r * each, x(1) - x(0) + 0.3, each - 1, {
        style: `fill:var(--accent);fill-opacity:${(requests / largest).toFixed(3)}`,
      }),
    ),
  );
  const every = Math.ceil(14 / each);
  const texts = outcome.served.flatMap((_, r) =>
    r % every
      ? []
      : [
          label(left - 6, (r + 0.5) * each + 4, r, "quiet", "end"),
          label(right + 8, (r + 0.5) * each + 4, `${share(outcome.busy[r], 1)}, ${number(outcome.misses[r])}`, "quiet"),
        ],
  );
  const height = outcome.served.length * each;
  picture(
    figure,
    height + 36,
    `Requests of each of ${count(outcome.served.length, "replica")}; at most ${number(largest)} in a part`,
    ...cells,
    ...texts,
    ...parts_of(figure).map((part) =>
      label(x(part * parts), height + 16, seconds(part * outcome.seconds), "quiet", "middle"),
    ),
  );
  const total = (row) => row.reduce((sum, value) => sum + value, 0);
  $("served-table").replaceChildren(
    table(
      ["replica", "requests", "busy", "loaded"],
      outcome.served.map((row, r) => [String(r), total(row), share(outcome.busy[r], 1), outcome.misses[r]]),
    ),
  );
}

function show() {
  show_outcomes();
  show_waits();
  show_time(DATA.outcomes[chosen]);
  show_served(DATA.outcomes[chosen]);
}

// An address that names no outcome shows the first.
function read_address() {
  const given = Number(new URLSearchParams(location.hash.slice(1)).get("outcome"));
  chosen = Number.isInteger(given) && given >= 0 && given < DATA.outcomes.length ? given : 0;
  show();
}

$("arguments").textContent = Object.entries(DATA.arguments)
  .map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`)
  .join(" · ");
addEventListener("hashchange", read_address);
addEventListener("resize", show);
read_address();
