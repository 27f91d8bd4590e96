"""Threads: who joins a call, several callers, fork, interrupts, and life without a futex.

The kernels of this file do no sums. Each thread that enters one waits until as many as expected
are there, or for a second or so, and leaves what it saw in the call's v.
"""

from __future__ import annotations

import _ctypes
import ctypes
import ctypes.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

import sgmv
from reference.workloads import popularity, real
from sgmv import launch, tensors, workers
from sgmv.backend import Kernels
from sgmv.cpu import JITTED, cores
from sgmv.errors import SgmvError
from sgmv.kernels import call, plan
from sgmv.kernels.atomics import add_atomic, load_atomic, pause
from sgmv.kernels.jit import entry, jit, record, vector
from sgmv.kernels.pool import SHUT, free_helpers, take_helpers
from sgmv.kernels.records import CALL, INTEGER
from sgmv.kernels.tasks import NONE, claim_shrink, finish_shrink
from sgmv.launch import WORTH_SHARING_NS
from sgmv.tensors import as_array
from sgmv.threads import NativeThread
from tests.help.acceptance import assert_same_bits, backends_of, check, stack_of
from tests.help.planting import run_python

jitted = pytest.mark.skipif(not JITTED, reason="without the jit every call runs alone")
on_a_futex = pytest.mark.parametrize("pool", ["futex"], indirect=True)
on_both_kinds = pytest.mark.parametrize("pool", ["futex", "team"], indirect=True)
on_a_bell = pytest.mark.parametrize("pool", ["bell"], indirect=True)
posix = pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")

# Enough work that helpers are woken for it, on every backend.
RANK, H_IN, H_OUT = (64, 1300, 700) if JITTED else (3, 40, 30)
CASE = real(
    "threads",
    "a race",
    popularity("uniform", 90, seed=1),
    dict.fromkeys(range(10), RANK),
    H_IN,
    H_OUT,
)
# What the kernels below keep in v: how many threads to wait for, turns to wait for them; threads
# that entered, tasks begun, turns that a task takes; and a count for every task.
EXPECTED, PATIENCE, ENTERED, BEGUN, TURNS, TASKS = range(0, 48, 8)
SECOND = 100_000_000  # turns of a loop that only looks at memory: a second, or less, or some


@jit()
def meet(address: int, limit: int) -> None:
    seen = record(CALL, address).v
    counts = vector(seen, TASKS, INTEGER)
    add_atomic(seen + 8 * ENTERED, 1)
    turns = 0
    while load_atomic(seen + 8 * ENTERED) < counts[EXPECTED] and turns < counts[PATIENCE]:
        pause()
        turns += 1
    for _ in range(limit):
        task = claim_shrink(address)
        if task.number == NONE:
            return
        add_atomic(seen + 8 * BEGUN, 1)
        turns = 0
        while turns < counts[TURNS] and load_atomic(seen + 8 * TURNS) > 0:
            turns += 1
        add_atomic(seen + 8 * (TASKS + task.number), 1)
        finish_shrink(address, task, np.float32(0))


def kernel(address: int, limit: int) -> None:
    meet(address, limit)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(entry(kernel), 0, 4)


LARGE = 512  # ranks: a block is cut, so that a part's weights stay in L2
CUTS = LARGE // plan.RANKS_IN_L2


class Meeting:
    """A call whose tasks tell who came: `rows` of one adapter whose rank and width are large."""

    def __init__(
        self,
        kernels: Kernels,
        rows: int,
        expected: int = 1,
        turns: int = 0,
        patience: int = 3 * SECOND,
    ) -> None:
        self.kernels = kernels
        pair = np.zeros((LARGE, 2048), "f"), np.zeros((1, LARGE), "f")
        self.stack = sgmv.AdapterStack.from_adapters([pair])
        self.ids = np.zeros(rows, np.int64)
        self.v = np.zeros((1, TASKS + rows + 1024 * CUTS), np.int64)
        self.v[0, [EXPECTED, PATIENCE, TURNS]] = expected, patience, turns

    def call(self) -> None:
        launch.run_shrink(self.kernels, self.stack.table, self.ids, self.v, self.v)

    def check_all_come(self) -> None:
        self.call()
        assert self.entered == self.v[0, EXPECTED]
        self.check_done_once()

    @property
    def entered(self) -> int:
        return int(self.v[0, ENTERED])

    @property
    def begun(self) -> int:
        return int(self.v[0, BEGUN])

    @property
    def done(self) -> np.ndarray:
        """How often each task was done."""
        return self.v[0, TASKS:]

    def check_done_once(self) -> None:
        assert self.begun > 0
        assert (self.done[: self.begun] == 1).all()
        assert not self.done[self.begun :].any()


TEAM_THREADS = 5


@pytest.fixture
def parallel() -> Iterator[int]:
    """The address of GOMP_parallel, of an OpenMP that has TEAM_THREADS."""
    name = ctypes.util.find_library("gomp")
    if name is None:
        pytest.skip("this system has no OpenMP")
    openmp = ctypes.CDLL(name)
    before = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(TEAM_THREADS)
    yield ctypes.cast(openmp.GOMP_parallel, ctypes.c_void_p).value or 0
    openmp.omp_set_num_threads(before)


@pytest.fixture(params=["futex", "bell", "team"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[workers.Pool]:
    """A pool without helpers yet, which sleep on a futex, or else on the bell; or OpenMP's team."""
    if request.param == "team":
        fresh: workers.Pool = workers.Team(request.getfixturevalue("parallel"))
    else:
        fresh = workers.Pool()
    if request.param == "bell":
        fresh.fields["syscall"] = 0
    elif fresh.fields["syscall"][0] == 0:
        pytest.skip("this system has no futex")
    monkeypatch.setattr(workers, "pool", fresh)
    yield fresh
    fresh.close()
    assert not any(helper.is_alive() for helper in fresh.helpers)


@contextmanager
def held(pool: workers.Pool) -> Iterator[None]:
    """As if another thread were in a call, with the pool's helpers."""
    assert take_helpers(pool.address)
    yield
    free_helpers(pool.address)


def sleepers(pool: workers.Pool) -> int:
    return int(pool.fields[0].sleepers) + pool.asleep


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def add(backend: str | None = None) -> np.ndarray:
    y = CASE.y.copy()
    return sgmv.add_lora(y, CASE.x, stack_of(CASE), CASE.adapter_ids, backend=backend)


# who joins


@jitted
@on_both_kinds
def test_every_task_runs_once_on_whichever_thread(kernels: Kernels, pool: workers.Pool) -> None:
    sgmv.set_num_threads(3)
    for _ in range(5):
        Meeting(kernels, rows=2000, expected=3).check_all_come()


@jitted
@on_both_kinds
def test_threads_up_and_down_between_calls(kernels: Kernels, pool: workers.Pool) -> None:
    """As many as asked for take part, whether helpers spin, sleep, or are not yet made."""
    for count in (2, 5, 1, 3, 4, 1, 2, 5):
        sgmv.set_num_threads(count)
        Meeting(kernels, rows=2000, expected=count).check_all_come()
        if count == 4 and not isinstance(pool, workers.Team):
            wait_until(lambda: sleepers(pool) == len(pool.helpers) == 4)


@jitted
@on_a_bell
def test_the_bell_wakes_helpers_to_an_open_gate(
    kernels: Kernels, pool: workers.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a futex. At a shut gate they soon fall asleep again, and miss the call."""
    gates: list[int] = []
    release = pool.bell.release

    def ring(n: int = 1) -> None:
        gates.append(int(pool.fields[0].gate))
        release(n)

    monkeypatch.setattr(pool.bell, "release", ring)
    sgmv.set_num_threads(2)
    came = 0
    for _ in range(10):
        meeting = Meeting(kernels, rows=200, expected=2, patience=SECOND // 100)
        meeting.call()
        meeting.check_done_once()
        came += meeting.entered == 2
        wait_until(lambda: pool.asleep == 1)
    assert gates
    assert SHUT not in gates
    assert came > 5


@jitted
@on_a_futex
def test_small_work_wakes_nobody(
    kernels: Kernels, pool: workers.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large work does."""
    monkeypatch.setattr(launch, "WORTH_SHARING_NS", WORTH_SHARING_NS)
    sgmv.set_num_threads(2)
    small = np.ones((1, 8), "f"), np.ones((2, 8), "f"), np.ones((8, 2), "f")
    for _ in range(3):
        Meeting(kernels, rows=200, expected=2).check_all_come()
        wait_until(lambda: pool.fields[0].sleepers == 1)
        sgmv.lora_delta(*small, 1.0)
        # A helper that was woken would spin at the gate first.
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            assert pool.fields[0].sleepers == 1


@jitted
@on_a_futex
@pytest.mark.skipif(cores() < 2, reason="needs two cores")
def test_sleeping_helpers_are_woken_off_the_callers_core(
    kernels: Kernels, pool: workers.Pool
) -> None:
    sgmv.set_num_threads(2)
    allowed = os.sched_getaffinity(0)
    Meeting(kernels, rows=2000, expected=2).check_all_come()
    try:
        for cpu in sorted(allowed)[:2]:
            wait_until(lambda: sleepers(pool) == 1)
            os.sched_setaffinity(0, {cpu})
            Meeting(kernels, rows=2000, expected=2).check_all_come()
            assert os.sched_getaffinity(pool.helpers[0].native_id or 0) == allowed - {cpu}
    finally:
        os.sched_setaffinity(0, allowed)


@jitted
def test_a_caller_who_finds_helpers_busy_runs_alone(kernels: Kernels, pool: workers.Pool) -> None:
    sgmv.set_num_threads(3)
    meeting = Meeting(kernels, rows=200, expected=1)
    with held(pool):
        meeting.call()
    assert meeting.entered == 1
    meeting.check_done_once()


def test_whose_threads_help() -> None:
    """Torch's, for a call on torch's memory, where it has as many; else sgmv's own."""
    torch = pytest.importorskip("torch")
    ours, tensor = np.zeros((4, 6), "f"), torch.zeros(4, 6)
    theirs = [tensor.numpy(), tensor.numpy()[1:, ::2], as_array("x", tensor.bfloat16())]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        sgmv.set_num_threads(2)
        assert all(isinstance(workers.pool_of(array), workers.Team) for array in theirs)
        assert workers.pool_of(ours) is workers.pool_of(ours[1:]) is workers.pool
        sgmv.set_num_threads(3)
        assert all(workers.pool_of(array) is workers.pool for array in theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", [_ctypes.__file__, "no such file"])
def test_a_library_without_openmp(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(_C=SimpleNamespace(__file__=path))
    monkeypatch.setitem(sys.modules, "torch", library)  # type: ignore[arg-type]
    assert tensors.gomp_parallel() == 0


@pytest.mark.usefixtures("pool")
def test_many_python_threads_at_once() -> None:
    sgmv.set_num_threads(3)
    expected = {backend: add(backend) for backend in backends_of(CASE)}
    for backend, y in expected.items():
        check(CASE, y, backend)
    wrong: list[str] = []

    def call() -> None:
        for _ in range(10 if JITTED else 1):
            for backend, y in expected.items():
                try:
                    assert_same_bits(add(backend), y, f"{backend}, beside others")
                except Exception as error:
                    wrong.append(repr(error))

    threads = [threading.Thread(target=call) for _ in range(6 if JITTED else 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@jitted
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
        for _ in range(4):
            sgmv.add_lora(y, x, stack, ids)
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
    # With the GIL held the other thread could tick only between two kernels.
    assert sum(start < at < end for at in ticks) > 12


# fork


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@on_both_kinds
def test_in_a_child_after_fork(kernels: Kernels, pool: workers.Pool) -> None:
    """The parent has used its helpers; the child must not wait for theirs, and gets its own."""
    sgmv.set_num_threads(3)
    expected = add()
    with held(pool):  # as if another thread of the parent were calling
        child = os.fork()
    if child == 0:  # pragma: no cover
        status = 1
        try:
            status = 0 if add().tobytes() == expected.tobytes() else 2
            if JITTED:
                Meeting(kernels, rows=200, expected=3).check_all_come()
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


# interrupts and failures


def interrupted_call(meeting: Meeting, pool: workers.Pool) -> None:
    """Ctrl-C when some tasks are done; returns once the call has ended."""

    def interrupt() -> None:
        wait_until(lambda: meeting.begun > 3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            meeting.call()
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


def check_nobody_works(meeting: Meeting, pool: workers.Pool) -> None:
    """No task runs any more, and none was left half done."""
    assert pool.fields[0].inside == 0
    assert pool.fields[0].gate == SHUT
    before = meeting.v.copy()
    time.sleep(0.05)
    np.testing.assert_array_equal(meeting.v, before)
    assert meeting.done.sum() == meeting.begun
    assert meeting.done.max() == 1


@posix
@jitted
@on_both_kinds
@pytest.mark.parametrize("threads", [1, 3])
def test_ctrl_c_stops_a_long_call(threads: int, kernels: Kernels, pool: workers.Pool) -> None:
    """Its tasks would take a minute; helpers have stopped when the interrupt is raised."""
    sgmv.set_num_threads(threads)
    meeting = Meeting(kernels, rows=50_000, expected=threads, turns=SECOND // 10)
    started = time.monotonic()
    interrupted_call(meeting, pool)
    assert time.monotonic() - started < 20
    assert 3 < meeting.begun < 400 * CUTS
    check_nobody_works(meeting, pool)
    Meeting(kernels, rows=200, expected=threads).check_all_come()
    check(CASE, add(), "after an interrupt")


@jitted
@on_both_kinds
def test_a_failure_is_raised_after_all_have_stopped(
    kernels: Kernels, pool: workers.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sgmv.set_num_threads(3)
    meeting = Meeting(kernels, rows=50_000, expected=3, turns=SECOND // 100)

    def fail(call: int) -> int:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(call, "resume", fail)
        with pytest.raises(MemoryError):
            meeting.call()
    assert meeting.begun < 520 * CUTS
    check_nobody_works(meeting, pool)
    check(CASE, add(), "after a failure")


@pytest.mark.once
@posix
@jitted
def test_ctrl_c_ends_a_program_that_runs_kernels() -> None:
    program = (
        "import numpy as np, sgmv, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sgmv.set_num_threads(2)\n"
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


@jitted
def test_long_work_is_cut_into_batches_that_hear_signals(kernels: Kernels) -> None:
    """The kernel is entered anew about every BETWEEN_SIGNALS_NS of estimated work."""
    sgmv.set_num_threads(1)
    products = 10 * call.BETWEEN_SIGNALS_NS * plan.PRODUCTS_PER_NS
    meeting = Meeting(kernels, rows=products // (512 * 2048))
    meeting.call()
    meeting.check_done_once()
    assert 10 <= meeting.entered <= 20


@pytest.mark.parametrize("pool", ["futex", "bell"], indirect=True)
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_the_caller_goes_on_where_no_thread_can_be_had(
    error: Exception, pool: workers.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MemoryError is told; the next call, with threads again, finds everything in order."""
    sgmv.set_num_threads(4)
    tried = []

    def refuse(self: object) -> None:
        tried.append(self)
        raise error

    with monkeypatch.context() as patch:
        for kind in (threading.Thread, NativeThread):
            patch.setattr(kind, "start", refuse)
        if isinstance(error, RuntimeError) or not JITTED:
            check(CASE, add(), "alone")
        else:
            with pytest.raises(MemoryError):
                add()
    assert bool(tried) == JITTED
    assert not pool.helpers
    check(CASE, add(), "afterwards")
    assert len(pool.helpers) == (3 if JITTED else 0)


def test_number_of_threads() -> None:
    sgmv.set_num_threads(np.int32(3))
    assert sgmv.get_num_threads() == 3
    program = "import sgmv; print(sgmv.get_num_threads())"
    assert run_python(program, SGMV_NUM_THREADS="5").stdout.strip() == "5"
    expected = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert int(run_python(program, SGMV_NUM_THREADS=None).stdout) == expected
    for wrong in ("0", "two", "-1"):
        said = run_python(program, SGMV_NUM_THREADS=wrong).stderr
        assert "SGMV_NUM_THREADS: expected a whole number >= 1" in said
    for wrong in (0, -2, 1.5, "2", True, 1025, 2**31):
        with pytest.raises(SgmvError, match=r"^n: expected"):
            sgmv.set_num_threads(wrong)
    assert sgmv.get_num_threads() == 3
