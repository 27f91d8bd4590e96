// The panel of the roofline: every case at its arithmetic intensity, below what the machine can do.
"use strict";

const gflops = (each, variant) => each.flops / median(each.times[variant]) / 1e3;
const intensity = (each) => each.flops / each.footprint;

function draw_roof() {
  const { cases, grid, variant } = shown;
  const threads = variant.slice(5);
  const figure = $("roof");
  const width = figure.clientWidth;
  if (!cases.length) return figure.replaceChildren();
  const [peak, roofs] = [grid.peak[threads] / 1e9, grid.roofs[threads]];
  const popularities = popularities_of(grid.cases);
  const ranks = distinct(grid.cases.map(({ rank }) => rank)).sort((a, b) => a - b);
  const at = { left: 62, right: width - 10, top: 26, floor: width < 620 ? 330 : 400 };
  const wide = extent(cases.map(intensity), 3);
  const speeds = cases.map((each) => gflops(each, variant));
  const high = [
    Math.min(...speeds, (roofs[roofs.length - 1][1] / 1e9) * wide[0]) / 1.3,
    peak * 1.6,
  ];
  Object.assign(at, {
    x: log_scale(wide, [at.left, at.right]),
    y: log_scale(high, [at.floor, at.top]),
  });
  at.xs = log_ticks(wide, at.x, 36);
  at.ys = log_ticks(high, at.y, 26);
  const colours = distinct([...KINDS, ...popularities]);
  const colour_of = (popularity) => colour(colours.indexOf(popularity))[0];
  const dots = cases.map((each) =>
    mark(
      ranks.indexOf(each.rank),
      at.x(intensity(each)),
      at.y(gflops(each, variant)),
      3.4,
      { class: "dot-of", style: `fill:${colour_of(each.popularity)}` },
      title(
        `${each.name} (${each.names[0]}): ${significant(gflops(each, variant))} GFLOP/s, ` +
          `${significant(intensity(each))} FLOP per byte, ` +
          `${percent(each.shares[variant])} of the limit`,
      ),
    ),
  );
  picture(
    figure,
    at.floor + 40,
    `Roofline with ${count(Number(threads), "thread")}: peak ${significant(peak)} GFLOP/s; ` +
      roofs.map(([name]) => name).join(", ") +
      `. ${count(cases.length, "case")}, from ${significant(Math.min(...speeds))} to ` +
      `${significant(Math.max(...speeds))} GFLOP/s.`,
    ...axes(at, short, short, "FLOP per byte of weights, x and y"),
    label(at.left, 12, "GFLOP/s", "quiet"),
    ...roofs_drawn(at, roofs, peak, wide),
    ...dots,
  );
  legend("roof-legend", [
    ...popularities.map((popularity) => [
      popularity,
      mark(0, 9, 6, 4.5, { style: `fill:${colour_of(popularity)}` }),
    ]),
    ...ranks.map((rank, kind) => [`r = ${rank}`, mark(kind, 9, 6, 4.5, { class: "dot at" })]),
    ...roofs.map(([name], i) => [
      name,
      shape("path", { class: "slope", d: "M0 6H18", "stroke-dasharray": DASHES[i] }),
    ]),
  ]);
}

// Each level of memory as a slope, from the left edge to the peak or the right edge.
function roofs_drawn({ left, right, x, y }, roofs, peak, [low, high]) {
  const slopes = roofs.map(([, rate], i) => {
    const end = Math.min(peak / (rate / 1e9), high);
    const d = `M${left} ${y((low * rate) / 1e9)}L${x(end)} ${y((end * rate) / 1e9)}`;
    return shape("path", { class: "slope", d, "stroke-dasharray": DASHES[i] });
  });
  return [
    ...slopes,
    shape("path", { class: "roofline", d: `M${left} ${y(peak)}H${right}` }),
    label(right, y(peak) - 6, `FMA peak: ${significant(peak)} GFLOP/s`, "quiet", "end"),
  ];
}
