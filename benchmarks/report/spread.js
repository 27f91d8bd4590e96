// A figure of ratios: for each line the worst, the middle half, the geometric mean and the best.
"use strict";

const SPREAD_LEGEND = [
  ["geometric mean", shape("circle", { cx: 9, cy: 6, r: 5, class: "here" })],
  ["the middle half of the cases", box(0.5, 1.5, 17, 9, { class: "half" })],
  ["from the worst to the best", line(0, 6, 18, 6, "whole")],
  ["equal times", line(9, 0, 9, 12, "once")],
];

// lines: [name, sums of `spread`, in a few words]; `ends`: what left and right of 1 mean.
function draw_spread(name, lines, ends, told) {
  const figure = $(name);
  const width = figure.clientWidth;
  const narrow = width < 620;
  const [left, right] = narrow ? [8, width - 8] : [170, width - 216];
  const [top, tall] = [40, narrow ? 48 : 30];
  const reach = lines.flatMap(([, { worst, best }]) => [worst[0], best[0]]);
  const span = [Math.min(0.8, ...reach) / 1.1, Math.max(1.25, ...reach) * 1.1];
  const x = log_scale(span, [left, right]);
  const floor = top + tall * lines.length;
  const ticks = log_ticks(span, x, 44);
  picture(
    figure,
    floor + 6,
    told,
    label(left, 12, `← ${ends[0]}`, "quiet"),
    label(right, 12, `${ends[1]} →`, "quiet", "end"),
    ...ticks.flatMap((value) => [
      line(x(value), top - 6, x(value), floor, "grid"),
      label(x(value), top - 11, `${short(value)}x`, "quiet", "middle"),
    ]),
    ...lines.flatMap((each, i) => spread_line(each, top + tall * i, { x, left, right, narrow })),
  );
}

function spread_line([name, sums, words], top, { x, left, right, narrow }) {
  const y = top + (narrow ? 34 : 15);
  const [low, high] = sums.quarters;
  const texts = narrow
    ? [label(left, top + 16, name), label(right, top + 16, words, "quiet", "end")]
    : [label(left - 12, y + 4, name, "", "end"), label(right + 12, y + 4, words, "quiet")];
  const end = ([ratio, each]) => `${ratio_text([ratio])} (${each.name})`;
  const told =
    `${name}: geometric mean ${ratio_text([sums.geomean])}, ` +
    `worst ${end(sums.worst)}, best ${end(sums.best)}`;
  return [
    ...texts,
    shape("path", { class: "whole", d: `M${x(sums.worst[0])} ${y}H${x(sums.best[0])}` }),
    box(x(low), y - 5, x(high) - x(low), 10, { class: "half" }),
    line(x(1), y - 9, x(1), y + 9, "once"),
    shape("circle", { cx: x(sums.geomean), cy: y, r: 5.5, class: "here" }, title(told)),
  ];
}
