"""The loading thread of AdapterSlots: adapters are read while steps run.

    asked    oldest first, but what a step needs goes before what is only expected
      │
      v
    loading thread    reads, converts, packs: all that takes time, without the slots' lock
      │
      v
    done     handed over under the lock; or failed, kept until the step that needs it is told

The thread lives as long as something is asked for. So nothing has to be closed, and no idle thread
keeps the slots alive.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress

from sgmv.serving.requests import LoRARequest
from sgmv.threads import are_patched

# Beside a thread of the caller's priority, steps on all cores took 1.2 to 1.7 times as long at the
# 99th percentile, with 10 up to 1.15 times; with 19 an adapter took ten times as long to come.
NICE = 10
MOST_FAILURES = 64  # kept: an error keeps what its reader had at hand


class Loader:
    """Which adapters are to be read, which is being read, and which could not be.

    Semantics: `load` is called for each adapter asked for, in the loading thread. All methods
    but `wait` are called under the lock.

    lock     of what the adapters are loaded into
    arrived  is notified under that lock when an adapter is done, or has failed
    """

    def __init__(self, lock: threading.RLock) -> None:
        self.arrived = threading.Condition(lock)
        self._asked: dict[LoRARequest, None] = {}
        self._reading: LoRARequest | None = None
        self._failed: dict[LoRARequest, Exception] = {}
        self._thread: threading.Thread | None = None

    def ask(
        self,
        lora_requests: Iterable[LoRARequest],
        load: Callable[[LoRARequest], None],
        first: bool = False,
    ) -> None:
        """Have these adapters read: behind all others, or `first`. One that failed is tried again.

        Raises RuntimeError where the system has no thread; they are read once it has.
        """
        asked = dict.fromkeys(one for one in lora_requests if one != self._reading)
        self.forget(asked)
        self._asked = {**asked, **self._asked} if first else {**self._asked, **asked}
        if self._asked and self._thread is None:
            # A daemon: the interpreter does not wait for a slow disk when it ends.
            thread = threading.Thread(target=self._work, args=[load], name="sgmv-load", daemon=True)
            thread.start()
            self._thread = thread

    def ask_first(
        self,
        lora_requests: Mapping[int, LoRARequest],
        load: Callable[[LoRARequest], None],
        failed: dict[int, Exception],
    ) -> dict[int, LoRARequest]:
        """What a step needs: read before all others. Returns what is not there yet.

        What could not be read since it was asked for last is added to `failed`, and forgotten.
        """
        found = {i: self._failed.pop(one, None) for i, one in lora_requests.items()}
        failed.update((i, error) for i, error in found.items() if error is not None)
        waiting = {i: one for i, one in lora_requests.items() if i not in failed}
        self.ask(waiting.values(), load, first=True)
        return waiting

    def forget(self, lora_requests: Iterable[LoRARequest]) -> None:
        """Failures of these are of the past."""
        for one in lora_requests:
            self._failed.pop(one, None)

    def wait(self, lora_requests: Collection[LoRARequest]) -> None:
        """Return once one of these is done or has failed."""
        with self.arrived:
            while all(one in self._asked or one == self._reading for one in lora_requests):
                self.arrived.wait()

    def renewed(self, lock: threading.RLock) -> Loader:
        """In a forked child, where the thread is gone: what was asked for is read when asked next.

        What the parent's thread was reading is asked for again by the step that needs it.
        """
        loader = Loader(lock)
        loader._asked, loader._failed = dict(self._asked), dict(self._failed)
        return loader

    def _work(self, load: Callable[[LoRARequest], None]) -> None:
        _yield_cores()
        while (lora_request := self._next()) is not None:
            failure = None
            try:
                load(lora_request)
            except Exception as error:
                failure = error
            except BaseException as error:  # a reader's SystemExit would end the thread in silence
                failure = RuntimeError(repr(error))
            with self.arrived:
                if failure is not None:
                    self._failed[lora_request] = failure
                    for old in list(self._failed)[:-MOST_FAILURES]:
                        del self._failed[old]
                self._reading = None
                self.arrived.notify_all()

    def _next(self) -> LoRARequest | None:
        with self.arrived:
            self._reading = next(iter(self._asked), None)
            if self._reading is None:
                self._thread = None
            else:
                del self._asked[self._reading]
            return self._reading


def _yield_cores() -> None:
    """Have this thread run where a core is idle: a product on all cores waits for the slowest.

    Where others keep all cores busy, it may hold the GIL for longer, too.
    """
    if sys.platform.startswith("linux") and not are_patched():  # elsewhere it is the process's
        thread = threading.get_native_id()
        with suppress(OSError):
            own = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, own + NICE)
