"""The interpreter ends promptly and silently, whatever the helpers do at the time."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from sgmv.cpu import JITTED
from tests.help.planting import run_python

pytestmark = pytest.mark.once


def seconds_to_exit(program: str) -> float:
    """How long the program takes to end after it said that it is done; nothing else is said."""
    command = [sys.executable, "-c", program + "\nprint('done', flush=True)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"done\n", process.stderr.read().decode()
            started = time.monotonic()
            said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert said == (b"", b"")
    assert process.returncode == 0
    return time.monotonic() - started


HELPERS = """
import numpy as np, sgmv, sys, threading, time
from sgmv import workers
sgmv.set_num_threads(3)
x = np.ones((200, 1000), 'f')
def call(): return sgmv.lora_delta(x, x[:64], np.ones((1000, 64), 'f'), 1.0)
"""
ENDS = {
    "no call": "",
    "helpers spin": "call()",
    "helpers sleep": (
        "call()\nwhile workers.pool.fields[0].sleepers + workers.pool.asleep < 2: pass"
    ),
    "a thread calls": (
        "def forever():\n    while True: call()\n"
        "call()\nthreading.Thread(target=forever, daemon=True).start()\ntime.sleep(0.05)"
    ),
}


@pytest.mark.skipif(not JITTED, reason="without the jit there are no helpers")
@pytest.mark.parametrize("futex", ["futex", "bell"])
@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_ends_promptly_and_silently(end: str, futex: str) -> None:
    bell = "" if futex == "futex" else "workers.pool.fields['syscall'] = 0\n"
    # What an interpreter with these imports takes, plus the time of a loaded machine.
    assert seconds_to_exit(HELPERS + bell + ENDS[end]) < 5


def test_works_while_the_interpreter_shuts_down() -> None:
    """Also after the helpers have been sent home: first's handler runs last."""
    n = 800 if JITTED else 80
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: first())\n"
        "import numpy as np, sgmv\n"
        "sgmv.set_num_threads(2)\n"
        f"f = np.ones(({n}, 80), 'f')\n"
        "def last(): print(sgmv.lora_delta(f, f[:20], f[:, :20], 1.0).sum())\n"
        "first = last\n"
        "atexit.register(last)\n"
        "last()"
    )
    done = run_python(program)
    assert done.stdout.split() == [str(np.float32(n * n * 80 * 20))] * 3, done.stderr
    assert not done.stderr
