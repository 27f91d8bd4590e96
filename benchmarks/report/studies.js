// Tables: of the other studies as Python prints them, of the records, and of the machines.
"use strict";

// rows of text; columns from `left` on are numbers and stand right.
function text_table({ head, rows, left }) {
  const cell = (tag, scope) => (value, i) =>
    node(
      tag,
      { class: i < left ? null : "number", scope: scope(i) },
      value instanceof Node ? value : String(value),
    );
  return node(
    "table",
    {},
    node("thead", {}, node("tr", {}, ...head.map(cell("th", () => "col")))),
    node(
      "tbody",
      {},
      ...rows.map((row) =>
        node(
          "tr",
          {},
          ...row.map((value, i) => cell(i ? "td" : "th", () => (i ? null : "row"))(value, i)),
        ),
      ),
    ),
  );
}

const scrolled = (told, ...children) =>
  node("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": told }, ...children);

function draw_studies() {
  const records = of_machine(DATA.records).filter(({ tables }) => tables.length);
  $("studies-panel").hidden = !records.length;
  $("studies").replaceChildren(
    ...records.flatMap((record) => [
      node("h3", {}, DATA.studies[record.study].replace(/\.$/, "")),
      node("p", { class: "help" }, source_told(record), " ", noise_told(record)),
      ...record.tables.flatMap((each) => [
        scrolled(`${record.study}, ${record.name}`, text_table(each)),
        node("p", { class: "help" }, ...prose(each.notes.join(" "))),
      ]),
    ]),
  );
}

function draw_records() {
  const busiest = ({ busy }) => Math.max(...busy.filter((cores) => cores !== null));
  const noise = (record) => {
    if (!record.busy.length) return "not timed";
    if (!record.busy.some((cores) => cores !== null)) return "not known";
    const disturbed = `${noisy(record.busy, DATA.quiet)} of ${number(record.busy.length)}`;
    return `${disturbed}, at most ${busiest(record)} cores`;
  };
  const rows = of_machine(DATA.records).map((record) => [
    record.name,
    record.study,
    machine_name(record.machine),
    record.date.slice(0, 16).replace("T", " "),
    record.commit,
    [record.threads].flat().filter(Boolean).join(", ") || "–",
    noise(record),
    `${number(Math.round(record.seconds))} s`,
  ]);
  const head = [
    "record",
    "study",
    "machine",
    "date, UTC",
    "commit",
    "threads",
    "noisy cases",
    "took",
  ];
  $("records").replaceChildren(text_table({ head, rows, left: 5 }));
}

// Machines that are called the same are told apart by a number.
function machine_name(place) {
  const plain = ({ cpu, cores }) => `${cpu}, ${count(cores, "core")}`;
  const alike = range(DATA.machines.length).filter(
    (other) => plain(DATA.machines[other]) === plain(DATA.machines[place]),
  );
  const name = plain(DATA.machines[place]);
  return alike.length > 1 ? `${name} (${alike.indexOf(place) + 1})` : name;
}

function draw_machines() {
  const size = (bytes_of) =>
    bytes_of >= 1 << 20 ? `${bytes_of / 2 ** 20} MiB` : `${bytes_of / 2 ** 10} KiB`;
  const rows = DATA.machines.map((machine, place) => [
    machine_name(place),
    machine.vendor || "not recorded",
    machine.family || "not recorded",
    machine.flags.join(" "),
    machine.flags.some((flag) => flag.startsWith("amx")) ? "yes" : "no",
    Object.entries(machine.caches)
      .map(([level, held]) => `${level} ${size(held)}`)
      .join(", "),
    machine.system,
  ]);
  const head = ["machine", "vendor", "family and model", "features", "AMX", "caches", "system"];
  $("machines").replaceChildren(text_table({ head, rows, left: head.length }));
}
