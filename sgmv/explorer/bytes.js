// The panel of bytes: every kernel of this half, on one scale.
"use strict";

function draw_bytes() {
  const { segments, values, launch, figures: f } = shown;
  const alike = Object.values(KERNELS)
    .map((kernel) => kernel(segments, values))
    .filter((each) => each.shrinks === launch.shrinks && !each.experts === !launch.experts);
  now(
    "bytes-now",
    ({ figures: of }) =>
      `${kernel_name(of.kernel)}: ${bytes(of.bytes_read)} read, ${bytes(of.bytes_written)} written`,
    ({ figures: of }) =>
      `, ${significant((of.bytes_read + of.bytes_written) / of.io_bytes || 0)} × every operand once`,
  );
  const figure = $("bytes");
  const width = figure.clientWidth;
  const largest = most([f.io_bytes, ...alike.map((each) => each.bytes_read + each.bytes_written)]);
  const x = (value) => (largest ? (width * value) / largest : 0);
  const drawn = alike.flatMap((each, i) => {
    const y = 20 + 46 * i;
    const moved = each.bytes_read + each.bytes_written;
    const missing = each.unsupported.length ? " (no such kernel)" : "";
    const chosen = each.kernel === launch.kernel;
    const times = `${bytes(moved)}, ${significant(moved / f.io_bytes || 0)}×`;
    return [
      label(0, y, `${kernel_name(each.kernel)}${missing}`, chosen ? "strong" : ""),
      label(width, y, times, chosen ? "strong" : "quiet", "end"),
      box(0, y + 6, x(each.bytes_read), 16, { class: "read" }),
      ...["written", "added"].map((kind) =>
        box(x(each.bytes_read), y + 6, x(each.bytes_written), 16, { class: kind }),
      ),
      line(x(f.io_bytes), y + 6, x(f.io_bytes), y + 25, "once"),
    ];
  });
  const low = 20 + 46 * alike.length;
  const told_bytes = (each) =>
    `${kernel_name(each.kernel)}: ${bytes(each.bytes_read)} read, ${bytes(each.bytes_written)} written`;
  picture(
    figure,
    low + 8,
    `${alike.map(told_bytes).join("; ")}. Every operand once: ${bytes(f.io_bytes)}.`,
    ...drawn,
    label(Math.min(x(f.io_bytes), width - 130), low, `once: ${bytes(f.io_bytes)}`, "quiet"),
  );
  legend("bytes-legend", [
    ["read", sample_of({ class: "read" })],
    ["written", sample_of({ class: "written" }), sample_of({ class: "added" })],
    ["every operand once", line(9, 0, 9, 12, "once")],
  ]);
}
