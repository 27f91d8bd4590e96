// Panels: each draws one view of `shown`, the batch and launch of the controls, and says what it is.
"use strict";

// A panel's sentence on this batch; the gist of it for the batch before, where that was another.
function now(id, gist, rest = () => "") {
  const last = before && gist(before) !== gist(shown) ? ` Before: ${gist(before)}.` : "";
  $(id).replaceChildren(`${gist(shown)}${rest(shown)}.`, node("span", { class: "before" }, last));
}

// --- verdict ----------------------------------------------------------------------------------

function verdict({ launch, figures: f }) {
  if (launch.unsupported.length) return ["fails", "There is no such kernel."];
  if (f.deadlock) return ["fails", "This launch hangs."];
  if (!f.blocks) return ["runs", "Nothing is launched: no row has an adapter."];
  if (!f.capacity && launch.estimated) {
    return ["warns", `Tiles of this size do not fit an SM of ${f.device}; Triton may need less.`];
  }
  if (!f.capacity) return ["fails", `No block fits an SM of ${f.device}.`];
  if (f.race) return ["warns", "This launch runs, with a race."];
  if (f.faults.length) return ["fails", "This launch runs, and goes wrong."];
  if (launch.kernel === "punica_sgmv_shrink" && !f.cooperative) {
    return ["warns", "This launch runs, but K is no longer split."];
  }
  return ["runs", "This launch runs."];
}

function draw_device() {
  const { sms, shared_memory_per_sm, bandwidth, fp16_peak } = shown.launch.device;
  $("device-facts").textContent =
    `${sms} SMs of ${shared_memory_per_sm / 1024} KiB shared memory, ` +
    `${number(bandwidth / 1e9)} GB/s, ${number(fp16_peak / 1e12)} TFLOP/s in fp16`;
}

const paragraph = (...children) => node("p", {}, ...children);
const listed = (items) => node("ul", {}, ...items.map((item) => node("li", {}, ...[item].flat())));

function draw_verdict() {
  const { launch, figures: f } = shown;
  const [tone, title] = verdict(shown);
  const story = STORIES.find(
    (_, i) => $("stories").children[i].getAttribute("aria-pressed") === "true",
  );
  const lines = story ? [paragraph(story[2])] : [];
  if (launch.unsupported.length) {
    lines.push(listed(launch.unsupported), paragraph("The panels show what it would be."));
  } else {
    if (f.deadlock) lines.push(...why_it_hangs(launch));
    else if (f.faults.length) lines.push(listed(f.faults));
    if (f.blocks && f.capacity) lines.push(...what_fits(shown));
  }
  $("verdict").className = `verdict ${tone}`;
  $("verdict-title").textContent = title;
  $("verdict-body").replaceChildren(...lines);
}

function what_fits({ launch, figures: f, values }) {
  const holds = `${f.device} holds ${number(f.capacity)} at once`;
  if (launch.kernel === "punica_sgmv_shrink") {
    const chunks = ceil_div(launch.k, CHUNK);
    const told_blocks = paragraph(
      `${count(chunks, "chunk")} of K × ${count(f.S, "segment")} = ` +
        `${count(chunks * f.S, "block")}; ${holds}, ` +
        `so K is split for up to ${count(f.split_k_segments, "segment")}.`,
    );
    const opting_in =
      `A block takes ${number(f.shared_memory)} bytes of shared memory here. Punica opts in to ` +
      "more than 48 KiB only after it has asked how many blocks fit; where CUDA then answers " +
      "none, K is not split and nothing hangs.";
    const large = f.shared_memory > WITHOUT_OPT_IN;
    return large ? [told_blocks, node("p", { class: "help" }, opting_in)] : [told_blocks];
  }
  const idle = f.early_exits ? `, ${number(f.early_exits)} of which find nothing to do` : "";
  const lines = [
    `${count(f.blocks, "block")} of ${f.threads} threads${idle}; ${holds}: ` +
      `${count(f.waves, "wave")}.`,
  ];
  if (!f.deterministic) {
    lines.push("Atomic additions come in any order: the last bits differ from run to run.");
  }
  if (launch.kernel.startsWith("vllm") && values.max_loras > state.max_loras) {
    lines.push(`max_loras is taken to be ${values.max_loras}, the adapters of the batch.`);
  }
  return [paragraph(lines.join(" "))];
}

function why_it_hangs(launch) {
  const stuck = deadlock(launch);
  const { barrier, waiting, returned } = stuck;
  const counts = [...new Set(launch.work.map((w) => w.barriers))].sort((a, b) => a - b);
  const run_fixed = () => {
    controls_write({ release: "1.1.0" });
    update();
    $("release").focus();
  };
  const bold = (text) => node("b", {}, text);
  return [
    paragraph(
      "After each step the blocks meet at a barrier of the whole grid, to add up their chunks " +
        "of K. It opens when ",
      bold(`all ${blocks_of(launch)} blocks`),
      " stand at it.",
    ),
    listed(counts.map((barriers) => who_comes(launch.work, barriers, bold))),
    paragraph(
      "At barrier ",
      bold(barrier),
      `, ${count(waiting.length, "block")} ${waiting.length === 1 ? "waits" : "wait"} for ` +
        `${count(returned.length, "block")} that returned after barrier ${barrier - 1} and will ` +
        "never come. Nothing on the GPU notices, and the call does not end.",
    ),
    paragraph(node("code", {}, told(stuck))),
    paragraph(node("button", { type: "button", click: run_fixed }, "Run it with release 1.1.0")),
  ];
}

// The segments that pass so many barriers, the first four by name, and why so many.
function who_comes(work, barriers, bold) {
  const members = range(work.length).filter((s) => work[s].barriers === barriers);
  const named = members.slice(0, 4).map((s) => {
    const { adapter_id, rows } = work[s];
    return node("span", {}, chip(s), `${adapter(adapter_id)}, ${count(rows, "row")}`);
  });
  const more = members.length > 4 ? `; and ${members.length - 4} more` : "";
  const whose = members.length === 1 ? "its" : "each one’s";
  return [
    ...named.flatMap((each, i) => (i ? ["; ", each] : [each])),
    `${more}: ${count(barriers, "step")} of ${STEP_ROWS} rows, so ${whose} blocks come to the barrier `,
    bold(barriers === 1 ? "once" : `${barriers} times`),
    ".",
  ];
}

// --- rows into segments -----------------------------------------------------------------------

const STRIP = { top: 20, tall: 26, low: 98 }; // the rows as they came, and where the sorted ones are

function draw_segments(moving) {
  const { segments, launch } = shown;
  const { n, S, seq_start, adapter_ids } = segments;
  const bases = S - launch.work.length; // segments without an adapter: none, or the first
  now(
    "segments-now",
    ({ segments: at }) => `${count(at.n, "row")} in ${count(at.S, "segment")}`,
    ({ segments: at }) => `: seq_start = [${some(at.seq_start)}]`,
  );
  const figure = $("segments");
  const cell = figure.clientWidth / n;
  const places = range(S).map((s) => (s < bases ? null : s - bases));
  const parts = range(S).map((s) => segment_drawn(segments, s, cell, places[s], moving));
  picture(
    figure,
    STRIP.low + STRIP.tall + 66,
    `${n} rows sorted into ${S} segments. seq_start: ${some(seq_start)}.`,
    label(0, 12, `x, rows as they came${cell >= 18 ? ": adapter id of each" : ""}`, "quiet"),
    ...parts.map(({ links }) => links),
    ...parts.flatMap(({ cells }) => cells),
    ...under_segments(segments, cell, figure.clientWidth),
  );
  const rows_of = (s) => seq_start[s + 1] - seq_start[s];
  $("segments-table").replaceChildren(
    table(
      ["segment", "adapter", "rows", "offsets"],
      range(S).map((s) => [
        node("span", {}, chip(places[s]), String(s)),
        adapter(adapter_ids[s]),
        rows_of(s),
        `${seq_start[s]}:${seq_start[s + 1]}`,
      ]),
    ),
  );
}

// One segment's rows where they came, where they are sorted to, and the links between.
function segment_drawn({ n, rows, seq_start, adapter_ids }, s, cell, place, moving) {
  const { top, tall, low } = STRIP;
  const [fill, ink] = colour(place);
  const cells = [];
  let links = "";
  for (let p = seq_start[s]; p < seq_start[s + 1]; p += 1) {
    const row = rows[p];
    const square = (at, y, text) =>
      shape(
        "g",
        {},
        box(at * cell, y, cell - (cell > 6 ? 1 : 0), tall, { fill }),
        text === null ? null : label((at + 0.5) * cell, y + 18, text, "", "middle", ink),
      );
    const sorted = square(p, low, cell >= 24 ? row : null);
    if (moving && n <= 256) moves_from(sorted, (row - p) * cell, top - low);
    cells.push(square(row, top, cell >= 18 ? adapter_ids[s] : null), sorted);
    links += curve((row + 0.5) * cell, top + tall + 2, (p + 0.5) * cell, low - 2);
  }
  const width = Math.max(0.6, Math.min(2.5, cell / 4));
  const path = { d: links, fill: "none", stroke: fill, "stroke-width": width, opacity: 0.65 };
  return { cells, links: shape("path", path) };
}

function curve(x, y, to_x, to_y) {
  const half = (y + to_y) / 2;
  const [from, to] = [x.toFixed(1), to_x.toFixed(1)];
  return `M${from} ${y}C${from} ${half} ${to} ${half} ${to} ${to_y}`;
}

// seq_start, as many of it as there is room for, and the segments' names.
function under_segments({ n, S, seq_start, adapter_ids }, cell, width) {
  const y = STRIP.low + STRIP.tall;
  const drawn = [label(width, y + 20, n, "", "end")];
  let free = 0;
  for (let s = 0; s < S; s += 1) {
    const [x, rows] = [seq_start[s] * cell, seq_start[s + 1] - seq_start[s]];
    const wide = 8 * String(seq_start[s]).length + 6;
    const from = Math.max(free, x - wide / 2); // a little aside, rather than not at all
    drawn.push(line(x, y, x, y + 7, "axis"));
    if (from - x < 12 && from + wide < width - 8 * String(n).length) {
      drawn.push(label(from, y + 20, seq_start[s]));
      free = from + wide;
    }
    const name = adapter(adapter_ids[s]);
    const fits = (text) => text.length * 6.6 + 6 < rows * cell;
    const text = [`${name}, ${count(rows, "row")}`, name, `${adapter_ids[s]}`].find(fits);
    if (text) drawn.push(label(x + (rows * cell) / 2, y + 38, text, "strong", "middle"));
  }
  const of_rows = cell >= 24 && width > 500 ? ": row of x at each position" : "";
  drawn.push(
    line(width, y, width, y + 7, "axis"),
    label(0, y + 58, `sorted${of_rows}; below it seq_start, and the segments`, "quiet"),
  );
  return drawn;
}

// --- tiles ------------------------------------------------------------------------------------

function draw_tiles() {
  const { launch, figures: f } = shown;
  const { tile } = launch;
  now(
    "tiles-now",
    ({ figures: at }) => `${share(at.useful_lanes, at.lanes)} of the lanes are useful`,
    ({ figures: at, launch: of }) =>
      `: ${number(at.rows)} of ${number(at.row_slots)} rows × ` +
      `${number(of.width)} of ${number(of.tile.column_slots)} columns × ` +
      `${number(of.k)} of ${number(of.tile.k_slots)} products`,
  );
  const figure = $("tiles");
  const width = figure.clientWidth;
  const tiles = launch.work.flatMap(({ rows, row_slots, adapter_id }, s) =>
    range(row_slots / tile.rows).map((i) => ({
      s,
      adapter_id,
      used: Math.min(tile.rows, rows - i * tile.rows),
    })),
  );
  const drawn = [
    label(
      0,
      14,
      `Rows: ${count(tiles.length, "tile")} of ${count(tile.rows, "row")}, ` +
        `${number(f.rows)} of ${number(f.row_slots)} places taken`,
      "strong",
    ),
  ];
  let y = 26 + row_tiles(tiles, tile.rows, width, 26, drawn);
  const columns = `Columns of ${launch.shrinks ? "v" : "y"}: ${number(launch.width)}`;
  const products = `Products per sum (K): ${number(launch.k)}`;
  for (const [name, used, slots, pieces, word] of [
    [columns, launch.width, tile.column_slots, tile.columns, "tile"],
    [products, launch.k, tile.k_slots, tile.splits, "split"],
  ]) {
    const text = `${name} of ${number(slots)}${pieces > 1 ? `, ${count(pieces, word)}` : ""}`;
    drawn.push(label(0, y + 16, text, "strong"), ...room(0, y + 24, width, 18));
    drawn.push(box(0, y + 24, (width * used) / slots, 18, { class: "used" }));
    const apart = width / pieces;
    for (let i = 1; i < pieces && apart >= 4; i += 1) {
      drawn.push(line(i * apart, y + 24, i * apart, y + 42, "cut"));
    }
    y += 54;
  }
  if (f.early_exits) {
    const leave = `${number(f.early_exits)} of ${count(f.blocks, "block")} hold no tile`;
    drawn.push(label(0, y + 14, `${leave}: they leave at once`, "quiet"));
    y += 24;
  }
  const told_lanes = `${share(f.useful_lanes, f.lanes)} of all lanes are useful.`;
  picture(
    figure,
    y,
    `${tiles.length} tiles of ${tile.rows} rows hold ${f.rows} rows; ${told_lanes}`,
    ...drawn,
  );
}

const room = (x, y, wide, tall) =>
  ["room", "waste"].map((kind) => box(x, y, wide, tall, { class: kind }));

// Tiles side by side, filled from above as far as they hold rows; returns the height they take.
function row_tiles(tiles, rows, width, top, drawn) {
  const small = rows === 1;
  const [wide, tall, pitch, step, lines] = small ? [12, 12, 15, 16, 10] : [46, 52, 54, 88, 4];
  const per_line = Math.max(1, Math.floor((width + 4) / pitch));
  const first = tiles.slice(0, per_line * lines);
  first.forEach(({ s, adapter_id, used }, i) => {
    const x = (i % per_line) * pitch;
    const y = top + Math.floor(i / per_line) * step;
    const fill = colour(s)[0];
    drawn.push(
      ...room(x, y, wide, tall),
      box(x, y, wide, Math.max(1.5, (tall * used) / rows), { fill }),
    );
    if (small) return;
    drawn.push(
      label(x + wide / 2, y + tall + 14, `id ${adapter_id}`, "strong", "middle"),
      label(x + wide / 2, y + tall + 28, `${used}/${rows}`, "quiet", "middle"),
    );
  });
  const height = Math.ceil(first.length / per_line) * step + (small ? 6 : 0);
  if (first.length === tiles.length) return height;
  const more = `… and ${count(tiles.length - first.length, "more tile")}`;
  drawn.push(label(0, top + height + 10, more, "quiet"));
  return height + 24;
}

// --- roofline ---------------------------------------------------------------------------------

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
    x: (value) => left + between(value, POWERS.x) * (right - left),
    y: (value) => floor - between(value, POWERS.y) * (floor - top),
    roof: (intensity) => Math.min(device.fp16_peak, intensity * device.bandwidth),
  }; // prettier-ignore
  const intensity = (kind, rows) => {
    const segments = popularity(kind, rows).length;
    return traffic(rows, segments, launch.x_width, launch.k, launch.width).intensity;
  };
  const alike = (kind) => `${kind} with as many rows: ${significant(intensity(kind, f.rows || 1))}`;
  picture(
    figure,
    plot.low + 40,
    `Roofline of ${device.name}, ridge at ${significant(ridge)} FLOP per byte. ` +
      `This batch: ${significant(f.intensity)}. ${POPULARITIES.map(alike).join(", ")}.`,
    ...roof_axes(plot),
    ...roof_itself(plot, device, ridge),
    ...POPULARITIES.flatMap((kind, i) => popularity_drawn(plot, kind, i, intensity, f.rows || 1)),
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

function batch_drawn({ left, right, low, x, y, roof }, intensity, moving) {
  const [cx, cy] = [x(intensity), y(roof(intensity))];
  const point = shape("circle", { cx, cy, r: 8, class: "here" });
  const last = before?.figures.intensity;
  if (moving && last) moves_from(point, x(last) - cx, y(roof(last)) - cy);
  const text = `this batch: ${significant(intensity)}`;
  const named =
    cx > (left + right) / 2
      ? label(cx - 12, cy - 6, text, "strong", "end")
      : label(cx + 12, cy + 18, text, "strong");
  return [line(cx, cy, cx, low, "drop"), point, named];
}

// --- bytes ------------------------------------------------------------------------------------

function draw_bytes() {
  const { segments, values, launch, figures: f } = shown;
  const alike = Object.values(KERNELS)
    .map((kernel) => kernel(segments, values))
    .filter((each) => each.shrinks === launch.shrinks);
  now(
    "bytes-now",
    ({ figures: of }) =>
      `${kernel_name(of.kernel)}: ${bytes(of.bytes_read)} read, ${bytes(of.bytes_written)} written`,
    ({ figures: of }) =>
      `, ${significant((of.bytes_read + of.bytes_written) / of.io_bytes || 0)} times every operand once`,
  );
  const figure = $("bytes");
  const width = figure.clientWidth;
  const largest = most([f.io_bytes, ...alike.map((each) => each.bytes_read + each.bytes_written)]);
  const x = (value) => (largest ? (width * value) / largest : 0);
  const drawn = alike.flatMap((each, i) => {
    const y = 20 + 46 * i;
    const moved = each.bytes_read + each.bytes_written;
    const missing = each.unsupported.length ? " (no such kernel)" : "";
    const chosen = each.kernel === launch.kernel;
    const times = `${bytes(moved)}, ${significant(moved / f.io_bytes || 0)}×`;
    return [
      label(0, y, `${kernel_name(each.kernel)}${missing}`, chosen ? "strong" : ""),
      label(width, y, times, chosen ? "strong" : "quiet", "end"),
      box(0, y + 6, x(each.bytes_read), 16, { class: "read" }),
      box(x(each.bytes_read), y + 6, x(each.bytes_written), 16, { class: "written" }),
      line(x(f.io_bytes), y + 3, x(f.io_bytes), y + 25, "once"),
    ];
  });
  const low = 20 + 46 * alike.length;
  const told_bytes = (each) =>
    `${kernel_name(each.kernel)}: ${bytes(each.bytes_read)} read, ${bytes(each.bytes_written)} written`;
  picture(
    figure,
    low + 8,
    `${alike.map(told_bytes).join("; ")}. Every operand once: ${bytes(f.io_bytes)}.`,
    ...drawn,
    label(Math.min(x(f.io_bytes), width - 260), low, `once: ${bytes(f.io_bytes)}`, "quiet"),
    box(width - 128, low - 9, 12, 10, { class: "read" }),
    label(width - 112, low, "read", "quiet"),
    box(width - 72, low - 9, 12, 10, { class: "written" }),
    label(width - 56, low, "written", "quiet"),
  );
}

const ENGINES = {
  sgmv: "sgmv Segments", punica: "Punica", vllm_v1: "vLLM V1", sglang: "SGLang csgmv", lorax: "LoRAX",
}; // prettier-ignore

function draw_layouts() {
  const { segments, values } = shown;
  const lines = Object.entries(layouts(segments, values.ids, values)).flatMap(([engine, fields]) =>
    Object.entries(fields).map(([name, [dtype, held]], i) => [
      i ? "" : ENGINES[engine],
      node("code", {}, name),
      dtype,
      BYTES[dtype] * held.length,
      node("code", {}, `[${some(held, 12)}]`),
    ]),
  );
  $("layouts").replaceChildren(table(["engine", "field", "type", "bytes", "values"], lines));
}

// --- figures ----------------------------------------------------------------------------------

function value_told(value) {
  if (Array.isArray(value)) return `[${some(value)}]`;
  if (typeof value !== "number") return value;
  return Number.isInteger(value) ? number(value) : significant(value);
}

function draw_figures() {
  const lines = Object.entries(shown.figures);
  $("figures").replaceChildren(
    table(
      ["figure", "value"],
      lines.map(([name, value]) => [node("code", {}, name), value_told(value)]),
    ),
  );
}
