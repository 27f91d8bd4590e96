// The panel of experts: which pairs share weights, what padding them costs, and with how many rows.
"use strict";

const SIZES_PADDED = [1, 4, 16, 64, 256, 1024]; // rows of the batches in the table
const MOST_MAPPED = 16; // adapters in the map; below it says how many more there are

function draw_experts() {
  const { launch, figures: f, values } = shown;
  $("experts-panel").hidden = !launch.experts;
  if (!launch.experts) return;
  now(
    "experts-now",
    ({ figures: of }) =>
      of.experts
        ? `${count(of.rows, "pair")} in ${count(of.S, "group")}`
        : `${count(of.rows, "row")} without experts`,
    ({ figures: of }) =>
      `, each padded to ${number(of.block_rows)} rows or a multiple: ` +
      `${number(of.row_slots)} rows, ${share(of.wasted_rows, of.row_slots)} of them zeros`,
  );
  draw_map(launch, f);
  const zeros = (kind, rows) => {
    const segments = segment(mixed(kind, rows));
    const max_loras = Math.max(values.max_loras, segments.S);
    const of = figures(KERNELS[launch.kernel](segments, { ...values, max_loras }));
    return share(of.wasted_rows, of.row_slots);
  };
  $("experts-table").replaceChildren(
    table(
      ["rows", ...POPULARITIES],
      SIZES_PADDED.map((rows) => [rows, ...POPULARITIES.map((kind) => zeros(kind, rows))]),
    ),
  );
}

// A line for each adapter and a column for each expert: a group's tiles of rows, and its pairs.
function draw_map(launch, f) {
  const figure = $("experts-map");
  const [left, top, tall, pitch] = [52, 22, 22, 28];
  const mapped = launch.adapters.slice(0, MOST_MAPPED);
  const right = figure.clientWidth - 2;
  const cell = (right - left) / launch.experts;
  const wide = Math.max(0.5, cell - (cell > 3 ? 1 : 0));
  const low = top + pitch * mapped.length;
  const drawn = [
    label(left, 12, `experts from left to right, 0 to ${launch.experts - 1}`, "quiet"),
    ...mapped.map(({ adapter_id }, place) => label(0, top + pitch * place + 16, short_id(adapter_id))),
  ];
  for (const kind of ["room", "waste"]) {
    drawn.push(shape("path", { class: kind, d: cells(launch, () => tall) }));
  }
  mapped.forEach((_, place) => {
    const own = ({ rows, row_slots }) => Math.max(1.5, (tall * rows) / row_slots);
    drawn.push(shape("path", { style: fill(place), d: cells(launch, own, place) }));
  });
  const more = launch.adapters.length - mapped.length;
  if (more) drawn.push(label(0, low + 12, `… and ${count(more, "more adapter")}`, "quiet"));
  picture(
    figure,
    low + (more ? 22 : 4),
    `${count(f.S, "group")} of ${count(f.rows, "pair")}, by adapter and expert.`,
    ...drawn,
  );
  legend("experts-legend", [
    ...adapters_meant(launch.adapters),
    ["zeros", sample_of({ class: "room" }), sample_of({ class: "waste" })],
    ["nothing: no pair"],
  ]);

  // The groups of one adapter, or of all, each filled from above as high as `high` says.
  function cells({ work }, high, place = null) {
    return work
      .filter((part) => part.place < MOST_MAPPED && (place === null || part.place === place))
      .map((part) => {
        const x = (left + part.expert * cell).toFixed(1);
        const w = wide.toFixed(1);
        return `M${x} ${top + pitch * part.place}h${w}v${high(part).toFixed(1)}h-${w}z`;
      })
      .join("");
  }
}
