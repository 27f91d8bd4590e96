// What can be measured of how a page looks; `examined` of tests/help/explored.py runs it in the page.
// Each function returns what is wrong, in words.
"use strict";

const channels = (text) => {
  const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
  return [r, g, b, a];
};
const over = ([r, g, b, a], ground) => [...[r, g, b].map((v, i) => v * a + ground[i] * (1 - a)), 1];
const light = (colour) =>
  colour
    .slice(0, 3)
    .map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum_of, v, i) => sum_of + v * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (one, other) => {
  const [a, b] = [light(one), light(other)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
};

function opacity_of(element) {
  let all = 1;
  for (let each = element; each; each = each.parentElement) all *= getComputedStyle(each).opacity;
  return all;
}

function ground_of(element) {
  if (!element) return [255, 255, 255, 1];
  const own = channels(getComputedStyle(element).backgroundColor);
  return own[3] === 1 ? own : over(own, ground_of(element.parentElement));
}

const faded = (colour, element) => [...colour.slice(0, 3), colour[3] * opacity_of(element)];
const visible = (element) => element.checkVisibility({ visibilityProperty: true });
const drawn = (selector) => [...document.querySelectorAll(selector)].filter(visible);

// A pattern's colour is its lines'.
function paint(element, what) {
  const value = getComputedStyle(element)[what];
  const pattern = /url\("?#([\w-]+)/.exec(value);
  if (pattern) return paint(document.getElementById(pattern[1]).firstElementChild, "fill");
  return value === "none" ? null : faded(channels(value), element);
}

// Text of the page outside drawings: at least 4.5 to 1.
function faint_texts() {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || element.closest("svg, script, select, :disabled") || !visible(element)) continue;
    const ground = ground_of(element);
    const ratio = contrast(
      over(faded(channels(getComputedStyle(element).color), element), ground),
      ground,
    );
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${text.slice(0, 40)}`);
  }
  for (const control of drawn("select:enabled, input:enabled, textarea:enabled")) {
    const ratio = contrast(channels(getComputedStyle(control).color), ground_of(control));
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${control.id}`);
  }
  return found;
}

// Text of the drawings, over whatever is drawn below it.
function faint_labels() {
  const found = [];
  for (const text of drawn("figure text")) {
    const { x, y, width, height } = text.getBBox();
    const middle = new DOMPoint(x + width / 2, y + height / 2);
    const panel = ground_of(text.closest("figure"));
    const grounds = [panel];
    for (const shape_of of text.ownerSVGElement.querySelectorAll("rect, path, circle")) {
      if (!(shape_of.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING)) continue;
      if (!shape_of.isPointInFill(middle)) continue;
      const colour_of = paint(shape_of, "fill");
      if (!colour_of) continue;
      const patterned = getComputedStyle(shape_of).fill.startsWith("url");
      if (!patterned) grounds.length = 0;
      grounds.push(over(colour_of, panel));
    }
    const own = over(paint(text, "fill"), panel);
    const ratio = Math.min(...grounds.map((ground) => contrast(own, ground)));
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${text.textContent}`);
  }
  return found;
}

// Shapes that mean something, and the edges of controls: at least 3 to 1 by fill or by stroke.
function faint_shapes() {
  const found = [];
  const meant = "rect, path, circle, line";
  const aside = ".grid, .veil, .cut, .added, defs *";
  for (const element of drawn(`figure :is(${meant}), .legend :is(${meant})`)) {
    if (element.matches(aside)) continue;
    const panel = ground_of(element.closest("section"));
    const paints = ["fill", "stroke"].map((what) => paint(element, what)).filter(Boolean);
    const ratio = Math.max(
      0,
      ...paints.map((colour_of) => contrast(over(colour_of, panel), panel)),
    );
    if (ratio < 3) found.push(`${ratio.toFixed(2)} ${element.outerHTML.slice(0, 120)}`);
  }
  for (const element of drawn(
    "button:enabled, select, textarea, input:not([type=range]), .stories a, .chip",
  )) {
    const style = getComputedStyle(element);
    const edge = element.matches(".chip") ? style.backgroundColor : style.borderTopColor;
    const ground = ground_of(element.parentElement);
    const ratio = contrast(over(channels(edge), ground), ground);
    if (ratio < 3) found.push(`${ratio.toFixed(2)} ${element.id || element.textContent}`);
  }
  return found;
}

const inside = (box_of, by) => ({
  left: box_of.left + by, right: box_of.right - by, top: box_of.top + by, bottom: box_of.bottom - by,
}); // prettier-ignore
const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

// Texts of a drawing upon each other, or struck through by a line.
function overlaps() {
  const found = [];
  for (const svg of drawn("figure svg")) {
    const texts = [...svg.querySelectorAll("text")].map((text) => ({
      text: text.textContent,
      // a line of text is higher than its letters
      at: (({ left, right, top, bottom }) => ({
        left,
        right,
        top: top + 2.5,
        bottom: bottom - 2.5,
      }))(text.getBoundingClientRect()),
    }));
    texts.forEach(({ text, at }, i) => {
      for (const other of texts.slice(i + 1)) {
        if (meet(at, other.at)) found.push(`“${text}” and “${other.text}”`);
      }
      for (const stroke of svg.querySelectorAll("line:not(.grid, .cut, .cursor, .drop)")) {
        if (meet(inside(at, 1), inside(stroke.getBoundingClientRect(), -0.1))) {
          found.push(`“${text}” and a line ${stroke.getAttribute("class")}`);
        }
      }
    });
  }
  return found;
}

// Rings around what has the focus, cut off by a box that scrolls.
function clipped_rings() {
  const found = [];
  for (const element of drawn(
    "a, button:enabled, select, input:enabled, textarea, summary, .scroll",
  )) {
    element.focus();
    element.scrollIntoView({ block: "center" });
    const style = getComputedStyle(element);
    const wide = 3 + parseFloat(style.outlineOffset);
    const ring = inside(element.getBoundingClientRect(), -wide);
    for (
      let box_of = element.parentElement;
      box_of !== document.body;
      box_of = box_of.parentElement
    ) {
      if (getComputedStyle(box_of).overflowY === "visible") continue;
      const edge = box_of.getBoundingClientRect();
      const cut =
        ring.left < edge.left - 0.5 || ring.right > edge.right + 0.5 ||
        ring.top < edge.top - 0.5 || ring.bottom > edge.bottom + 0.5; // prettier-ignore
      if (cut) found.push(element.id || element.textContent.slice(0, 30));
    }
  }
  return found;
}

// Cells of tables that stand beyond the box in which the table scrolls.
function hidden_cells() {
  for (const each of document.querySelectorAll("details")) each.open = true;
  return drawn(".scroll").flatMap((box_of) =>
    [...box_of.querySelectorAll("td, th")]
      .filter(
        (cell) => cell.getBoundingClientRect().right > box_of.getBoundingClientRect().right + 1,
      )
      .map((cell) => cell.textContent.slice(0, 40)),
  );
}

// “1 rows” and its like, in what is seen and in what a screen reader hears.
function wrong_numbers() {
  const texts = drawn("p, li, h2, h3, text, .help").map((each) => each.textContent);
  texts.push(...drawn("[aria-label]").map((each) => each.getAttribute("aria-label")));
  return texts.flatMap(
    (text) => text.match(/(?<![\d.,~-])\b1 (?!ms\b)(?:more |thread )?[a-z]+s\b(?<!is)/g) ?? [],
  );
}

// Words that are used before the paragraph that defines them; `known` were defined before.
function undefined_words(known) {
  const paragraphs = drawn("header p, .answer p, .answer li, .panels p, .panels li");
  const defined = new Set(known);
  const early = [];
  for (const each of paragraphs) {
    for (const dfn of each.querySelectorAll("dfn")) {
      const word = dfn.textContent.replace(/ies$/, "y");
      defined.add(WORDS[word] ? word : word.replace(/s$/, ""));
    }
    for (const word of Object.keys(WORDS)) {
      const used = new RegExp(`(?<![\\w-])${word.replace(/y$/, "(?:y|ie)")}s?(?![\\w-])`).test(
        each.textContent,
      );
      if (used && !defined.has(word)) early.push(`${word}: ${each.textContent.slice(0, 60)}`);
    }
  }
  return { early, defined: [...defined] };
}
