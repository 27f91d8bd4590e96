// A colour for each adapter, by its place among the adapters: neighbours differ in hue and in
// lightness, and the first 64 all differ. Each is 3:1 against its ground, in both themes.
"use strict";

const TURN = 137.508; // degrees: the golden angle, so that hues spread whatever their number
const LIGHT = [0.16, 0.28, 0.06, 0.11]; // relative luminances on a light ground
const DARK = [0.24, 0.38, 0.15, 0.58]; // and on a dark one
const COLOURS_IN_ALL = 64; // from here on they come again

// Linear red, green and blue of a colour in OKLab (Ottosson), in which equal distances look alike.
function from_oklab(lightness, a, b) {
  const [l, m, s] = [
    lightness + 0.3963377774 * a + 0.2158037573 * b,
    lightness - 0.1055613458 * a - 0.0638541728 * b,
    lightness - 0.0894841775 * a - 1.291485548 * b,
  ].map((value) => value ** 3);
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
}

// As strong as the screen can show it, up to a limit.
function vivid(hue, lightness) {
  const turned = (hue * Math.PI) / 180;
  for (let chroma = 0.17; ; chroma -= 0.01) {
    const found = from_oklab(lightness, chroma * Math.cos(turned), chroma * Math.sin(turned));
    if (chroma <= 0 || found.every((value) => value >= 0 && value <= 1)) return found;
  }
}

const luminance = ([red, green, blue]) => 0.2126 * red + 0.7152 * green + 0.0722 * blue;
const channel = (value) =>
  Math.round(255 * (value <= 0.0031308 ? 12.92 * value : 1.055 * value ** (1 / 2.4) - 0.055));

function of_luminance(hue, wanted) {
  let [low, high] = [0, 1];
  for (let i = 0; i < 12; i += 1) {
    const half = (low + high) / 2;
    if (luminance(vivid(hue, half)) < wanted) low = half;
    else high = half;
  }
  return `rgb(${vivid(hue, low)
    .map((value) => channel(Math.max(0, Math.min(1, value))))
    .join(" ")})`;
}

const ink_on = (wanted) => (wanted > 0.18 ? "#000" : "#fff"); // at least 4.5:1

// [fill, ink], in CSS that follows the theme.
function made(place) {
  const hue = (250 + TURN * place) % 360;
  const [light, dark] = [LIGHT[place % LIGHT.length], DARK[place % DARK.length]];
  return [
    `light-dark(${of_luminance(hue, light)}, ${of_luminance(hue, dark)})`,
    `light-dark(${ink_on(light)}, ${ink_on(dark)})`,
  ];
}

const COLOURS = range(COLOURS_IN_ALL).map(made);
const BASE_COLOUR = ["var(--base)", "var(--base-ink)"];
const colour = (s) => (s === null ? BASE_COLOUR : COLOURS[s % COLOURS.length]);
