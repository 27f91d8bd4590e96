"""Adapters read while others write: one version, or an error, and never a dead process."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save, save_file

from sgmv import files, peft
from sgmv.adapter import Adapter, load_peft
from sgmv.errors import PeftError
from sgmv.files import TensorFile
from sgmv.serving import AdapterSlots, LoRARequest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def tensors_of(version: int, width: int = 3, module: str = "up") -> dict[str, Any]:
    name = f"base_model.model.{module}"
    return {
        f"{name}.lora_A.weight": np.full((2, width), version, np.float32),
        f"{name}.lora_B.weight": np.full((width, 2), version, np.float32),
    }


def config_of(version: int, **options: object) -> bytes:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2 * version} | options
    return json.dumps(config).encode()


def write(directory: Path, version: int, width: int = 3) -> Path:
    """An adapter whose values and scaling are all its version."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_bytes(config_of(version))
    save_file(tensors_of(version, width), directory / WEIGHTS)
    return directory


def version_of(adapters: dict[str, Any]) -> int:
    """Of an adapter that is whole."""
    adapter = adapters["up"]
    values = {*adapter.A.ravel().tolist(), *adapter.B.ravel().tolist(), adapter.scaling}
    assert len(values) == 1, f"two versions in one: {values}"
    return int(values.pop())


def rested(directory: Path) -> Path:
    """Once its files are older than a tick of the clock, one reading is enough."""
    newest = max((directory / name).stat().st_ctime_ns for name in (CONFIG, WEIGHTS))
    while time.time_ns() - newest < 2 * files._TICK:
        time.sleep(0.005)
    return directory


# Another process writes all the time

READER = """
import collections, sys
import numpy as np
from sgmv.errors import PeftError
from sgmv.adapter import load_peft

directory, loads, check_scaling = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "both"
seen = collections.Counter()
for _ in range(loads):
    try:
        adapter = load_peft(directory)["up"]
    except PeftError as error:
        assert directory in str(error), error
        seen["refused"] += 1
        continue
    (version,) = {*np.unique(adapter.A).tolist(), *np.unique(adapter.B).tolist()}
    assert version in (1, 2), version
    assert not check_scaling or adapter.scaling == version, adapter
    seen[version] += 1
"""


def while_reading(directory: Path, loads: int, which: str, change: Callable[[int], None]) -> None:
    """Change what a child process reads, until it has."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", READER, str(directory), str(loads), which]
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for number in itertools.count():
            if child.poll() is not None:
                break
            change(number)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0, f"ended by {child.returncode}: {err}"


def test_weights_that_are_rewritten_all_the_time(tmp_path: Path) -> None:
    """In place, over a cut file, and by renaming: it ended the process by SIGBUS."""
    width, pause = 250_000, random.Random(12)
    served = write(tmp_path / "served", 1, width)
    sources = [write(tmp_path / str(v), v, width) / WEIGHTS for v in (1, 2)]
    (served / CONFIG).write_bytes(config_of(1))
    path = served / WEIGHTS

    def change(number: int) -> None:
        source = sources[number % 2]
        match number % 3:
            case 0:
                shutil.copyfile(source, path)
            case 1:
                os.truncate(path, path.stat().st_size // 2)
                shutil.copyfile(source, path)
            case 2:
                shutil.copyfile(source, served / "new")
                (served / "new").replace(path)
        time.sleep(pause.uniform(0, 0.06))

    while_reading(served, 200, "weights", change)
    assert load_peft(served)["up"].A[0, 0] in (1, 2)


def test_directories_that_are_renamed_all_the_time(tmp_path: Path) -> None:
    """Config and weights are of one directory, though each is opened by its name."""
    for version in (1, 2):
        write(tmp_path / str(version), version, 20_000)
    served = tmp_path / "served"
    served.symlink_to("1")

    def change(number: int) -> None:
        (tmp_path / "next").symlink_to(str(1 + number % 2))
        (tmp_path / "next").replace(served)
        time.sleep(0.0005)

    while_reading(served, 1000, "both", change)


# The same, at a moment chosen here


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have something happen while an adapter is read, at each reading or at the first."""

    def arrange(moment: str, action: Callable[[], object], times: int = 1) -> None:
        left = [times]

        def act() -> None:
            left[0] -= 1
            if left[0] >= 0:
                action()

        if moment == "between config and weights":
            open_weights = peft.Tensors
            monkeypatch.setattr(peft, "Tensors", lambda *_: (act(), open_weights(*_))[1])
        else:  # between A and B
            tensor = TensorFile.tensor

            def then_act(self: TensorFile, name: str, dtype: Any) -> Any:
                found = tensor(self, name, dtype)
                if "lora_A" in name:
                    act()
                return found

            monkeypatch.setattr(TensorFile, "tensor", then_act)

    return arrange


def in_place(directory: Path, version: int) -> None:
    """A writer that keeps the file, its size and, like `cp -p`, its time."""
    for name, data in ((CONFIG, config_of(version)), (WEIGHTS, save(tensors_of(version)))):
        path = directory / name
        at = path.stat()
        with path.open("r+b") as file:
            file.write(data)
        os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))


def over_it(directory: Path, version: int) -> None:
    (directory / CONFIG).write_bytes(config_of(version))
    (directory / WEIGHTS).write_bytes(save(tensors_of(version)))


def by_renaming_files(directory: Path, version: int) -> None:
    new = write(directory.with_name("new"), version)
    for name in (CONFIG, WEIGHTS):
        (new / name).replace(directory / name)


def by_renaming_the_directory(directory: Path, version: int) -> None:
    new = write(directory.with_name("new"), version)
    directory.rename(directory.with_name("old"))
    new.rename(directory)


MOMENTS = ["between config and weights", "between A and B"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", [in_place, over_it, by_renaming_files])
def test_an_adapter_replaced_while_it_is_read_is_the_new_one(
    change: Callable[[Path, int], None], moment: str, tmp_path: Path, meanwhile: Any
) -> None:
    directory = rested(write(tmp_path / "served", 1))
    meanwhile(moment, lambda: change(directory, 2))
    assert version_of(load_peft(directory)) == 2


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_config_replaced_while_weights_are_read(
    moment: str, tmp_path: Path, meanwhile: Any
) -> None:
    directory = rested(write(tmp_path / "served", 1))
    meanwhile(moment, lambda: (directory / CONFIG).write_bytes(config_of(2)))
    assert load_peft(directory)["up"].scaling == 2


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_directory_replaced_while_it_is_read_is_the_old_one(
    moment: str, tmp_path: Path, meanwhile: Any
) -> None:
    directory = rested(write(tmp_path / "served", 1))
    meanwhile(moment, lambda: by_renaming_the_directory(directory, 2))
    assert [version_of(load_peft(directory)) for _ in range(2)] == [1, 2]


@pytest.mark.skipif(os.open not in os.supports_dir_fd, reason="directories have no descriptor")
def test_a_link_that_moves_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config of one directory, weights of another, and a second look that sees the first again."""
    versions = [rested(write(tmp_path / str(version), version)) for version in (1, 2)]
    link, opened, turns = tmp_path / "served", files._opened, itertools.cycle(versions)

    def turn() -> None:
        (tmp_path / "next").symlink_to(next(turns))
        (tmp_path / "next").replace(link)

    def then_turn(*arguments: Any) -> Any:
        found = opened(*arguments)
        turn()
        return found

    turn()
    monkeypatch.setattr(files, "_opened", then_turn)
    for _ in range(3):
        version_of(load_peft(link))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("read", [load_peft, lambda path: Adapter.from_peft(path, "up")])
def test_files_that_change_at_each_reading(
    read: Callable[[Path], Any], moment: str, tmp_path: Path, meanwhile: Any
) -> None:
    directory = rested(write(tmp_path / "served", 1))
    versions = itertools.count(2)
    meanwhile(moment, lambda: in_place(directory, next(versions) % 5), times=99)
    with pytest.raises(PeftError) as caught:
        read(directory)
    for part in (str(directory), CONFIG, WEIGHTS, "another process", "try again", "renames"):
        assert part in str(caught.value)
    assert next(versions) == 5  # read three times


def test_a_clock_too_coarse_to_tell(
    tmp_path: Path, meanwhile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes within a tick have one time; what was written a moment ago is read again."""
    directory = write(tmp_path / "served", 1)
    now, fstat = [10**18], os.fstat

    def coarse(descriptor: int) -> Any:
        at = fstat(descriptor)
        kept = {name: getattr(at, name) for name in ("st_mode", "st_dev", "st_ino", "st_size")}
        return SimpleNamespace(**kept, st_mtime_ns=10**18 - 5, st_ctime_ns=10**18 - 5)

    monkeypatch.setattr(files.os, "fstat", coarse)
    clock = SimpleNamespace(
        time_ns=lambda: now[0], sleep=lambda s: now.append(now.pop() + int(s * 1e9))
    )
    monkeypatch.setattr(files, "time", clock)
    meanwhile("between A and B", lambda: in_place(directory, 2))
    assert version_of(load_peft(directory)) == 2
    assert now[0] > 10**18


def test_times_of_a_server_with_another_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write(tmp_path / "served", 1)
    sleeps: list[float] = []
    clock = SimpleNamespace(time_ns=lambda: time.time_ns() - 3600 * 10**9, sleep=sleeps.append)
    monkeypatch.setattr(files, "time", clock)
    assert version_of(load_peft(directory)) == 1
    assert not sleeps


def test_what_rests_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = rested(write(tmp_path / "served", 1))
    sleeps: list[float] = []
    monkeypatch.setattr(files.time, "sleep", sleeps.append)
    assert version_of(load_peft(directory)) == 1
    assert not sleeps


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_directory_removed_while_it_is_read(moment: str, tmp_path: Path, meanwhile: Any) -> None:
    directory = rested(write(tmp_path / "served", 1))
    meanwhile(moment, lambda: shutil.rmtree(directory))
    with pytest.raises(PeftError, match=r"directory: .*served \(no such directory\)"):
        load_peft(directory)


def test_a_file_cut_short_while_it_is_read(tmp_path: Path, meanwhile: Any) -> None:
    directory = rested(write(tmp_path / "served", 1))
    meanwhile("between A and B", lambda: os.truncate(directory / WEIGHTS, 200))
    with pytest.raises(PeftError, match=f"{WEIGHTS}: expected a safetensors file, got damaged"):
        load_peft(directory)


def test_config_and_weights_of_two_saves_that_do_not_fit(tmp_path: Path) -> None:
    directory = write(tmp_path / "served", 1)
    (directory / CONFIG).write_bytes(config_of(2, r=4))
    with pytest.raises(PeftError, match="take config and tensors from the same save"):
        load_peft(directory)


# What is in a file's place, and what fails below it


def make_socket(path: Path) -> None:
    os.chdir(path.parent)  # a socket's name is at most 108 bytes
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)


IN_ITS_PLACE: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "a FIFO, not a file"),
    "socket": (make_socket, "No such device or address"),
    "directory": (os.mkdir, "Is a directory"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device, not a file"),
    "loop": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    # The first page of a process is not mapped: a read fails with EIO.
    "disk error": (lambda path: path.symlink_to("/proc/self/mem"), ""),
}


@pytest.mark.skipif(sys.platform != "linux", reason="files of Linux")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", IN_ITS_PLACE)
def test_what_is_no_file_is_named_and_never_waited_for(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # back, after make_socket
    directory = write(tmp_path / "served", 1)
    (directory / name).unlink()
    make, part = IN_ITS_PLACE[kind]
    make(directory / name)
    script = "import sys; from sgmv.adapter import load_peft; load_peft(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"sgmv.errors.PeftError: {directory / name}: "), done.stderr
    assert part in last


@pytest.mark.parametrize("code", ["EIO", "ESTALE", "EACCES", "EMFILE", "EWOULDBLOCK"])
@pytest.mark.parametrize("where", ["_open_at_once", "_exactly"])
def test_errors_of_the_system_name_the_file(
    where: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk, a mount or a right that fails is the library's error, and says why."""
    directory = rested(write(tmp_path / "served", 1))
    number = getattr(errno, code)
    real = getattr(files, where)
    for name in (CONFIG, WEIGHTS):

        def failing(first: Any, *rest: Any, name: str = name, **more: Any) -> Any:
            if str(getattr(first, "name", first)).endswith(name):
                raise OSError(number, os.strerror(number))
            return real(first, *rest, **more)

        monkeypatch.setattr(files, where, failing)
        with pytest.raises(PeftError) as caught:
            load_peft(directory)
        for part in (str(directory / name), os.strerror(number), "try again"):
            assert part in str(caught.value)


def test_a_parent_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path, **_: object) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", failing)
    with pytest.raises(PeftError, match=r"directory: .* \(Permission denied\)"):
        load_peft(tmp_path)


def test_one_adapter_that_cannot_be_read_is_not_the_others(tmp_path: Path) -> None:
    good = LoRARequest("good", 1, str(write(tmp_path / "good", 1)))
    bad = []
    for number, make in enumerate(
        (os.mkfifo, os.mkdir, lambda path: path.write_bytes(b"version https://git-lfs.github.com/"))
    ):
        directory = write(tmp_path / str(number), 1)
        (directory / WEIGHTS).unlink()
        make(directory / WEIGHTS)
        bad.append(LoRARequest(f"bad{number}", 2 + number, str(directory)))
    slots = AdapterSlots(max_loras=4, max_cpu_loras=4, max_lora_rank=8)
    active, failed = slots.try_activate([bad[0], good, *bad[1:]])
    assert (list(active), list(failed)) == ([1], [2, 3, 4])
    for lora in bad:
        error = failed[lora.lora_int_id]
        assert isinstance(error, PeftError)
        assert lora.lora_name in str(error)


# Names


NAMES = [
    "a b",
    "ü-ñ-漢",
    "two\nlines",
    "quote'\"",
    "100%",
    "#1?x=2&y",
    "{brace}",
    " end ",
    "~",
    "*",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
def test_directories_of_any_name(kind: Callable[[Any], Any], name: str, tmp_path: Path) -> None:
    directory = write(tmp_path / name, 1)
    assert version_of(load_peft(kind(str(directory)))) == 1
    assert Adapter.from_peft(kind(str(directory)), "up").scaling == 1
    (directory / WEIGHTS).unlink()
    with pytest.raises(PeftError) as caught:
        load_peft(kind(str(directory)))
    assert str(caught.value).isprintable()  # one line


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe"
    directory = write(Path(os.fsdecode(name)), 1)
    for given in (name, os.fsdecode(name), directory):
        assert version_of(load_peft(given)) == 1
    (directory / WEIGHTS).write_bytes(b"")
    with pytest.raises(PeftError) as caught:
        load_peft(name)
    str(caught.value).encode("utf-8")  # a console prints it


@pytest.mark.parametrize("given", ["", b"", "a\0b", b"a\0b", "x" * 5000, "a/" * 5000])
def test_names_that_no_directory_has(given: Any) -> None:
    with pytest.raises(PeftError, match="directory: expected a PEFT adapter directory, got "):
        load_peft(given)


# The format, held against safetensors' own reader


def values(directory: Path) -> dict[str, bytes]:
    with io.FileIO(directory / WEIGHTS) as opened:
        file = TensorFile(opened)
        if {entry.dtype for entry in file.entries.values()} != {"U8"}:
            raise ValueError("types, which the reader of PEFT's files checks")
        return {name: file.tensor(name, np.uint8).tobytes() for name in file.entries}


def test_damaged_files_are_refused_as_safetensors_does(tmp_path: Path) -> None:
    """What it refuses is refused; what both take has the same values."""
    rng = random.Random(20)
    whole = save(
        {"a": np.arange(24, dtype=np.uint8).reshape(2, 12), "b": np.arange(7, dtype=np.uint8)},
        metadata={"format": "pt"},
    )
    length = 8 + int.from_bytes(whole[:8], "little")
    taken = 0
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(min(length, len(data)))
            match rng.randrange(4):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    data[at] = rng.choice(b'0123456789[]{},:" U8')
                case 2:
                    del data[at]
                case 3:
                    data = data[: rng.randrange(1, len(data) + 1)]
        (tmp_path / WEIGHTS).write_bytes(data)
        try:
            expected = {name: bytes(tensor["data"]) for name, tensor in deserialize(bytes(data))}
        except (SafetensorError, ValueError):
            expected = None
        try:
            found = values(tmp_path)
        except (OSError, ValueError):
            found = None
        if expected is None:
            assert found is None, data
        elif found is not None:
            assert found == expected
            taken += 1
    assert taken > 10


def test_header_that_nests_for_ever(tmp_path: Path) -> None:
    header = b"[" * 200_000
    directory = write(tmp_path / "served", 1)
    (directory / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(PeftError, match="damaged data"):
        load_peft(directory)
    (directory / CONFIG).write_bytes(header)
    with pytest.raises(PeftError, match="JSON, got damaged"):
        load_peft(directory)


def test_a_config_too_large_to_be_one(tmp_path: Path) -> None:
    directory = write(tmp_path / "served", 1)
    os.truncate(directory / CONFIG, files.MOST_TEXT + 1)
    with pytest.raises(PeftError, match="JSON, got damaged data"):
        load_peft(directory)


@pytest.mark.parametrize("change", ["longer", "shorter"])
def test_a_tensor_of_another_size_than_its_shape(change: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "served", 1)
    data = (directory / WEIGHTS).read_bytes()
    shapes = (b"[2,3]", b"[2,4]") if change == "longer" else (b"[2,3]", b"[2,2]")
    assert shapes[0] in data
    (directory / WEIGHTS).write_bytes(data.replace(*shapes))
    with pytest.raises(PeftError, match=f"{WEIGHTS}: expected a safetensors file, got damaged"):
        load_peft(directory)


def test_a_file_longer_than_its_header_says(tmp_path: Path) -> None:
    directory = write(tmp_path / "served", 1)
    with (directory / WEIGHTS).open("ab") as file:
        file.write(b"more")
    with pytest.raises(PeftError, match="52 bytes of data, where its header names 48"):
        load_peft(directory)


@pytest.mark.parametrize("offsets", [(b"[24,48]", b"[ 0,24]"), (b"[ 0,24]", b"[ 4,24]")])
def test_tensors_that_overlap_or_leave_gaps(offsets: tuple[bytes, bytes], tmp_path: Path) -> None:
    directory = write(tmp_path / "served", 1)
    data = (directory / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].strip().replace(b"[0,24]", b"[ 0,24]")
    assert offsets[0] in header
    header = header.replace(*offsets)
    (directory / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[-48:])
    with pytest.raises(PeftError, match=r"damaged data .*tensors overlap, or leave gaps"):
        load_peft(directory)
