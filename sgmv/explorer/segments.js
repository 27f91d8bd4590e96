// The panel of rows and segments: where each row of x comes from and is sorted to.
"use strict";

// A panel's sentence on this batch; the gist of it for the batch before, where that was another.
function now(id, gist, rest = () => "") {
  const last = before && gist(before) !== gist(shown) ? ` Before: ${gist(before)}.` : "";
  $(id).replaceChildren(`${gist(shown)}${rest(shown)}.`, node("span", { class: "before" }, last));
}

const STRIP = { top: 20, tall: 26, low: 98 }; // the rows as they came, and where the sorted ones are

function draw_segments(moving) {
  const { segments, launch } = shown;
  const { n, S, seq_start, adapter_ids } = segments;
  const bases = S - adapters_of(launch).length; // segments without an adapter: none, or the first
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
    `${count(n, "row")} sorted into ${count(S, "segment")}. seq_start: ${some(seq_start)}.`,
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
function segment_drawn(segments, s, cell, place, moving) {
  const { rows, seq_start } = segments;
  const { top, tall, low } = STRIP;
  const positions = range(seq_start[s + 1] - seq_start[s]).map((i) => seq_start[s] + i);
  const links = positions.map((p) =>
    curve((rows[p] + 0.5) * cell, top + tall + 2, (p + 0.5) * cell, low - 2),
  );
  const width = Math.max(0.6, Math.min(2.5, cell / 4));
  const path = { d: links.join(""), class: "link", "stroke-width": width };
  return {
    cells:
      cell < 6
        ? strips_drawn(segments, positions, cell, place)
        : cells_drawn(segments, s, positions, cell, place, moving),
    links: shape("path", { ...path, style: `stroke:${colour(place)[0]}` }),
  };
}

function cells_drawn({ n, rows, adapter_ids }, s, positions, cell, place, moving) {
  const { top, tall, low } = STRIP;
  const ink = colour(place)[1];
  return positions.flatMap((p) => {
    const square = (at, y, text) =>
      shape(
        "g",
        {},
        box(at * cell, y, cell - 1, tall, { style: fill(place) }),
        text === null ? null : label((at + 0.5) * cell, y + 18, text, "", "middle", ink),
      );
    const own = `${adapter_ids[s]}`;
    const sorted = square(p, low, cell >= 24 ? rows[p] : null);
    if (moving && n <= 256) moves_from(sorted, (rows[p] - p) * cell, top - low);
    return [square(rows[p], top, cell >= 18 && own.length * 8 < cell ? own : null), sorted];
  });
}

// Too narrow for a cell each: one shape for all rows of the segment.
function strips_drawn({ rows }, positions, cell, place) {
  const { top, tall, low } = STRIP;
  const came = positions.map(
    (p) => `M${(rows[p] * cell).toFixed(2)} ${top}h${cell}v${tall}h-${cell}z`,
  );
  return [
    shape("path", { d: came.join(""), style: fill(place) }),
    box(positions[0] * cell, low, positions.length * cell, tall, { style: fill(place) }),
  ];
}

function curve(x, y, to_x, to_y) {
  const half = (y + to_y) / 2;
  const [from, to] = [x.toFixed(1), to_x.toFixed(1)];
  return `M${from} ${y}C${from} ${half} ${to} ${half} ${to} ${to_y}`;
}

const LETTER = 7.5; // px: room for a letter of the drawings' text

// seq_start and the segments' names: of every segment, or of every second, fifth, tenth, … where
// they are equally long; else of those that have room.
function under_segments({ n, S, seq_start, adapter_ids }, cell, width) {
  const y = STRIP.low + STRIP.tall;
  const lengths = range(S).map((s) => seq_start[s + 1] - seq_start[s]);
  const even = most(lengths) - Math.min(...lengths) <= 1;
  const wide = (text) => String(text).length * LETTER + 6;
  const widest = (texts) => most(texts.map(wide));
  const pace = (n * cell) / S;
  const every = even_step((step) => step >= S || step * pace >= widest([...adapter_ids, n]));
  const drawn = [];
  let free = -Infinity;
  for (let s = 0; s < S; s += 1) {
    const [x, rows] = [seq_start[s] * cell, lengths[s]];
    const middle = x + (rows * cell) / 2;
    const half = wide(seq_start[s]) / 2;
    const aside = Math.max(0, free - (x - half)); // a little aside, rather than not at all
    const named = even ? s % every === 0 : aside < 16;
    drawn.push(line(x, y, x, y + (named ? 8 : 4), "axis"));
    if (named && x + aside + half < width - wide(n)) {
      const at = Math.max(x + (even ? 0 : aside), half - 3);
      drawn.push(label(at, y + 20, seq_start[s], "", "middle"));
      free = at + half;
    }
    const name = adapter(adapter_ids[s]);
    const fits = (text) => wide(text) <= rows * cell;
    const text = [`${name}, ${count(rows, "row")}`, name, `${adapter_ids[s]}`].find(fits);
    const short = even && every > 1 ? named && `${adapter_ids[s]}` : text;
    if (short && middle + wide(short) / 2 <= width + 6) {
      drawn.push(label(middle, y + 38, short, "strong", "middle"));
    }
  }
  const of_rows = cell >= 24 && width > 500 ? ": row of x at each position" : "";
  drawn.push(
    line(width, y, width, y + 8, "axis"),
    label(width, y + 20, n, "", "end"),
    label(0, y + 58, `sorted${of_rows}; below it seq_start, and the segments`, "quiet"),
  );
  return drawn;
}
