"""AdapterStore: its index, its requests, and what is damaged; adapters of a store in slots."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sgmv
from sgmv.errors import DtypeError, PeftError, ServingError, ValueRangeError
from sgmv.serving import AdapterSlots, AdapterStore, Scheduler, next_step, store
from tests.help.peft_files import halves, write_adapter
from tests.help.served import FIXTURES

pytestmark = pytest.mark.once

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def written(directory: Path, version: float) -> Path:
    """An adapter whose values are all its version, and its scaling 2."""
    directory.mkdir(parents=True, exist_ok=True)
    A, B = np.full((2, 3), version, "f"), np.full((4, 2), version, "f")
    return write_adapter(directory, halves("up", A, B))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Three adapters."""
    for version, name in enumerate(["french", "greek", "latin"], 1):
        written(tmp_path / "adapters" / name, version)
    return tmp_path / "adapters"


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the adapters of which configs and headers are read from now on."""
    names: list[str] = []
    describe = store.describe

    def noted(path: str) -> Any:
        names.append(Path(path).name)
        return describe(path)

    monkeypatch.setattr(store, "describe", noted)
    return names


def test_a_store_has_its_adapters_and_reads_each_when_asked(directory: Path) -> None:
    (directory / ".hidden").mkdir()
    (directory / "a-file").write_text("")
    found = AdapterStore(directory)
    assert (len(found), list(found), found.names) == (3, *[["french", "greek", "latin"]] * 2)
    assert "greek" in found
    assert ".hidden" not in found
    assert found.damaged == {}
    request = found.request("greek")
    assert (request.lora_name, request.lora_path) == ("greek", f"{directory}/greek")
    assert (found.read(request.lora_path)["up"].A == 2).all()
    assert repr(found) == f"AdapterStore({str(directory)!r}, 3 adapters)"


def test_the_index_is_made_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = looked_at(monkeypatch)
    first = AdapterStore(directory)
    assert sorted(names) == ["french", "greek", "latin"]
    second = AdapterStore(directory)
    assert len(names) == 3
    assert [first.request(n) for n in first] == [second.request(n) for n in second]
    assert second.refresh() == []


def test_only_what_changed_is_looked_at_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AdapterStore(directory)
    names = looked_at(monkeypatch)
    shutil.rmtree(directory / "french")
    written(directory / "norse", 4)
    written(directory / "new", 5)
    (directory / "new").rename(directory / "newer")
    (directory / "latin" / WEIGHTS).unlink()
    found = AdapterStore(directory)
    assert sorted(names) == ["latin", "newer", "norse"]
    assert found.names == ["greek", "latin", "newer", "norse"]
    assert list(found.damaged) == ["latin"]
    written(directory / "latin", 3)
    shutil.rmtree(directory / "norse")
    assert found.refresh() == ["latin", "norse"]
    assert found.damaged == {}
    assert names.count("greek") == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: text.replace('"directory": "', '"directory": "/else'),
        lambda text: json.dumps(json.loads(text) | {"stamps": ["french"]}),
        lambda text: json.dumps(json.loads(text) | {"damaged": {"norse": "gone"}}),
        lambda text: "[]",
        lambda text: "",
        lambda text: json.dumps(json.loads(text) | {"stamps": {"french": 7}}),
    ],
)
def test_an_index_that_is_damaged_is_made_anew(
    directory: Path, spoil: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = AdapterStore(directory)
    path = directory / store.INDEX
    text = path.read_text()
    path.write_text(spoil(text))
    assert path.read_text() != text
    names = looked_at(monkeypatch)
    after = AdapterStore(directory)
    assert len(names) == 3
    assert [before.request(n) for n in before] == [after.request(n) for n in after]


def test_where_the_index_is(directory: Path, tmp_path: Path) -> None:
    AdapterStore(directory, index=tmp_path / "index.json")
    assert not (directory / store.INDEX).exists()
    assert (tmp_path / "index.json").exists()
    with pytest.raises(ServingError, match=r"index: expected a file that can be written.*nowhere"):
        AdapterStore(directory, index=tmp_path / "nowhere" / "index.json")
    assert {path.name for path in tmp_path.iterdir()} == {"adapters", "index.json"}


def test_a_directory_that_cannot_be_written(directory: Path) -> None:
    (directory / store.INDEX).mkdir()  # so that no file takes its place
    assert len(AdapterStore(directory)) == 3
    left = {path.name for path in directory.iterdir()}
    assert left == {"french", "greek", "latin", store.INDEX}


def test_damaged_and_half_written_adapters_are_named(directory: Path) -> None:
    weights = directory / "greek" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-5])
    (directory / "latin" / CONFIG).unlink()
    (directory / "empty").mkdir()
    (directory / "norse").mkdir()
    (directory / "norse" / CONFIG).write_text('{"peft_type": "LO')
    found = AdapterStore(directory)
    assert sorted(found.damaged) == ["empty", "greek", "latin", "norse"]
    assert WEIGHTS in found.damaged["greek"]
    for name in found.damaged:
        assert str(directory / name) in found.damaged[name]
        with pytest.raises(ServingError, match=f"'{name}': expected an adapter that is whole"):
            found.request(name)
    assert "4 damaged" in repr(found)
    assert (found.read(found.request("french").lora_path)["up"].A == 1).all()


def test_a_request_sees_what_has_changed_since(directory: Path) -> None:
    """In place, by renaming, new, mended, and gone; each version has an id of its own."""
    found = AdapterStore(directory)
    ids = {found.request("greek").lora_int_id}
    written(directory / "greek", 7)
    ids.add(found.request("greek").lora_int_id)
    written(directory / "next", 8)
    shutil.rmtree(directory / "greek")
    (directory / "next").rename(directory / "greek")
    request = found.request("greek")
    ids.add(request.lora_int_id)
    assert len(ids) == 3
    assert (found.read(request.lora_path)["up"].A == 8).all()
    weights = directory / "greek" / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ServingError, match=r"whole"):
        found.request("greek")
    weights.write_bytes(whole)
    found.request("greek")
    written(directory / "norse", 9)
    assert found.request("norse").lora_name == "norse"
    assert found.names == ["french", "greek", "latin", "norse"]
    shutil.rmtree(directory / "norse")
    with pytest.raises(ServingError, match=r"name: expected an adapter of the store .*'norse'"):
        found.request("norse")


def test_ids_differ_and_are_those_of_every_process(directory: Path) -> None:
    for number in range(60):
        shutil.copytree(directory / "french", directory / f"a{number}")
    found = AdapterStore(directory)
    ids = {found.request(name).lora_int_id for name in found}
    assert len(ids) == 63
    assert all(0 < i < 2**63 for i in ids)


@pytest.mark.parametrize("name", ["../french", "french/..", "", ".", ".sgmv-index.json", "a\0b"])
def test_nothing_beside_the_store_is_looked_at(directory: Path, name: str) -> None:
    with pytest.raises(ServingError, match=r"name: expected an adapter of the store"):
        AdapterStore(directory / "..").request(name)


def test_refusals(directory: Path) -> None:
    with pytest.raises(ServingError, match=r"directory: expected one that holds adapters.*no such"):
        AdapterStore(directory / "nowhere")
    with pytest.raises(ServingError, match=r"directory: expected one that holds adapters"):
        AdapterStore(directory / "french" / CONFIG)
    for given in ("", "a\0b"):
        with pytest.raises(ServingError, match=r"directory: expected a path"):
            AdapterStore(given)
    with pytest.raises(DtypeError, match=r"directory: expected a path, got int"):
        AdapterStore(7)  # type: ignore[arg-type]
    with pytest.raises(ServingError, match=r"cache: expected none"):
        AdapterStore(directory, cache=directory)
    with pytest.raises(ServingError, match=r"cache: expected a folder"):
        AdapterStore("memory://adapters")
    with pytest.raises(ValueRangeError, match=r"cache_bytes"):
        AdapterStore(directory, cache_bytes=0)
    with pytest.raises(DtypeError, match=r"name"):
        AdapterStore(directory).request(7)  # type: ignore[arg-type]


def test_one_version_while_another_process_replaces_it(directory: Path, tmp_path: Path) -> None:
    """By renaming whole directories: what is read is the old one or the new one."""
    found = AdapterStore(directory)
    rng = random.Random(0)
    for version in range(10, 30):
        written(tmp_path / "next", version)
        os.rename(directory / "greek", tmp_path / "old")
        if rng.random() < 0.5:
            with pytest.raises(PeftError, match=r"greek"):
                found.read(f"{directory}/greek")
        os.rename(tmp_path / "next", directory / "greek")
        shutil.rmtree(tmp_path / "old")
        layer = found.read(found.request("greek").lora_path)["up"]
        np.testing.assert_array_equal(layer.A, version)
        np.testing.assert_array_equal(layer.B, version)


def test_a_store_in_slots(tmp_path: Path) -> None:
    """Requests for adapters that PEFT wrote, read by the thread; every layer of each is right."""
    shutil.copytree(FIXTURES / "llama", tmp_path / "llama")
    found = AdapterStore(tmp_path / "llama")
    slots = AdapterSlots(2, 3, 32, read=found.read)
    scheduler = Scheduler[str](2)
    scheduler.add("base")
    names = found.names
    for name in names:
        scheduler.add(name, found.request(name))
    seen = set()
    while len(seen) < len(names):
        step = next_step(scheduler, slots, wait=False)
        assert step.failed == ()
        for name in step.rows.keys() - {"base"}:
            layers = sgmv.load_peft(tmp_path / "llama" / name)
            for module, layer in layers.items():
                x = np.ones((step.n, layer.h_in), "f")
                y = step.add_lora(module, np.zeros((step.n, layer.h_out), "f"), x)[step.rows[name]]
                assert y.any() == bool(np.asarray(layer.B, "f").any())
                stack = sgmv.AdapterStack.from_adapters([layer], dtype="float32")
                alone = sgmv.add_lora(np.zeros((1, layer.h_out), "f"), x[:1], stack, [0])
                assert y.tobytes() == alone.tobytes()
            seen.add(name)
            scheduler.finish(name)
    assert slots.counters.host_misses == len(names)
