// The panel of the roofline, with the paper's four popularities below it.
"use strict";

const SIZES = [1, 2, 4, 8, 16, 32, 64]; // of the batches in Punica's figure
const POWERS = { x: [-1, 3], y: [10, 15.3] }; // of ten: FLOP per byte, FLOP per second

function draw_roof(moving) {
  const { launch, figures: f } = shown;
  const { device } = launch;
  const ridge = device.fp16_peak / device.bandwidth;
  now(
    "roof-now",
    ({ figures: of }) => `${significant(of.intensity)} FLOP per byte`,
    ({ figures: of }) =>
      `: at best ${share(Math.min(of.intensity, ridge), ridge)} ` +
      `of the peak of ${device.name}, and at least ${significant(of.roofline_us)} µs`,
  );
  const figure = $("roof");
  const [left, right, top, floor, lane] = [78, figure.clientWidth - 10, 12, 232, 24];
  const between = (value, [low, high]) => (Math.log10(value) - low) / (high - low);
  const plot = {
    left, right, top, floor, lane,
    low: floor + POPULARITIES.length * lane + 16,
    ridge: left + between(ridge, POWERS.x) * (right - left),
    x: (value) => left + between(value, POWERS.x) * (right - left),
    y: (value) => floor - between(value, POWERS.y) * (floor - top),
    roof: (intensity) => Math.min(device.fp16_peak, intensity * device.bandwidth),
  }; // prettier-ignore
  const as_many = launch.experts ? shown.segments.n : f.rows || 1; // rows, of which pairs are made
  const intensity = (kind, rows) => {
    const parts = launch.experts
      ? laid_out(pair_segments(segment(mixed(kind, rows)), shown.values))
      : popularity(kind, rows);
    const n = launch.experts ? sum(parts.map((part) => part.rows)) : rows;
    return traffic(n, parts.length, launch.x_width, launch.k, launch.width).intensity;
  };
  legend("roof-legend", [
    ["this batch", shape("circle", { cx: 9, cy: 6, r: 5, class: "here" })],
    [
      "popularities: as many rows as this batch",
      shape("circle", { cx: 9, cy: 6, r: 5, class: "dot at" }),
    ],
    ["1, 2, 4 … 64 rows", shape("circle", { cx: 9, cy: 6, r: 3, class: "dot" })],
  ]);
  const alike = (kind) => `${kind} with as many rows: ${significant(intensity(kind, as_many))}`;
  picture(
    figure,
    plot.low + 40,
    `Roofline of ${device.name}, ridge at ${significant(ridge)} FLOP per byte. ` +
      `This batch: ${significant(f.intensity)}. ${POPULARITIES.map(alike).join(", ")}.`,
    ...roof_axes(plot),
    ...roof_itself(plot, device, ridge),
    ...POPULARITIES.flatMap((kind, i) => popularity_drawn(plot, kind, i, intensity, as_many)),
    ...(f.rows ? batch_drawn(plot, f.intensity, moving) : []),
  );
}

function roof_axes({ left, right, top, low, x, y }) {
  const drawn = [
    label(right, low + 32, "FLOP per byte", "quiet", "end"),
    label(left + 6, top + 10, "FLOP/s", "quiet"),
  ];
  for (const value of [0.1, 1, 10, 100, 1000]) {
    const anchor = value === 1000 ? "end" : "middle";
    drawn.push(
      line(x(value), top, x(value), low, "grid"),
      label(x(value), low + 16, value, "quiet", anchor),
    );
  }
  for (const [value, name] of [
    [1e10, "10 G"],
    [1e12, "1 T"],
    [1e14, "100 T"],
  ]) {
    drawn.push(
      line(left, y(value), right, y(value), "grid"),
      label(left - 6, y(value) + 4, name, "quiet", "end"),
    );
  }
  return drawn;
}

function roof_itself({ right, floor, x, y, roof }, device, ridge) {
  const peak = y(device.fp16_peak);
  const name = right > 500 ? `ridge at ${significant(ridge)}` : significant(ridge);
  return [
    line(x(ridge), peak, x(ridge), floor, "ridge"),
    label(x(ridge) - 4, floor - 6, name, "quiet", "end"),
    shape("path", {
      class: "roofline",
      d: `M${x(0.1)} ${y(roof(0.1))}L${x(ridge)} ${peak}H${right}`,
    }),
    label(
      right,
      peak - 6,
      `${device.name}: ${significant(device.fp16_peak / 1e12)} TFLOP/s`,
      "quiet",
      "end",
    ),
  ];
}

// A lane under the plot: batches of Punica's sizes, and one of this batch's rows.
function popularity_drawn({ left, floor, lane, x }, kind, i, intensity, rows) {
  const y = floor + 8 + lane * (i + 0.75);
  const points = SIZES.map((n) => x(intensity(kind, n)));
  return [
    label(left - 6, y + 4, kind, state.popularity === kind ? "strong" : "quiet", "end"),
    line(points[0], y, points[points.length - 1], y, "axis"),
    ...points.map((cx) => shape("circle", { cx, cy: y, r: 3, class: "dot" })),
    shape("circle", { cx: x(intensity(kind, rows)), cy: y, r: 5, class: "dot at" }),
  ];
}

function batch_drawn({ left, right, low, x, y, roof, ridge }, intensity, moving) {
  const [cx, cy] = [x(intensity), y(roof(intensity))];
  const point = shape("circle", { cx, cy, r: 8, class: "here" });
  const last = before?.figures.intensity;
  if (moving && last) moves_from(point, x(last) - cx, y(roof(last)) - cy);
  const until = ridge > cx ? Math.min(ridge, right) : right;
  const texts = [`this batch: ${significant(intensity)}`, significant(intensity)];
  const places = texts.flatMap((text) => [
    [until - cx, cx + 12, cy + 18, text, "start"],
    [cx - left, cx - 12, cy - 6, text, "end"],
  ]);
  const wide = (text) => text.length * LETTER + 12;
  const [, at_x, at_y, text, anchor] = places.find(([free, , , name]) => wide(name) < free);
  const named = label(at_x, at_y, text, "strong", anchor);
  return [line(cx, cy, cx, low, "drop"), point, named];
}
