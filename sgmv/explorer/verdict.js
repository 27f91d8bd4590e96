// Whether the launch runs, and what it is made of.
"use strict";

const MUCH = 2; // times as long, by the roofline, as the launch beside it: worth a warning

function verdict({ launch, figures: f }) {
  if (launch.unsupported.length) return ["fails", "There is no such kernel."];
  if (f.deadlock) return ["fails", "This launch hangs."];
  if (!f.blocks) return ["runs", "Nothing is launched: no row has an adapter."];
  if (!f.capacity && launch.estimated) {
    return ["warns", `Tiles of this size do not fit an SM of ${f.device}; Triton may need less.`];
  }
  if (!f.capacity) return ["fails", `No block fits an SM of ${f.device}.`];
  if (f.race) return ["warns", "This launch runs, with a race."];
  if (f.faults.length) return ["fails", "This launch runs, and goes wrong."];
  if (launch.kernel === "punica_sgmv_shrink" && !f.cooperative) {
    return ["warns", "This launch runs, but K is no longer split."];
  }
  const longer = beside ? f.roofline_us / beside.figures.roofline_us : 1;
  if (longer >= MUCH) {
    return [
      "warns",
      `This launch runs, but takes at least ${significant(longer)} times as long as ${beside.name}.`,
    ];
  }
  return ["runs", "This launch runs."];
}

function draw_device() {
  const { sms, shared_memory_per_sm, bandwidth, fp16_peak } = shown.launch.device;
  $("device-facts").textContent =
    `${sms} SMs of ${shared_memory_per_sm / 1024} KiB shared memory, ` +
    `${number(bandwidth / 1e9)} GB/s, ${number(fp16_peak / 1e12)} TFLOP/s in fp16`;
}

function draw_verdict() {
  const { launch, figures: f } = shown;
  const [tone, title] = verdict(shown);
  const lines = [];
  if (launch.unsupported.length) {
    lines.push(listed(launch.unsupported), paragraph("The panels show what it would be."));
  } else {
    if (f.deadlock) lines.push(...why_it_hangs(launch));
    else if (f.faults.length) lines.push(listed(f.faults));
    if (f.blocks && f.capacity) lines.push(...what_fits(shown));
  }
  $("verdict").className = `verdict ${tone}`;
  $("verdict-title").textContent = title;
  $("verdict-body").replaceChildren(...lines);
}

function what_fits({ launch, figures: f, values }) {
  const { sms } = launch.device;
  const lines = [
    `This *launch*, one call of a kernel, starts a *grid* of ${count(f.blocks, "*thread block*", "*thread blocks*")}, ` +
      `groups of ${f.threads} threads that share fast memory. Each runs on one *SM*, a core of the GPU: ` +
      `${f.device} has ${sms}, and holds ${number(f.capacity)} of these blocks at once.`,
  ];
  if (launch.kernel === "punica_sgmv_shrink") {
    const chunks = ceil_div(launch.k, CHUNK);
    const fit = f.cooperative ? "which fit" : "too many";
    lines.push(
      "K is cut into chunks of 256, a block for each. This *split of K* is made for up to " +
        `${count(f.split_k_segments, "segment")}, because its blocks wait for each other and must ` +
        `all be on the GPU. Here: ${count(chunks, "chunk")} × ` +
        `${count(f.S, "segment")} = ${count(chunks * f.S, "block")}, ${fit}.`,
    );
    if (f.shared_memory > WITHOUT_OPT_IN) {
      lines.push(
        `A block takes ${number(f.shared_memory)} bytes of shared memory here. Punica opts in to ` +
          "more than 48 KiB only after it has asked how many blocks fit; where CUDA then answers " +
          "none, K is not split and nothing hangs.",
      );
    }
  } else {
    lines.push(
      `That is ${count(f.waves, "*wave*", "*waves*")}: ` +
        (f.waves > 1 ? "blocks that find no room wait for the next." : "all find room at once.") +
        (f.early_exits
          ? ` ${number(f.early_exits)} of them ${f.early_exits === 1 ? "finds" : "find"} nothing to do.`
          : ""),
    );
  }
  if (!f.deterministic && launch.atomics) {
    lines.push("Atomic additions come in any order: the last bits differ from run to run.");
  }
  if (launch.experts && values.top_k < state.top_k) {
    lines.push(`top_k is taken to be ${number(values.top_k)}, all experts.`);
  }
  if (launch.kernel.startsWith("vllm") && values.max_loras > state.max_loras) {
    lines.push(`max_loras is taken to be ${number(values.max_loras)}, the adapters of the batch.`);
  }
  return lines.map((text) => paragraph(...prose(text)));
}

function why_it_hangs(launch) {
  const stuck = deadlock(launch);
  const { barrier, waiting, returned } = stuck;
  const counts = [...new Set(launch.work.map((w) => w.barriers))].sort((a, b) => a - b);
  const run_fixed = () => {
    controls_write({ release: "1.1.0" });
    update();
    $("story-title").focus();
  };
  const bold = (text) => node("b", {}, text);
  return [
    paragraph(
      "After each step the blocks meet at a barrier of the whole grid, to add up their chunks " +
        "of K. It opens when ",
      bold(`all ${blocks_of(launch)} blocks`),
      " stand at it.",
    ),
    listed(counts.map((barriers) => who_comes(launch.work, barriers, bold))),
    paragraph(
      "At barrier ",
      bold(barrier),
      `, ${count(waiting.length, "block")} ${waiting.length === 1 ? "waits" : "wait"} for ` +
        `${count(returned.length, "block")} that returned after barrier ${barrier - 1} and will ` +
        "never come. Nothing on the GPU notices, and the call does not end.",
    ),
    paragraph(node("code", {}, told(stuck))),
    paragraph(node("button", { type: "button", click: run_fixed }, "Run it with release 1.1.0")),
  ];
}

// The segments that pass `barriers` barriers, the first four by name, and why.
function who_comes(work, barriers, bold) {
  const members = range(work.length).filter((s) => work[s].barriers === barriers);
  const named = members.slice(0, 4).map((s) => {
    const { adapter_id, rows } = work[s];
    return node("span", {}, chip(s), `${adapter(adapter_id)}, ${count(rows, "row")}`);
  });
  const more = members.length > 4 ? `; and ${members.length - 4} more` : "";
  const whose = members.length === 1 ? "its" : "each one’s";
  return [
    ...named.flatMap((each, i) => (i ? ["; ", each] : [each])),
    `${more}: ${count(barriers, "step")} of ${STEP_ROWS} rows, so ${whose} blocks come to the barrier `,
    bold(barriers === 1 ? "once" : `${barriers} times`),
    ".",
  ];
}
