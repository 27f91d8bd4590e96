// Segments, and the popularities of Punica's paper (section 7). This and the files of the kernels have
// sgmv's names and integers: tests/page holds every figure equal to Python's. Nothing in them
// knows of the page.
"use strict";

const BASE_ONLY = -1;
const HALF = 2;
const SINGLE = 4; // bytes

const ceil_div = (a, b) => Math.ceil(a / b);
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const most = (numbers) => numbers.reduce((largest, number) => Math.max(largest, number), 0);
const range = (count) => Array.from({ length: count }, (_, i) => i);

function segment(adapter_ids) {
  const rows = range(adapter_ids.length).sort((a, b) => adapter_ids[a] - adapter_ids[b] || a - b);
  const seq_start = [];
  const ids = [];
  rows.forEach((row, p) => {
    if (p === 0 || adapter_ids[row] !== ids[ids.length - 1]) {
      seq_start.push(p);
      ids.push(adapter_ids[row]);
    }
  });
  seq_start.push(rows.length);
  return { rows, seq_start, adapter_ids: ids, n: rows.length, S: ids.length };
}

const POPULARITIES = ["distinct", "uniform", "skewed", "identical"];
const RATIO = 1.5; // of the sizes of neighbouring segments, skewed

// Rows of each adapter, the most popular first.
function popularity(kind, n) {
  if (kind === "distinct") return Array(n).fill(1);
  if (kind === "identical") return [n];
  if (kind === "uniform") {
    const adapters = Math.ceil(Math.sqrt(n));
    return range(adapters).map((i) => Math.floor(n / adapters) + (i < n % adapters ? 1 : 0));
  }
  const lengths = [];
  let left = n;
  for (let size = 1; Math.floor(size) < left; size *= RATIO) {
    lengths.push(Math.floor(size));
    left -= Math.floor(size);
  }
  return [...lengths, left].sort((a, b) => b - a);
}
