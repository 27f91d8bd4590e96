"""Times of this tree beside another commit: the same calls in turn, each in a process of its own.

    python -m benchmarks against main      is this branch faster or slower than main?
    python -m benchmarks against HEAD~3    what the last three commits changed
    python -m benchmarks against . --here SGMV_VECTOR_BITS=128 --there SGMV_VECTOR_BITS=0
                                           this tree twice: tiles of 128 bits, and the plain loops

Both are copied to a temporary folder, the commit by git archive, this tree as it is now, and each
compiles into a cache of its own, which takes a minute or two. A layer 4096 -> 16 -> 4096, if no
other is named; weights are hot, segments made before. Each result is checked before it is timed.

Processes of one commit differ by several percent, by where their memory happens to be. So both are
started anew several times, and an interval is over these pairs of processes, not over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from benchmarks import record, worker
from benchmarks.batch import DTYPES, popularity_ids
from benchmarks.clock import interval, quietly, summary
from benchmarks.gate import CHECKED_ROWS, spread
from benchmarks.record import Head, Times
from benchmarks.study import Red, Study
from benchmarks.text import Console, Table, ratio_text
from reference import bounds, by_row, compare
from reference.workloads import POPULARITIES
from sgmv.console import Parser, at_least

H_IN, H_OUT, RANK = 4096, 4096, 16
THIS_TREE = "."
ROWS = (1, 16, 64, 256)
STARTS, ROUNDS, TURN_S, SETTLE_S = 6, 4, 0.03, 0.01
SIDES = ("this", "commit")


class AgainstCase(msgspec.Struct, forbid_unknown_fields=True):
    """One batch. A round of `times` is a pair of processes."""

    rows: int
    popularity: str
    S: int
    times: dict[str, Times]
    foreign_cores: float | None


class AgainstRecord(Head):
    """One run of this file. `against`: the other commit; `here`, `there`: variables of each."""

    STUDY: ClassVar[str] = "against"
    threads: int
    against: str
    dtype: str
    h_in: int
    h_out: int
    rank: int
    here: dict[str, str]
    there: dict[str, str]
    cases: list[AgainstCase]


def checkout(ref: str | None, folder: Path) -> None:
    """The package of a commit, or of this tree as it is, and the worker beside it."""
    folder.mkdir()
    if ref in (None, THIS_TREE):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(record.ROOT / "sgmv", folder / "sgmv", ignore=ignore)
    else:
        done = subprocess.run(
            ["git", "-C", str(record.ROOT), "archive", ref, "sgmv"], capture_output=True
        )
        if done.returncode:
            raise SystemExit(f"REF: expected a commit of this repository, got {ref}; see git log")
        subprocess.run(["tar", "-x", "-C", str(folder)], input=done.stdout, check=True)
    shutil.copy(worker.__file__, folder / "worker.py")


class Side:
    """A process that times one checkout."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.folder = process, folder

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer to an order. Raises Red if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise Red(f"{self.folder.name}: its process ended; see its error above") from error
        return answer

    def turn(self) -> list[int]:
        found: list[int] = self.ask(turn_s=TURN_S, settle_s=SETTLE_S)["nanoseconds"]
        return found


@contextmanager
def started(folder: Path, variables: dict[str, str]) -> Iterator[Side]:
    """The folder's process, with a cache of its own for compiled kernels."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache"), **variables}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(folder / "worker.py")]
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        yield Side(process, folder)


def check(side: Side, case: dict[str, Any]) -> None:
    """Hold a result of the side to the reference. Raises Red."""
    result = side.folder / "result.npy"
    file = Path(side.ask(case=case, result=str(result))["file"])
    if not file.is_relative_to(side.folder):
        raise Red(f"{side.folder.name}: expected its own sgmv, got {file}")
    x, y, pairs = worker.operands(case)
    rows = spread(len(y), CHECKED_ROWS)
    ids = np.asarray(case["ids"])[rows]
    expected = by_row.add_lora(y[rows], x[rows], pairs, ids)
    bound = bounds.add_lora_bound(y[rows], x[rows], pairs, ids, expected=expected)
    try:
        compare.check(np.load(result).view(y.dtype)[rows], expected, bound)
    except AssertionError as error:
        raise Red(f"gate: RED, nothing was timed; {side.folder.name}:", error) from error


def turns(sides: Sequence[Side]) -> list[list[list[int]]]:
    """For each side its turns, which take each other's place first round after round."""
    found: list[list[list[int]]] = [[] for _ in sides]
    for done in range(ROUNDS):
        order = list(zip(sides, found, strict=True))
        for side, taken in reversed(order) if done % 2 else order:
            taken.append(side.turn())
    return found


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check out both, and time each batch on both in turn, in several pairs of processes."""
    batches = [
        (n, popularity)
        for n in args.rows
        for popularity in (args.popularity if n > 1 else args.popularity[:1])
    ]
    variables = dict(args.here), dict(args.there)
    h_in, h_out = args.layer
    layer = {"h_in": h_in, "h_out": h_out, "rank": args.rank}
    taken: dict[tuple[int, str], list[list[list[int]]]] = {key: [[], []] for key in batches}
    noise: dict[tuple[int, str], list[float | None]] = {key: [] for key in batches}
    console.print("each compiles its kernels first")
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder).resolve()
        for name, ref in zip(SIDES, (None, args.ref), strict=True):
            checkout(ref, top / name)
        for start in range(STARTS):
            console.print(f"  processes {start + 1} of {STARTS}")
            with ExitStack() as stack:
                sides = [
                    stack.enter_context(started(top / name, its))
                    for name, its in zip(SIDES, variables, strict=True)
                ]
                pids = [side.process.pid for side in sides]
                for n, popularity in batches:
                    ids = popularity_ids(popularity, n, seed=0).tolist()
                    case = {"ids": ids, **layer, "dtype": args.dtype}
                    for side in sides:
                        check(side, {**case, "threads": args.threads})
                    both, foreign = quietly(partial(turns, sides), pids=pids)
                    noise[n, popularity].append(foreign)
                    for kept, its in zip(taken[n, popularity], both, strict=True):
                        kept.append(list(chain(*its)))
    cases = []
    for (n, popularity), sides_taken in taken.items():
        times = dict(zip(SIDES, map(summary, sides_taken), strict=True))
        S = len(set(popularity_ids(popularity, n, seed=0).tolist()))
        known = [busy for busy in noise[n, popularity] if busy is not None]
        cases.append(AgainstCase(n, popularity, S, times, max(known, default=None)))
    return {
        "threads": args.threads, "against": args.ref, "dtype": args.dtype, **layer,
        "here": variables[0], "there": variables[1], "cases": cases,
    }  # fmt: skip


def tables(found: AgainstRecord) -> list[Table]:
    """One line per batch, and what its interval decides."""
    other = "there" if found.against == THIS_TREE else found.against
    head = ["n", "popularity", "S", "this us", f"{other} us", "ratio", "95 %", ""]
    rows = []
    for case in found.cases:
        this, theirs = (case.times[name] for name in SIDES)
        low, high = interval((this, theirs)) or (0.0, float("inf"))
        verdict = "faster" if low > 1 else "slower" if high < 1 else "undecided"
        rows.append(
            [
                str(case.rows), case.popularity, str(case.S),
                f"{this.q50:.1f}", f"{theirs.q50:.1f}",
                ratio_text(theirs.q50 / this.q50, (low, high)), f"{low:.3f}-{high:.3f}", verdict,
            ]
        )  # fmt: skip
    note = (
        f"ratio: time of {other} / time of this tree, at the median, with its interval over "
        f"{STARTS} pairs of processes; {found.h_in} -> {found.rank} -> {found.h_out}, "
        f"{found.dtype}, {found.threads} threads."
    )
    settings = [
        f"{side}: {' '.join(f'{name}={value}' for name, value in its.items())}"
        for side, its in (("here", found.here), ("there", found.there))
        if its
    ]
    return [Table(head, rows, 2, [note, *settings])]


def layer(text: str) -> tuple[int, int]:
    """H_IN x H_OUT, as an argument.

    >>> layer("4096x14336")
    (4096, 14336)
    """
    h_in, h_out = map(at_least(1), text.split("x"))
    return h_in, h_out


def variable(text: str) -> tuple[str, str]:
    """NAME=VALUE, as an argument.

    >>> variable("SGMV_VECTOR_BITS=128")
    ('SGMV_VECTOR_BITS', '128')
    """
    name, value = text.split("=", 1)
    return name, value


def arguments(parser: Parser) -> None:
    parser.add_argument(
        "ref", metavar="REF", help="a commit, branch or tag of this repository; . is this tree"
    )
    parser.add_argument("--rows", nargs="+", type=at_least(1), default=ROWS, metavar="N")
    parser.add_argument("--popularity", nargs="+", choices=POPULARITIES, default=POPULARITIES)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--layer", type=layer, default=(H_IN, H_OUT), metavar="H_INxH_OUT")
    parser.add_argument("--rank", type=at_least(1), default=RANK, metavar="R")
    for side, which in (("--here", "this tree's"), ("--there", "REF's")):
        parser.add_argument(
            side, nargs="+", type=variable, default=[], metavar="NAME=VALUE",
            help=f"environment of {which} processes",
        )  # fmt: skip


STUDY = Study("against", __doc__, AgainstRecord, run, tables, arguments, whole=lambda args: False)
