"""What sgmv tells about itself: `info`, the command line, and the line while it compiles."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

import sgmv
from sgmv.cpu import VECTOR_BITS
from tests.conftest import JITTED

pytestmark = pytest.mark.once


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sgmv", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_info_on_the_command_line_is_info() -> None:
    done = command("info", SGMV_NUM_THREADS=str(sgmv.get_num_threads()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(sgmv.info())


def test_info_tells_threads_and_backends() -> None:
    sgmv.set_num_threads(3)
    told = sgmv.info()
    assert told.threads.startswith("3;")
    assert told.backend["float64"] == "loops"
    assert told.cpu in str(told)


@pytest.mark.compiles
@pytest.mark.skipif(not JITTED, reason="no tiles without the jit")
@pytest.mark.skipif(VECTOR_BITS == 0, reason="this CPU has no vectors that tiles could use")
def test_info_tells_the_forced_width() -> None:
    assert "256 bits, 8 float32" in command("info", SGMV_VECTOR_BITS="256").stdout
    none = command("info", SGMV_VECTOR_BITS="0").stdout
    assert "none: plain loops" in none
    assert "float32 loops" in none
    assert "float32 loops" in command("info", SGMV_BACKEND="loops").stdout


def test_info_for_programs() -> None:
    told = json.loads(command("info", "--json").stdout)
    assert set(told) == {field.name for field in dataclasses.fields(sgmv.info())}
    assert told["backend"] == dict(sgmv.info().backend)


def test_a_wrong_command_is_refused() -> None:
    done = command("no-such-thing")
    assert done.returncode == 2
    assert "no-such-thing" in done.stderr
