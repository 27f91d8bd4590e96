// Tables: the batch as each engine writes it down, and all figures of the launch.
"use strict";

const ENGINES = {
  sgmv: "sgmv Segments", punica: "Punica", vllm_v1: "vLLM V1", sglang: "SGLang csgmv", lorax: "LoRAX",
}; // prettier-ignore

// A long name may be broken after its underscores.
const name_shown = (name) =>
  node(
    "code",
    {},
    ...name
      .split(/(?<=_)/)
      .flatMap((part) => [node("wbr"), part])
      .slice(1),
  );

// One line for each engine's name, then one for each of its arrays.
function draw_layouts() {
  const { segments, values } = shown;
  const lines = Object.entries(layouts(segments, values.ids, values)).flatMap(
    ([engine, fields]) => [
      [node("b", {}, ENGINES[engine])],
      ...Object.entries(fields).map(([name, [dtype, held]]) => [
        name_shown(name),
        node("code", {}, `[${some(held, 12)}]`),
        `${dtype}, ${number(BYTES[dtype] * held.length)} B`,
      ]),
    ],
  );
  $("layouts").replaceChildren(table(["array", "values", "type, bytes"], lines));
}

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
      lines.map(([name, value]) => [name_shown(name), value_told(value)]),
    ),
  );
}
