"""Very many adapters in one place, each read when it is asked for: `AdapterStore`.

    adapters/.sgmv-index.json                  times and sizes of all files, what is damaged
            /french/adapter_config.json
                   /adapter_model.safetensors
            /greek/...

    store.request("french")  ──>  LoRARequest, an id for each version of its files
    store.read(lora_path)    ──>  its layers: what AdapterSlots takes as `read`

The index is made once: configs and headers are read then, never values. Later only times and sizes
are looked at, and what has changed is read again. A place with a scheme (s3://) is listed by
fsspec, and its adapters are fetched into a cache: remote.py.

Files are read, not mapped into memory: files.py says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sgmv import forms
from sgmv.adapter import PeftAdapter, load_peft
from sgmv.adapters import describe
from sgmv.checks import check_count
from sgmv.errors import DtypeError, ServingError
from sgmv.files import shown
from sgmv.peft import FILES
from sgmv.serving.remote import Cache, has_scheme, listed
from sgmv.serving.requests import LoRARequest

PathLike = str | os.PathLike[str]
INDEX = ".sgmv-index.json"
FORMAT = 1  # of the index; another is made anew
CACHE_BYTES = 20 << 30


class AdapterStore:
    """Adapters as PEFT writes them, any number in one directory, which a server reads one by one.

    Semantics: `names` are those of the sub-directories but hidden ones, as the index has them;
    `len`, `in` and iteration are over these. The index is one file. It is made by reading every
    config and header, and at the next start by looking at times and sizes alone. Nothing of an
    adapter's values is kept here.

    directory    holds a sub-directory for each adapter: adapter_config.json and
                 adapter_model.safetensors, or another form that `load_peft` reads. With a scheme,
                 as in "s3://bucket/adapters", what fsspec lists there (extra `store`)
    index        the index's file; left out, .sgmv-index.json in the directory or, with a scheme, a
                 file in the cache. Where it cannot be written, it is made anew at each start
    cache        a folder for adapters that are fetched, of any number of processes; needed with a
                 scheme, and only then
    cache_bytes  the most that it holds, and one adapter more for each call that fetches; the least
                 recently used leave it

    Any thread may call any method. Raises ServingError for a directory that is not there or cannot
    be listed, a missing cache, an `index` that cannot be written; DtypeError, ValueRangeError.
    Source: S-LoRA (arXiv 2311.03285), section 5; PEFT, `save_pretrained`, for the files.

    >>> import pathlib, tempfile
    >>> scratch = tempfile.TemporaryDirectory()
    >>> pathlib.Path(scratch.name, "half-written").mkdir()
    >>> store = AdapterStore(scratch.name)
    >>> len(store), list(store), list(store.damaged)
    (1, ['half-written'], ['half-written'])
    >>> "french" in store
    False
    >>> scratch.cleanup()
    """

    def __init__(
        self,
        directory: PathLike,
        *,
        index: PathLike | None = None,
        cache: PathLike | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.directory = _text("directory", directory)
        most = check_count("cache_bytes", cache_bytes, 1)
        self._cache: Cache | None = None
        if has_scheme(self.directory):
            if cache is None:
                remedy = "name a folder of this machine, as in cache='/var/cache/adapters'"
                raise ServingError("cache", "a folder for what is fetched", "none", remedy)
            self._cache = Cache(Path(_text("cache", cache)), most)
            digest = hashlib.sha256(self.directory.encode()).hexdigest()[:16]
            place = self._cache.folder / f"index-{digest}.json"
        elif cache is not None:
            remedy = "leave it out: the system keeps files of a local directory in memory itself"
            raise ServingError("cache", "none for a directory of this machine", repr(cache), remedy)
        else:
            place = Path(self.directory, INDEX)
        self._index = place if index is None else Path(_text("index", index))
        self._must_write = index is not None
        self._stamps, self._damaged = self._read_index()
        self.refresh()

    @property
    def names(self) -> list[str]:
        """Of all adapters, ascending."""
        return sorted(self._stamps)

    @property
    def damaged(self) -> dict[str, str]:
        """The names of those that could not be read when they were indexed, and why."""
        return dict(self._damaged)

    def refresh(self) -> list[str]:
        """Look again: which adapters have come, changed or gone; their names, ascending.

        Semantics: configs and headers of those alone are read. A request for a local adapter looks
        at that adapter by itself, so that a server need not call this often.

        Raises ServingError for a directory that is not there any more, or cannot be listed.
        Source: none; git's index looks at times and sizes in the same way.

        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as scratch:
        ...     store = AdapterStore(scratch)
        ...     pathlib.Path(scratch, "french").mkdir()
        ...     store.refresh(), len(store)
        (['french'], 1)
        """
        before, damaged = self._stamps, dict(self._damaged)
        stamps = listed(self.directory) if self._cache else _stamps(self.directory)
        gone = before.keys() - stamps.keys()
        changed = [name for name, stamp in stamps.items() if before.get(name) != stamp]
        for name in (*gone, *changed):
            damaged.pop(name, None)
        for name in changed:
            if why := self._why_refused(name):
                damaged[name] = why
        self._stamps, self._damaged = stamps, damaged
        if gone or changed or not self._index.exists():
            self._write_index()
        return sorted([*gone, *changed])

    def request(self, name: str) -> LoRARequest:
        """What a request for this adapter names: to be passed to `Scheduler.add`.

        Semantics: `lora_int_id` is made from the name and from the times and sizes of its files: an
        adapter that was replaced has another id, and requests that run end with the old weights.
        Of a local one the files are looked at now; one with a scheme is as `refresh` found it.

        Raises ServingError for a name that the store does not have, and for a damaged adapter.
        Source: vLLM, entrypoints/openai/serving_models.py, where a name has one id.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as scratch:
        ...     AdapterStore(scratch).request("french")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        sgmv.errors.ServingError: name: expected an adapter of the store ..., which has 0, got \
'french'; put it there
        """
        if not isinstance(name, str):
            raise DtypeError("name", "an adapter's name", type(name).__name__, "pass a str")
        stamp = self._stamps.get(name, "")
        if self._cache is None and _is_name(name):
            stamp = _stamp(self._path(name))
            if stamp and self._stamps.get(name) != stamp:
                self._damaged.pop(name, None)
                if why := self._why_refused(name):
                    self._damaged[name] = why
                self._stamps[name] = stamp
        if not stamp:
            place = f"{shown(self.directory)}, which has {len(self)}"
            expected = f"an adapter of the store {place}"
            raise ServingError("name", expected, repr(name), "put it there")
        if why := self._damaged.get(name, ""):
            raise ServingError(f"name {name!r}", "an adapter that is whole", why, "mend it")
        digest = hashlib.sha256(f"{name}/{stamp}".encode()).digest()
        number = int.from_bytes(digest[:8], "big") >> 1
        return LoRARequest(name, max(number, 1), self._path(name))

    def read(self, lora_path: str) -> PeftAdapter:
        """The layers of an adapter: what AdapterSlots is given as `read`.

        Semantics: `load_peft` of the directory, or of the copy in the cache, fetched if it is not
        there: one version of all files, while others write there, too. An adapter is fetched anew
        if `refresh` found it changed.

        lora_path  that of a request

        Raises as `load_peft` does, and PeftError for what cannot be fetched; both name the file.
        Source: as `load_peft`; fsspec, `url_to_fs`, for what has a scheme.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as scratch:
        ...     AdapterStore(scratch).read("no-such-place")
        Traceback (most recent call last):
        sgmv.errors.PeftError: directory: expected a PEFT adapter directory, got no-such-place \
(no such directory); pass a local directory that save_pretrained wrote (nothing is downloaded)
        """
        if self._cache is None or not has_scheme(lora_path):
            return load_peft(lora_path)
        name = lora_path.rpartition("/")[2]
        found, version = self._cache.read(lora_path, self._stamps.get(name, ""), load_peft)
        if name in self._stamps:
            self._stamps[name] = version
        return found

    def __len__(self) -> int:
        return len(self._stamps)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._stamps

    def __repr__(self) -> str:
        text = f"AdapterStore({self.directory!r}, {len(self)} adapters"
        damaged = len(self.damaged)
        return f"{text}, {damaged} damaged)" if damaged else f"{text})"

    def _path(self, name: str) -> str:
        return f"{self.directory}{'' if self.directory.endswith('/') else '/'}{name}"

    def _why_refused(self, name: str) -> str:
        """What `load_peft` would say of its config and headers; "" if nothing is wrong."""
        if self._cache is not None:  # the files are elsewhere; they are looked at when fetched
            return ""
        return describe(self._path(name)).refused

    def _read_index(self) -> tuple[dict[str, str], dict[str, str]]:
        """What the file has; nothing if it is not there, or is none of ours."""
        try:
            found = json.loads(self._index.read_bytes())
            if found["format"] != FORMAT or found["directory"] != self._place():
                return {}, {}
            stamps, damaged = found["stamps"], found["damaged"]
            if not isinstance(stamps, dict) or not damaged.keys() <= stamps.keys():
                return {}, {}
            return stamps, damaged
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}, {}

    def _write_index(self) -> None:
        """In one piece: another process sees the old one or the new one."""
        head = {"format": FORMAT, "directory": self._place()}
        text = json.dumps({**head, "stamps": self._stamps, "damaged": self._damaged})
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(
                "w", dir=self._index.parent, prefix=INDEX, delete=False
            ) as file:
                temporary = file.name
                file.write(text)
            os.replace(temporary, self._index)
        except OSError as error:
            if temporary is not None and os.path.exists(temporary):
                os.unlink(temporary)
            if self._must_write:
                got = f"{shown(self._index)} ({error.strerror})"
                remedy = "name another file, or leave it out"
                raise ServingError("index", "a file that can be written", got, remedy) from error

    def _place(self) -> str:
        return self.directory if self._cache else os.path.abspath(self.directory)


def _text(argument: str, path: object) -> str:
    if not isinstance(path, str | os.PathLike):
        raise DtypeError(argument, "a path", type(path).__name__, "pass a str or a Path")
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ServingError(argument, "a path", repr(text), "name a directory")
    return text


def _is_name(name: str) -> bool:
    """Whether it can be that of a sub-directory: nothing beside the store is looked at."""
    return bool(name) and not name.startswith(".") and not {"/", "\\", "\0"} & set(name)


def _stamps(directory: str) -> dict[str, str]:
    """Name -> times and sizes of its files, of every sub-directory but hidden ones."""
    try:
        with os.scandir(directory) as entries:
            names = [one.name for one in entries if one.name[0] != "." and one.is_dir()]
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        got = f"{shown(directory)} ({'no such directory' if missing else error.strerror})"
        raise ServingError("directory", "one that holds adapters", got, "make it first") from error
    if os.stat not in os.supports_dir_fd:
        return {name: _stamp(f"{directory}/{name}") for name in names}
    place = os.open(directory, os.O_RDONLY)
    try:
        return {name: _stamp(name, place) for name in names}
    finally:
        os.close(place)


def _stamp(path: str, place: int | None = None) -> str:
    """What changes with the files of an adapter; "" if there is no such directory.

    Without a config or weights as PEFT names them, the directory's own time says whether files came
    or went. A path is of the open directory `place`: that takes less time.
    """
    try:
        config = os.stat(f"{path}/{forms.CONFIG_FILE}", dir_fd=place)
        weights = os.stat(f"{path}/{forms.WEIGHTS_FILE}", dir_fd=place)
    except OSError:
        return _stamp_of_another(path, place)
    first = f"{config.st_mtime_ns} {config.st_size} {config.st_ino}"
    return f"{first} {weights.st_mtime_ns} {weights.st_size} {weights.st_ino}"


def _stamp_of_another(path: str, place: int | None) -> str:
    """Of a directory with other files than these two."""
    try:
        stamp = f"{os.stat(f'{path}/.', dir_fd=place).st_mtime_ns}"
        for name in FILES:
            with suppress(OSError):
                at = os.stat(f"{path}/{name}", dir_fd=place)
                stamp += f" {name} {at.st_mtime_ns} {at.st_size} {at.st_ino}"
    except OSError:
        return ""
    return stamp
