"""Printing: in colour and with a progress bar where rich is installed, else plain lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

Span = tuple[str, str]  # text, and a rich style ("" for none)


class Console:
    """The one place that knows whether rich is there; texts are the same with and without."""

    def __init__(self, *, rich: bool | None = None) -> None:
        self._rich: Any = None
        if rich if rich is not None else find_spec("rich") is not None:
            from rich.console import Console as RichConsole

            self._rich = RichConsole(highlight=False, soft_wrap=True)

    def print(self, text: str = "", style: str = "") -> None:
        self.spans([(text, style)])

    def spans(self, spans: Sequence[Span]) -> None:
        """One line made of styled pieces."""
        if self._rich is None:
            print("".join(text for text, _ in spans), flush=True)
            return
        from rich.text import Text

        self._rich.print(Text.assemble(*spans))

    def table(self, lines: Sequence[Sequence[str]], left: int = 0) -> None:
        """Aligned columns under their heads, to the right but for the first so many."""
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for number, line in enumerate(lines):
            cells = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
            cells[:left] = [line[i].ljust(widths[i]) for i in range(left)]
            self.print("  ".join(cells), "" if number else "dim")

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """Yields a function to be called with a label as each step begins.

        Where no one watches (a file, a pipe) the bar is replaced by one line per tenth.
        """
        if self._rich is None or not self._rich.is_terminal:
            done = 0

            def step(label: str) -> None:
                nonlocal done
                if done * 10 // total != (done - 1) * 10 // total:
                    self.print(f"  {done:4d}/{total} {label}")
                done += 1

            yield step
            return

        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

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
