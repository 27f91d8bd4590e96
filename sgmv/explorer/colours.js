// A colour for each adapter, by its place among the adapters: neighbours differ in hue and in
// lightness, and the first 64 all differ. Each is 3:1 against its ground, in both themes.
"use strict";

const TURN = 137.508; // degrees: the golden angle, so that hues spread whatever their number
const LIGHT = [0.16, 0.28, 0.06, 0.11]; // relative luminances on a light ground
const DARK = [0.24, 0.38, 0.15, 0.58]; // and on a dark one
const COLOURS_IN_ALL = 64; // from here on they come again

function rgb(hue, lightness) {
  const strength = 0.75 * Math.min(lightness, 1 - lightness);
  return [0, 8, 4].map((shift) => {
    const at = (shift + hue / 30) % 12;
    return Math.round(255 * (lightness - strength * Math.max(-1, Math.min(at - 3, 9 - at, 1))));
  });
}

const linear = (value) => (value <= 10.3 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4);
const luminance = (channels) =>
  channels.reduce((total, value, i) => total + linear(value) * [0.2126, 0.7152, 0.0722][i], 0);

function of_luminance(hue, wanted) {
  let [low, high] = [0, 1];
  for (let i = 0; i < 12; i += 1) {
    const half = (low + high) / 2;
    if (luminance(rgb(hue, half)) < wanted) low = half;
    else high = half;
  }
  return `rgb(${rgb(hue, low).join(" ")})`;
}

const ink_on = (wanted) => (wanted > 0.18 ? "#000" : "#fff"); // at least 4.5:1

// [fill, ink], in CSS that follows the theme.
function made(place) {
  const hue = (205 + TURN * place) % 360;
  const [light, dark] = [LIGHT[place % LIGHT.length], DARK[place % DARK.length]];
  return [
    `light-dark(${of_luminance(hue, light)}, ${of_luminance(hue, dark)})`,
    `light-dark(${ink_on(light)}, ${ink_on(dark)})`,
  ];
}

const COLOURS = range(COLOURS_IN_ALL).map(made);
const BASE_COLOUR = ["var(--base)", "var(--base-ink)"];
const colour = (s) => (s === null ? BASE_COLOUR : COLOURS[s % COLOURS.length]);
