"""warm_up: nothing is left to compile, and who waits is told once."""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import sgmv
from sgmv.errors import DtypeError
from sgmv.kernels import jit
from tests.conftest import JITTED
from tests.help.planting import run_python

pytestmark = pytest.mark.once
jitted = pytest.mark.skipif(not JITTED, reason="nothing is compiled")

CALLS = """
import numpy as np, sgmv
one = np.ones((3, 5), np.float32)
stack = sgmv.AdapterStack.from_adapters([(np.ones((2, 5), "f"), np.ones((7, 2), "f"))])
y = np.zeros((3, 7), np.float32)
sgmv.add_lora(y, one, stack, [0, -1, 0])
ids = np.array([0, -1, 0])
ids.flags.writeable = False
sgmv.add_lora(y, one, stack, ids)
sgmv.add_lora(y[::2], one[::2], stack, sgmv.segment([0, 0]))
sgmv.add_lora(y[::2], one[::2], stack, [0, 0])
sgmv.add_lora(y, one[:, ::-1], stack, ids)
sgmv.expand(sgmv.shrink(one, stack, sgmv.segment([0] * 3)), stack, sgmv.segment([0] * 3), y)
"""
COUNT = """
from sgmv.kernels.jit import notice
notice.seconds = 0.0
"""


@jitted
@pytest.mark.compiles
def test_the_first_process_says_once_that_it_compiles(tmp_path: object) -> None:
    empty = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = run_python(CALLS, **empty), run_python(CALLS, **empty)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stderr.count("compiling kernels") == 1
    assert len(first.stderr.splitlines()) == 1
    assert second.stderr == ""


@jitted
@pytest.mark.compiles
def test_after_it_no_call_compiles(tmp_path: object) -> None:
    """Also where helpers have to be made; and warm_up itself warns of nothing."""
    program = (
        "import sgmv\nprint(sgmv.warm_up(['float32']) > 0.1)\n"
        + COUNT
        + CALLS
        + "import time; time.sleep(0.2)  # a helper's own compiling would show, too\n"
        + "print(notice.seconds, sgmv.warm_up(['float32']))"
    )
    done = run_python(program, NUMBA_CACHE_DIR=str(tmp_path), SGMV_NUM_THREADS="2")
    assert done.stdout.splitlines() == ["True", "0.0 0.0"], done.stderr
    assert done.stderr == ""


@jitted
def test_types_may_differ(caplog: pytest.LogCaptureFixture) -> None:
    mix = (np.float16, ml_dtypes.bfloat16, "float32")
    with caplog.at_level(logging.INFO, "sgmv"):
        sgmv.warm_up([mix])
        again = sgmv.warm_up([mix])
    assert again == 0
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "float16/bfloat16/float32 are ready" in caplog.text


@pytest.mark.parametrize("wrong", ["int8", "float8", None, np.complex64, ("float32", "f", 7)])
def test_other_types_are_refused_before_anything_is_compiled(
    wrong: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("sgmv.warm_up")
    monkeypatch.setattr(module, "_calls", lambda *mix: pytest.fail("a call was made"))
    monkeypatch.setattr(module, "_warm", set())
    with pytest.raises(DtypeError, match=r"dtypes\[1\]"):
        sgmv.warm_up(["float32", wrong])


def test_one_type_needs_no_list() -> None:
    assert sgmv.warm_up() >= 0
    for one in ("float32", np.float32, np.dtype(np.float32)):
        assert sgmv.warm_up(one) == 0


def compiling(notice: jit.Notice, seconds: float, module: str = "sgmv.kernels.tiles") -> None:
    """As numba would tell of a function, and of another inside it."""
    function = SimpleNamespace(py_func=SimpleNamespace(__module__=module))
    event = SimpleNamespace(data={"dispatcher": function})
    notice.on_start(event)
    notice.on_start(event)
    notice.on_end(event)
    jit.time.now += seconds  # type: ignore[attr-defined]
    notice.on_end(event)


@pytest.fixture
def notice(monkeypatch: pytest.MonkeyPatch) -> jit.Notice:
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(jit, "time", clock)
    return jit.Notice()


def test_what_takes_as_long_as_loading_is_not_told(
    notice: jit.Notice, caplog: pytest.LogCaptureFixture
) -> None:
    compiling(notice, jit.NOTICE_AFTER_S / 2)
    compiling(notice, jit.NOTICE_AFTER_S)
    assert not caplog.records
    compiling(notice, 0.1)
    compiling(notice, 5.0)
    assert len(caplog.records) == 1
    assert notice.seconds == pytest.approx(1.5 * jit.NOTICE_AFTER_S + 5.1)


def test_other_peoples_functions_are_not_ours(
    notice: jit.Notice, caplog: pytest.LogCaptureFixture
) -> None:
    compiling(notice, 9.0, "somebody.else")
    compiling(notice, 0.1)
    compiling(notice, 0.1)
    assert not caplog.records


def test_expected_compiling_needs_no_notice(
    notice: jit.Notice, caplog: pytest.LogCaptureFixture
) -> None:
    notice.expected = True
    compiling(notice, 9.0)
    compiling(notice, 9.0)
    assert not caplog.records
