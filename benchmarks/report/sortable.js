// A table that is sorted by the column whose head is pressed, and shows its first rows at first.
"use strict";

const FIRST_ROWS = 50;

// columns: {key, head, about, value(row): number, text or null, cells(row): nodes or texts, left}
// chosen: {sort: key, "-" before it for the largest first; more: whether all rows are shown}
function draw_sortable(name, columns, rows, chosen, choose) {
  const down = chosen.sort.startsWith("-");
  const key = chosen.sort.replace(/^-/, "");
  const column = columns.find((each) => each.key === key);
  const sorted = column
    ? [...rows].sort((a, b) => in_order(column.value(a), column.value(b), down))
    : rows;
  const shown = chosen.more ? sorted : sorted.slice(0, FIRST_ROWS);
  const focused = document.activeElement?.dataset.key;
  const heads = columns.map((each) => {
    const current = each.key === key;
    const arrow = current ? (down ? " ▼" : " ▲") : "";
    const press = () => choose({ ...chosen, sort: current && !down ? `-${each.key}` : each.key });
    return node(
      "th",
      {
        scope: "col",
        class: each.left ? null : "number",
        "aria-sort": current ? (down ? "descending" : "ascending") : null,
      },
      node(
        "button",
        { type: "button", title: each.about, "data-key": `${name}-${each.key}`, click: press },
        each.head,
        arrow,
      ),
    );
  });
  const body = shown.map((row) =>
    node(
      "tr",
      {},
      ...columns.map((each, i) =>
        node(
          i ? "td" : "th",
          { scope: i ? null : "row", class: each.left ? null : "number" },
          ...each.cells(row),
        ),
      ),
    ),
  );
  const scroll = $(name);
  const place = scroll.scrollLeft;
  scroll.replaceChildren(
    node("table", {}, node("thead", {}, node("tr", {}, ...heads)), node("tbody", {}, ...body)),
  );
  if (place) scroll.scrollLeft = place;
  const more = $(`${name}-more`);
  more.hidden = rows.length <= FIRST_ROWS;
  more.textContent = chosen.more
    ? `Show the first ${FIRST_ROWS}`
    : `Show all ${number(rows.length)}`;
  more.onclick = () => choose({ ...chosen, more: !chosen.more });
  if (focused) document.querySelector(`[data-key="${focused}"]`)?.focus({ preventScroll: true });
}

// What is missing comes last, whichever way.
function in_order(a, b, down) {
  if (a === null || b === null) return Number(a === null) - Number(b === null);
  const order = a < b ? -1 : Number(a > b);
  return down ? -order : order;
}

const quiet = (...children) => node("span", { class: "quiet" }, ...children);

// The median, and below it the 20 % and 80 % quantiles.
const times_cells = (times) =>
  times
    ? [
        node("b", {}, microseconds(median(times))),
        quiet(`${microseconds(times[0])}–${microseconds(times[2])}`),
      ]
    : ["–"];
const ratio_kind = (ratio) => (is_undecided(ratio) ? "undecided" : is_loss(ratio) ? "loss" : "win");

const layer_column = (head, cells) => ({
  key: "layer",
  head,
  about: "h_in → h_out, and the first of the layers of this shape",
  left: true,
  value: (c) => c.h_in * 1e6 + c.h_out,
  cells,
});

const count_column = (key, head, about) => ({
  key,
  head,
  about,
  value: (c) => c[key],
  cells: (c) => [number(c[key])],
});

const CASE_COLUMNS = [
  layer_column("layer", (c) => [
    node("span", { title: c.names.join(", ") }, `${c.h_in} → ${c.h_out}`),
    quiet(c.names[0] + (c.names.length > 1 ? ` +${c.names.length - 1}` : "")),
  ]),
  count_column("rank", "r", "rank of the adapters"),
  count_column("rows", "n", "rows of the batch"),
  {
    key: "popularity",
    head: "popularity",
    about: "how the rows share the adapters",
    left: true,
    value: (c) => c.popularity,
    cells: (c) => [c.popularity, quiet(c.dtype)],
  },
  count_column("S", "S", "segments: adapters in the batch"),
];

// All of a case in its first column, for narrow windows.
const WHOLE_CASE = layer_column("case", (c) => [
  node("span", { title: c.names.join(", ") }, `${c.h_in} → ${c.h_out}, r ${c.rank}`),
  quiet(`n ${number(c.rows)}, ${c.popularity}`),
  quiet(c.dtype),
]);

// A case's own columns, then the figures. Where there is little room, the ratio comes first.
function columns_for(name, figures, ratio) {
  if ($(name).clientWidth >= 620) return [...CASE_COLUMNS, ...figures];
  const first = figures.filter(({ key }) => key === ratio);
  const others = figures.filter(({ key }) => key !== ratio);
  return [WHOLE_CASE, ...first, ...others, ...CASE_COLUMNS.slice(1)];
}
