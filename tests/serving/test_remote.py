"""Adapters with a scheme: fetched once, kept in bounds, by any number of processes at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgmv.adapter import load_peft
from sgmv.errors import PeftError, ServingError
from sgmv.serving import AdapterSlots, AdapterStore, make_step, remote
from sgmv.serving.remote import Cache
from tests.help.peft_files import halves, write_adapter
from tests.help.planting import ROOT, run_python

fsspec = pytest.importorskip("fsspec")
pytestmark = pytest.mark.once

NAMES = ["french", "greek", "latin", "norse"]
WEIGHTS = "adapter_model.safetensors"


def written(directory: Path, version: float, width: int = 3) -> Path:
    """An adapter whose values are all its version, and its scaling is."""
    directory.mkdir(parents=True, exist_ok=True)
    A, B = np.full((2, width), version, "f"), np.full((4, 2), version, "f")
    return write_adapter(directory, halves("up", A, B), lora_alpha=2 * version)


def version_of(adapter: Any) -> float:
    layer = adapter["up"]
    values = {*layer.A.ravel().tolist(), *layer.B.ravel().tolist(), layer.scaling}
    assert len(values) == 1, values
    return float(values.pop())


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Any]:
    """A filesystem of this process that holds four adapters, and what is no adapter."""
    fs = fsspec.filesystem("memory")
    for version, name in enumerate(NAMES, 1):
        put(fs, written(tmp_path / "source" / name, version), name)
    fs.pipe("/adapters/README.md", b"#")
    fs.pipe("/adapters/.hidden/adapter_config.json", b"{}")
    fs.pipe("/adapters/deep/er/adapter_config.json", b"{}")
    yield fs
    fs.rm("/adapters", recursive=True)


def put(fs: Any, source: Path, name: str) -> None:
    for path in source.iterdir():
        fs.pipe(f"/adapters/{name}/{path.name}", path.read_bytes())


def held(cache: Path) -> dict[str, int]:
    """The directories of a cache, and the bytes of each."""
    return {
        path.name: sum(file.stat().st_size for file in path.iterdir())
        for path in cache.iterdir()
        if path.is_dir()
    }


@pytest.mark.usefixtures("memory")
def test_adapters_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    store = AdapterStore("memory://adapters/", cache=cache)
    assert store.names == NAMES
    for version, name in enumerate(NAMES, 1):
        request = store.request(name)
        assert request.lora_path == f"memory://adapters/{name}"
        assert version_of(store.read(request.lora_path)) == version
    assert len(held(cache)) == 4
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]
    monkeypatch.setattr(remote, "_fetch", None)
    again = AdapterStore("memory://adapters", cache=cache)
    assert [again.request(name) for name in again] == [store.request(name) for name in store]
    for version, name in enumerate(NAMES, 1):
        assert version_of(again.read(f"memory://adapters/{name}")) == version


def test_what_changed_is_fetched_anew_after_a_refresh(memory: Any, tmp_path: Path) -> None:
    store = AdapterStore("memory://adapters", cache=tmp_path / "cache")
    before = store.request("greek")
    assert version_of(store.read(before.lora_path)) == 2
    put(memory, written(tmp_path / "source" / "greek", 7), "greek")
    assert version_of(store.read(before.lora_path)) == 2  # until somebody looks
    assert store.request("greek") == before
    assert store.refresh() == ["greek"]
    after = store.request("greek")
    assert after.lora_int_id != before.lora_int_id
    assert version_of(store.read(after.lora_path)) == 7
    memory.rm("/adapters/french", recursive=True)
    assert store.refresh() == ["french"]
    assert store.names == NAMES[1:]


def test_what_changed_before_it_was_fetched_is_fetched_once(memory: Any, tmp_path: Path) -> None:
    """As it is by then; the index knows which version it was."""
    store = AdapterStore("memory://adapters", cache=tmp_path / "cache")
    before = store.request("greek")
    put(memory, written(tmp_path / "source" / "greek", 7), "greek")
    assert version_of(store.read(before.lora_path)) == 7
    (place,) = held(tmp_path / "cache")
    at = (tmp_path / "cache" / place).stat().st_ino
    assert version_of(store.read(before.lora_path)) == 7
    assert (tmp_path / "cache" / place).stat().st_ino == at
    assert store.request("greek").lora_int_id != before.lora_int_id
    assert store.refresh() == []


@pytest.mark.usefixtures("memory")
def test_the_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store = AdapterStore("memory://adapters", cache=cache)
    store.read("memory://adapters/french")
    (size,) = held(cache).values()
    store = AdapterStore("memory://adapters", cache=cache, cache_bytes=2 * size + size // 2)
    store.read("memory://adapters/greek")
    (french,) = {*held(cache)} - {place_of(cache, store, "greek")}
    store.read("memory://adapters/french")
    store.read("memory://adapters/latin")
    assert {*held(cache)} == {french, place_of(cache, store, "latin")}
    for name in NAMES * 2:
        store.read(f"memory://adapters/{name}")
        assert sum(held(cache).values()) <= 2 * size + size // 2
        assert place_of(cache, store, name) in held(cache)
    tiny = AdapterStore("memory://adapters", cache=cache, cache_bytes=1)
    assert version_of(tiny.read("memory://adapters/greek")) == 2
    assert version_of(tiny.read("memory://adapters/latin")) == 3


def place_of(cache: Path, store: AdapterStore, name: str) -> str:
    assert store._cache is not None
    return store._cache._place(f"memory://adapters/{name}", store._stamps[name]).name


@pytest.mark.usefixtures("memory")
def test_one_that_is_removed_while_it_is_read_is_fetched_again(tmp_path: Path) -> None:
    """What the cache has is removed, or spoilt, once somebody has begun to read it."""
    cache, url = Cache(tmp_path / "cache", 1 << 20), "memory://adapters/greek"
    for spoil in (
        lambda place: remote._remove(place, cache.folder),
        lambda place: (place / WEIGHTS).unlink(),
        lambda place: (place / WEIGHTS).write_bytes(b"spoilt"),
    ):
        _, version = cache.read(url, "", load_peft)
        places: list[Path] = []

        def spoilt(place: Path, spoil: Any = spoil, places: list[Path] = places) -> Any:
            places.append(place)
            if len(places) == 1:
                spoil(place)
            return load_peft(place)

        found, again = cache.read(url, version, spoilt)
        assert (version_of(found), again, len(places)) == (2, version, 2)
        assert version_of(cache.read(url, version, load_peft)[0]) == 2
        assert places[0] == cache._place(url, version)
        assert len(held(cache.folder)) == 1


def test_damaged_files_are_named_where_they_are(memory: Any, tmp_path: Path) -> None:
    whole = memory.cat(f"/adapters/greek/{WEIGHTS}")
    memory.pipe(f"/adapters/greek/{WEIGHTS}", whole[:-5])
    memory.rm(f"/adapters/latin/{WEIGHTS}")
    store = AdapterStore("memory://adapters", cache=tmp_path / "cache")
    with pytest.raises(PeftError, match=rf"greek/{WEIGHTS}: .*damaged data"):
        store.read("memory://adapters/greek")
    with pytest.raises(PeftError, match=r"memory://adapters/latin/.* \(no such file\)"):
        store.read("memory://adapters/latin")
    assert held(tmp_path / "cache") == {}
    memory.pipe(f"/adapters/greek/{WEIGHTS}", whole)  # mended
    assert version_of(store.read("memory://adapters/greek")) == 2
    with pytest.raises(PeftError, match=r"memory://adapters/none: .*can be fetched.*NotFound"):
        store.read("memory://adapters/none")


def test_files_that_change_while_they_are_fetched(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the config and the weights: never the one of one version and the other of another."""
    store = AdapterStore("memory://adapters", cache=tmp_path / "cache")
    kind, changes = type(memory), [9.0]
    get_file = kind.get_file

    def changing(self: Any, rpath: str, lpath: str, **options: Any) -> None:
        get_file(self, rpath, lpath, **options)
        if changes:
            put(memory, written(tmp_path / "source" / "greek", changes.pop()), "greek")

    monkeypatch.setattr(kind, "get_file", changing)
    assert version_of(store.read("memory://adapters/greek")) == 9
    changes[:] = range(10, 30)
    store = AdapterStore("memory://adapters", cache=tmp_path / "other")
    with pytest.raises(PeftError, match=r"memory://adapters/greek: expected files that stay"):
        store.read("memory://adapters/greek")
    assert held(tmp_path / "other") == {}


@pytest.mark.usefixtures("memory")
def test_what_dead_processes_left_is_removed_in_time(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store = AdapterStore("memory://adapters", cache=cache)
    for name, age in ((".part-old", 2 * remote.STALE_S), (".gone-old", 2 * remote.STALE_S),
                      (".part-new", 0), (".gone-new", 0)):  # fmt: skip
        (cache / name).mkdir()
        (cache / name / WEIGHTS).write_text("")
        os.utime(cache / name, (time.time() - age,) * 2)
    store.read("memory://adapters/greek")
    left = {path.name for path in cache.iterdir() if path.name.startswith(".")}
    assert left == {".part-new", ".gone-new"}


def test_what_cannot_be_listed(tmp_path: Path) -> None:
    for url in ("memory://nowhere", "no-such-scheme://adapters"):
        with pytest.raises(ServingError, match=rf"directory: expected an address .*{url}"):
            AdapterStore(url, cache=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ServingError, match="cache: expected a folder"):
        AdapterStore("memory://nowhere", cache=tmp_path / "file")


def test_without_fsspec(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from sgmv.serving import AdapterStore\n"
        f"print(len(AdapterStore({str(tmp_path)!r})))\n"
        f"AdapterStore('s3://bucket', cache={str(tmp_path)!r})\n"
    )
    done = run_python(program)
    assert done.stdout == "0\n"
    assert "expected fsspec, for a path with a scheme, got none; pip install fsspec" in done.stderr


def test_local_stores_do_not_import_fsspec(tmp_path: Path) -> None:
    program = (
        "import sys; from sgmv.serving import AdapterStore\n"
        f"AdapterStore({str(tmp_path)!r}); print('fsspec' in sys.modules)\n"
    )
    assert run_python(program).stdout == "False\n"


def test_a_remote_store_in_slots(memory: Any, tmp_path: Path) -> None:
    store = AdapterStore("memory://adapters", cache=tmp_path / "cache")
    slots = AdapterSlots(2, 2, 8, read=store.read)
    requests = {name: store.request(name) for name in ("greek", "norse")}
    step = make_step(slots, requests)
    y = step.add_lora("up", np.zeros((2, 4), "f"), np.ones((2, 3), "f"))
    assert y[:, 0].tolist() == [2 * 3 * 2 * 2 * 2, 4 * 3 * 4 * 2 * 4]


PROCESS = """
import random, sys
from sgmv.serving import AdapterStore

url, cache, most, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store, rng, names = AdapterStore(url, cache=cache, cache_bytes=most), random.Random(seed), 0
for _ in range(80):
    name = rng.choice(store.names)
    layer = store.read(store.request(name).lora_path)["up"]
    values = {*layer.A.ravel().tolist(), *layer.B.ravel().tolist(), layer.scaling}
    assert values == {float(name)}, (name, values)
    names += 1
print(names)
"""


def test_processes_on_one_cache_that_has_room_for_two(tmp_path: Path) -> None:
    """Each removes what others are reading, all the time."""
    for version in range(1, 7):
        written(tmp_path / "adapters" / str(version), version)
    size = sum(path.stat().st_size for path in (tmp_path / "adapters" / "1").iterdir())
    cache = tmp_path / "cache"
    words = [f"file://{tmp_path / 'adapters'}", str(cache), str(2 * size)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *words, str(seed)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for seed in range(3)
    ]  # fmt: skip
    done = [process.communicate(timeout=240) for process in processes]
    assert [out for out, _ in done] == ["80\n"] * 3, done
    assert sum(held(cache).values()) <= 3 * size
    assert not [path for path in cache.iterdir() if path.name.startswith((".part-", ".gone-"))]


def test_an_adapter_is_counted_while_another_process_removes_it(tmp_path: Path) -> None:
    place, over = tmp_path / "adapter", threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            place.mkdir()
            (place / "weights").write_bytes(b"12")
            shutil.rmtree(place)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        assert {remote._bytes_of(place) for _ in range(40_000)} <= {0, 2}
    finally:
        over.set()
        other.join()


def test_threads_on_one_cache(tmp_path: Path) -> None:
    for version in range(1, 5):
        written(tmp_path / "adapters" / str(version), version)
    url, wrong = f"file://{tmp_path / 'adapters'}", []
    store = AdapterStore(url, cache=tmp_path / "cache", cache_bytes=1)

    def read(seed: int) -> None:
        try:
            for k in range(20):
                name = str(1 + (seed + k) % 4)
                assert version_of(store.read(f"{url}/{name}")) == float(name)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
