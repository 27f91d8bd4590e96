// The panel of all cases: sgmv's time, then each peer's ratio, interval and time.
"use strict";

function case_columns(cases, variant, record_quiet) {
  const ran = Object.keys(DATA.peers).filter((peer) =>
    cases.some((each) => each.ratios[variant]?.[peer]),
  );
  return [
    {
      key: "sgmv",
      head: "sgmv, µs",
      about: "median of sgmv’s time, and its 20 and 80 % quantiles",
      value: (c) => median(c.times[variant]),
      cells: (c) => times_cells(c.times[variant]),
    },
    {
      key: "closest",
      head: "lowest",
      about: "the lowest ratio, and the peer that has it",
      value: (c) => closest(c, variant)?.[1][0] ?? null,
      cells: (c) => {
        const near = closest(c, variant);
        return near ? [...ratio_cells(near[1]), quiet(peer_title(near[0]))] : ["–"];
      },
    },
    ...ran.map((peer) => ({
      key: peer,
      head: peer_title(peer),
      about: `${peer_title(peer)}: its time / sgmv’s time, the ratio’s interval, its median in µs`,
      value: (c) => c.ratios[variant]?.[peer]?.[0] ?? null,
      cells: (c) => peer_cells(c, variant, peer),
    })),
    {
      key: "limit",
      head: "of the limit",
      about: "share of the roofline: the machine’s time limit / sgmv’s time",
      value: (c) => c.shares[variant] ?? null,
      cells: (c) => [c.shares[variant] === undefined ? "–" : percent(c.shares[variant])],
    },
    {
      key: "noise",
      head: "noise",
      about: "cores that other processes kept busy meanwhile",
      value: (c) => c.foreign,
      cells: (c) => [
        c.foreign === null ? "–" : c.foreign.toFixed(2),
        c.foreign > record_quiet ? node("span", { class: "loss" }, " ?") : "",
      ],
    },
  ];
}

function ratio_cells(ratio) {
  const [middle, low, high] = ratio;
  const digits = ratio_digits(middle);
  return [
    node("b", { class: ratio_kind(ratio) }, ratio_text(ratio)),
    low === undefined ? "" : quiet(`${fixed(low, digits)}–${fixed(high, digits)}`),
  ];
}

function peer_cells(each, variant, peer) {
  const ratio = each.ratios[variant]?.[peer];
  if (!ratio) return [node("span", { title: each.skipped[peer] ?? "did not run" }, "–")];
  return [...ratio_cells(ratio), quiet(`${microseconds(median(each.times[peer]))} µs`)];
}

function draw_cases() {
  const { cases, grid, variant, record } = shown;
  $("cases-now").textContent =
    `${number(cases.length)} of ${count(grid.cases.length, "case")} of ${record.name}.`;
  const left_out = Object.entries(grid.untimed);
  $("left-out").hidden = !left_out.length;
  $("left-out-table").replaceChildren(
    text_table({ head: ["case", "why"], rows: left_out, left: 2 }),
  );
  draw_sortable(
    "cases",
    columns_for("cases", case_columns(cases, variant, DATA.quiet), "closest"),
    cases,
    { sort: state.sort || "closest", more: state.more === "all" },
    ({ sort, more }) => {
      Object.assign(state, { sort, more: more ? "all" : "" });
      draw_cases();
      save();
    },
  );
}
