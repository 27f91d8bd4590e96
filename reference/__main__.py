"""python -m reference check FILE:FUNCTION: is a kernel right, and if not, why likely."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from reference.loading import load
from reference.pieces import run
from reference.runner import Found, Piece, check
from reference.signatures import SIGNATURES
from reference.workloads import types_of

EXAMPLES = """examples:
  python -m reference check my_kernel.py:my_kernel
  python -m reference check my_kernel.py:my_kernel --random 10000 --seed 1
  python -m reference check my_kernel.py:my_kernel --random 1000000 --jobs 8 --journal run.jsonl
  python -m reference check my_ops.py:bgmv_shrink,bgmv_expand --like vllm-bgmv --torch

status: 0 every case passed, 1 some failed, 2 the command is wrong"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"reference: error: {message.removeprefix('argument ')}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """What `python -m reference` does; the exit status.

    >>> main(["check", "nowhere.py:f"])
    2
    """
    options = _parser().parse_args(arguments)
    progress = _Progress() if sys.stderr.isatty() else None
    try:
        kernels = load(options.kernel)
        if options.torch and "torch" not in sys.modules:
            raise ValueError("--torch: expected a kernel whose file imports torch, got one without")
        report = check(
            kernels,
            like=options.like,
            dtypes=options.dtypes,
            random=options.random,
            seed=options.seed,
            torch=options.torch,
            name=options.kernel,
            progress=progress,
            elsewhere=_elsewhere(options),
        )
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        print(f"reference: error: {error}", file=sys.stderr)
        return 2
    finally:
        if progress is not None:
            progress.clear()
    try:
        print(report.as_json() if options.json else report.text(None if options.all else 10))
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`; the interpreter would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if report.ok else 1


def _elsewhere(options: argparse.Namespace) -> Callable[[list[Piece]], Iterable[Found]] | None:
    """What runs the random batches, where it is not this process alone."""
    if options.jobs == 1 and not (options.ray or options.journal or options.resume):
        return None
    kernel = options.kernel, options.like, options.torch
    where = options.jobs, options.ray, options.journal, options.resume
    return lambda pieces: run(*kernel, pieces, where)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m reference", description="Numpy references for LoRA kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="check")
    checked = commands.add_parser(
        "check",
        help="the corpus, and random batches, on a kernel of your own",
        description="Runs the corpus on a kernel of your own; says the likeliest fault first.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = checked.add_argument
    add("kernel", metavar="FILE:FUNCTION", help="or MODULE:FUNCTION; two functions with a comma")
    like = ", ".join(SIGNATURES)
    types = "float16, bfloat16, float32, float64"
    add("--like", default="reference", type=_like, help=f"its signature: {like}")
    add("--dtypes", default="float32", type=_dtypes, help=f"{types}; several with commas")
    add("--torch", action="store_true", help="hand it torch's tensors, on the CPU")
    add("--random", type=_count, default=0, metavar="N", help="N random batches of each type too")
    add("--seed", type=_count, default=0, help="of the random batches (%(default)s)")
    add("--jobs", type=_jobs, default=1, help="processes for the random batches (%(default)s)")
    on_ray = "the same on Ray: the cluster at this address, or that which runs here, or a local one"
    add("--ray", nargs="?", const="auto", metavar="ADDRESS", help=on_ray)
    add("--journal", type=Path, metavar="FILE", help="keep what is done of them in this file")
    add("--resume", action="store_true", help="go on with what the journal has")
    add("--all", action="store_true", help="the whole table, not its first ten groups")
    add("--json", action="store_true", help="the report in JSON")
    return parser


def _jobs(text: str) -> int:
    return max(1, _count(text))


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text}") from None
    if count < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return count


def _like(text: str) -> str:
    if text not in SIGNATURES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(SIGNATURES)}, got {text}")
    return text


def _dtypes(text: str) -> list[np.dtype[Any]]:
    try:
        return types_of(text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("dtypes: ")) from None


class _Progress:
    """One line on stderr, from two seconds on, four times a second."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.next = self.start + 2.0
        self.shown = False

    def __call__(self, checked: int, failed: int) -> None:
        now = time.monotonic()
        if now >= self.next:
            self.next, self.shown = now + 0.25, True
            sys.stderr.write(
                f"\r\x1b[K{checked} cases checked, {failed} failed, {now - self.start:.0f} s"
            )
            sys.stderr.flush()

    def clear(self) -> None:
        """The line away."""
        if self.shown:
            sys.stderr.write("\r\x1b[K")


if __name__ == "__main__":
    sys.exit(main())
