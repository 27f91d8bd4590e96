// The panel of tiles: how much of what is multiplied is of use.
"use strict";

function draw_tiles() {
  const { launch, figures: f } = shown;
  const { tile } = launch;
  const filled = launch.is_sorted === false ? 1 : tile.rows; // rows of a tile, where all are there
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
  const tiles = launch.work.flatMap(({ rows, row_slots, adapter_id, place, expert }, s) =>
    range(row_slots / tile.rows).map((i) => ({
      s: place ?? s,
      name: place === undefined ? short_id(adapter_id) : `e ${expert}`,
      used: Math.min(filled, rows - i * filled),
    })),
  );
  const cut = `Rows: ${count(tiles.length, "tile")} of ${count(tile.rows, "row")}`;
  const taken = `${cut}, ${number(f.rows)} of ${count(f.row_slots, "place")} taken`;
  const drawn = [label(0, 14, taken.length * LETTER < width ? taken : cut, "strong")];
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
    const verb = f.early_exits === 1 ? "finds" : "find";
    const leave = `${number(f.early_exits)} of ${count(f.blocks, "block")} ${verb} no tile`;
    drawn.push(label(0, y + 14, `${leave} and leave at once`, "quiet"));
    y += 24;
  }
  legend("tiles-legend", [
    ...adapters_meant(adapters_of(launch)),
    ["used", sample_of({ class: "used" })],
    ["zeros", sample_of({ class: "room" }), sample_of({ class: "waste" })],
  ]);
  const told_lanes = `${share(f.useful_lanes, f.lanes)} of all lanes are useful.`;
  picture(
    figure,
    y,
    `${count(tiles.length, "tile")} of ${count(tile.rows, "row")} hold ${count(f.rows, "row")}; ${told_lanes}`,
    ...drawn,
  );
}

const room = (x, y, wide, tall) =>
  ["room", "waste"].map((kind) => box(x, y, wide, tall, { class: kind }));

const short_id = (id) => (id < 10000 ? `id ${id}` : `…${id % 10000}`);

// Tiles side by side, filled from above as far as they hold rows; returns the height they take.
function row_tiles(tiles, rows, width, top, drawn) {
  const small = rows === 1;
  const [wide, tall, pitch, step, lines] = small ? [12, 12, 15, 16, 10] : [46, 52, 54, 88, 4];
  const per_line = Math.max(1, Math.floor((width + 4) / pitch));
  const first = tiles.slice(0, per_line * lines);
  first.forEach(({ s, name, used }, i) => {
    const x = (i % per_line) * pitch;
    const y = top + Math.floor(i / per_line) * step;
    drawn.push(
      ...room(x, y, wide, tall),
      box(x, y, wide, Math.max(1.5, (tall * used) / rows), { style: fill(s) }),
    );
    if (small) return;
    drawn.push(
      label(x + wide / 2, y + tall + 14, name, "strong", "middle"),
      label(x + wide / 2, y + tall + 28, `${used}/${rows}`, "quiet", "middle"),
    );
  });
  const height = Math.ceil(first.length / per_line) * step + (small ? 6 : 0);
  if (first.length === tiles.length) return height;
  const more = `… and ${count(tiles.length - first.length, "more tile")}`;
  drawn.push(label(0, top + height + 10, more, "quiet"));
  return height + 24;
}
