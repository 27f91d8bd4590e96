"""The threads that run tasks.

The caller always works; helpers join it when the work is worth waking them. All of them claim
tasks from one counter inside jitted code that has released the GIL. A helper that has not started
by the time the caller runs out of tasks is not waited for: it finds the call closed. So a second
concurrent caller, who finds the helpers busy, simply runs alone.

Not numba's prange: its OpenMP layer dies in a forked child and took 4-8 ms a barrier after 20 ms of
idleness; its workqueue layer aborts the process when two Python threads call at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sgmv.errors import ValueRangeError
from sgmv.segment import Integers, check_count

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
    n = check_count("n", n, 1)
    with _lock:
        if n != _threads and _pool is not None:
            _pool.shutdown(wait=False)
            _pool = None
        _threads = n


def run(
    kernel: Callable[..., None], tasks: Integers, work: int, owners: object, *arguments: Any
) -> None:
    """Run `kernel(next_task, batch, tasks, *arguments)` on several threads until no task is left.

    Semantics: when it returns, or raises, no thread works on `arguments` any more.
    work    multiply-adds and weights read by all tasks together: decides about waking helpers
    owners  what holds the memory behind the addresses among `arguments`: kept alive meanwhile
    """
    next_task = np.zeros(1, np.int64)
    batch = max(1, len(tasks) * BETWEEN_SIGNALS // max(work, 1))

    def drain() -> None:
        while next_task[0] < len(tasks):
            kernel(next_task, batch, tasks, *arguments)

    if work < WORTH_WAKING:
        drain()
        return
    call = _Call(drain, owners)
    try:
        _wake(min(get_num_threads(), len(tasks)) - 1, call.help)
        drain()
    finally:
        next_task[0] = len(tasks)
        call.close()


class _Call:
    """The door to one call: helpers come in to drain its tasks until it is closed."""

    def __init__(self, drain: Callable[[], None], owners: object) -> None:
        self.drain, self.owners = drain, owners
        self.changed = threading.Condition()
        self.helpers = 0
        self.closed = False
        self.failure: BaseException | None = None

    def help(self) -> None:
        with self.changed:
            if self.closed:
                return
            self.helpers += 1
        try:
            self.drain()
        except BaseException as failure:
            self.failure = failure
        finally:
            with self.changed:
                self.helpers -= 1
                self.changed.notify_all()

    def close(self) -> None:
        """Let no helper in any more, wait for those inside, raise what one of them raised."""
        interrupt = None
        while not self.closed or self.helpers:
            try:
                with self.changed:
                    self.closed = True
                    self.changed.wait_for(lambda: not self.helpers)
            except KeyboardInterrupt as error:  # helpers still write: hear it, but wait on
                interrupt = error
        if self.failure or interrupt:
            raise self.failure or interrupt  # type: ignore[misc]  # one of them is there


def _wake(count: int, help: Callable[[], None]) -> None:
    global _pool
    if count < 1:
        return
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, get_num_threads() - 1), "sgmv")
        try:
            for _ in range(count):
                _pool.submit(help)
        except RuntimeError:  # shutting down, or no thread to be had: the caller does it all
            return


def _forget_pool() -> None:
    """In a forked child the parent's threads are gone, and its lock may have been held."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
