"""Planted faults: one replacement of text each, which a check must find.

`verdict` says what a check finds in a copy of the package; `replaced` plants in other texts. What
only the compiler can run is planted in a folder, by `plant`, for a process of its own.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numba
import pytest
from numba.core import event

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """One replacement: the module, the text that stands there once, and what stands there then."""

    module: str
    text: str
    instead: str


# Small blocks everywhere, so that a case of 40 columns and 20 rows has several.
SMALL_BLOCKS = (
    Fault("kernels.loops", "K_BLOCK = 1024", "K_BLOCK = 16"),
    Fault("kernels.records", "PANEL, WIDE_PANEL = 64, 1024", "PANEL, WIDE_PANEL = 8, 8"),
    Fault("kernels.records", "RANK_UNIT = 8", "RANK_UNIT = 4"),
    Fault("kernels.plan", "\nROWS_PER_BLOCK = 96", "\nROWS_PER_BLOCK = 9"),
    Fault("kernels.plan", "FEWEST_ROWS_PER_BLOCK = 12", "FEWEST_ROWS_PER_BLOCK = 2"),
    Fault("launch", "WORTH_SHARING_NS = 20_000", "WORTH_SHARING_NS = 0"),
)


def plant(folder: Path, *faults: Fault) -> Path:
    """Copy the package into the folder, with these faults; returns the folder."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sgmv", folder / "sgmv", ignore=ignore)
    for fault in faults:
        change(folder, fault)
    return folder


def change(folder: Path, fault: Fault) -> None:
    """Make this replacement in the folder's copy."""
    path = folder.joinpath("sgmv", *fault.module.split(".")).with_suffix(".py")
    path.write_text(replaced(path.read_text(), fault.text, fault.instead))


def replaced(source: str, text: str, instead: str) -> str:
    """The source with this replacement: the text must stand there, and once."""
    found = source.count(text)
    assert found == 1, f"{text!r} stands there {found} times"
    return source.replace(text, instead)


def verdict(
    check: Callable[[dict[str, ModuleType]], object], *faults: Fault, name: str = "sgmv"
) -> str:
    """What the check raises on a copy of the package with these faults, or "nothing".

    check   is given the copy's modules by their full names; they run as plain Python
    name    what is imported of the copy
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        modules = imported(plant(Path(folder), *faults), patch, name)
        return outcome(lambda: check(modules))


def imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "sgmv"
) -> dict[str, ModuleType]:
    """The modules that this folder's `name` imports, as plain Python; the tests' own stay."""
    ours = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == "sgmv"}
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(numba.config, "DISABLE_JIT", 1)
        try:
            importlib.import_module(name)
            found = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "sgmv"}
        finally:
            for each in [n for n in sys.modules if n.split(".")[0] == "sgmv"]:
                del sys.modules[each]
            sys.modules.update(ours)
    # numba would tell the copy, too, of what these tests compile, and it would log it once more.
    event.unregister("numba:compile", found["sgmv.kernels.jit"].notice)
    event.unregister("numba:compiler_lock", found["sgmv.kernels.disk"].one_process)
    assert all(Path(str(module.__file__)).is_relative_to(folder) for module in found.values())
    return found


def outcome(function: Callable[[], object]) -> str:
    """What the function raises in a child process: a fault may write, or read, anywhere."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child leaves be
        child = os.fork()
    if child == 0:  # pragma: no cover
        signal.setitimer(signal.ITIMER_PROF, 60)  # of the CPU, which others may keep busy
        signal.alarm(600)
        try:
            function()
            os.write(writing, b"nothing")
        except BaseException as error:
            os.write(writing, repr(error).encode()[:4000])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        raised = pipe.read()
    _, status = os.waitpid(child, 0)
    return raised or f"the end of the child, {os.waitstatus_to_exitcode(status)}"


def run_python(
    program: str,
    folder: Path | None = None,
    *,
    arguments: Sequence[str] = (),
    timeout: float = 120,
    **environment: str | None,
) -> subprocess.CompletedProcess[str]:
    """Run a program on the package of this folder, or on the tests' own.

    environment  variables to set, or to take away where None
    """
    path = os.pathsep.join(str(part) for part in (folder, ROOT) if part)
    variables: dict[str, str | None] = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={name: value for name, value in variables.items() if value is not None},
        cwd=folder or ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
