"""Threads that Python knows nothing of, for helpers that never leave compiled code.

Whatever has been put in the place of Python's own threads (gevent and eventlet make them tasks of
one thread, which such a helper would never give back), these are the system's.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import signal
import types

import numpy as np
import numpy.typing as npt

LIBC = ctypes.CDLL(None if os.name == "posix" else "msvcrt")  # used where there is a futex alone


def are_patched() -> bool:
    """Whether something other than Python makes `threading`'s threads, such as gevent."""
    return not isinstance(_thread.start_new_thread, types.BuiltinFunctionType)


class NativeThread:
    """One of the system's threads, with the methods of `threading.Thread` that a pool needs.

    life  the address of a compiled function of one integer, `seat`'s address
    seat  int64s that the function reads; it stores its thread id in the last
    """

    def __init__(self, life: int, seat: npt.NDArray[np.int64]) -> None:
        self._life, self._seat = life, seat
        self._thread = ctypes.c_ulong()
        self._alive = False

    def start(self) -> None:
        """Begin, all signals blocked: they are for the threads that run Python.

        Raises RuntimeError if the system gives no thread.
        """
        function, argument = ctypes.c_void_p(self._life), ctypes.c_void_p(self._seat.ctypes.data)
        before = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        try:
            status = LIBC.pthread_create(ctypes.byref(self._thread), None, function, argument)
            self._alive = status == 0
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if status != 0:
            raise RuntimeError(os.strerror(status))

    @property
    def native_id(self) -> int:
        """The system's number of the thread."""
        while self._seat[-1] == 0:  # it has not begun yet
            os.sched_yield()
        return int(self._seat[-1])

    def is_alive(self) -> bool:
        """Whether it has begun, and nobody has waited for its end."""
        return self._alive

    def join(self) -> None:
        """Wait for its end."""
        if self._alive:
            LIBC.pthread_join(self._thread, None)
            self._alive = False
