"""python -m benchmarks: one study, or what is made from records."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None, now: Callable[[], float] = time.perf_counter) -> int:
    """Run a study by its name, the grid without one; return the exit status."""
    try:
        from benchmarks import pages
        from benchmarks.registry import DEFAULT, STUDIES
        from benchmarks.report import write
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("rich", "matplotlib", "msgspec", "threadpoolctl"):
            raise
        raise SystemExit(f"{package} is not installed; pip install -e '.[bench]'") from error

    words = sys.argv[1:] if argv is None else list(argv)
    makers = {"pages": pages.main, "report": write.main}
    if words and words[0] in makers:
        return makers[words[0]](words[1:])
    if words and words[0] in STUDIES:
        return STUDIES[words[0]].main(words[1:], now=now)
    others = (f"python -m benchmarks {name}" for name in [*STUDIES, *makers])
    return DEFAULT.main(
        words, "python -m benchmarks", f"Others, each with a --help: {', '.join(others)}", now
    )


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as ended:
        if not isinstance(ended.code, str):
            raise
        print(f"benchmarks: error: {ended.code}", file=sys.stderr)
        status = 2
    raise SystemExit(status)
