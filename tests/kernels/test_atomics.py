"""Atomics on ARM64, which reorders what x86 does not: read in the assembly, from any machine.

How threads meet by them is tested in tests/core/test_workers.py.
"""

from __future__ import annotations

import re

import pytest

from benchmarks.studies.instructions import ON_ARM
from tests.help.planting import run_python

pytestmark = pytest.mark.once

PROGRAM = """
import sys
from numba import types
from benchmarks.studies import instructions
from sgmv.kernels import atomics, modes
machine = instructions.target(sys.argv[1])
number = types.int64
for intrinsic, operands in [
    (atomics._add, 2), (atomics._load, 1), (atomics._store, 2), (atomics._pause, 0),
    (modes._exchange, 1),
]:
    module = instructions.compiled(intrinsic, (number,) * operands, machine)
    machine.emit_object(module)  # inline assembly would end the process here
    print("===", intrinsic.__name__, machine.emit_assembly(module))
"""
# LLVM's name of a CPU, and how it adds: in a loop, or by one instruction.
CPUS = {"cortex-a72": r"ldaxr.*stlxr", "neoverse-n1": r"ldaddal|ldaxr.*stlxr"}


@pytest.mark.parametrize("cpu", CPUS)
def test_atomics_are_sequentially_consistent_on_arm(cpu: str) -> None:
    """Acquire and release in each: the gate needs a store that no later load overtakes."""
    done = run_python(ON_ARM + PROGRAM, arguments=[cpu])
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^=== (\w+)", done.stdout, flags=re.M)[1:]
    assembly = dict(zip(parts[::2], parts[1::2], strict=True))
    expected = {
        "_add": CPUS[cpu],
        "_load": r"\tldar\t",
        "_store": r"\tstlr\t",
        "_pause": r"\tisb",
        "_exchange": r"\tmrs\t.*FPCR.*\tmsr\tFPCR",
    }
    assert assembly.keys() == expected.keys()
    for name, pattern in expected.items():
        assert re.search(pattern, assembly[name], flags=re.S | re.I), assembly[name]
