"""Threads: several callers at once, fork, interrupts, and what a failing task leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import sgmv
from reference.workloads import popularity, real
from sgmv.errors import SgmvError
from tests.acceptance import assert_same_bits, stack_of
from tests.conftest import JITTED

workers = sys.modules["sgmv.workers"]
CASE = real(
    "threads", "a race", popularity("uniform", 90, seed=1), dict.fromkeys(range(10), 9), 130, 70
)


@pytest.fixture
def _always_wake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "WORTH_WAKING", 0)
    sgmv.set_num_threads(3)


def add() -> np.ndarray:
    return sgmv.add_lora(CASE.y.copy(), CASE.x, stack_of(CASE), CASE.adapter_ids)


@pytest.mark.usefixtures("_always_wake")
def test_many_python_threads_at_once() -> None:
    expected = add()
    CASE.check(expected)
    wrong: list[str] = []

    def call() -> None:
        for _ in range(20 if JITTED else 1):
            try:
                assert_same_bits(add(), expected, "beside others")
            except AssertionError as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.usefixtures("_always_wake")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_in_a_child_after_fork() -> None:
    """The parent has used its helpers; the child must not wait for theirs."""
    expected = add()
    child = os.fork()
    if child == 0:  # pragma: no cover
        status = 1
        try:
            status = 0 if add().tobytes() == expected.tobytes() else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert_same_bits(add(), expected, "in the parent, afterwards")


@pytest.mark.usefixtures("_always_wake")
def test_every_task_runs_once_on_whichever_thread() -> None:
    done = np.zeros(500, np.int64)
    threads = set()

    def kernel(next_task: np.ndarray, batch: int, tasks: np.ndarray) -> None:
        for _ in range(batch):
            with lock:
                t = int(next_task[0])
                next_task[0] += 1
            if t >= len(tasks):
                return
            threads.add(threading.get_ident())
            done[tasks[t]] += 1
            time.sleep(0.0001)

    lock = threading.Lock()
    workers.run(kernel, np.arange(500), 1, None)
    assert (done == 1).all()
    assert len(threads) == 3


@pytest.mark.usefixtures("_always_wake")
@pytest.mark.parametrize("where", ["caller", "helper"])
def test_a_failure_is_raised_after_all_have_stopped(where: str) -> None:
    caller = threading.get_ident()
    running = []

    def kernel(next_task: np.ndarray, batch: int, tasks: np.ndarray) -> None:
        running.append(1)
        try:
            time.sleep(0.02)
            if (threading.get_ident() == caller) == (where == "caller"):
                raise MemoryError(where)
            next_task[0] += 1
            time.sleep(0.02)
        finally:
            running.pop()

    with pytest.raises(MemoryError, match=where):
        workers.run(kernel, np.arange(10), 1, None)
    assert not running


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.usefixtures("_always_wake")
def test_ctrl_c_stops_between_batches() -> None:
    running = []

    def kernel(next_task: np.ndarray, batch: int, tasks: np.ndarray) -> None:
        running.append(1)
        try:
            next_task[0] += 1
            time.sleep(0.01)
        finally:
            running.pop()

    threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        workers.run(kernel, np.arange(10_000), 1, None)
    assert time.monotonic() - started < 20
    assert not running
    CASE.check(add())


@pytest.mark.skipif(os.name != "posix" or not JITTED, reason="sends SIGINT to jitted code")
def test_ctrl_c_ends_a_program_that_runs_kernels() -> None:
    program = (
        "import numpy as np, sgmv\n"
        "x = np.ones((512, 2048), 'f')\n"
        "while True:\n"
        "    sgmv.lora_delta(x, x[:64], np.ones((2048, 64), 'f'), 1.0)\n"
        "    print('again', flush=True)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            for _ in range(3):
                assert process.stdout.readline() == b"again\n"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert b"KeyboardInterrupt" in errors


def test_long_work_is_cut_into_batches_that_hear_signals() -> None:
    batches = []

    def kernel(next_task: np.ndarray, batch: int, tasks: np.ndarray) -> None:
        batches.append(batch)
        next_task[0] += batch

    workers.run(kernel, np.arange(1000), 4 * workers.BETWEEN_SIGNALS, None)
    assert set(batches) == {250}


def test_small_work_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_wake", lambda *_: pytest.fail("woke a helper"))
    sgmv.set_num_threads(4)
    sgmv.lora_delta(np.ones((1, 8), "f"), np.ones((2, 8), "f"), np.ones((8, 2), "f"), 1.0)


@pytest.mark.usefixtures("_always_wake")
def test_the_caller_goes_on_where_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    sgmv.set_num_threads(4)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    CASE.check(add())


@pytest.mark.skipif(not JITTED, reason="Python code holds the GIL")
def test_other_python_threads_run_meanwhile() -> None:
    x, A, B = np.ones((2048, 4096), "f"), np.ones((64, 4096), "f"), np.ones((4096, 64), "f")
    stack, ids = sgmv.AdapterStack.from_adapters([(A, B)]), np.zeros(2048, int)
    y = np.zeros((2048, 4096), "f")
    sgmv.set_num_threads(1)
    sgmv.add_lora(y[:1], x[:1], stack, ids[:1])
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.0005):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        start = time.perf_counter()
        sgmv.add_lora(y, x, stack, ids)
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
    # With the GIL held the other thread could tick only between two kernels.
    assert sum(start < at < end for at in ticks) > 3


def run_python(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


def test_number_of_threads() -> None:
    sgmv.set_num_threads(np.int32(3))
    assert sgmv.get_num_threads() == 3
    program = "import sgmv; print(sgmv.get_num_threads())"
    assert run_python(program, SGMV_NUM_THREADS="5").strip() == "5"
    expected = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {k: v for k, v in os.environ.items() if k != "SGMV_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert int(done.stdout) == expected
    for wrong in ("0", "two", "-1"):
        assert "SGMV_NUM_THREADS: expected a whole number >= 1" in run_python(
            program, SGMV_NUM_THREADS=wrong
        )
    for wrong in (0, -2, 1.5, "2", True):
        with pytest.raises(SgmvError, match=r"^n: expected"):
            sgmv.set_num_threads(wrong)
    assert sgmv.get_num_threads() == 3


def test_works_while_the_interpreter_shuts_down() -> None:
    program = (
        "import atexit, numpy as np, sgmv, sys\n"
        "sys.modules['sgmv.workers'].WORTH_WAKING = 0\n"
        "sgmv.set_num_threads(2)\n"
        "f = np.ones((80, 8), 'f')\n"
        "def last(): print(sgmv.lora_delta(f, f[:2], f[:, :2], 1.0).sum())\n"
        "atexit.register(last)\n"
        "last()"
    )
    assert run_python(program).split() == ["102400.0", "102400.0"]
