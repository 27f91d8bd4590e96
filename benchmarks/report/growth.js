// The panel of growth: time of one call over rows and over adapters, each curve with its line.
"use strict";

function draw_growth() {
  const records = of_machine(DATA.records).filter(({ growth }) => growth);
  $("growth-panel").hidden = !records.length;
  $("growth").replaceChildren(
    ...records.flatMap(({ name, threads, growth }) => [
      node("p", { class: "now" }, `${name}: ${growth.layer}, ${count(threads, "thread")}.`),
      node("figure", { id: `growth-${name}` }),
    ]),
  );
  for (const { name, growth } of records) growth_drawn($(`growth-${name}`), growth.series);
  const [largest] = records.sort((a, b) => b.growth.series.length - a.growth.series.length);
  legend(
    "growth-legend",
    (largest?.growth.series ?? []).map((series, i) => [
      series.name,
      ...curve_meant(growth_look(i)),
    ]),
  );
}

const growth_look = (i) => ({ colour: colour(i)[0], kind: i, dash: null });

function growth_drawn(figure, series) {
  const names = distinct(series.map(({ axis }) => axis));
  const width = figure.clientWidth;
  const columns = width < 620 ? 1 : names.length;
  const [each_wide, each_tall] = [width / columns, 340];
  const ys = extent(
    series.flatMap(({ points }) => points.flatMap(([, ...times]) => times)),
    1.4,
  );
  const drawn = names.flatMap((axis, i) => {
    const [column, row] = [i % columns, Math.floor(i / columns)];
    const at = { left: column * each_wide + 58, right: (column + 1) * each_wide - 20 };
    Object.assign(at, { top: row * each_tall + 12, floor: (row + 1) * each_tall - 48 });
    const own = series.filter((each) => each.axis === axis);
    const xs = extent(own.flatMap(({ points }) => points.map(([n]) => n)));
    Object.assign(at, {
      x: log_scale(xs, [at.left, at.right]),
      y: log_scale(ys, [at.floor, at.top]),
    });
    at.xs = log_ticks(xs, at.x, 44);
    at.ys = log_ticks(ys, at.y, 24);
    return [
      ...axes(at, short, time_text, `${axis}, n`),
      ...own.flatMap((each) => {
        const look = growth_look(series.indexOf(each));
        return [fit_drawn(each, at, look), ...curve(each.points, at, look, each.name, false)];
      }),
    ];
  });
  const told = series.map(({ name, fit: [a, b], points }) => {
    const [first, last] = [points[0], points[points.length - 1]];
    const at = ([n, , q50]) => `${microseconds(q50)} µs at ${n}`;
    return `${name}: ${significant(a)} + ${significant(b)} n µs, from ${at(first)} to ${at(last)}`;
  });
  picture(figure, Math.ceil(names.length / columns) * each_tall, told.join("; "), ...drawn);
}

// t = a + b n, from the first point to the last.
function fit_drawn({ points, fit: [a, b] }, { x, y }, look) {
  const [low, high] = [points[0][0], points[points.length - 1][0]];
  const steps = range(61).map((i) => low * (high / low) ** (i / 60));
  const way = steps.map((n) => `${round(x(n))} ${round(y(a + b * n))}`).join("L");
  return shape("path", {
    class: "curve",
    d: `M${way}`,
    style: `stroke:${look.colour};stroke-width:1.3`,
  });
}
