// What records say, in figures. Nothing in this file draws or knows of the page:
// tests/page/test_report.py holds its figures equal to those of benchmarks/ in Python.
"use strict";

const ONE_ROW = "one row"; // the popularity of a batch of one row
const KINDS = [ONE_ROW, "distinct", "uniform", "skewed", "identical"]; // others come after these
const [LOSS, UNDECIDED] = ["!", "~"];

const range = (count) => Array.from({ length: count }, (_, i) => i);
const distinct = (values) => [...new Set(values)];

// The fields that a case of the page's data begins with, in the order of write.py; after them come
// shares, times, ratios and skipped.
const FIELDS = [
  ...["h_in", "h_out", "names", "rank", "rows", "popularity", "dtype", "S"],
  ...["footprint", "flops", "foreign"],
];

// A record of the grid as the page's data has it, its cases by name of their fields.
function unpacked(grid) {
  const cases = grid.cases.map((values) => {
    const [shares, times, ratios, skipped] = values.slice(FIELDS.length);
    const found = {
      ...Object.fromEntries(FIELDS.map((field, i) => [field, values[i]])),
      shares,
      ratios,
      times: {},
      skipped: Object.fromEntries(
        Object.entries(skipped).map(([peer, why]) => [peer, grid.reasons[why]]),
      ),
    };
    found.names = grid.names[found.names];
    grid.variants.forEach((variant, i) => {
      if (times[i].length) found.times[variant] = times[i];
    });
    found.name = case_name(found);
    return found;
  });
  return { ...grid, cases };
}

// The popularities of these cases, in one order for all records.
function popularities_of(cases) {
  const place = (kind) => (KINDS.includes(kind) ? KINDS.indexOf(kind) : KINDS.length);
  const found = distinct(cases.map(({ popularity }) => popularity));
  return found.sort((a, b) => place(a) - place(b));
}

function case_name({ h_in, h_out, rank, rows, popularity, dtype }) {
  const name = `${h_in}>${h_out} r=${rank} n=${rows} ${popularity}`;
  return dtype === "float32" ? name : `${name} ${dtype}`;
}

const median = ([, q50]) => q50;
const is_loss = ([ratio]) => ratio < 1;
const is_undecided = ([, low, high]) => low !== undefined && low <= 1 && 1 <= high;

// sgmv's variant with as many threads, or with the most that the record has.
function variant_of(grid, threads) {
  const most = Math.max(...grid.threads);
  return `sgmv@${grid.threads.includes(Number(threads)) ? threads : most}`;
}

const geomean = (values) =>
  Math.exp(values.reduce((sum, value) => sum + Math.log(value), 0) / values.length);

// Between the two nearest of the sorted values.
function quantile(sorted, part) {
  const place = part * (sorted.length - 1);
  const below = Math.floor(place);
  const above = Math.min(below + 1, sorted.length - 1);
  return sorted[below] + (place - below) * (sorted[above] - sorted[below]);
}

// Sums over [ratio, case, low, high], null where there is none; `worst` and `best` are two of them.
function spread(found) {
  if (!found.length) return null;
  const by_ratio = (a, b) => a[0] - b[0] || (a[1].name < b[1].name ? -1 : 1);
  const sorted = [...found].sort(by_ratio);
  const values = sorted.map(([ratio]) => ratio);
  const with_interval = found.filter(([, , low]) => low !== undefined);
  return {
    cases: found.length,
    losses: values.filter((ratio) => ratio < 1).length,
    undecided: with_interval.length
      ? with_interval.filter(([ratio, , ...interval]) => is_undecided([ratio, ...interval])).length
      : null, // older records have no intervals
    geomean: geomean(values),
    quarters: [quantile(values, 0.25), quantile(values, 0.75)],
    worst: sorted[0],
    best: sorted[sorted.length - 1],
  };
}

// One sum for each peer, in the order given, of the cases in which it ran.
function summary(cases, variant, peers) {
  const of_peer = (peer) =>
    spread(
      cases
        .filter((each) => each.ratios[variant]?.[peer])
        .map((each) => {
          const [ratio, ...interval] = each.ratios[variant][peer];
          return [ratio, each, ...interval];
        }),
    );
  return peers.map((peer) => [peer, of_peer(peer)]).filter(([, sums]) => sums);
}

// The peer that came closest in a case, with its ratio and interval; null where no peer ran.
function closest(each, variant) {
  const ratios = Object.entries(each.ratios[variant] ?? {});
  const nearest = (a, b) => (b[1][0] < a[1][0] ? b : a);
  return ratios.length ? ratios.reduce(nearest) : null;
}

// The same sums, of each case's closest peer.
function against_closest(cases, variant) {
  const found = cases.map((each) => [each, closest(each, variant)]).filter(([, near]) => near);
  return spread(found.map(([each, [, [ratio, ...interval]]]) => [ratio, each, ...interval]));
}

const noisy = (busy, quiet) => busy.filter((cores) => cores !== null && cores > quiet).length;

// The cases of the shape, rank and type with the most; of equals, rank 16 and squares first.
function hub(cases) {
  const key = (c) => [c.h_in, c.h_out, c.rank, c.dtype, c.names[0]].join();
  const groups = new Map();
  for (const each of cases) groups.set(key(each), [...(groups.get(key(each)) ?? []), each]);
  const order = (group) => {
    const [{ rank, h_in, h_out }] = group;
    return [group.length, Number(rank === 16), Number(h_in === h_out), -h_in];
  };
  const later = (one, other) => {
    const [a, b] = [order(one), order(other)];
    const i = range(a.length).find((place) => a[place] !== b[place]);
    return i !== undefined && b[i] > a[i] ? other : one;
  };
  return groups.size ? [...groups.values()].reduce(later) : [];
}

// The cases of both, [one, other], in the order of the first.
function in_both(cases, others) {
  const known = new Map(others.map((each) => [each.name, each]));
  return cases.filter(({ name }) => known.has(name)).map((each) => [each, known.get(each.name)]);
}

// Times of the other / times of the one at the median: above 1, the one is faster.
function beside_sums(pairs, variant, other_variant) {
  const ratios = pairs
    .filter(([one, other]) => one.times[variant] && other.times[other_variant])
    .map(([one, other]) => [median(other.times[other_variant]) / median(one.times[variant]), one]);
  return spread(ratios);
}

// As Python writes it: a tie goes to the even digit.
function fixed(value, digits) {
  const scaled = value * 10 ** digits;
  const tie = Number.isInteger(value * 8) && Math.abs(scaled % 1) === 0.5;
  return (tie ? (2 * Math.round(scaled / 2)) / 10 ** digits : value).toFixed(digits);
}

const ratio_digits = (ratio) => (ratio < 10 ? 2 : ratio < 100 ? 1 : 0);

function ratio_text([ratio, low, high]) {
  const digits = ratio_digits(ratio);
  const mark = is_undecided([ratio, low, high]) ? UNDECIDED : is_loss([ratio]) ? LOSS : "";
  return `${fixed(ratio, digits)}x${mark}`;
}

const microseconds = (value) => fixed(value, value < 10 ? 2 : value < 100 ? 1 : 0);
const percent = (share) => `${fixed(100 * share, 0)}%`;
