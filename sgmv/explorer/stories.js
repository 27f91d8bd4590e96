// The path: each story answers one question, over a state of the controls that shows it.
"use strict";

const FIVE_ROWS = {
  popularity: "",
  kernel: "punica_sgmv_shrink",
  release: "1.1.0",
  device: "A100",
  versus: "",
  h_in: 4096,
  r: 16,
  h_out: 4096,
  max_loras: 8,
  max_lora_chunk_size: 16,
  experts: 8,
  top_k: 2,
  ids: "2, 0, -1, 2, 0",
};

const moved = ({ figures: f }) => f.bytes_read + f.bytes_written;
const steps = ({ timeline: { end } }) => count(Math.ceil(end), "step");

// `answer` makes paragraphs of what is shown and what is beside it; `see` is a panel further down.
const STORIES = [
  {
    title: "Five rows",
    question: "What is seq_start?",
    values: FIVE_ROWS,
    see: "segments",
    answer: () => [
      "Five rows came, for adapters 2, 0, none, 2 and 0. Sorted by adapter, rows of one adapter lie " +
        "side by side: each such run is a *segment*. *seq_start* = [0, 1, 3, 5] says where each " +
        "begins among the sorted rows: segment 1, of adapter 0, is rows 1 and 2, from seq_start[1] = 1 " +
        "up to seq_start[2] = 3, where the next one begins.",
      "Id -1 is the base model alone. Punica knows no such rows: nothing is added to them.",
    ],
  },
  {
    title: "Why sort",
    question: "Why sort the rows by adapter?",
    values: {
      ...FIVE_ROWS,
      popularity: "uniform",
      n: 64,
      kernel: "punica_cutlass_expand",
      versus: "unsorted",
    },
    answer: (sorted, unsorted) => [
      "A kernel reads an adapter’s weights at least once per segment, for a whole *tile* of " +
        `${count(sorted.launch.tile.rows, "row")}, however few the segment has. Unsorted, every change ` +
        `of adapter begins a new segment: ${count(sorted.figures.n, "row")} make ` +
        `${unsorted.figures.S} segments. Sorted they make ${sorted.figures.S}, one per adapter.`,
      `So sorting saves memory traffic and steps: ${bytes(moved(sorted))} of memory are read and written in place of ` +
        `${bytes(moved(unsorted))}, and the blocks take ${steps(sorted)} in place of ${steps(unsorted)}. ` +
        "Punica’s caller puts the rows of x in that order; vLLM and sgmv sort row numbers alone, and the " +
        "kernel looks up which row is meant.",
    ],
  },
  {
    title: "Why distinct is slow",
    question: "Why is a batch of distinct adapters slow?",
    values: {
      ...FIVE_ROWS,
      popularity: "distinct",
      n: 64,
      kernel: "punica_cutlass_expand",
      versus: "identical",
    },
    answer: (distinct, identical) => [
      "With an adapter of its own, every row brings a weight matrix that no other row uses. " +
        `${count(distinct.figures.n, "row")} read ${count(distinct.figures.S, "matrix", "matrices")}: ` +
        `${bytes(distinct.figures.io_bytes)}, where as many rows of one adapter need ` +
        `${bytes(identical.figures.io_bytes)} for the same arithmetic.`,
      "A GPU multiplies far faster than it reads. So memory sets the pace: at least " +
        `${significant(distinct.figures.roofline_us)} µs, in place of ` +
        `${significant(identical.figures.roofline_us)} µs. And each tile has room for ` +
        `${distinct.launch.tile.rows} rows but holds one: ` +
        `${share(distinct.figures.useful_lanes, distinct.figures.lanes)} of the products are useful.`,
    ],
  },
  {
    title: "Why split K",
    question: "Why split K?",
    values: { ...FIVE_ROWS, popularity: "uniform", n: 16, versus: "unsplit" },
    answer: (split, whole) => [
      `Shrink sums K = ${number(split.launch.k)} products for each of only ${split.launch.width} columns ` +
        "of v. One *thread block*, a group of threads that share fast memory, could do a whole segment. " +
        `But then only ${whole.figures.blocks} of the ${split.launch.device.sms} *SMs*, the GPU’s cores, ` +
        `would have work, for ${steps(whole)}.`,
      `Punica cuts K into ${split.figures.split_k} chunks, a block for each: ` +
        `${count(split.figures.blocks, "block")} on as many SMs, done after ${steps(split)}. The price: the blocks ` +
        "leave their partial sums in *tmp*, a scratch buffer in GPU memory, meet at a *barrier*, which " +
        "opens when all blocks have come, and only then add them up. So " +
        `${bytes(moved(split))} are read and written in place of ${bytes(moved(whole))}; caches spare ` +
        "part of it.",
    ],
  },
  {
    title: "Why [1, 132] hung",
    question: "Why did segments of 1 and 132 rows hang?",
    values: { ...FIVE_ROWS, ids: "1*50, 0, 1*82", release: "1.0.0", versus: "release" },
    answer: () => [
      "Before release 1.1.0 a block of Punica’s shrink came to the *barrier* once for every 64 rows of " +
        "its own segment, or part of them: once for 1 row, 3 times for 132. A barrier opens only when all blocks have " +
        "come, and the short segment’s blocks had already left: the others wait for ever. Watch barrier 2.",
    ],
  },
  {
    title: "…and its fix",
    question: "How was the hang mended?",
    values: { ...FIVE_ROWS, ids: "1*50, 0, 1*82", versus: "release" },
    answer: () => [
      "Since 1.1.0 every block comes to as many barriers as the longest segment needs. A block with no " +
        "rows left comes with nothing to add, and waits.",
    ],
  },
  {
    title: "The split-K cliff",
    question: "Why does one more adapter take ten times as many steps?",
    values: { ...FIVE_ROWS, popularity: "distinct", n: 28, versus: "fewer" },
    answer: (over, within) => [
      "Blocks that wait for each other must all be on the GPU at once. " +
        `${within.figures.S} segments × ${within.figures.split_k} chunks of K = ` +
        `${count(within.figures.blocks, "block")}, just what ${over.figures.device} holds. Segment ` +
        `${over.figures.S} is one too many, and the launch drops its split of K.`,
      `Now one block per segment sums all ${number(over.launch.k)} products: ` +
        `${steps(over)} on ${over.figures.blocks} SMs, in place of ${steps(within)} on ` +
        `${over.launch.device.sms}.`,
    ],
  },
  {
    title: "A race between blocks",
    question: "What can go wrong without hanging?",
    values: { ...FIVE_ROWS, popularity: "identical", n: 130 },
    answer: () => [
      "Beyond 64 rows a block takes several steps, and *tmp*, the scratch buffer of the partial sums, is " +
        "used again in each. A fast block may write its next sums to it while a slow one still reads " +
        "the last: no *barrier* stands between the two.",
    ],
  },
  {
    title: "Blocks with nothing to do",
    question: "What does a fixed grid cost?",
    values: {
      ...FIVE_ROWS,
      popularity: "skewed",
      n: 64,
      kernel: "vllm_v1_shrink",
      max_loras: 16,
      versus: "punica_sgmv_shrink",
    },
    answer: ({ figures: f }) => [
      "vLLM lays out its *grid*, the blocks of a launch, for the worst case, as if each slot might hold " +
        `all rows: ${number(f.early_exits)} of ${number(f.blocks)} blocks leave at once. Of those that work, with K = ${number(f.h_in)}, 48 of the 64 splits of K ` +
        "multiply zeros.",
    ],
  },
  {
    title: "Mostly zeros",
    question: "Why do few rows of many experts waste nearly everything?",
    values: {
      ...FIVE_ROWS,
      popularity: "uniform",
      n: 64,
      kernel: "vllm_moe_shrink",
      h_in: 2048,
      experts: 128,
      top_k: 8,
      versus: "identical",
    },
    see: "experts",
    answer: ({ figures: f, launch, segments }, { figures: one }) => [
      `In some layers each row goes through a few of many feed-forward networks, its *experts*: here ` +
        `through ${launch.top_k} of ${launch.experts}. An adapter has an A and a B for each of them. So two ` +
        "*pairs* of a row and an expert share weights only where adapter and expert are both the same: " +
        `${count(segments.n, "row")} make ${count(f.rows, "pair")}, and these fall into ` +
        `${count(f.S, "group")}, ${significant(f.rows / f.S)} each.`,
      `A block multiplies ${count(f.block_rows, "row")}, whatever it finds, so each group is filled up with ` +
        `zeros: ${share(f.wasted_rows, f.row_slots)} of all rows. And the grid is laid out before the groups ` +
        "are known, for each slot of the server as if it had all pairs: " +
        `${number(f.early_exits)} of ${count(f.blocks, "block")} leave at once. One adapter for all rows ` +
        `makes ${count(one.S, "group")}, and still ${share(one.wasted_rows, one.row_slots)} zeros: few ` +
        "pairs cannot fill many groups.",
    ],
  },
];

// The story with this state, or -1.
const story_of = (values) => {
  const here = address({ ...values, moment: 0 });
  return STORIES.findIndex((story) => story.address === here);
};

function draw_story() {
  const at = story_of(state);
  const story = STORIES[at];
  [...$("stories").children].forEach(({ firstChild: link }, i) => {
    if (i === at) link.setAttribute("aria-current", "step");
    else link.removeAttribute("aria-current");
  });
  $("story-place").textContent = story
    ? `${at + 1} of ${STORIES.length}: ${story.title}`
    : "Your own batch";
  $("story-title").textContent = story
    ? story.question
    : `${count(state.ids.length, "row")}, ${kernel_name(state.kernel)}`;
  const told = story
    ? story.answer(shown, beside)
    : ["What you have set is in the address of this page: keep it, or send it."];
  $("story-body").replaceChildren(...told.map((text) => paragraph(...prose(text))));
  const following = STORIES[(at + 1) % STORIES.length];
  const verb = !story
    ? "The path from its start:"
    : following === STORIES[0]
      ? "Again from the start:"
      : "Next:";
  const next = node(
    "a",
    { id: "story-next", class: "button", href: following.address, click: followed },
    `${verb} ${following.title} →`,
  );
  const seen = story?.see ? [jump(story.see, "See it")] : [];
  const watch = shown.timeline.moments.length > 1 ? [watch_link()] : [];
  $("story-ways").replaceChildren(next, ...watch, ...seen);
}

// Down to a panel. No link to a fragment, for the address holds the state.
function jump(name, text) {
  const title = $(`${name}-title`);
  const go_there = () => {
    title.scrollIntoView({ block: "start" });
    title.focus({ preventScroll: true });
  };
  return node("button", { type: "button", click: go_there }, `${text}: ${title.textContent} ↓`);
}

function watch_link() {
  const watch = () => {
    $("time-title").scrollIntoView({ block: "start" });
    $("play").focus({ preventScroll: true });
    go(0);
    if (!playing) play();
  };
  return node(
    "button",
    { type: "button", id: "watch", click: watch },
    "▶ Watch the blocks over time",
  );
}

// A story's link opened where it already is: the controls may hold something that is wrong.
function followed({ currentTarget: link }) {
  if (link.hash === location.hash) read_address();
  $("story-title").focus({ preventScroll: true });
  $("story").scrollIntoView({ block: "nearest" });
}
