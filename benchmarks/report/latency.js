// The panel of latency: time of one call over rows, a plot for each popularity.
"use strict";

// sgmv's variants, then the peers that ran.
function latency_lines(cases, grid) {
  const threads = [...grid.threads].sort((a, b) => b - a);
  const own = distinct([threads[0], ...threads.filter((each) => each === 1)]).map((each, i) => [
    `sgmv@${each}`,
    `sgmv, ${count(each, "thread")}`,
    i ? SGMV_ONE_LOOK : SGMV_LOOK,
  ]);
  const peers = Object.keys(DATA.peers).map((peer, i) => [peer, peer_title(peer), look_of(i)]);
  return [...own, ...peers].filter(([name]) => cases.some((each) => each.times[name]));
}

function draw_latency() {
  const cases = hub(passing(shown.grid.cases, ["rows", "popularity"]));
  const figure = $("latency");
  $("latency-now").textContent = "";
  legend("latency-legend", []);
  if (!cases.length) return figure.replaceChildren();
  const one_row = cases.filter(({ popularity }) => popularity === ONE_ROW);
  const kinds = popularities_of(cases).filter(
    (kind) => kind !== ONE_ROW && (!state.popularity || kind === state.popularity),
  );
  const panels = kinds.length ? kinds : [ONE_ROW];
  const lines = latency_lines(cases, shown.grid);
  const [first] = cases;
  const layer = `${first.h_in} → ${first.rank} → ${first.h_out}, ${first.dtype} (${first.names[0]})`;
  $("latency-now").textContent = `${layer}: the layer, rank and type with the most row counts.`;
  const width = figure.clientWidth;
  const most = Math.max(1, Math.floor(width / 230)); // columns that there is room for
  const columns = Math.ceil(panels.length / Math.ceil(panels.length / most));
  const [each_wide, each_tall] = [width / columns, 330];
  const times = cases.flatMap((each) => lines.flatMap(([name]) => each.times[name] ?? []));
  const [xs, ys] = [extent(cases.map(({ rows }) => rows)), extent(times)];
  const drawn = panels.flatMap((kind, i) => {
    const [column, row] = [i % columns, Math.floor(i / columns)];
    const at = { left: column * each_wide + 54, right: (column + 1) * each_wide - 14 };
    Object.assign(at, { top: row * each_tall + 28, floor: (row + 1) * each_tall - 48 });
    Object.assign(at, {
      x: log_scale(xs, [at.left, at.right]),
      y: log_scale(ys, [at.floor, at.top]),
    });
    const its = [...one_row, ...cases.filter(({ popularity }) => popularity === kind)];
    const shown_cases = distinct(its).sort((a, b) => a.rows - b.rows);
    at.xs = apart_ticks(distinct(shown_cases.map(({ rows }) => rows)), at.x, 32);
    at.ys = log_ticks(ys, at.y, 24);
    return [
      label(at.left, at.top - 12, kind, "strong"),
      ...axes(at, short, time_text, "rows, n"),
      ...[...lines].reverse().flatMap(([name, text, look]) =>
        curve(
          shown_cases
            .filter((each) => each.times[name])
            .map((each) => [each.rows, ...each.times[name]]),
          at,
          look,
          text,
        ),
      ),
    ];
  });
  picture(
    figure,
    Math.ceil(panels.length / columns) * each_tall,
    `Time of one call over rows, ${layer}. ` + latency_told(cases, panels, shown.variant),
    ...drawn,
  );
  legend(
    "latency-legend",
    lines.map(([, text, look]) => [text, ...curve_meant(look)]),
  );
}

const latency_told = (cases, panels, variant) =>
  panels
    .map((kind) => {
      const timed = cases.filter((each) => each.popularity === kind && each.times[variant]);
      const words = timed.map(
        (each) => `${microseconds(median(each.times[variant]))} µs at ${each.rows}`,
      );
      return `${kind}, sgmv: ${words.join(", ")}`;
    })
    .join("; ");
