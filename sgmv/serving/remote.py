"""Adapters that are elsewhere: listed by fsspec, and fetched into a folder of bounded size.

    s3://bucket/adapters/french/adapter_config.json, ...   one version of an adapter's files
      │ fetched into .part-*, read there, renamed
      v
    cache/5f2c...                                         named after the address and the version
      │ renamed to .gone-*, then removed, the least recently used first
      v
    nothing

A directory of the cache is whole from the moment it has its name, and never changes. So processes
need no locks among them: of two that fetch the same one keeps its copy, and one that reads what
another removes fetches it again, and reads that before anybody else knows of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from sgmv.errors import PeftError, ServingError
from sgmv.extras import load
from sgmv.files import shown
from sgmv.peft import FILES

T = TypeVar("T")
Infos = dict[str, Any]  # of a file, as its filesystem has them
TRIES = 3
STALE_S = 24 * 3600  # longer than anything is fetched or removed
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
# What of a file's infos changes with its content; each filesystem has some of these.
_VERSION = (
    *("size", "ETag", "etag", "e_tag", "VersionId", "version_id", "generation", "md5Hash", "md5"),
    *("sha256", "blob_id", "oid", "LastModified", "last_modified", "mtime", "modified", "updated"),
    "created",
)


def has_scheme(path: object) -> bool:
    """Whether fsspec is to read this path.

    >>> has_scheme("s3://bucket/adapters"), has_scheme("adapters"), has_scheme("C:/adapters")
    (True, False, False)
    """
    return isinstance(path, str) and _SCHEME.match(path) is not None


def listed(url: str) -> dict[str, str]:
    """Name -> version of each adapter below this address.

    Raises ServingError if it cannot be listed.
    """
    try:
        fs, root = _filesystem(url)
        fs.invalidate_cache()
        if not fs.isdir(root):
            raise FileNotFoundError(root)
        found: dict[str, dict[str, Infos]] = {}
        for path, infos in fs.find(root, detail=True).items():
            name, _, file = path[len(root) :].strip("/").partition("/")
            if file in FILES and not name.startswith("."):
                found.setdefault(name, {})[file] = infos
    except ServingError:  # without fsspec
        raise
    except Exception as error:  # of any library that fsspec calls
        got = f"{url} ({_said(error)})"
        remedy = "check the address, and what its filesystem needs"
        raise ServingError("directory", "an address that can be listed", got, remedy) from error
    return {name: _version(files) for name, files in found.items()}


class Cache:
    """Fetched adapters in a folder of `most` bytes, which any number of processes share.

    Semantics: more than `most` is in it by one adapter at most for each call that fetches, and one
    that is larger itself stays until the next is fetched. Any thread may call any method.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self._most = folder, most
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            got = f"{shown(folder)} ({error.strerror})"
            raise ServingError("cache", "a folder", got, "name another") from error

    def read(self, url: str, version: str, read: Callable[[Path], T]) -> tuple[T, str]:
        """What `read` makes of this version of an adapter, or of a newer one, and which it is.

        It is fetched if it is not there: then as it is at the address now.

        Raises what `read` raises, with the adapter's address; PeftError if it cannot be fetched.
        """
        place = self._place(url, version)
        try:
            if _touched(place):
                try:
                    return read(place), version
                except PeftError:  # another process removes it, or the disk has spoilt it
                    _remove(place, self.folder)
            return self._fetched(url, read)
        except OSError as error:  # of the folder
            raise _not_fetched(url, error) from error

    def _place(self, url: str, version: str) -> Path:
        return self.folder / hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:32]

    def _fetched(self, url: str, read: Callable[[Path], T]) -> tuple[T, str]:
        """The same of what is at the address now; kept if it can be read."""
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=self.folder))
        try:
            version = _fetch(url, part)
            try:
                found = read(part)
            except PeftError as error:
                texts = (error.argument, error.expected, error.received, error.remedy)
                raise PeftError(*(text.replace(shown(part), url) for text in texts)) from error
            self._make_room(_bytes_of(part))
            place = self._place(url, version)
            with suppress(OSError):  # another process was faster
                part.rename(place)
            _touched(place)
            return found, version
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used until `size` bytes more are no more than may be."""
        kept: list[tuple[int, int, Path]] = []
        for path in self.folder.iterdir():
            try:
                at = path.stat().st_mtime_ns
            except FileNotFoundError:  # removed by another process
                continue
            if path.name.startswith("."):
                if time.time() - at / 1e9 > STALE_S:  # of a process that died
                    shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir():
                kept.append((at, _bytes_of(path), path))
        total = size + sum(held for _, held, _ in kept)
        for _, held, path in sorted(kept):
            if total <= self._most:
                break
            _remove(path, self.folder)
            total -= held


def _fetch(url: str, to: Path) -> str:
    """Copy one version of an adapter's files; returns which.

    Raises PeftError if they have changed three times meanwhile, or cannot be read.
    """
    try:
        for _ in range(TRIES):
            before = _files(url)
            for name, infos in before.items():
                fs, _root = _filesystem(url)
                fs.get_file(infos["name"], str(to / name))
            after = _files(url)
            if _version(before) == _version(after) and _are_whole(to, after):
                return _version(after)
            for name in before:
                (to / name).unlink(missing_ok=True)
    except Exception as error:  # of any library that fsspec calls
        raise _not_fetched(url, error) from error
    raise PeftError(
        url,
        "files that stay as they are while they are fetched",
        "others, or other sizes, each time",
        "try again; write a new directory rather than into one that is served",
    )


def _files(url: str) -> dict[str, Infos]:
    """The files of an adapter as they are now; FileNotFoundError if there are none."""
    fs, root = _filesystem(url)
    fs.invalidate_cache()
    found = fs.find(root, detail=True)  # as `listed` does, which gets the same infos
    names = {path[len(root) :].strip("/"): infos for path, infos in found.items()}
    files = {name: infos for name, infos in names.items() if name in FILES}
    if not files:
        raise FileNotFoundError(f"none of {', '.join(FILES)}")
    return files


def _are_whole(place: Path, files: Mapping[str, Infos]) -> bool:
    """Whether these have the sizes that they should, where the filesystem tells."""
    sizes = {name: infos.get("size") for name, infos in files.items()}
    return all(size in (None, (place / name).stat().st_size) for name, size in sizes.items())


def _filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of fsspec's, looked up each time: none that a fork has left behind."""
    try:
        fsspec = load("fsspec")
    except ImportError as error:
        remedy = "pip install fsspec, and what it needs for the scheme: s3fs for s3"
        raise ServingError(
            "directory", "fsspec, for a path with a scheme", "none", remedy
        ) from error
    fs, root = fsspec.core.url_to_fs(url)
    return fs, root.rstrip("/")


def _version(files: Mapping[str, Infos]) -> str:
    """What changes with any of the files, as far as the filesystem tells."""
    facts = [
        (name, key, str(files[name][key]))
        for name in sorted(files)
        for key in _VERSION
        if files[name].get(key) is not None
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _not_fetched(url: str, error: Exception) -> PeftError:
    remedy = "check the address, and what its filesystem needs"
    return PeftError(url, "an adapter that can be fetched", _said(error), remedy)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _touched(place: Path) -> bool:
    """Whether it is there; it has been used now."""
    now = time.time_ns()
    try:
        os.utime(place, ns=(now, now))  # the system's own "now" is of a tick of milliseconds
    except FileNotFoundError:
        return False
    return True


def _remove(place: Path, folder: Path) -> None:
    """Take its name away at once, then its files: who has them open still reads them."""
    gone = Path(tempfile.mkdtemp(prefix=".gone-", dir=folder))
    with suppress(OSError):  # by another process
        place.rename(gone / "adapter")
    shutil.rmtree(gone, ignore_errors=True)


def _bytes_of(place: Path) -> int:
    """Of the files there, which another process may remove meanwhile, and the directory as well."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(place) as entries:
        for entry in entries:
            total += entry.stat().st_size
    return total
