"""What all commands share: a parser with errors in one style, types of arguments, progress.

Every error is one line on standard error, and status 2:

    sgmv: error: --rank: expected at least 1, got 0
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from sgmv.errors import SgmvError

T = TypeVar("T")
QUOTE = "'"
# argparse's own messages, and how they read in the style of `SgmvError`.
STYLE: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^argument ", ""),
    (
        r"invalid choice: (.+?) \(choose from (.+)\)$",
        lambda found: f"expected one of {found[2].replace(QUOTE, '')}, got {found[1]}",
    ),
    (r"invalid (?:int|float) value: (.+)$", r"expected a number, got \1"),
    (r"expected (?:at least )?one argument$", "expected a value, got none"),
    (r"not allowed with argument (.+)$", r"expected no \1 beside it; leave one of them out"),
    (
        r"^the following arguments are required: (.+)$",
        r"\1: expected a value, got none; see --help",
    ),
    (r"^unrecognized arguments: (.+)$", r"\1: no such argument; see --help"),
)
NEGATIVE = re.compile(r"-\d.*")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with errors in the style of the library's."""

    def error(self, message: str) -> NoReturn:
        for pattern, text in STYLE:
            message = re.sub(pattern, text, message)
        program = self.prog.removeprefix("python -m ").split()[0]
        self.exit(2, f"{program}: error: {message}\n")

    def refuse(self, error: SgmvError, given: argparse.Namespace) -> NoReturn:
        """End as `error` does, the library's argument named as the flag that gave it."""
        name = error.argument
        flag = f"--{name.replace('_', '-')}" if hasattr(given, name) else name
        self.error(str(error).replace(name, flag, 1))


def joined(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--flag -1,0` as `--flag=-1,0`: argparse takes `-1,0` for a flag.

    >>> joined(["--ids", "-1,0", "--json"])
    ['--ids=-1,0', '--json']
    """
    found: list[str] = []
    for text in arguments:
        if NEGATIVE.fullmatch(text) and found and re.fullmatch(r"--[a-z-]+", found[-1]):
            found[-1] += f"={text}"
        else:
            found.append(text)
    return found


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number, not below the least.

    >>> at_least(1)("0")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: expected at least 1, got 0
    """

    def parse(text: str) -> int:
        value = _number(int, "a whole number", text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return parse


def number(text: str) -> float:
    """The type of an argument that is a number; its range is the library's to check."""
    return _number(float, "a number", text)


def counts(least: int) -> Callable[[str], list[int]]:
    """The type of an argument such as 1,8,64; an empty text has no numbers.

    >>> counts(-1)("0,1,-1"), counts(0)("")
    ([0, 1, -1], [])
    """

    def parse(text: str) -> list[int]:
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        for part in parts:
            if not re.fullmatch(r"[-+]?\d+", part) or int(part) < least:
                expected = f"whole numbers of at least {least}, with commas"
                raise argparse.ArgumentTypeError(f"expected {expected}, got {part!r}")
        return [int(part) for part in parts]

    return parse


def _number(kind: Callable[[str], T], expected: str, text: str) -> T:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows a text in place of the one before.

    Semantics: on standard error, and only where that is a terminal; nothing is left at the end.
    """
    stream = sys.stderr
    shown = stream.isatty() and os.environ.get("TERM") != "dumb"

    def show(text: str) -> None:
        if shown:
            width = shutil.get_terminal_size().columns
            stream.write(f"\r\x1b[K{text[: width - 1]}")
            stream.flush()

    try:
        yield show
    finally:
        show("")
