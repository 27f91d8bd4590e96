// Panels: each draws one view of `shown`, the batch and launch of the controls, and says what to see.
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

function draw_verdict() {
  const { launch, figures: f } = shown;
  const [tone, title] = verdict(shown);
  const story =
    STORIES[[...$("stories").children].findIndex((b) => b.getAttribute("aria-pressed") === "true")];
  const lines = [];
  if (story) lines.push(node("p", {}, story[2]));
  if (launch.unsupported.length) {
    lines.push(
      listed(launch.unsupported),
      node("p", {}, "The panels show what it would be if there were."),
    );
  } else if (f.deadlock) lines.push(...why_it_hangs(launch));
  else if (f.faults.length) lines.push(listed(f.faults));
  if (launch.kernel === "punica_sgmv_shrink" && f.blocks && !launch.unsupported.length) {
    const chunks = ceil_div(launch.k, CHUNK);
    lines.push(
      node(
        "p",
        {},
        `${count(chunks, "chunk")} of K × ${count(f.S, "segment")} = ` +
          `${count(chunks * f.S, "block")}; ${f.device} holds ${number(f.capacity)} at once, so K is split for up to ` +
          `${count(f.split_k_segments, "segment")}.`,
      ),
    );
    if (f.shared_memory > WITHOUT_OPT_IN) {
      lines.push(
        node(
          "p",
          { class: "help" },
          `A block takes ${number(f.shared_memory)} bytes of shared memory here. ` +
            "Punica opts in to more than 48 KiB only after it has asked how many blocks fit; where CUDA then answers none, K is not split and nothing hangs.",
        ),
      );
    }
  } else if (f.blocks && f.capacity && !launch.unsupported.length) {
    lines.push(
      node(
        "p",
        {},
        `${count(f.blocks, "block")} of ${f.threads} threads` +
          (f.early_exits ? `, ${number(f.early_exits)} of which find nothing to do` : "") +
          `; ${f.device} holds ${number(f.capacity)} at once: ${count(f.waves, "wave")}.` +
          (f.deterministic
            ? ""
            : " Atomic additions come in any order: the last bits differ from run to run.") +
          (launch.kernel.startsWith("vllm") && shown.values.max_loras > state.max_loras
            ? ` max_loras is taken to be ${shown.values.max_loras}, as the batch names so many adapters.`
            : ""),
      ),
    );
  }
  $("verdict").className = `verdict ${tone}`;
  $("verdict-title").textContent = title;
  $("verdict-body").replaceChildren(...lines);
}

const listed = (texts) => node("ul", {}, ...texts.map((text) => node("li", {}, text)));

function why_it_hangs(launch) {
  const stuck = deadlock(launch);
  const by_barriers = new Map();
  launch.work.forEach((w, s) =>
    by_barriers.set(w.barriers, [...(by_barriers.get(w.barriers) ?? []), s]),
  );
  const reasons = [...by_barriers]
    .sort(([a], [b]) => a - b)
    .map(([barriers, members]) => {
      const few = members
        .slice(0, 4)
        .map((s) =>
          node(
            "span",
            {},
            chip(s),
            `${adapter(launch.work[s].adapter_id)}, ${count(launch.work[s].rows, "row")}`,
          ),
        );
      const named = few.flatMap((each, i) => (i ? ["; ", each] : [each]));
      return node(
        "li",
        {},
        ...named,
        members.length > 4 ? `; and ${members.length - 4} more` : "",
        `: ${count(barriers, "step")} of ${STEP_ROWS} rows, so ${members.length === 1 ? "its" : "each one’s"} blocks come to the barrier `,
        node("b", {}, barriers === 1 ? "once" : `${barriers} times`),
        ".",
      );
    });
  return [
    node(
      "p",
      {},
      "After each step the blocks meet at a barrier of the whole grid, to add up their chunks of K. It opens when ",
      node("b", {}, `all ${blocks_of(launch)} blocks`),
      " stand at it.",
    ),
    node("ul", {}, ...reasons),
    node(
      "p",
      {},
      "At barrier ",
      node("b", {}, stuck.barrier),
      `, ${count(stuck.waiting.length, "block")} wait for ` +
        `${count(stuck.returned.length, "block")} that returned after barrier ${stuck.barrier - 1}. These never come, nothing on the GPU notices, and the call never ends.`,
    ),
    node("p", {}, node("code", {}, told(stuck))),
    node(
      "p",
      {},
      node(
        "button",
        {
          type: "button",
          click: () => {
            controls_write({ release: "1.1.0" });
            update();
            $("release").focus();
          },
        },
        "Run it with release 1.1.0",
      ),
    ),
  ];
}

// --- rows into segments -----------------------------------------------------------------------

const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

function draw_segments(moving) {
  const { segments } = shown;
  const { n, S, rows, seq_start, adapter_ids } = segments;
  const base = segments.S - shown.launch.work.length;
  const of_segment = (s) => (s < base ? null : s - base);
  now(
    "segments-now",
    ({ segments: at }) => `${count(at.n, "row")} in ${count(at.S, "segment")}`,
    ({ segments: at }) => `: seq_start = [${written_some(at.seq_start)}]`,
  );
  const figure = $("segments");
  const width = figure.clientWidth;
  const cell = width / n;
  const gap = cell > 6 ? 1 : 0;
  const [top, tall, apart] = [20, 26, 52];
  const low = top + tall + apart;
  const came = [];
  const links = [];
  const sorted = [];
  const under = [];
  for (let s = 0; s < S; s += 1) {
    const [fill, ink] = colour(of_segment(s));
    let threads = "";
    for (let p = seq_start[s]; p < seq_start[s + 1]; p += 1) {
      const row = rows[p];
      const from = (row + 0.5) * cell;
      const to = (p + 0.5) * cell;
      came.push(box(row * cell, top, cell - gap, tall, { fill }));
      if (cell >= 18)
        came.push(
          label(from, top + 18, adapter_ids[s], { "text-anchor": "middle", style: `fill:${ink}` }),
        );
      threads += `M${from.toFixed(1)} ${top + tall + 2}C${from.toFixed(1)} ${top + tall + apart / 2} ${to.toFixed(1)} ${low - apart / 2} ${to.toFixed(1)} ${low - 2}`;
      const place = shape(
        "g",
        {},
        box(p * cell, low, cell - gap, tall, { fill }),
        cell >= 24
          ? label(to, low + 18, row, { "text-anchor": "middle", style: `fill:${ink}` })
          : null,
      );
      if (moving && n <= 256 && !still()) {
        place.animate(
          [
            { transform: `translate(${(row - p) * cell}px, ${-(tall + apart)}px)` },
            { transform: "none" },
          ],
          { duration: 600, easing: "ease-in-out" },
        );
      }
      sorted.push(place);
    }
    links.push(
      shape("path", {
        d: threads,
        fill: "none",
        stroke: fill,
        "stroke-width": Math.max(0.6, Math.min(2.5, cell / 4)),
        opacity: 0.65,
      }),
    );
  }
  let free = 0;
  for (let s = 0; s <= S; s += 1) {
    const x = seq_start[s] * cell;
    const wide = 8 * String(seq_start[s]).length + 6;
    under.push(line(x, low + tall, x, low + tall + 7, "axis"));
    const from = Math.max(free, x - wide / 2); // a little aside, rather than not at all
    if (s === S) under.push(label(width, low + tall + 20, n, { "text-anchor": "end" }));
    else if (from - x < 12 && from + wide < width - 8 * String(n).length) {
      under.push(label(from, low + tall + 20, seq_start[s]));
      free = from + wide;
    }
    if (s === S) break;
    const span = (seq_start[s + 1] - seq_start[s]) * cell;
    const names = [
      `${adapter(adapter_ids[s])}, ${count(seq_start[s + 1] - seq_start[s], "row")}`,
      adapter(adapter_ids[s]),
      `${adapter_ids[s]}`,
    ];
    const name = names.find((text) => text.length * 6.6 + 6 < span);
    if (name)
      under.push(
        label(x + span / 2, low + tall + 38, name, { "text-anchor": "middle", class: "strong" }),
      );
  }
  const told_rows = `${n} rows sorted into ${S} segments. seq_start: ${written_some(seq_start)}.`;
  picture(
    figure,
    low + tall + 66,
    told_rows,
    label(0, 12, cell >= 18 ? "x, rows as they came: adapter id of each" : "x, rows as they came", {
      class: "quiet",
    }),
    ...came,
    ...links,
    ...sorted,
    ...under,
    label(
      0,
      low + tall + 58,
      `sorted${cell >= 24 && width > 500 ? ": row of x at each position" : ""}; below it seq_start, and the segments`,
      { class: "quiet" },
    ),
  );
  $("segments-table").replaceChildren(
    table(
      ["segment", "adapter", "rows", "offsets"],
      range(S).map((s) => [
        node("span", {}, chip(of_segment(s)), String(s)),
        adapter(adapter_ids[s]),
        seq_start[s + 1] - seq_start[s],
        `${seq_start[s]}:${seq_start[s + 1]}`,
      ]),
    ),
  );
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
      `${number(of.width)} of ${number(of.tile.column_slots)} columns × ${number(of.k)} of ${number(of.tile.k_slots)} products`,
  );
  const figure = $("tiles");
  const width = figure.clientWidth;
  const children = [];
  const tiles = launch.work.flatMap((w, s) =>
    range(w.row_slots / tile.rows).map((i) => ({
      s,
      id: w.adapter_id,
      used: Math.min(tile.rows, w.rows - i * tile.rows),
    })),
  );
  const small = tile.rows === 1;
  const [wide, tall, pitch, step] = small ? [12, 12, 15, 16] : [46, 52, 54, 88];
  const per_line = Math.max(1, Math.floor((width + 4) / pitch));
  const drawn = tiles.slice(0, per_line * (small ? 10 : 4));
  children.push(
    label(
      0,
      14,
      `Rows: ${count(tiles.length, "tile")} of ${count(tile.rows, "row")}, ` +
        `${number(f.rows)} of ${number(f.row_slots)} places taken`,
      { class: "strong" },
    ),
  );
  let y = 26;
  drawn.forEach((each, i) => {
    const x = (i % per_line) * pitch;
    const at = y + Math.floor(i / per_line) * step;
    const filled_to = Math.max(1.5, (tall * each.used) / tile.rows);
    children.push(
      box(x, at, wide, tall, { class: "room" }),
      box(x, at, wide, tall, { class: "waste" }),
      box(x, at, wide, filled_to, { fill: colour(each.s)[0] }),
    );
    if (!small) {
      children.push(
        label(x + wide / 2, at + tall + 14, `id ${each.id}`, {
          "text-anchor": "middle",
          class: "strong",
        }),
        label(x + wide / 2, at + tall + 28, `${each.used}/${tile.rows}`, {
          "text-anchor": "middle",
          class: "quiet",
        }),
      );
    }
  });
  y += Math.ceil(drawn.length / per_line) * step + (small ? 6 : 0);
  if (drawn.length < tiles.length) {
    children.push(
      label(0, y + 10, `… and ${count(tiles.length - drawn.length, "more tile", "more tiles")}`, {
        class: "quiet",
      }),
    );
    y += 24;
  }
  const splits = tile.splits > 1 ? `, ${tile.splits} splits` : "";
  for (const [name, used, slots, pieces] of [
    [
      `Columns of ${launch.shrinks ? "v" : "y"}: ${number(launch.width)} of ${number(tile.column_slots)}, ${count(tile.columns, "tile")}`,
      launch.width,
      tile.column_slots,
      tile.columns,
    ],
    [
      `Products per sum (K): ${number(launch.k)} of ${number(tile.k_slots)}${splits}`,
      launch.k,
      tile.k_slots,
      tile.splits,
    ],
  ]) {
    children.push(
      label(0, y + 16, name, { class: "strong" }),
      box(0, y + 24, width, 18, { class: "room" }),
      box(0, y + 24, width, 18, { class: "waste" }),
      box(0, y + 24, (width * used) / slots, 18, { class: "used" }),
    );
    const pitch_of = width / pieces;
    if (pieces > 1 && pitch_of >= 4) {
      for (let i = 1; i < pieces; i += 1)
        children.push(line(i * pitch_of, y + 24, i * pitch_of, y + 42, "cut"));
    }
    y += 54;
  }
  if (f.early_exits) {
    children.push(
      label(
        0,
        y + 14,
        `${number(f.early_exits)} of ${count(f.blocks, "block")} hold no tile: they leave at once`,
        { class: "quiet" },
      ),
    );
    y += 24;
  }
  picture(
    figure,
    y,
    `${tiles.length} tiles of ${tile.rows} rows hold ${f.rows} rows; ${share(f.useful_lanes, f.lanes)} of all lanes are useful.`,
    ...children,
  );
}

// --- roofline ---------------------------------------------------------------------------------

function draw_roof(moving) {
  const { launch, figures: f } = shown;
  const { device, x_width, k, width: out } = launch;
  const at = (rows, segments) => traffic(rows, segments, x_width, k, out).intensity;
  const ridge = device.fp16_peak / device.bandwidth;
  now(
    "roof-now",
    ({ figures: of }) => `${significant(of.intensity)} FLOP per byte`,
    ({ figures: of, launch: { device: its } }) =>
      `: at best ${share(Math.min(of.intensity, ridge), ridge)} ` +
      `of the peak of ${its.name}, and at least ${significant(of.roofline_us)} µs`,
  );
  const figure = $("roof");
  const wide = figure.clientWidth;
  const [left, top, tall, lane] = [78, 12, 220, 24];
  const right = wide - 10;
  const [x0, x1, y0, y1] = [-1, 3, 10, 15.3]; // powers of ten
  const x = (value) => left + ((Math.log10(value) - x0) / (x1 - x0)) * (right - left);
  const y = (value) => top + tall - ((Math.log10(value) - y0) / (y1 - y0)) * tall;
  const roof = (intensity) => Math.min(device.fp16_peak, intensity * device.bandwidth);
  const children = [];
  for (let power = x0; power <= x1; power += 1) {
    children.push(
      line(x(10 ** power), top, x(10 ** power), top + tall + 4 * lane + 16, "grid"),
      label(x(10 ** power), top + tall + 4 * lane + 32, 10 ** power, {
        "text-anchor": power === x1 ? "end" : "middle",
        class: "quiet",
      }),
    );
  }
  for (const [power, name] of [
    [10, "10 G"],
    [12, "1 T"],
    [14, "100 T"],
  ]) {
    children.push(
      line(left, y(10 ** power), right, y(10 ** power), "grid"),
      label(left - 6, y(10 ** power) + 4, name, { "text-anchor": "end", class: "quiet" }),
    );
  }
  children.push(
    label(right, top + tall + 4 * lane + 48, "FLOP per byte", {
      "text-anchor": "end",
      class: "quiet",
    }),
    label(left + 6, top + 10, "FLOP/s", { class: "quiet" }),
    line(x(ridge), y(device.fp16_peak), x(ridge), top + tall, "ridge"),
    label(
      x(ridge) - 4,
      top + tall - 6,
      wide > 500 ? `ridge at ${significant(ridge)}` : significant(ridge),
      { "text-anchor": "end", class: "quiet" },
    ),
    shape("path", {
      class: "roofline",
      d: `M${x(0.1)} ${y(roof(0.1))}L${x(ridge)} ${y(device.fp16_peak)}H${right}`,
    }),
    label(
      right,
      y(device.fp16_peak) - 6,
      `${device.name}: ${significant(device.fp16_peak / 1e12)} TFLOP/s`,
      { "text-anchor": "end", class: "quiet" },
    ),
  );
  POPULARITIES.forEach((kind, i) => {
    const level = top + tall + 8 + lane * (i + 0.75);
    children.push(
      label(left - 6, level + 4, kind, {
        "text-anchor": "end",
        class: state.popularity === kind ? "strong" : "quiet",
      }),
    );
    const sizes = [1, 2, 4, 8, 16, 32, 64];
    const points = sizes.map((n) => x(at(n, popularity(kind, n).length)));
    children.push(line(points[0], level, points[points.length - 1], level, "axis"));
    points.forEach((cx) => children.push(shape("circle", { cx, cy: level, r: 3, class: "dot" })));
    const here = x(at(f.rows || 1, popularity(kind, f.rows || 1).length));
    children.push(
      shape(
        "circle",
        { cx: here, cy: level, r: 5, class: "dot at" },
        shape(
          "title",
          {},
          `${kind}, ${f.rows} rows: ${significant(at(f.rows || 1, popularity(kind, f.rows || 1).length))} FLOP per byte`,
        ),
      ),
    );
  });
  if (f.rows) {
    const [cx, cy] = [x(f.intensity), y(roof(f.intensity))];
    const point = shape("circle", { cx, cy, r: 8, class: "here" });
    if (moving && before?.figures.rows && !still()) {
      const last = before.figures.intensity;
      point.animate(
        [
          { transform: `translate(${x(last) - cx}px, ${y(roof(last)) - cy}px)` },
          { transform: "none" },
        ],
        { duration: 600, easing: "ease-in-out" },
      );
    }
    const side = cx > (left + right) / 2 ? ["end", -12] : ["start", 12];
    children.push(
      line(cx, cy, cx, top + tall + 4 * lane + 16, "drop"),
      point,
      label(
        cx + side[1],
        cy + (side[0] === "end" ? -6 : 18),
        `this batch: ${significant(f.intensity)}`,
        { "text-anchor": side[0], class: "strong" },
      ),
    );
  }
  picture(
    figure,
    top + tall + 4 * lane + 56,
    `Roofline of ${device.name}, ridge at ${significant(ridge)} FLOP per byte. This batch: ${significant(f.intensity)}. ` +
      POPULARITIES.map(
        (kind) =>
          `${kind} with as many rows: ${significant(at(f.rows || 1, popularity(kind, f.rows || 1).length))}`,
      ).join(", ") +
      ".",
    ...children,
  );
}

// --- bytes ------------------------------------------------------------------------------------

function draw_bytes() {
  const { segments, values, launch, figures: f } = shown;
  const all = Object.keys(KERNELS)
    .map((kernel) => KERNELS[kernel](segments, values))
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
  const largest = most([f.io_bytes, ...all.map((each) => each.bytes_read + each.bytes_written)]);
  const x = (value) => (largest ? (width * value) / largest : 0);
  const children = [];
  all.forEach((each, i) => {
    const y = 20 + 46 * i;
    const moved = each.bytes_read + each.bytes_written;
    const missing = each.unsupported.length ? " (no such kernel)" : "";
    children.push(
      label(0, y, `${kernel_name(each.kernel)}${missing}`, {
        class: each.kernel === launch.kernel ? "strong" : "",
      }),
      label(width, y, `${bytes(moved)}, ${significant(moved / f.io_bytes || 0)}×`, {
        "text-anchor": "end",
        class: each.kernel === launch.kernel ? "strong" : "quiet",
      }),
      box(0, y + 6, x(each.bytes_read), 16, { class: "read" }),
      box(x(each.bytes_read), y + 6, x(each.bytes_written), 16, { class: "written" }),
      line(x(f.io_bytes), y + 3, x(f.io_bytes), y + 25, "once"),
    );
  });
  const low = 20 + 46 * all.length;
  children.push(
    label(Math.min(x(f.io_bytes), width - 260), low, `once: ${bytes(f.io_bytes)}`, {
      class: "quiet",
    }),
    box(width - 128, low - 9, 12, 10, { class: "read" }),
    label(width - 112, low, "read", { class: "quiet" }),
    box(width - 72, low - 9, 12, 10, { class: "written" }),
    label(width - 56, low, "written", { class: "quiet" }),
  );
  picture(
    figure,
    low + 8,
    all
      .map(
        (each) =>
          `${kernel_name(each.kernel)}: ${bytes(each.bytes_read)} read, ${bytes(each.bytes_written)} written`,
      )
      .join("; ") + `. Every operand once: ${bytes(f.io_bytes)}.`,
    ...children,
  );
  draw_layouts();
}

const ENGINES = {
  sgmv: "sgmv Segments",
  punica: "Punica",
  vllm_v1: "vLLM V1",
  sglang: "SGLang csgmv",
  lorax: "LoRAX",
};

function draw_layouts() {
  const { segments, values } = shown;
  const lines = Object.entries(layouts(segments, values.ids, values)).flatMap(([engine, fields]) =>
    Object.entries(fields).map(([name, [dtype, held]], i) => [
      i ? "" : ENGINES[engine],
      node("code", {}, name),
      dtype,
      BYTES[dtype] * held.length,
      node("code", {}, `[${written_some(held, 12)}]`),
    ]),
  );
  $("layouts").replaceChildren(table(["engine", "field", "type", "bytes", "values"], lines));
}

function value_told(value) {
  if (Array.isArray(value)) return `[${written_some(value)}]`;
  if (typeof value !== "number") return value;
  return Number.isInteger(value) ? number(value) : significant(value);
}

function draw_figures() {
  $("figures").replaceChildren(
    table(
      ["figure", "value"],
      Object.entries(shown.figures).map(([name, value]) => [
        node("code", {}, name),
        value_told(value),
      ]),
    ),
  );
}
