// The panel of two records: cases that both have, times of each and their ratio.
"use strict";

function beside_columns(variant, other_variant) {
  const times_of = (key, head, about, pick) => ({
    key,
    head,
    about,
    value: (c) => median(pick(c)),
    cells: (c) => times_cells(pick(c)),
  });
  const ratio = (c) => [median(c.other.times[other_variant]) / median(c.times[variant])];
  return [
    times_of("a", "A, µs", "sgmv’s median in record A, 20 and 80 %", (c) => c.times[variant]),
    times_of("b", "B, µs", "and in record B", (c) => c.other.times[other_variant]),
    {
      key: "ratio",
      head: "B / A",
      about: "B’s time / A’s time: above 1, A is faster",
      value: (c) => ratio(c)[0],
      cells: (c) => [node("b", { class: ratio_kind(ratio(c)) }, ratio_text(ratio(c)))],
    },
  ];
}

function draw_beside() {
  const other = GRIDS.find(({ name }) => name === state.b);
  for (const part of ["beside-body", "beside-figure-panel"]) $(part).hidden = !other;
  if (!other) {
    $("beside-now").textContent = "Choose a record B among the controls.";
    return;
  }
  const { cases, variant, record } = shown;
  const other_variant = variant_of(other.grid, state.threads);
  const pairs = in_both(cases, other.grid.cases);
  const named = (side, { name, machine }, of) =>
    `${side}: ${name}, ${machine_name(machine)}, ${count(Number(of.slice(5)), "thread")}`;
  $("beside-now").textContent =
    `${named("A", record, variant)}. ${named("B", other, other_variant)}. ` +
    `${count(pairs.length, "case")} in both.`;
  const lines = [
    ["sgmv", beside_sums(pairs, variant, other_variant)],
    ...Object.keys(DATA.peers).map((peer) => [peer_title(peer), beside_sums(pairs, peer, peer)]),
  ].filter(([, sums]) => sums);
  for (const part of ["beside-body", "beside-figure-panel"]) $(part).hidden = !lines.length;
  if (!lines.length) return;
  const words = (sums) => `${ratio_text([sums.geomean])}, ${count(sums.cases, "case")}`;
  draw_spread(
    "beside-figure",
    lines.map(([name, sums]) => [name, sums, words(sums)]),
    ["B is faster", "A is faster"],
    `B’s time / A’s time. ${lines.map(([name, sums]) => `${name}: ${words(sums)}`).join("; ")}`,
  );
  legend("beside-legend", SPREAD_LEGEND.map(copied));
  draw_sortable(
    "beside",
    columns_for("beside", beside_columns(variant, other_variant), "ratio"),
    pairs
      .filter(([one, two]) => one.times[variant] && two.times[other_variant])
      .map(([one, two]) => ({ ...one, other: two })),
    { sort: state.beside_sort || "ratio", more: state.beside_more === "all" },
    ({ sort, more }) => {
      Object.assign(state, { beside_sort: sort, beside_more: more ? "all" : "" });
      draw_beside();
      save();
    },
  );
}
