// What the plots share: logarithmic scales, axes, marks, and colours by place in a list.
"use strict";

const LETTER = 7; // px: room for a letter of the drawings' text

const log_scale =
  ([low, high], [from, to]) =>
  (value) =>
    from + (Math.log(value / low) / Math.log(high / low)) * (to - from);

// 1, 2 and 5 times powers of ten, or every power, or every second one: as near as `apart` pixels.
function log_ticks([low, high], scale, apart) {
  const powers = range(40).map((i) => i - 20);
  for (const [steps, each] of [
    [[1, 2, 5], 1],
    [[1, 3], 1],
    [[1], 1],
    [[1], 2],
    [[1], 3],
  ]) {
    const ticks = powers
      .filter((power) => power % each === 0)
      .flatMap((power) => steps.map((step) => Number(`${step}e${power}`)))
      .filter((value) => value >= low * 0.999 && value <= high * 1.001);
    const near = ticks.some(
      (value, i) => i && Math.abs(scale(value) - scale(ticks[i - 1])) < apart,
    );
    if (!near) return ticks;
  }
  return [low, high];
}

// As many of these ticks as keep `apart` pixels, the last one first.
function apart_ticks(values, scale, apart) {
  const kept = [];
  for (const value of [...values].sort((a, b) => b - a)) {
    if (!kept.length || scale(kept[kept.length - 1]) - scale(value) >= apart) kept.push(value);
  }
  return kept;
}

// From the least to the largest, and a little beyond.
function extent(values, beyond = 1.2) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return [low / beyond, high * beyond];
}

const short = (value) => {
  const [size, unit] = value >= 1e6 ? [1e6, "M"] : value >= 1e4 ? [1e3, "k"] : [1, ""];
  return `${Number((value / size).toPrecision(4))}${unit}`;
};
const time_text = (us) => {
  const [size, unit] = us >= 1e6 ? [1e6, "s"] : us >= 1e3 ? [1e3, "ms"] : [1, "µs"];
  return `${Number((us / size).toPrecision(3))} ${unit}`;
};

// Grid lines and their values. `at`: {left, right, top, floor, x, y, xs, ys}, scales and ticks.
function axes({ left, right, top, floor, x, y, xs, ys }, x_text, y_text, x_name) {
  return [
    ...xs.flatMap((value) => [
      line(x(value), top, x(value), floor, "grid"),
      label(x(value), floor + 16, x_text(value), "quiet", "middle"),
    ]),
    ...ys.flatMap((value) => [
      line(left, y(value), right, y(value), "grid"),
      label(left - 6, y(value) + 4, y_text(value), "quiet", "end"),
    ]),
    shape("path", { class: "axis", d: `M${left} ${top}V${floor}H${right}` }),
    label(right, floor + 33, x_name, "quiet", "end"),
  ];
}

const round = (value) => Math.round(10 * value) / 10;

// A mark's outline of about 2 r, so that kinds differ by more than their colours.
const OUTLINES = [
  (r) => `m${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  (r) => `m${-0.9 * r} ${-0.9 * r}h${1.8 * r}v${1.8 * r}h${-1.8 * r}z`,
  (r) => `m0 ${-1.2 * r}l${1.15 * r} ${2 * r}h${-2.3 * r}z`,
  (r) => `m0 ${-1.3 * r}l${1.2 * r} ${1.3 * r}l${-1.2 * r} ${1.3 * r}l${-1.2 * r} ${-1.3 * r}z`,
  (r) => `m0 ${1.2 * r}l${1.15 * r} ${-2 * r}h${-2.3 * r}z`,
  (r) => {
    const [s, t] = [0.8 * r, -0.8 * r];
    return `m${-0.4 * r} ${-1.2 * r}h${s}v${s}h${s}v${s}h${t}v${s}h${t}v${t}h${t}v${t}h${s}z`;
  },
];
const mark = (kind, x, y, r, attributes = {}, ...children) =>
  shape(
    "path",
    { d: `M${round(x)} ${round(y)}${OUTLINES[kind % OUTLINES.length](r)}`, ...attributes },
    ...children,
  );

const DASHES = [null, "7 3", "2 3", "8 3 2 3"];
const title = (text) => shape("title", {}, text);

// Medians over n as a line, each with a stroke from the 20 % to the 80 % quantile.
// points: [n, q20, q50, q80]; look: {colour, kind, dash, wide}
function curve(points, { x, y }, look, name, joined = true) {
  const way = points.map(([n, , q50]) => `${round(x(n))} ${round(y(q50))}`).join("L");
  const stroke = `stroke:${look.colour}`;
  const path = {
    class: "curve",
    d: `M${way}`,
    style: `${stroke};stroke-width:${look.wide ?? 1.5}`,
  };
  const band = (q20, q80) => `20-80 %: ${microseconds(q20)} to ${microseconds(q80)}`;
  return [
    joined && points.length > 1 ? shape("path", { ...path, "stroke-dasharray": look.dash }) : null,
    ...points.map(([n, q20, , q80]) =>
      shape("path", {
        class: "curve",
        d: `M${round(x(n))} ${round(y(q20))}V${round(y(q80))}`,
        style: `${stroke};stroke-width:3`,
      }),
    ),
    ...points.map(([n, q20, q50, q80]) =>
      mark(
        look.kind,
        x(n),
        y(q50),
        look.wide ? 4 : 3.2,
        { style: `fill:${look.colour}` },
        title(`${name}, n = ${number(n)}: ${microseconds(q50)} µs (${band(q20, q80)})`),
      ),
    ),
  ].filter(Boolean);
}

// A sample of such a line, for a legend.
const curve_meant = (look) => [
  shape("path", {
    class: "curve", d: "M0 6H18", "stroke-dasharray": look.dash,
    style: `stroke:${look.colour};stroke-width:${look.wide ?? 1.5}`,
  }),
  mark(look.kind, 9, 6, look.wide ? 4 : 3.4, { style: `fill:${look.colour}` }),
]; // prettier-ignore

// sgmv in the accent's colour, then a colour, a mark and a dash for each peer by its place. Every
// fifth colour: eleven hues all round, and of two neighbours one is light and one dark.
const SGMV_LOOK = { colour: "var(--accent)", kind: 0, dash: null, wide: 2.5 };
const SGMV_ONE_LOOK = { colour: "var(--accent)", kind: 1, dash: "2 3", wide: 2 };
const look_of = (place) => ({
  colour: colour(5 * place + 1)[0],
  kind: place + 1,
  dash: DASHES[place % DASHES.length],
});
