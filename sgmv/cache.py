"""`sgmv cache`: the folder of compiled kernels, and how to empty it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sgmv.cpu import JITTED
from sgmv.errors import SgmvError
from sgmv.kernels.call import start
from sgmv.kernels.disk import SUFFIX


def folder() -> Path | None:
    """Where compiled kernels are kept; None where nothing is compiled, or no folder is writable."""
    path = getattr(getattr(start, "_cache", None), "cache_path", None)
    return None if path is None else Path(path)


def state() -> str:
    """The folder and what is in it, as `sgmv info` has it."""
    path = folder()
    if path is None:
        return "none: no folder can be written" if JITTED else "none, NUMBA_DISABLE_JIT is set"
    sizes = []
    for file in path.glob(f"*{SUFFIX}"):
        with suppress(FileNotFoundError):  # another process clears the folder
            sizes.append(file.stat().st_size)
    return f"{path}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"


def clear() -> int:
    """Remove every compiled kernel from the folder, and return how many there were.

    Kernels that this process has loaded stay with it.
    """
    path = folder()
    files = [] if path is None else list(path.glob(f"*{SUFFIX}*"))
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise SgmvError(
                "--clear", "a folder that can be written", str(error), f"remove {path} by hand"
            ) from None
    return len(files)


def command(parser: ArgumentParser) -> Callable[[Namespace], str]:
    """Add the argument, and return what runs it."""
    parser.add_argument("--clear", action="store_true", help="remove all; the next call compiles")
    return _run


def _run(given: Namespace) -> str:
    return f"{clear()} files removed from {folder()}" if given.clear else state()
