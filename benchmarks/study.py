"""A study: what it measures, what it shows, and its command line, the same way for each.

A study is a file in `studies/` and a line in `registry.py`. `measure` checks what it times before
it times it. The rest is here: parser, record, table, warning, file, figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from benchmarks import figures, record
from benchmarks.machine import slug
from benchmarks.record import R
from benchmarks.text import Console, Table
from sgmv.console import Parser, at_least
from sgmv.cpu import cores

OUTPUT = Path("bench-out")
RED = 1


class Red(Exception):
    """Something is wrong, so that it is not timed: lines, the first one says what."""


def all_quiet(found: R) -> R | None:
    """The record if no other process ran meanwhile, as what may be committed."""
    return None if record.noisy(cases_of(found)) else found


def cases_of(found: Any) -> list[Any]:
    """The cases of a record, whatever they are called."""
    lists = (getattr(found, name, None) for name in ("cases", "series", "points"))
    return next((cases for cases in lists if cases is not None), [])


@dataclass(frozen=True)
class Study(Generic[R]):
    """One study.

    name       the command, and what its records' file names begin with
    about      its help: the docstring of its file
    record     the struct of its records
    measure    from the arguments to the record's own fields; raises Red
    tables     what the terminal shows of a record
    arguments  adds the study's own arguments
    threads    whether --threads is one of them
    whole      whether the arguments leave nothing out, so that a record may be committed
    pages      by page and marker, the text made from a record and its file's name
    figures    by file name, what draws a record
    files      how the names of its records begin, those shown in the pages first
    quiet      what of a record may be committed: None if it was disturbed
    packages   whose versions its records name beside the usual
    """

    name: str
    about: str
    record: type[R]
    measure: Callable[[argparse.Namespace, Console], dict[str, Any]]
    tables: Callable[[R], Sequence[Table]]
    arguments: Callable[[Parser], object] = lambda parser: None
    threads: bool = True
    whole: Callable[[argparse.Namespace], bool] = lambda args: True
    pages: Mapping[tuple[str, str], Callable[[R, str], str]] = field(default_factory=dict)
    figures: Mapping[str, Callable[[R], Any]] = field(default_factory=dict)
    files: Sequence[str] = ()
    quiet: Callable[[R], R | None] = all_quiet
    packages: Sequence[str] = ()

    def parser(self, program: str, epilog: str = "") -> Parser:
        """The command line: the study's own arguments, then those of every study."""
        found = Parser(
            prog=program, description=self.about, epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self.arguments(found)
        if self.threads:
            found.add_argument(
                "--threads", type=at_least(1), default=cores(), metavar="N",
                help="default: all cores",
            )  # fmt: skip
        found.add_argument(
            "--output", type=Path, default=OUTPUT, metavar="FOLDER", help="default: %(default)s/"
        )
        saving = found.add_mutually_exclusive_group()
        saving.add_argument("--no-save", action="store_true", help="print only")
        saving.add_argument(
            "--record", action="store_true", help="write to benchmarks/records/, to commit"
        )
        if self.figures:
            found.add_argument(
                "--figures", action=argparse.BooleanOptionalAction, default=True,
                help="draw PNG figures beside the record (default)",
            )  # fmt: skip
        return found

    def main(
        self,
        words: Sequence[str],
        program: str = "",
        epilog: str = "",
        now: Callable[[], float] = time.perf_counter,
    ) -> int:
        """Measure, print, save; return the exit status: 0, or 1 where something is wrong.

        now  the clock that ends the timings, in seconds
        """
        args = self.parser(program or f"python -m benchmarks {self.name}", epilog).parse_args(words)
        if args.record and not self.whole(args):
            raise SystemExit("--record: expected the whole study; leave the filters out")
        args.now = now
        console, started = Console(), time.perf_counter()
        try:
            fields = self.measure(args, console)
        except Red as error:
            first, *lines = map(str, error.args)
            console.print(first, "bold red")
            for line in lines:
                console.print(f"  {line}")
            return RED
        found = record.made(self.record, started, self.packages, fields)
        self.show(found, console)
        if not args.no_save:
            self.keep(found, args, console)
        return 0

    def show(self, found: R, console: Console) -> None:
        """The tables of a record, and a warning where other processes ran."""
        for table in self.tables(found):
            console.table(table)
        if noisy := record.noisy(cases_of(found)):
            names = [name for name in (getattr(case, "name", "") for case in noisy) if name]
            which = f": {', '.join(names)}" if names else ""
            console.print(
                f"WARNING: other processes ran during {len(noisy)} cases{which}", "bold red"
            )

    def keep(self, found: R, args: argparse.Namespace, console: Console) -> None:
        """Save the record: among those to commit, if that is wanted and nothing disturbed it."""
        folder, kind = args.output, getattr(found, "mode", self.name)
        name = f"{kind}.json"
        if args.record:
            quiet = self.quiet(found)
            if quiet is None:
                disturbed = len(record.noisy(cases_of(found)))
                console.print(
                    f"not recorded: other processes ran during {disturbed} cases; run again on a "
                    "quiet machine",
                    "bold red",
                )
            else:
                found, folder = quiet, record.RECORDS
                name = f"{kind}-{slug(found.machine)}.json"
        record.save(found, folder / name)
        written = [folder / name]
        if getattr(args, "figures", False):
            written += figures.draw(self.figures, found, folder)
        console.print(f"written: {', '.join(map(str, written))}")
        if folder == record.RECORDS:
            console.print("now: python -m benchmarks pages", "bold")

    def shown(self, folder: Path | None = None) -> tuple[Path, R] | None:
        """The record that the pages show, with its file: the newest; None if there is none."""
        for prefix in self.files or [f"{self.name}-"]:
            paths = sorted((folder or record.RECORDS).glob(f"{prefix}*.json"))
            found = [(path, record.load(self.record, path)) for path in paths]
            if found:
                return max(found, key=lambda one: one[1].date)
        return None
