"""The command line of random batches, each of its seed: `--first SEED --batches NUMBER`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable


def main(about: str | None, run: Callable[[Iterable[int]], int], what: str) -> None:
    """Run the batches that are asked for; an exception names the seed."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    found = run(range(options.first, options.first + options.batches))
    sys.stdout.write(f"{found} {what}, all right, in {time.perf_counter() - started:.0f} s\n")
