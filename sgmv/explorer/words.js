// The words of the page, in the order in which they are met.
"use strict";

const WORDS = {
  row: "one token of the batch: a row of x, and of y.",
  adapter: "two thin matrices, A (r, h_in) and B (h_out, r), that change what a layer does.",
  rank: "r, the number of columns between A and B; 8 to 128.",
  shrink: "the first half of SGMV: v = x Aᵀ.",
  v: "what shrink hands to expand: r numbers for each row.",
  expand: "the second half: y += v Bᵀ.",
  K: "the number of products in each sum: h_in in shrink, r in expand.",
  segment: "the rows of one adapter, side by side after sorting.",
  seq_start:
    "where each segment begins among the sorted rows; the number of rows stands at its end.",
  popularity:
    "how the rows share the adapters: distinct, an adapter per row; uniform, √n adapters with equal " +
    "shares; skewed, each 1.5 times as many rows as the next; identical, one adapter.",
  launch: "one call of a kernel, a function that runs on the GPU.",
  "thread block": "a group of threads that run on one SM and share its fast memory.",
  grid: "all thread blocks of a launch.",
  SM: "streaming multiprocessor, a core of the GPU; it holds a few blocks at once.",
  wave: "as many blocks as the GPU holds at once; more blocks than that take several waves.",
  tile: "what a block multiplies at a time: a fixed number of rows, columns and products.",
  lane: "the place of one product in a tile; useful if it holds no padding.",
  "split of K": "K cut into chunks, a block for each, so that more SMs have work.",
  tmp: "a scratch buffer in GPU memory, for the partial sums of the chunks.",
  barrier: "a point at which blocks wait; it opens when all blocks of the grid have come.",
  roofline:
    "the fastest that a GPU can be: the arithmetic’s time or the memory’s, the longer of the two.",
  FLOP: "a floating-point operation: one addition or one multiplication.",
  expert: "one of a layer’s feed-forward networks, of which each row goes through a few.",
  pair: "a row and one of its experts.",
};

function draw_words() {
  $("words-list").replaceChildren(
    ...Object.entries(WORDS).map(([word, meaning]) =>
      node("div", {}, node("dt", {}, word), node("dd", {}, meaning)),
    ),
  );
}
