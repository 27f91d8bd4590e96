"""Threads under anybody's rules: patched, forked at any moment, in a subinterpreter."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

from tests.conftest import JITTED
from tests.help.planting import run_python

pytestmark = pytest.mark.once
jitted = pytest.mark.skipif(not JITTED, reason="nothing is compiled, and nothing runs in parallel")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="helpers sleep on a futex")

CALL = """
import numpy as np, sgmv
sgmv.set_num_threads(2)
x = np.ones((200, 1000), 'f')
def call():
    return sgmv.lora_delta(x, x[:64], np.ones((1000, 64), 'f'), 1.0)[-1, -1]
"""
PATCHES = {
    "gevent": "import gevent.monkey; gevent.monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}


@linux
@jitted
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("library", PATCHES)
def test_calls_share_work_where_pythons_threads_are_patched(library: str, when: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    parts = [PATCHES[library], CALL] if when == "before" else [CALL, PATCHES[library]]
    count = "from sgmv import workers; print(call(), call(), len(workers.pool.helpers))"
    done = run_python("\n".join([*parts, count]), timeout=60)
    assert done.stdout.split() == ["64000.0", "64000.0", "1"], done.stderr


@jitted
def test_where_there_is_no_futex_either_a_call_runs_alone_and_says_so_once() -> None:
    """As on macOS: start_new_thread is somebody else's, and a thread of it would never begin."""
    program = (
        CALL
        + "import _thread\nfrom sgmv import workers\n"
        + "workers.pool.fields['syscall'] = 0\n"
        + "_thread.start_new_thread = lambda *arguments: None\n"
        + "print(call(), call(), len(workers.pool.helpers))"
    )
    done = run_python(program, timeout=60)
    assert done.stdout.split() == ["64000.0", "64000.0", "0"], done.stderr
    assert done.stderr.count("calls run on one thread") == 1


@linux
@jitted
def test_helpers_hear_no_signals() -> None:
    """Python's handlers run in its main thread, which a signal must be able to wake."""
    program = (
        CALL
        + "from sgmv import workers\ncall()\n"
        + "path = f'/proc/self/task/{workers.pool.helpers[0].native_id}/status'\n"
        + "[line] = [line for line in open(path) if line.startswith('SigBlk')]\n"
        + "import signal\nmask = int(line.split()[1], 16)\n"
        + "print(all(mask >> (int(n) - 1) & 1 for n in (signal.SIGINT, signal.SIGCHLD)))\n"
        + "print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    )
    assert run_python(program).stdout.split("\n")[:2] == ["True", "set()"]


SUBINTERPRETER = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
{before}
one = interpreters.create()
code = f'import sys; sys.path[:] = {sys.path!r}; import sgmv'
try:
    found = interpreters.run_string(one, code)
except Exception as error:
    found = error
print(found)
"""


@pytest.mark.parametrize("before", ["", "import sgmv"])
def test_a_subinterpreter_is_refused_by_name(before: str) -> None:
    done = run_python(SUBINTERPRETER.replace("{before}", before), timeout=60)
    assert "expected the main interpreter, got a subinterpreter" in done.stdout, done.stderr


@linux
@jitted
def test_helpers_do_not_mind_that_the_main_thread_ends_first() -> None:
    """Its own end waits for Python's other threads, which go on calling."""
    program = (
        CALL
        + "import threading, time\ncall()\n"
        + "def later():\n    time.sleep(0.3)\n    print(call(), call())\n"
        + "threading.Thread(target=later).start()"
    )
    assert run_python(program, timeout=60).stdout.split() == ["64000.0"] * 2


FORKS = """
import os, sys, threading, time
{call}
threading.Thread(target=call).start()
time.sleep(float(sys.argv[1]))
child = os.fork()
if child == 0:
    os._exit(0 if call() == 64000.0 else 1)
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        print(os.waitstatus_to_exitcode(status))
        break
    time.sleep(0.01)
else:
    os.kill(child, 9)
    print('the child hangs')
print(call())
"""


@forks
@pytest.mark.parametrize("delay", [0.02, 0.06, 0.1, 0.15, 0.2, 0.3, 0.41])
def test_a_fork_while_another_thread_makes_its_first_call(delay: float) -> None:
    """That thread loads kernels, or compiles them: the child must not wait for its locks."""
    done = run_python(
        FORKS.replace("{call}", CALL), arguments=[str(delay)], timeout=110, PYTHONWARNINGS="ignore"
    )
    assert done.stdout.split() == ["0", "64000.0"], done.stdout + done.stderr


# servers that load in one process and answer in its forks: gunicorn --preload, uWSGI

SERVER = (
    CALL
    + """
import os, signal, sys, threading, time
def answers():
    'From threads of this process, as a server with threads would ask.'
    found = []
    threads = [threading.Thread(target=lambda: found.append(call())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found == [64000.0] * 3
def fork(work):
    sys.stdout.flush()  # or the child would print that, too, when it ends
    child = os.fork()
    if child:
        return child
    sys.exit(0 if work() else 1)  # as a worker ends: what was registered for the end runs
def ended(child):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 'hangs'
"""
)
WORKERS = """
def worker():
    'Answers, forks once more, and answers.'
    return answers() and ended(fork(answers)) == 0 and answers()
children = [fork(worker) for _ in range(4)]
print(*[ended(child) for child in children], call())
"""
KILLED = """
stop = threading.Event()
wrong = []
def ask():
    while not stop.is_set():
        if call() != 64000.0:
            wrong.append('wrong')
thread = threading.Thread(target=ask)
thread.start()
reading, writing = os.pipe()
def busy():
    os.write(writing, b'!')
    while True:
        call()
for number in range(8):
    child = fork(busy)  # in the midst of the thread's call, mostly
    os.read(reading, 1)
    time.sleep(0.003 * number)
    os.kill(child, signal.SIGKILL)
    print(ended(child))
print(ended(fork(answers)))  # the one that comes instead
stop.set()
thread.join()
print(wrong, answers())
"""


@forks
@pytest.mark.parametrize("begin", ["sgmv.warm_up()", "call()", "answers()", ""])
def test_workers_forked_after_a_warm_up_answer(begin: str) -> None:
    done = run_python("\n".join([SERVER, begin, WORKERS]), timeout=110, PYTHONWARNINGS="ignore")
    assert done.stdout.split() == ["0"] * 4 + ["64000.0"], done.stdout + done.stderr


@forks
def test_a_worker_that_is_killed_in_its_call_harms_no_other() -> None:
    program = "\n".join([SERVER, "call()", KILLED])
    done = run_python(program, timeout=110, PYTHONWARNINGS="ignore")
    assert done.stdout.splitlines() == ["-9"] * 8 + ["0", "[] True"], done.stdout + done.stderr
