"""The kernels' files on disk: what damages them, or fills the disk, costs a compilation only."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
from numba.core import event
from numba.core.compiler_lock import global_compiler_lock
from numba.core.errors import TypingError

from sgmv.kernels import disk, jit
from sgmv.kernels.disk import KernelFiles
from tests.conftest import JITTED
from tests.help.planting import run_python

pytestmark = pytest.mark.once
jitted = pytest.mark.skipif(not JITTED, reason="nothing is compiled")
SOURCE = "def twice(n):\n    return 2 * n\n"

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda found: b"",
    "halved": lambda found: found[: len(found) // 2],
    "zeroed": lambda found: bytes(len(found)),
    "a bit flipped": lambda found: found[:-9] + bytes([found[-9] ^ 1]) + found[-8:],
    "appended to": lambda found: found + b"\0",
    "another program's": lambda found: b"not a kernel" * 99,
}


@pytest.fixture(autouse=True)
def _nothing_was_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_logged", set())


def probe(folder: Path) -> Any:
    """A function of this folder, as a new process would have it: nothing of it is in memory."""
    path = folder / "probe.py"
    if not path.exists():
        path.write_text(SOURCE)
    names: dict[str, Any] = {"__name__": "probe"}
    exec(compile(path.read_text(), path, "exec"), names)
    return jit.jit()(names["twice"])


def files(compiled: Any) -> list[Path]:
    return sorted(Path(compiled._cache.cache_path).glob("probe.twice*"))


def hits(compiled: Any) -> int:
    return sum(compiled.stats.cache_hits.values())


@jitted
def test_a_second_process_loads_what_the_first_kept(tmp_path: Path) -> None:
    first, second = probe(tmp_path), probe(tmp_path)
    assert (first(4), first(0.5), hits(first)) == (8, 1.0, 0)
    assert len(files(first)) == 2
    assert (second(4), second(0.5), hits(second)) == (8, 1.0, 2)


@jitted
def test_a_process_with_other_choices_keeps_files_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SGMV_VECTOR_BITS makes them: each would take the place of the other's."""
    first = probe(tmp_path)
    first(4)
    with monkeypatch.context() as patch:
        patch.setattr(jit, "CHOICES", ("narrow",))
        other = probe(tmp_path)
    assert (other(4), hits(other)) == (8, 0)
    second = probe(tmp_path)
    assert (second(4), hits(second), len(files(second))) == (8, 1, 2)


@jitted
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_compiled_anew_and_logged_once(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = probe(tmp_path)
    first(4), first(0.5)
    for path in files(first):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    second, third = probe(tmp_path), probe(tmp_path)
    assert (second(4), second(0.5), hits(second)) == (8, 1.0, 0)
    assert len(caplog.records) == 1
    assert "damaged" in caplog.text
    assert "probe.twice" in caplog.text
    assert (third(4), third(0.5), hits(third)) == (8, 1.0, 2)


@jitted
def test_a_whole_file_that_cannot_be_linked_is_compiled_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = probe(tmp_path)
    first(4)
    key = next(iter(first.overloads))
    cache = first._cache
    index = cache._index_key(key, first.targetctx.codegen())
    cache._cache_file.save(index, ("not", "a", "library"))
    second = probe(tmp_path)
    assert (second(4), hits(second)) == (8, 0)
    assert "cannot be loaded" in caplog.text


@jitted
@pytest.mark.parametrize("edit", ["    return 3 * n\n", "    return 2 * n  # edited\n"])
def test_an_edit_makes_the_file_stale(edit: str, tmp_path: Path) -> None:
    first = probe(tmp_path)
    first(4)
    (tmp_path / "probe.py").write_text(SOURCE.splitlines(True)[0] + edit)
    os.utime(tmp_path / "probe.py", (1, 1))  # a time of its own: the edit may come within a tick
    second = probe(tmp_path)
    assert (second(4), hits(second)) == (12 if "3" in edit else 8, 0)
    assert [path.suffix for path in files(second)] == [disk.SUFFIX] * len(files(second))


@jitted
def test_a_full_disk_costs_the_cache_and_not_the_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No file may grow past 100 bytes: the system refuses as it does on a full disk."""
    compiled = probe(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        values = compiled(4), compiled(0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert values == (8, 1.0)
    assert files(compiled) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be kept" in caplog.text


def test_entries_of_one_function_never_share_a_file(tmp_path: Path) -> None:
    """Two processes that fill an empty folder know nothing of each other's entries."""
    one, other = (KernelFiles(tmp_path, "f", "stamp") for _ in range(2))
    for number in range(20):
        (one, other)[number % 2].save(("key", number), number)
    assert [one.load(("key", number)) for number in range(20)] == list(range(20))
    assert KernelFiles(tmp_path, "f", "another stamp").load(("key", 3)) is None
    one.flush()
    assert other.load(("key", 3)) is None


def wait_for_the_lock(folder: Path, queue: Any) -> None:
    lock = disk._OneProcess()
    begun = time.monotonic()
    queue.put("ready")
    lock.acquire(folder)
    queue.put(time.monotonic() - begun)
    lock.release()


@pytest.fixture
def lock() -> Iterator[disk._OneProcess]:
    """One that follows numba's compiler lock, as the library's own does."""
    made = disk._OneProcess()
    event.register("numba:compiler_lock", made)
    yield made
    event.unregister("numba:compiler_lock", made)


flock = pytest.mark.skipif(disk.fcntl is None, reason="this system has no flock")


@flock
def test_a_second_process_waits_until_the_first_has_saved(
    tmp_path: Path, lock: disk._OneProcess
) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=wait_for_the_lock, args=(tmp_path, queue))
    with global_compiler_lock:
        assert not lock.acquire(tmp_path)
        with global_compiler_lock:  # for a function inside
            assert not lock.acquire(tmp_path)
        child.start()
        assert queue.get(timeout=60) == "ready"
        time.sleep(0.4)
        assert queue.empty()
    assert queue.get(timeout=60) >= 0.3
    child.join()


def enter_and_leave_the_compiler() -> None:
    with global_compiler_lock:
        pass


@flock
def test_another_thread_that_leaves_the_compiler_releases_nothing(
    tmp_path: Path, lock: disk._OneProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "WAIT_FOR_OTHERS_S", 0.1)
    lock.acquire(tmp_path)
    thread = threading.Thread(target=enter_and_leave_the_compiler)
    thread.start()
    thread.join()
    other = disk._OneProcess()
    assert other.acquire(tmp_path)
    other.release()
    lock.release()


@flock
def test_a_process_that_stops_in_the_middle_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, here = disk._OneProcess(), disk._OneProcess()
    stopped.acquire(tmp_path)
    monkeypatch.setattr(disk, "WAIT_FOR_OTHERS_S", 0.1)
    assert here.acquire(tmp_path)
    here.release()
    stopped.release()


class CtrlC(event.Listener):
    """Presses it once, where numba has begun to compile."""

    pressed = False

    def on_start(self, event: Any) -> None:
        if not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)

    def on_end(self, event: Any) -> None:
        pass


def interrupted(compiled: Any) -> None:
    event.register("numba:run_pass", CtrlC())
    compiled(4)


def interrupted_as_it_waits(compiled: Any) -> None:
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    compiled(4)


ENDINGS: dict[str, Callable[[Any], object]] = {
    "failed": lambda compiled: compiled(None),  # no number, so that numba refuses the product
    "interrupted": interrupted,
    "interrupted as it waits": interrupted_as_it_waits,
}


def end_early(folder: Path, how: str, pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    numba.njit(lambda n: n)(4)  # numba imports much for its first: what is tested comes after that
    compiled = probe(folder)
    try:
        ENDINGS[how](compiled)
    except (KeyboardInterrupt, TypingError) as error:
        pipe.send(type(error).__name__)
    pipe.recv()
    pipe.send((compiled(4), hits(compiled), disk.one_process._file))


@flock
@jitted
@pytest.mark.parametrize("how", ENDINGS)
def test_a_process_that_failed_to_compile_is_not_waited_for(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives on, and compiles later."""
    monkeypatch.setattr(disk, "WAIT_FOR_OTHERS_S", 30.0)
    folder = probe(tmp_path)._cache._files.folder
    holder = disk._OneProcess()
    if how == "interrupted as it waits":
        holder.acquire(folder)
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=end_early, args=(tmp_path, how, there))
    child.start()
    there.close()  # so that the end of the child is seen
    assert here.poll(60)
    assert here.recv() == ("TypingError" if how == "failed" else "KeyboardInterrupt")
    holder.release()
    begun = time.monotonic()
    holder.acquire(folder)
    assert time.monotonic() < begun + 20
    holder.release()
    here.send("again")
    assert here.poll(60)
    assert here.recv() == (8, 0, None)
    child.join()


@jitted
@pytest.mark.compiles
def test_eight_processes_compile_an_empty_folder_once(tmp_path: Path) -> None:
    program = (
        "import numpy as np, sgmv\n"
        "from sgmv.kernels.jit import notice\n"
        "sgmv.warm_up()\nprint(notice.seconds)"
    )
    context = multiprocessing.get_context("spawn")
    with context.Pool(8) as pool:
        calls = [
            pool.apply_async(run_python, (program,), {"NUMBA_CACHE_DIR": str(tmp_path)})
            for _ in range(8)
        ]
        done = [call.get(timeout=300) for call in calls]
    assert [each.returncode for each in done] == [0] * 8, done
    seconds = sorted(float(each.stdout) for each in done)
    assert sum(seconds) < 3 * seconds[-1] + 1, seconds


def test_a_log_line_is_given_once_for_each_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sgmv"):
        for problem in ("one", "one", "two", "one"):
            disk.log_once(problem, tmp_path, OSError(os.strerror(28)))
    assert len(caplog.records) == 2


INTERRUPTED = """
import signal, sys
import numpy as np, sgmv
A, B = np.ones((2, 8), 'f'), np.ones((4, 2), 'f')
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may ignore it
left = {count}
def lines(frame, what, _):
    'Ctrl-C at one of the lines.'
    global left
    left -= what == 'line'
    if left == 0 and what == 'line':
        signal.raise_signal(signal.SIGINT)
    return lines
def imports(frame, *_):
    'As numba imports modules of its own, and registers what it finds in them.'
    code = frame.f_code
    return lines if code.co_name == '<module>' and '/numba/' in code.co_filename else None
def call():
    return float(sgmv.lora_delta(np.ones((1, 8), 'f'), A, B, 1.0)[0, 0])
sys.settrace(imports)
try:
    print(call())
except KeyboardInterrupt:
    print('interrupted')
sys.settrace(None)
print(left <= 0, call(), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@jitted
@pytest.mark.parametrize("count", [200, 1000, 1500, 2000, 4000])  # of some 9,000
def test_ctrl_c_while_numba_imports_leaves_later_calls_as_they_were(count: int) -> None:
    """What numba had half imported was registered twice, and every later call failed."""
    done = run_python(INTERRUPTED.replace("{count}", str(count)), timeout=110)
    expected = ["interrupted", "True 16.0 True"]
    assert done.stdout.split("\n")[:2] == expected, done.stdout + done.stderr
