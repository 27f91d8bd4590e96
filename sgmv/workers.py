"""The threads that help with a call: how many, sgmv's or torch's, when made, and what ends them.

The caller always works; helpers join it (see kernels/pool.py). A caller that finds them busy with
another caller's tasks runs alone. They are sgmv's own, or torch's where it has as many.

Not numba's prange: its OpenMP layer dies in a forked child and took 4-8 ms a barrier after 20 ms of
idleness; its workqueue layer aborts the process when two Python threads call at once.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import sys
import threading
import time
from functools import cache
from typing import Any

import numpy as np

from sgmv import tensors
from sgmv.checks import check_count
from sgmv.cpu import cores
from sgmv.errors import ValueRangeError
from sgmv.kernels.disk import logger
from sgmv.kernels.jit import entry
from sgmv.kernels.pool import (
    CLOSED,
    close_gate,
    free_helpers,
    help_out,
    life,
    member,
    take_helpers,
)
from sgmv.kernels.records import CPU_WORDS, POOL, on_cache_lines
from sgmv.settings import NUM_THREADS
from sgmv.threads import NativeThread, are_patched

# The numbers of Linux's system calls. Elsewhere helpers sleep on a Python semaphore, which woke
# them 10 us later here, and needs the GIL.
SYSTEM_CALLS = {
    "x86_64": {"futex": 202, "getcpu": 309, "setaffinity": 203, "gettid": 186},
    "aarch64": {"futex": 98, "getcpu": 168, "setaffinity": 122, "gettid": 178},
}


MOST_THREADS = 64 * CPU_WORDS  # as many as keep_clear has bits of cores for


def _initial_threads() -> int:
    given = NUM_THREADS.read()
    if given is None:
        return cores()
    if not given.isdecimal() or not 1 <= int(given) <= MOST_THREADS:
        raise ValueRangeError(
            NUM_THREADS.name,
            f"a whole number >= 1, at most {MOST_THREADS}",
            repr(given),
            "set it to a number, or unset it",
        )
    return int(given)


_threads: int | None = None


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

    Semantics: holds for the whole process from the next call on. n  an integer from 1 to 1024.
    Raises DtypeError for anything but an integer, ValueRangeError for one out of range.

    >>> set_num_threads(get_num_threads())
    """
    global _threads
    count = check_count("n", n, 1)
    if count > MOST_THREADS:
        raise ValueRangeError(
            "n", f"at most {MOST_THREADS}", str(count), "use the number of cores, or fewer"
        )
    _threads = count


class Pool:
    """Helpers at a gate. One caller at a time has them: see `take_helpers` in kernels/pool.py."""

    def __init__(self) -> None:
        self.helpers: list[threading.Thread | NativeThread] = []
        self.begun = self.closed = False
        self.asleep = 0
        self.bell = threading.Semaphore(0)
        self.fields = on_cache_lines(POOL)
        for name, number in _system_calls().items():
            self.fields[name] = number
        self.cpus, self.mask = np.zeros((2, CPU_WORDS), np.int64)
        self.fields["cpus"], self.fields["mask"] = self.cpus.ctypes.data, self.mask.ctypes.data
        self.address = int(self.fields.ctypes.data)

    def prepare(self, helpers: int) -> None:
        """Start helpers until there are `helpers`, or as many as the system gives."""
        if len(self.helpers) >= helpers:
            return
        self.begun = True
        if not take_helpers(self.address):
            return
        try:
            while len(self.helpers) < helpers and not self.closed:
                self.helpers.append(self._helper(len(self.helpers)))
                self._know_helpers()
        except RuntimeError:  # no thread to be had, or the interpreter is shutting down
            return
        finally:
            free_helpers(self.address)

    def ring(self) -> None:
        """Wake the helpers that sleep, where there is no futex to do so."""
        while self.asleep > 0:
            self.asleep -= 1
            self.bell.release()

    def close(self) -> None:
        """End all helpers: they must not be in compiled code when the interpreter goes away."""
        self.closed = True
        if not self.begun:  # nothing has been compiled for helpers either
            return
        self._take_helpers()
        close_gate(self.address)
        self.bell.release(len(self.helpers) + 1)
        for helper in self.helpers:
            helper.join()
        free_helpers(self.address)

    def _take_helpers(self) -> None:
        """Wait for the caller that has them, perhaps a daemon thread."""
        while not take_helpers(self.address):
            time.sleep(0.001)

    def _helper(self, index: int) -> threading.Thread | NativeThread:
        """A thread that has begun to help; raises RuntimeError where there is none to be had."""
        if self.fields[0].syscall:
            native = NativeThread(_life(), np.array([self.address, index, 0]))
            native.start()
            return native
        if are_patched():
            _log_alone()
            raise RuntimeError
        helper = threading.Thread(target=self._help, args=(index,), name=f"sgmv-{index}")
        helper.daemon = True
        helper.start()
        return helper

    def _know_helpers(self) -> None:
        """Write down the helpers' thread ids, and on which cores they may run."""
        if self.fields[0].syscall:
            self.thread_ids = np.array([helper.native_id for helper in self.helpers], np.int64)
            self.fields["thread_ids"] = self.thread_ids.ctypes.data
            self.fields["helpers"], self.fields["kept_clear"] = len(self.helpers), -1
            allowed = sum(1 << cpu for cpu in os.sched_getaffinity(0) if cpu < 64 * CPU_WORDS)
            self.cpus[:] = np.frombuffer(allowed.to_bytes(8 * CPU_WORDS, "little"), np.int64)

    def _help(self, index: int) -> None:
        served = 0
        while (served := help_out(self.address, index, served)) != CLOSED:
            self.asleep += 1
            self.bell.acquire()


@cache
def _life() -> int:
    return entry(life, integers=1)


@cache
def _log_alone() -> None:
    logger.warning(
        "sgmv: Python's threads have been replaced, as gevent does, and this system has no futex "
        "for others to sleep on: calls run on one thread"
    )


def _system_calls() -> dict[str, int]:
    """SYSTEM_CALLS, and the address of libc's syscall(2); nothing where there is no such thing."""
    numbers = SYSTEM_CALLS.get(platform.machine())
    if not sys.platform.startswith("linux") or numbers is None:
        return {}
    try:
        syscall = ctypes.CDLL(None).syscall
    except (OSError, AttributeError):
        return {}
    return {"syscall": ctypes.cast(syscall, ctypes.c_void_p).value or 0, **numbers}


class Team(Pool):
    """The threads of OpenMP: made by its first parallel region, and ended by OpenMP itself.

    parallel  the address of its GOMP_parallel
    """

    def __init__(self, parallel: int) -> None:
        super().__init__()
        self.fields["team"], self.fields["member"] = parallel, entry(member, integers=1)

    def prepare(self, helpers: int) -> None:
        """They come by themselves."""

    def close(self) -> None:
        """From now on every caller finds them busy."""
        self._take_helpers()


def warm_up() -> None:
    """Compile what helpers run, on a gate that is closed; and what torch's run, if it is loaded."""
    closed = Pool()
    closed._take_helpers()
    free_helpers(closed.address)
    close_gate(closed.address)
    if closed.fields[0].syscall:
        _life()
    else:
        help_out(closed.address, 0, 0)
    if tensors.torch() is not None:
        torchs_pool()


pool = Pool()
_torchs: Pool | None = None  # what helps with torch's tensors, once that is known


def pool_of(array: Any) -> Pool:
    """Who helps with a call: torch's OpenMP threads if torch made the array, and has as many."""
    is_ours = array.base is None or not tensors.are_of_torch(array)
    return pool if is_ours else torchs_pool()


def torchs_pool() -> Pool:
    """Who helps with a call on torch's memory: its OpenMP threads, if it has as many.

    Measured: two of our own threads beside torch's two took longer than one (docs/engines.md).
    """
    global _torchs
    if _torchs is None:
        parallel = tensors.gomp_parallel()
        _torchs = Team(parallel) if parallel else pool
    return _torchs if tensors.torch().get_num_threads() >= get_num_threads() else pool


def _renew_pool() -> None:
    """In a forked child the parent's helpers are gone, torch's too, and a lock may be held."""
    global pool, _torchs
    pool = _torchs = Pool()


def _close_pools() -> None:
    pool.close()
    if _torchs is not None and _torchs is not pool:
        _torchs.close()


atexit.register(_close_pools)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_pool)
