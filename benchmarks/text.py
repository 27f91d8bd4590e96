"""Printing: tables for the terminal and for Markdown, and a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

Span = tuple[str, str]  # text, and a rich style ("" for none)
UNDECIDED = "~"  # the interval of a ratio spans 1
LOSS = "!"  # a mark, not only a colour: it must survive a pipe and colour blindness


@dataclass(frozen=True)
class Table:
    """Rows of text under their heads. `left` columns are aligned left; `notes` follow."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 0
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """As a page has it. Cells are not padded: a page's table changes where its figures do.

        >>> print(Table(["case", "us"], [["a", "1"]], left=1).markdown())
        | case | us |
        | --- | ---: |
        | a | 1 |
        """
        rule = "| --- " * self.left + "| ---: " * (len(self.head) - self.left) + "|"
        rows = ["| " + " | ".join(row) + " |" for row in (self.head, *self.rows)]
        return "\n".join([rows[0], rule, *rows[1:]])


class Console:
    """Lines in colour on a terminal, plain ones elsewhere."""

    def __init__(self) -> None:
        self._rich = RichConsole(highlight=False, soft_wrap=True)

    def print(self, text: str = "", style: str = "") -> None:
        self.spans([(text, style)])

    def spans(self, spans: Sequence[Span]) -> None:
        """One line made of styled pieces."""
        self._rich.print(Text.assemble(*spans))

    def table(self, table: Table) -> None:
        """Aligned columns under their heads, then the notes."""
        lines = [table.head, *table.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for number, line in enumerate(lines):
            cells = [
                text.ljust(width) if place < table.left else text.rjust(width)
                for place, (text, width) in enumerate(zip(line, widths, strict=True))
            ]
            self.print("  ".join(cells).rstrip(), "" if number else "dim")
        for note in table.notes:
            self.print(note, "dim")

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """Yields a function to be called with a label as each step begins.

        Where no one watches (a file, a pipe) the bar is replaced by one line per tenth.
        """
        if not self._rich.is_terminal:
            done = 0

            def step(label: str) -> None:
                nonlocal done
                if done * 10 // total != (done - 1) * 10 // total:
                    self.print(f"  {done:4d}/{total} {label}")
                done += 1

            yield step
            return

        columns = (
            BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )  # fmt: skip
        with Progress(*columns, console=self._rich, transient=True) as bar:
            task = bar.add_task("", total=total)
            started = False

            def advance(label: str) -> None:
                nonlocal started
                bar.update(task, description=label, advance=1 if started else 0)
                started = True

            yield advance


def ratio_text(ratio: float, interval: tuple[float, float] | None = None) -> str:
    """A ratio in few characters, with a mark if it is a loss or if its interval spans 1.

    >>> ratio_text(1.234), ratio_text(0.5), ratio_text(123.4), ratio_text(0.98, (0.9, 1.1))
    ('1.23x', '0.50x!', '123x', '0.98x~')
    """
    digits = 2 if ratio < 10 else 1 if ratio < 100 else 0
    return f"{ratio:.{digits}f}x" + (undecided(interval) or (LOSS if ratio < 1 else ""))


def undecided(interval: tuple[float, float] | None) -> str:
    """The mark of a ratio with an interval that spans 1."""
    return UNDECIDED if interval is not None and interval[0] <= 1 <= interval[1] else ""


def microseconds(value: float) -> str:
    """Three or more significant digits, no more than needed.

    >>> microseconds(8.123), microseconds(1234.5)
    ('8.12', '1234')
    """
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
