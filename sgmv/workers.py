"""The threads that run tasks.

The caller always works; helpers join it when the work is worth waking them. All of them claim
tasks from one counter inside jitted code that has released the GIL. A helper that has not started
by the time the caller runs out of tasks is not waited for: its turn is cancelled. So a second
concurrent caller, who finds the helpers busy, simply runs alone.

Not numba's prange: its OpenMP layer dies in a forked child and took 4-8 ms a barrier after 20 ms of
idleness; its workqueue layer aborts the process when two Python threads call at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from sgmv.errors import DtypeError, ValueRangeError
from sgmv.segment import Integers

# Work below which waking a helper, some 60 us, costs more than it brings: at half of it, 64 rows at
# r = 8, two threads took 1.4 times as long as one.
WORTH_WAKING = 4_000_000
# Work between two looks at pending signals, so that Ctrl-C is heard within about 50 ms.
BETWEEN_SIGNALS = 500_000_000


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _initial_threads() -> int:
    given = os.environ.get("SGMV_NUM_THREADS")
    if given is None:
        return cores()
    if not given.isdecimal() or int(given) < 1:
        raise ValueRangeError(
            "SGMV_NUM_THREADS",
            "a whole number >= 1",
            repr(given),
            "set it to a number, or unset it",
        )
    return int(given)


_lock = threading.Lock()
_threads: int | None = None
_pool: ThreadPoolExecutor | None = None


def get_num_threads() -> int:
    """The number of threads that a call may use, the calling one included.

    Semantics: the last value set; else the environment's SGMV_NUM_THREADS; else the cores that
    this process may use. Raises ValueRangeError when SGMV_NUM_THREADS is not a whole number >= 1.

    >>> get_num_threads() >= 1
    True
    """
    global _threads
    if _threads is None:
        _threads = _initial_threads()
    return _threads


def set_num_threads(n: int) -> None:
    """Let each call use n threads, the calling one included. Results do not depend on it.

    Semantics: holds for the whole process from the next call on. n  an integer >= 1.
    Raises DtypeError for anything but an integer, ValueRangeError below 1.

    >>> set_num_threads(get_num_threads())
    """
    global _threads, _pool
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise DtypeError("n", "an integer", type(n).__name__, "pass a number of threads")
    if n < 1:
        raise ValueRangeError("n", "at least 1", str(n), "pass 1 to use the calling thread alone")
    with _lock:
        if int(n) != _threads and _pool is not None:
            _pool.shutdown(wait=False)
            _pool = None
        _threads = int(n)


def run(kernel: Callable[..., None], tasks: Integers, work: int, *arguments: Any) -> None:
    """Run `kernel(next_task, batch, tasks, *arguments)` on several threads until no task is left.

    Semantics: when it returns, or raises, no thread works on `arguments` any more.
    work  multiply-adds and weights read by all tasks together: decides about waking helpers
    """
    last = len(tasks)
    next_task = np.zeros(1, np.int64)
    batch = max(1, last * BETWEEN_SIGNALS // max(work, 1))

    def drain() -> None:
        while next_task[0] < last:
            kernel(next_task, batch, tasks, *arguments)

    if work < WORTH_WAKING:
        drain()
        return
    helpers: list[Future[None]] = []
    try:
        _wake(helpers, min(get_num_threads(), last) - 1, drain)
        drain()
    finally:
        next_task[0] = last
        _dismiss(helpers)


def _wake(helpers: list[Future[None]], count: int, drain: Callable[[], None]) -> None:
    global _pool
    if count < 1:
        return
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, get_num_threads() - 1), "sgmv")
        try:
            for _ in range(count):
                helpers.append(_pool.submit(drain))
        except RuntimeError:  # the interpreter is shutting down: the caller does it all
            return


def _dismiss(helpers: list[Future[None]]) -> None:
    """Cancel those that have not started, wait for the others, then raise what they raised."""
    failures: list[BaseException | None] = []
    for helper in helpers:
        while not helper.cancel():
            try:
                failures.append(helper.exception())
                break
            except KeyboardInterrupt as interrupt:  # the helper still writes: wait on
                failures.append(interrupt)
    for failure in failures:
        if failure is not None:
            raise failure


def _forget_pool() -> None:
    """In a forked child the parent's threads are gone, and its lock may have been held."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
