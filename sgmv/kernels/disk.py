"""Compiled functions on disk: a file for each function and mix of types, which proves itself whole.

numba keeps an index beside the files of a function. Two processes that fill an empty folder at once
can give two entries the same file, and a file that was cut off fails every later call. Here the
name of a file follows from what it holds, and a file that is damaged counts as none.

What goes wrong with the folder never stops a call: it is logged, once, and the call compiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core import event
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock
from numba.core.serialize import dumps

try:
    import fcntl
except ImportError:  # Windows: processes may compile the same at the same time
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".sgmv"
DIGEST_BYTES = 32
# Longer than the slowest function takes; then the other process is taken for stopped.
WAIT_FOR_OTHERS_S = 60.0
logger = logging.getLogger("sgmv")
_logged: set[str] = set()


def log_once(problem: str, path: Path, error: object) -> None:
    """One line for each kind of problem in a process."""
    if problem not in _logged:
        _logged.add(problem)
        logger.warning("sgmv: %s: %s (%s); kernels are compiled anew", path, problem, error)


class KernelFiles:
    """The files of one function: what numba's cache saves to and loads from.

    stamp  equal in two processes that would compile the same code
    """

    def __init__(self, folder: Path, name: str, stamp: object) -> None:
        self.folder = folder
        self._name = name
        self._stamp = repr((numba.__version__, stamp))

    def path(self, key: tuple[Any, ...]) -> Path:
        """Of the entry with this key: signature, processor, and digests of the function."""
        digest = hashlib.sha256(repr(key).encode()).hexdigest()
        return self.folder / f"{self._name}.{digest[:16]}{SUFFIX}"

    def load(self, key: tuple[Any, ...]) -> Any:
        """The entry; None if there is none, or not a whole one."""
        path = self.path(key)
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            return log_once("a file of the kernel cache cannot be read", path, error)
        digest, content = found[:DIGEST_BYTES], found[DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            return log_once("a file of the kernel cache is damaged", path, f"{len(found)} bytes")
        stamp, key_text, data = pickle.loads(content)
        return data if (stamp, key_text) == (self._stamp, repr(key)) else None

    def save(self, key: tuple[Any, ...], data: object) -> None:
        """Keep the entry, in the place of an older one: readers see one or the other, whole."""
        content = dumps((self._stamp, repr(key), data))
        path = self.path(key)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:16]}")
        try:
            temporary.write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def flush(self) -> None:
        """Forget every entry of the function."""
        for path in self.folder.glob(f"{self._name}.*{SUFFIX}"):
            path.unlink(missing_ok=True)


class _OneProcess(event.Listener):
    """Held by the process that compiles: the others wait, and then load what it has saved.

    It is taken under numba's compiler lock, and released when its thread leaves that lock: also
    where the compilation failed, or Ctrl-C ended it.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._thread: int | None = None

    def acquire(self, folder: Path) -> bool:
        """Whether this process had to wait for another; no lock is taken inside another."""
        if fcntl is None or self._file is not None:
            return False
        self._thread = threading.get_ident()
        try:
            self._file = os.open(folder / "compiling.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # a folder that cannot be written: nothing will be saved for others either
            return False
        begun = time.monotonic()
        while time.monotonic() < begun + WAIT_FOR_OTHERS_S:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        return time.monotonic() > begun + 0.02

    def release(self) -> None:
        """Let another process compile; nothing where the lock is not held."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a forked child, too, which shares it
                fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._thread = None
            self._file = None  # the last: from here on another thread may take it

    def on_start(self, event: Any) -> None:
        """Of numba, when a thread asks for the compiler lock."""

    def on_end(self, event: Any) -> None:
        """Of numba, when a thread has released the compiler lock, which it may still hold."""
        if self._thread == threading.get_ident() and not global_compiler_lock.is_locked():
            self.release()


one_process = _OneProcess()
event.register("numba:compiler_lock", one_process)


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C is heard when this is over.

    With its first function numba imports modules of its own, which register what is in them. One
    that is left half-way registers it twice, and every later compilation in the process fails.
    """
    own = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or own is None:
        yield  # Python hears signals in its main thread alone
        return
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, own)
        if heard:
            signal.raise_signal(signal.SIGINT)


class KernelCache(FunctionCache):
    """numba's cache of one function, over `KernelFiles`.

    stamp    of its sources: another one takes the place of what is kept
    choices  of the process: code of others is kept beside it

    Raises RuntimeError if neither the package's folder nor the user's cache can be written.
    """

    def __init__(self, function: Any, stamp: object, choices: object) -> None:
        super().__init__(function)
        self._choices = choices
        own = self._impl.locator.get_source_stamp()
        name = self._impl.filename_base
        self._files = KernelFiles(Path(self._cache_path), name, (own, stamp))
        self._cache_file = self._files  # type: ignore[assignment]  # of the same three methods

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), self._choices)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function; None where it is to be compiled, and this process may do so."""
        with interrupts_wait():
            target_context.refresh()
        found = self._load(sig, target_context)
        if found is None and one_process.acquire(self._files.folder):
            found = self._load(sig, target_context)
        return found

    def _load(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # whatever reading and linking foreign bytes may raise
            path = self._files.folder
            return log_once("a kernel cannot be loaded from the cache", path, repr(error))

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep it for other processes, if the folder takes it."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            log_once("kernels cannot be kept in the cache", self._files.folder, error)
