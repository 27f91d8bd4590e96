// Side by side: the same launch with one thing changed, both on one scale.
"use strict";

const SORTED_BY_CALLER = ["punica_sgmv_shrink", "punica_cutlass_expand"];
const OTHER_RELEASE = { "1.0.0": "1.1.0", "1.1.0": "1.0.0" };

// Every run of rows with one adapter as a segment: what a batch is where nobody sorts.
function unsorted(ids) {
  const starts = range(ids.length).filter((row) => row === 0 || ids[row] !== ids[row - 1]);
  return {
    rows: range(ids.length),
    seq_start: [...starts, ids.length],
    adapter_ids: starts.map((row) => ids[row]),
    n: ids.length,
    S: starts.length,
  };
}

// Each gives the names of both sides and the other launch, or null where there is none.
const CHANGES = {
  unsorted: (values) =>
    SORTED_BY_CALLER.includes(values.kernel)
      ? ["sorted", "unsorted", launched(values, { segments: unsorted(values.ids) })]
      : null,
  fewer: (values) => {
    const [n, ids] = [values.ids.length, values.ids.slice(0, -1)];
    return n > 1 ? [count(n, "row"), count(n - 1, "row"), launched({ ...values, ids })] : null;
  },
  unsplit: (values) =>
    shown.figures.cooperative
      ? ["K split", "K not split", launched(values, { whole: true })]
      : null,
  release: (values) => {
    const release = OTHER_RELEASE[values.release];
    return values.kernel === "punica_sgmv_shrink"
      ? [`release ${values.release}`, `release ${release}`, launched({ ...values, release })]
      : null;
  },
};

function set_beside(values) {
  const found = beside_of(values, values.versus);
  $("versus-help").textContent =
    values.versus && !found ? "There is nothing to compare: choose another kernel or batch." : "";
  if (!found) return null;
  const [own_name, name, other] = found;
  return { ...other, name, own_name };
}

function beside_of(values, versus) {
  if (CHANGES[versus]) return CHANGES[versus](values);
  if (POPULARITIES.includes(versus) && versus !== values.popularity) {
    const ids = mixed(versus, values.ids.length);
    return [values.popularity || "this batch", versus, launched({ ...values, ids })];
  }
  const alike = KERNELS[versus] && versus !== values.kernel;
  if (!alike || half_of(versus) !== half_of(values.kernel)) return null;
  return [kernel_name(values.kernel), kernel_name(versus), launched({ ...values, kernel: versus })];
}

const half_of = (kernel) => kernel.split("_").pop(); // shrink or expand

const ending = ({ figures: f, timeline: { end, stuck } }) => {
  if (stuck) return "never ends";
  if (!f.blocks) return "no blocks";
  return f.capacity ? `done after ${count(Math.ceil(end), "step")}` : "no block fits";
};

function draw_compare() {
  $("compare-panel").hidden = !beside;
  if (!beside) return;
  const sides = [{ ...shown, name: beside.own_name }, beside];
  const ends = sides.every(({ timeline }) => !timeline.stuck);
  const told_of = (side) =>
    `${side.name}: ${count(side.figures.S, "segment")}, ${count(side.figures.blocks, "block")}, ` +
    ending(side) +
    (ends
      ? `, ${bytes(moved(side))} moved, at least ${significant(side.figures.roofline_us)} µs`
      : "");
  $("compare-title").textContent = `Side by side: ${sides[0].name} and ${sides[1].name}`;
  $("compare-now").replaceChildren(...sides.map((side) => node("span", {}, `${told_of(side)}.`)));
  const width = $("compare").clientWidth;
  const drawn = [];
  let y = compared_over_time(sides, width, drawn);
  for (const measure of ends ? MEASURES : [])
    y = compared_bars(sides, measure, width, y + 26, drawn);
  picture($("compare"), y + 4, sides.map(told_of).join("; "), ...drawn);
  const kinds = KINDS_IN_ORDER.filter((kind) =>
    sides.some(({ timeline: { bars } }) => bars.some((bar) => bar.kind === kind)),
  );
  legend("compare-legend", [...kinds.map(kind_meant), ...(ends ? LANES_MEANT : [])]);
  $("compare-note").textContent =
    sides[0].launch.kernel === sides[1].launch.kernel
      ? ""
      : "Steps of two kernels are not equally long: compare their bytes rather than their steps.";
}

const MEASURES = [
  ["Memory read and written", moved, bytes],
  [
    "Time at least, by the roofline",
    ({ figures: f }) => f.roofline_us,
    (us) => `${significant(us)} µs`,
  ],
  [
    "Products multiplied, zeros included",
    ({ figures: f }) => f.lanes,
    (lanes) => `${significant(lanes / 1e6)} million`,
    ({ figures: f }) => f.useful_lanes,
  ],
];
const LANES_MEANT = [
  ["useful", sample_of({ class: "used" })],
  ["zeros", sample_of({ class: "room" }), sample_of({ class: "waste" })],
];

// Both launches' blocks over one axis of time and one of blocks.
function compared_over_time(sides, width, drawn) {
  const [left, right, tall] = [40, width - 8, 64];
  const end = most(sides.map(({ timeline }) => timeline.end)) || 1;
  const blocks = most(sides.map(({ figures: f }) => Math.min(f.blocks, f.capacity))) || 1;
  const x = (time) => left + ((right - left) * time) / end;
  drawn.push(label(0, 12, "Blocks on the GPU, over steps of the main loop", "strong"));
  let y = 22;
  for (const side of sides) {
    const low = y + 20 + tall;
    const how = `${count(side.figures.blocks, "block")}, ${ending(side)}`;
    const room_for = (count_of) => (tall * count_of) / blocks;
    drawn.push(
      label(left, y + 13, side.name),
      (side.name.length + how.length) * LETTER < right - left
        ? label(right, y + 13, how, "quiet", "end")
        : null,
      ...areas(
        occupancy(side.timeline, (bar) => [bar.kind]),
        x,
        low,
        room_for,
      ),
      label(left - 6, low - tall + 10, number(blocks), "quiet", "end"),
      label(left - 6, low, 0, "quiet", "end"),
      line(left, low - tall, left, low, "axis"),
      line(left, low, right, low, "axis"),
    );
    y = low + 6;
  }
  drawn.push(...time_ticks(x, end, right, y - 6));
  return y + 14;
}

function compared_bars(sides, [title, value, told_value, useful], width, top, drawn) {
  const largest = most(sides.map(value)) || 1;
  const long = (amount) => (width * amount) / largest;
  drawn.push(label(0, top, title, "strong"));
  sides.forEach((side, i) => {
    const y = top + 18 + 36 * i;
    const amount = value(side);
    drawn.push(
      label(0, y, side.name),
      label(width, y, told_value(amount), "quiet", "end"),
      ...(useful ? room(0, y + 5, long(amount), 12) : []),
      box(0, y + 5, long(useful ? useful(side) : amount), 12, { class: useful ? "used" : "read" }),
    );
  });
  return top + 18 + 36 * sides.length - 12;
}
