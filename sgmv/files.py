"""Files that another process may change while they are read.

    open ──> read ──> open again ──┬─ the same files, times and sizes ──> one version was read
     ^                             │
     └──── wait, and read again <──┴─ changed, or written a moment before the reading began

Ordinary reads and no memory map: when a mapped file is cut short, or its disk or network mount
fails, the next access ends the process (SIGBUS). A read returns less, or raises. safetensors maps
a file to read its header, `backend="pread"` of 0.8 included, so that the format is read here.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from sgmv.errors import PeftError

T = TypeVar("T")
Opened = io.FileIO | OSError

MOST_TEXT = 100_000_000  # bytes of JSON; safetensors has the same limit for its header
# A clock tick where times are coarse: what was written less than this before the first look may be
# written again and still have the same time. A time further ahead is of another machine's clock.
_TICK, _AHEAD = 20_000_000, 1_000_000_000  # ns
_PAUSES = 0.025, 0.1  # s, before the second and the third reading
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def one_version(directory: Path, names: Sequence[str], read: Callable[..., T]) -> T:
    """What `read` returns or raises, given these files, once none has changed meanwhile.

    Each is passed to `read` as opened, or as the OSError that opening it raised; all are of one
    directory, also where its name means another at the next moment.

    Raises PeftError when they have changed three times.
    """
    there: list[str] = []
    for pause in (*_PAUSES, None):
        error = None
        with ExitStack() as stack:
            start = time.time_ns()
            place = _pinned(directory, stack)
            opened = [_opened(place, name, stack) for name in names]
            before = [_stamp(file) for file in opened]
            try:
                found = read(*opened)
            except Exception as caught:  # of half a file, perhaps
                error = caught
            # Opened again: a network mount asks its server then, and may not for fstat.
            after = [_stamp(_opened(place, name, stack)) for name in names]
        written = [stamp[-1] for stamp in before if len(stamp) > 1]
        there = [
            name
            for name, *stamps in zip(names, before, after, strict=True)
            if max(map(len, stamps)) > 1
        ]
        is_fresh = any(-_AHEAD < start - at < _TICK for at in written)
        if not is_fresh and before == after:
            if error is not None:
                raise error
            return found
        if pause is not None:
            time.sleep(pause)
    raise PeftError(
        shown(directory),
        "files that stay as they are while they are read",
        f"{' or '.join(there)} changed by another process",
        "try again; a writer that fills a new directory and renames it is never read half-way",
    ) from error


def _pinned(directory: Path, stack: ExitStack) -> Path | int | OSError:
    """The directory itself, whatever its name means later; its name, where systems lack that."""
    if os.open not in os.supports_dir_fd:
        return directory
    try:
        place = os.open(directory, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)
    except OSError as error:
        return error
    stack.callback(os.close, place)
    return place


def _opened(place: Path | int | OSError, name: str, stack: ExitStack) -> Opened:
    if isinstance(place, OSError):
        return place
    try:
        return stack.enter_context(_open_regular(place, name))
    except OSError as error:
        return error


def _open_regular(place: Path | int, name: str) -> io.FileIO:
    """Open a file for reading; OSError for what is none. A FIFO would wait for its writer."""
    if isinstance(place, int):
        file = io.FileIO(name, "r", opener=partial(_open_at_once, dir_fd=place))
    else:
        file = io.FileIO(place / name, "r", opener=_open_at_once)
    kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
    if kind != stat.S_IFREG:
        file.close()
        raise OSError(errno.EINVAL, f"{_KINDS.get(kind, 'something else')}, not a file", name)
    return file


def _open_at_once(path: str, flags: int, dir_fd: int | None = None) -> int:
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    return os.open(path, flags, dir_fd=dir_fd)


def _stamp(one: Opened) -> tuple[int, ...]:
    """What changes whenever the file's data do; the last is when they, or their name, did."""
    if isinstance(one, OSError):
        return (one.errno or 0,)
    at = os.fstat(one.fileno())
    return at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns


def existing(one: Opened) -> io.FileIO:
    """The file, or what opening it raised."""
    if isinstance(one, OSError):
        raise one
    return one


def read_text(file: io.FileIO) -> bytes:
    """All of a small file; OSError, or ValueError for one that is too large."""
    size = os.fstat(file.fileno()).st_size
    if size > MOST_TEXT:
        raise ValueError(f"{size:,} bytes")
    return _exactly(file, size).tobytes()


def read_all(file: io.FileIO) -> bytes:
    """All of a file, of whatever size."""
    file.seek(0)
    return _exactly(file, os.fstat(file.fileno()).st_size).tobytes()


def beginning(file: io.FileIO) -> bytes:
    """The first bytes of a file, which may say what it is instead."""
    file.seek(0)
    return file.read(64) or b""


def _exactly(file: io.FileIO, size: int) -> npt.NDArray[np.uint8]:
    data = np.empty(size, np.uint8)
    left = data.data
    while left:
        got = file.readinto(left)
        if not got:
            raise ValueError(f"the file ends {len(left):,} bytes early")
        left = left[got:]
    return data


class Entry(NamedTuple):
    """A tensor in a file: as its header says, and where."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file: names, shapes and types now, values when asked.

        8 bytes   the header's length, little-endian
        header    JSON, name -> {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
        data      the tensors, one after the other, without gaps

    Raises OSError, and ValueError for a file that is not so. Source: safetensors, README, Format.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._read_header()

    def tensor(self, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """One tensor's values; its type is known to be dtype."""
        entry = self.entries[name]
        if math.prod(entry.shape) * np.dtype(dtype).itemsize != entry.end - entry.begin:
            raise ValueError(f"{name!r} is {entry}")
        self._file.seek(self._start + entry.begin)
        return _exactly(self._file, entry.end - entry.begin).view(dtype).reshape(entry.shape)

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(_exactly(self._file, 8).tobytes(), "little")
        if length > min(size - 8, MOST_TEXT):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        try:
            header = json.loads(_exactly(self._file, length).tobytes().decode("utf-8"))
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            if not all(isinstance(text, str) for text in self.metadata.values()):
                raise ValueError("metadata that are not text")
            self.entries = {name: _entry(**described) for name, described in header.items()}
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"its header: {error}") from error
        self._start = 8 + length
        place = 0
        for entry in sorted(self.entries.values(), key=lambda entry: (entry.begin, entry.end)):
            if entry.begin != place:
                raise ValueError("its header: tensors overlap, or leave gaps")
            place = entry.end
        if place != size - self._start:
            raise ValueError(
                f"{size - self._start:,} bytes of data, where its header names {place:,}"
            )


def _entry(dtype: str, shape: Sequence[int], data_offsets: Sequence[int]) -> Entry:
    begin, end = data_offsets
    numbers = (*shape, begin, end)
    if not isinstance(dtype, str) or any(type(number) is not int for number in numbers):
        raise ValueError(f"{dtype!r}, {shape!r} at {data_offsets!r}")
    if min(numbers) < 0 or end < begin:
        raise ValueError(f"shape {shape!r} at {data_offsets!r}")
    return Entry(dtype, tuple(shape), begin, end)


def shown(path: str | os.PathLike[str]) -> str:
    """A path for a message: one line that every console prints.

    >>> shown("adapters/greek"), shown("two" + chr(10) + "lines").count(chr(10))
    ('adapters/greek', 0)
    """
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)
