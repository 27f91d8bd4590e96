// What drawings and texts are made of: numbers in words, nodes, legends.
"use strict";

const $ = (id) => document.getElementById(id);

const NUMBERS = new Intl.NumberFormat("en-US"); // toLocaleString would make one for each number
const number = (value) => NUMBERS.format(value);
const count = (value, word, plural = `${word}s`) =>
  `${number(value)} ${value === 1 ? word : plural}`;
const share = (part, whole) => {
  const percent = whole ? (100 * part) / whole : 0;
  return `${percent >= 10 || percent === 0 ? Math.round(percent) : percent.toPrecision(2)} %`;
};
const significant = (value) =>
  value >= 100 ? number(Math.round(value)) : String(Number(value.toPrecision(3)));
function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = value ? Math.min(units.length - 1, Math.floor(Math.log10(value) / 3)) : 0;
  return `${significant(value / 1000 ** power)} ${units[power]}`;
}
const adapter = (id) => (id === BASE_ONLY ? "base only" : `adapter ${id}`);
const kernel_name = (kernel) => $("kernel").querySelector(`[value=${kernel}]`).textContent;

const some = (values, largest = 16) =>
  [...values.slice(0, largest), ...(values.length > largest ? ["…"] : [])].join(", ");

function node(name, attributes = {}, ...children) {
  return filled_in(document.createElement(name), attributes, children);
}
function shape(name, attributes = {}, ...children) {
  return filled_in(
    document.createElementNS("http://www.w3.org/2000/svg", name),
    attributes,
    children,
  );
}
function filled_in(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
const box = (x, y, width, height, attributes = {}) =>
  shape("rect", { x, y, width: Math.max(width, 0), height: Math.max(height, 0), ...attributes });
const line = (x1, y1, x2, y2, kind) => shape("line", { x1, y1, x2, y2, class: kind });
const label = (x, y, text, kind = "", anchor = "start", ink = null) =>
  shape(
    "text",
    { x, y, class: kind, "text-anchor": anchor, style: ink && `fill:${ink}` },
    String(text),
  );

// Lets a shape come from so far away, unless the reader wants no motion.
function moves_from(element, x, y) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  element.animate([{ transform: `translate(${x}px, ${y}px)` }, { transform: "none" }], {
    duration: 600,
    easing: "ease-in-out",
  });
}

// An image of this size that says in words what it shows.
function picture(figure, height, told, ...children) {
  const width = figure.clientWidth;
  figure.replaceChildren(
    shape(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": told },
      ...children.filter(Boolean),
    ),
  );
}

function table(head, lines) {
  const cell = (tag) => (value) =>
    node(
      tag,
      typeof value === "number" ? { class: "number" } : {},
      value instanceof Node ? value : typeof value === "number" ? number(value) : String(value),
    );
  return node(
    "table",
    {},
    node("thead", {}, node("tr", {}, ...head.map((name) => node("th", { scope: "col" }, name)))),
    node(
      "tbody",
      {},
      ...lines.map(([first, ...rest]) =>
        node(
          "tr",
          {},
          filled_in(
            cell("th")(first),
            rest.length ? { scope: "row" } : { scope: "rowgroup", colspan: head.length },
            [],
          ),
          ...rest.map(cell("td")),
        ),
      ),
    ),
  );
}

const chip = (s) => node("span", { class: "chip", style: `background:${colour(s)[0]}` });

// Text with *defined words* and `names` in it, as nodes.
const prose = (text) =>
  text.split(/(\*[^*]+\*|`[^`]+`)/).map((part) => {
    if (part.startsWith("*")) return node("dfn", {}, part.slice(1, -1));
    return part.startsWith("`") ? node("code", {}, part.slice(1, -1)) : part;
  });
const paragraph = (...children) => node("p", {}, ...children);
const listed = (items) => node("ul", {}, ...items.map((item) => node("li", {}, ...[item].flat())));

// What a drawing's marks mean: a sample of each beside its meaning.
function legend(name, meanings) {
  const items = meanings.map(([meaning, ...marks]) => {
    const sample = shape("svg", { viewBox: "0 0 18 12", "aria-hidden": "true" }, ...marks);
    return node("li", {}, marks.length ? sample : null, meaning);
  });
  $(name).replaceChildren(...items);
}
const sample_of = (attributes) => box(0.5, 0.5, 17, 11, attributes);

// The colours of the adapters, the first few by name.
const adapters_meant = (work, most_named = 6) => [
  ...work
    .slice(0, most_named)
    .map(({ adapter_id }, s) => [adapter(adapter_id), sample_of({ style: fill(s) })]),
  ...(work.length > most_named
    ? [[`and ${count(work.length - most_named, "more adapter")}, a colour each`]]
    : []),
];
const fill = (s) => `fill:${colour(s)[0]}`;

// The smallest of 1, 2, 5, 10, 20, … that fits.
function even_step(fits) {
  for (let power = 1; ; power *= 10) {
    const found = [1, 2, 5].map((step) => step * power).find(fits);
    if (found) return found;
  }
}
