// The answer: how much faster sgmv is in the cases chosen, and beside which noise; then each peer.
"use strict";

const peer_title = (peer) => DATA.peers[peer] ?? peer;

function noise_told({ busy }) {
  if (!busy.length) return "Nothing was timed.";
  const known = busy.filter((cores) => cores !== null);
  if (!known.length) return "The system did not say whether other processes ran.";
  const disturbed = noisy(busy, DATA.quiet);
  return (
    `Noise: other processes ran during ${number(disturbed)} of ${count(busy.length, "case")}, ` +
    `with more than ${DATA.quiet} cores; the most was ${Math.max(...known)} cores.`
  );
}

const undecided_told = ({ undecided }) =>
  undecided === null
    ? "Undecided: not known, as this record has no intervals."
    : `Undecided, with an interval that spans 1: ${count(undecided, "case")}.`;

function draw_verdict() {
  const { record, cases, variant, grid } = shown;
  const sums = against_closest(cases, variant);
  const kind = !sums ? "" : sums.geomean < 1 ? "fails" : sums.losses ? "warns" : "runs";
  $("verdict").className = `verdict ${kind}`;
  if (!sums) {
    $("verdict-title").textContent = cases.length
      ? "No peer ran in these cases."
      : "No case passes these filters.";
    $("verdict-body").replaceChildren(
      paragraph(`${record.name} has ${count(grid.cases.length, "case")}.`),
    );
    return;
  }
  const [ratio, where] = sums.worst;
  const [peer] = closest(where, variant);
  const over = count(sums.cases, "case");
  $("verdict-title").textContent =
    `${fixed(sums.geomean, 2)} times as fast as the closest peer, over ${over}`;
  $("verdict-body").replaceChildren(
    paragraph(
      `Geometric mean of each case’s lowest ratio, peer’s time / sgmv’s time with ` +
        `${count(Number(variant.slice(5)), "thread")}. ` +
        `sgmv is slower in ${count(sums.losses, "case")}; ` +
        `the worst is ${ratio_text([ratio])} against ${peer_title(peer)}: ${where.name}. ` +
        undecided_told(sums),
    ),
    node("p", { class: "help" }, source_told(record)),
    node("p", { class: "help" }, noise_told({ busy: cases.map(({ foreign }) => foreign) })),
  );
}

function source_told({ name, machine, date, commit, versions, grid }) {
  const built = ["numpy", "numba", "torch", "mkl"]
    .filter((part) => versions[part])
    .map((part) => `${part} ${versions[part]}${part === "numpy" && grid ? ` (${grid.blas})` : ""}`);
  const left_out = grid ? `; ${count(Object.keys(grid.untimed).length, "case")} left out` : "";
  const run = `${machine_name(machine)}, ${date.slice(0, 10)}, commit ${commit}`;
  return `${name}: ${run}; ${built.join(", ")}${left_out}.`;
}

// A figure for each float type, as ratios of one say nothing of another.
function draw_summary() {
  const { cases, variant } = shown;
  const types = distinct(cases.map(({ dtype }) => dtype))
    .sort()
    .reverse(); // float32 first
  const parts = types.map((dtype) => [
    dtype,
    summary(
      cases.filter((each) => each.dtype === dtype),
      variant,
      Object.keys(DATA.peers),
    ),
  ]);
  const drawn = parts.filter(([, lines]) => lines.length);
  $("summary").replaceChildren(
    ...drawn.flatMap(([dtype]) => [
      node("h3", {}, dtype),
      node("figure", { id: `summary-${dtype}` }),
    ]),
  );
  for (const [dtype, lines] of drawn) {
    const words = (sums) =>
      `${ratio_text([sums.geomean])}, slower in ${sums.losses} of ${number(sums.cases)}`;
    draw_spread(
      `summary-${dtype}`,
      lines.map(([peer, sums]) => [peer_title(peer), sums, words(sums)]),
      ["the peer is faster", "sgmv is faster"],
      `${dtype}: ratio of each peer’s time to sgmv’s. ` +
        lines.map(([peer, sums]) => `${peer_title(peer)}: ${words(sums)}`).join("; "),
    );
  }
  legend("summary-legend", drawn.length ? SPREAD_LEGEND.map(copied) : []);
  $("summary-table").replaceChildren(
    text_table({
      head: [
        "peer",
        "type",
        "worst case",
        "geometric mean",
        "worst",
        "best",
        "slower",
        "undecided",
        "cases",
      ],
      left: 3,
      rows: drawn.flatMap(([dtype, lines]) =>
        lines.map(([peer, sums]) => [
          peer_title(peer),
          dtype,
          sums.worst[1].name,
          ratio_text([sums.geomean]),
          ratio_text([sums.worst[0]]),
          ratio_text([sums.best[0]]),
          sums.losses,
          sums.undecided ?? "–",
          sums.cases,
        ]),
      ),
    }),
  );
}

const copied = ([meaning, ...marks]) => [meaning, ...marks.map((each) => each.cloneNode(true))];
