"""Text for a terminal of any width, in colour or not: strips of cells, tables, bars.

Everything here returns lines of at most `width` characters. Colour only repeats what the text says:
an adapter has one colour wherever it appears, and its id is printed beside it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from sgmv.ids import BASE_ONLY

ESCAPE = re.compile(r"(\x1b\[[0-9;]*m)")
NARROWEST = 20
# Of the 256 colours those nearest to Okabe and Ito's, which most colour-blind people tell apart;
# their blue and vermilion lighter, for black text on them.
COLOURS = (214, 74, 36, 227, 68, 209, 175)
FULL, EMPTY, EDGE = "█", "░", "│"
# What is printed in their place where the output's encoding lacks them.
PLAIN = str.maketrans("█░│┃─·×…µ", "#.||-.x~u")


@dataclass(frozen=True)
class Terminal:
    """A width, and whether colours and box characters may be used.

    Semantics: `colour_of` gives an adapter's place in COLOURS; an id that is not in it has none.
    `about` is printed below every title: what all tables here are about.

    >>> for line in Terminal(24).table(("kernel", "blocks"), [("shrink", "32")]):
    ...     print(line)
    kernel  blocks
    shrink      32
    """

    width: int = 80
    colour: bool = False
    boxes: bool = True
    colour_of: Mapping[int, int] = field(default_factory=dict)
    about: str = ""

    @classmethod
    def of_stdout(
        cls, colour_of: Mapping[int, int] = MappingProxyType({}), about: str = ""
    ) -> Terminal:
        """The terminal behind standard output; a pipe has no colours and, unless COLUMNS tells, 80.

        NO_COLOR, if set and not empty, turns colours off: https://no-color.org
        """
        quiet = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        try:
            "".join(map(chr, PLAIN)).encode(getattr(sys.stdout, "encoding", None) or "utf-8")
            boxes = True
        except UnicodeEncodeError:
            boxes = False
        width = max(shutil.get_terminal_size().columns, NARROWEST)
        return cls(width, sys.stdout.isatty() and not quiet, boxes, colour_of, about)

    def text(self, lines: Sequence[str]) -> str:
        """The lines as one text; one that is still too long goes on in the next."""
        fitting = [part for line in lines for part in self._folded(line)]
        text = "\n".join(line.rstrip() for line in fitting)
        return text if self.boxes else text.translate(PLAIN)

    def title(self, text: str) -> list[str]:
        """A heading: bold, or underlined where there are no colours; then what it is about."""
        lines = textwrap.wrap(text, self.width)
        if self.colour:
            lines = [self.bold(line) for line in lines]
        else:
            lines.append("─" * max(map(len, lines), default=0))
        return [*lines, *map(self.faint, self.note(self.about))]

    def note(self, text: str, indent: str = "") -> list[str]:
        """A paragraph; lines after the first are indented."""
        return textwrap.wrap(text, self.width, subsequent_indent=indent, break_on_hyphens=False)

    def faint(self, text: str) -> str:
        return self._styled("2", text)

    def bold(self, text: str) -> str:
        return self._styled("1", text)

    def adapter(self, text: str, adapter_id: int) -> str:
        """Text about an adapter, on its colour."""
        if adapter_id not in self.colour_of:
            return text
        return self._styled(f"30;48;5;{self._code(adapter_id)}", text)

    def bar(self, used: int, total: int, cells: int, adapter_id: int = BASE_ONLY) -> str:
        """The share of the total that is used, as a bar of `cells`: full only if all is used.

        >>> Terminal().bar(1, 64, 8), Terminal().bar(63, 64, 8)
        ('█░░░░░░░', '███████░')
        """
        full = max(used * cells // total, used > 0) if total else 0
        colour = f"38;5;{self._code(adapter_id)}" if adapter_id in self.colour_of else ""
        return self._styled(colour, FULL * full) + self.faint(EMPTY * (cells - full))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], keys: int = 1) -> list[str]:
        """Columns, all but the first to the right; where they are too wide, the others below.

        Semantics: the first `keys` columns are repeated before those that go below. A head may
        have several lines. Where not even one column fits beside the keys, a line for each cell.

        >>> head, row = ("kernel", "blocks", "waves"), ("shrink", "9", "1")
        >>> for line in Terminal(20).table(head, [row]):
        ...     print(line)
        kernel  blocks
        shrink       9
        <BLANKLINE>
        kernel  waves
        shrink      1
        """
        columns = list(zip(head, *rows, strict=True))
        widths = [max(map(_length, "\n".join(column).split("\n"))) for column in columns]
        parts = _parts(widths, keys, self.width)
        if not parts:
            return self._one_below_another(head, rows, keys)
        lines: list[str] = []
        for part in parts:
            names = _several_lines([head[c] for c in part])
            texts = [_row(cells, [widths[c] for c in part]) for cells in names]
            lines += [""] * bool(lines) + [self.bold(text.rstrip()) for text in texts]
            lines += [_row([row[c] for c in part], [widths[c] for c in part]) for row in rows]
        return lines

    def _one_below_another(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], keys: int
    ) -> list[str]:
        names = [name.replace("\n", " ").strip() for name in head]
        width = max(map(len, names[keys:]), default=0)
        lines = []
        for row in rows:
            named = list(zip(names, row, strict=True))
            lines.append("  ".join(f"{name} {self.bold(cell)}" for name, cell in named[:keys]))
            lines += [f"  {name:{width}}  {cell}" for name, cell in named[keys:]]
        return lines

    def strip(
        self,
        lines: Mapping[str, Sequence[str]],
        adapter_ids: Sequence[int],
        starts: Sequence[int] = (),
        limit: int = 5,
    ) -> list[str]:
        """Cells side by side, wrapped into at most `limit` pieces, an edge before each segment.

        lines        name -> the texts of its cells, one per column
        adapter_ids  the adapter of each column, which gives its colour
        starts       columns that have an edge before them

        >>> ids = {"adapter": ["0", "0", "2"]}
        >>> Terminal().strip(ids, [0, 0, 2], [0, 2])
        ['adapter │0 0│2']
        """
        name_width = max(map(len, lines))
        cell_width = max((len(text) for texts in lines.values() for text in texts), default=1)
        each = max((self.width - name_width - 1) // (cell_width + 1), 1)
        n, edges, drawn = len(adapter_ids), set(starts), []
        for first in range(0, min(n, each * limit), each):
            columns = range(first, min(first + each, n))
            if first and len(lines) > 1:
                drawn.append("")
            for name, texts in lines.items():
                cells = [self.adapter(f"{texts[c]:>{cell_width}}", adapter_ids[c]) for c in columns]
                before = [EDGE if c in edges else " " for c in columns]
                drawn.append(f"{name:{name_width}} " + "".join(map(str.__add__, before, cells)))
        if n > each * limit:
            drawn.append(f"{'':{name_width}}  … and {n - each * limit:,} more")
        return drawn

    def _code(self, adapter_id: int) -> int:
        return COLOURS[self.colour_of[adapter_id] % len(COLOURS)]

    def _styled(self, style: str, text: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self.colour and style and text else text

    def _folded(self, line: str) -> list[str]:
        """The line cut where the terminal ends; escapes take no room."""
        folded, room = [""], self.width
        for part in ESCAPE.split(line.rstrip()):
            if ESCAPE.match(part):
                folded[-1] += part
                continue
            while len(part) > room:
                folded[-1] += part[:room]
                part, room = part[room:], self.width
                folded.append("")
            folded[-1] += part
            room -= len(part)
        return folded


def _length(text: str) -> int:
    """Characters that are seen."""
    return len(ESCAPE.sub("", text))


def _parts(widths: Sequence[int], keys: int, room: int) -> list[list[int]]:
    """The columns of each part, side by side, the keys first; none if there is no room for that.

    >>> _parts([6, 6, 5, 9], 1, 21), _parts([6, 6], 1, 13)
    ([[0, 1, 2], [0, 3]], [])
    """
    first = list(range(keys))
    parts = [list(first)]
    for column in range(keys, len(widths)):
        if sum(widths[c] + 2 for c in [*parts[-1], column]) - 2 > room:
            if parts[-1] == first or sum(widths[c] + 2 for c in [*first, column]) - 2 > room:
                return []
            parts.append(list(first))
        parts[-1].append(column)
    return parts


def _several_lines(names: Sequence[str]) -> list[list[str]]:
    r"""The lines of a head; short names are at its foot.

    >>> _several_lines(["kernel", "wasted\n%"])
    [['', 'wasted'], ['kernel', '%']]
    """
    split = [name.split("\n") for name in names]
    height = max(map(len, split))
    filled = ([""] * (height - len(each)) + each for each in split)
    return [list(line) for line in zip(*filled, strict=True)]


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The first cell to the left, the others to the right."""
    gaps = [" " * (width - _length(cell)) for cell, width in zip(cells, widths, strict=True)]
    padded = (gap + cell for gap, cell in zip(gaps[1:], cells[1:], strict=True))
    return "  ".join([cells[0] + gaps[0], *padded])


def abbreviated(count: int, each_end: int = 6) -> list[int | None]:
    """The numbers below count, those in the middle left out for one None if there are many.

    >>> abbreviated(3), abbreviated(20, 2)
    ([0, 1, 2], [0, 1, None, 18, 19])
    """
    shown: list[int | None] = list(range(count))
    if count > 2 * each_end + 1:
        shown = [*shown[:each_end], None, *shown[count - each_end :]]
    return shown


def plural(count: int, word: str) -> str:
    """A number of things.

    >>> plural(1, "row"), plural(1234, "row")
    ('1 row', '1,234 rows')
    """
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
