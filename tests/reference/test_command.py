"""`python -m reference check`: statuses, errors, interrupts, progress."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from reference.__main__ import main
from tests.help.my_kernel import KERNEL, run

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("one_blas_thread")]
ROOT = Path(__file__).parents[2]


def test_a_right_kernel_leaves_with_0(files: Path) -> None:
    done = run("check", "right.py:my_kernel", folder=files)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"passed: all \d+ cases\n", done.stdout)
    assert run("check", "right:my_kernel", folder=files).returncode == 0


def test_a_wrong_kernel_leaves_with_1_and_its_likeliest_fault_first(files: Path) -> None:
    done = run("check", "unscaled.py:my_kernel", "--random", "20", "--seed", "7", folder=files)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("likeliest: the scaling is dropped")
    assert "of seed 7, float32" in done.stdout
    assert 'load("unscaled.py:my_kernel")' in done.stdout


def test_json_on_the_command_line(files: Path) -> None:
    done = run("check", "unscaled.py:my_kernel", "--json", "--random", "5", folder=files)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["failed"] == len(told["failures"])
    assert "from reference import Workload, call, load" in told["smallest"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.py:f"], "kernel: expected a file, got nowhere.py"),
        (["right.py:g"], "kernel: expected a function of right.py, got g; it has my_kernel"),
        (["right.py"], "kernel: expected FILE:FUNCTION or MODULE:FUNCTION, got right.py"),
        (["no_such_module:f"], "kernel: expected no_such_module to be importable, got ModuleNot"),
        (["broken.py:f"], "kernel: expected broken.py to be importable, got SyntaxError"),
        (["right.py:my_kernel", "--dtypes", "int8"], "--dtypes: expected some of float16, "),
        (["right.py:my_kernel", "--random", "-1"], "--random: expected 0 or more, got -1"),
        (["right.py:my_kernel", "--random", str(2**31)], "random: expected at most 10000000"),
        (["right.py:my_kernel", "--random", "many"], "--random: expected an integer, got many"),
        (["right.py:my_kernel", "--seed", "-1"], "--seed: expected 0 or more, got -1"),
        (["right.py:my_kernel", "--like", "cuda"], "--like: expected one of reference, punica"),
        (["right.py:my_kernel", "--torch"], "--torch: expected a kernel whose file imports torch"),
        (["right.py:my_kernel", "--like", "vllm-bgmv"], "kernel: expected 2 for vllm-bgmv"),
        ([], "FILE:FUNCTION"),
    ],
)
def test_a_wrong_command_leaves_with_2(
    files: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (files / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "path", list(sys.path))  # `load` adds the file's folder
    for optional in ("torch", "right", "broken"):
        monkeypatch.delitem(sys.modules, optional, raising=False)
    try:
        status = main(["check", *arguments])
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.startswith("reference: error: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_a_wrong_command_shows_no_traceback(files: Path) -> None:
    done = run("check", "nowhere.py:f", folder=files)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"reference: error: kernel: expected a file, got .+\n", done.stderr)


def test_a_kernel_that_ends_the_process_fails(files: Path) -> None:
    (files / "ends.py").write_text("import sys\n\n\ndef my_kernel(*operands):\n    sys.exit(0)\n")
    done = run("check", "ends.py:my_kernel", folder=files)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("likeliest: it raises SystemExit: 0, in every case")
    (files / "ends.py").write_text("raise SystemExit\n")
    done = run("check", "ends.py:my_kernel", folder=files)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected ends.py to be importable, got SystemExit" in done.stderr


def test_an_interrupt_ends_without_a_traceback(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "interrupted.py").write_text(
        "def my_kernel(*operands):\n    raise KeyboardInterrupt\n"
    )
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "interrupted", raising=False)
    assert main(["check", "interrupted.py:my_kernel"]) == 130


def test_the_core_of_reference_imports_numpy_alone(files: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from reference.__main__ import main
        status = main(["check", "right.py:my_kernel"])
        optional = {"sgmv", "numba", "torch", "ml_dtypes", "hypothesis", "rich"}
        print(status, sorted(optional & set(sys.modules)))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=files,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.oracle
def test_progress_appears_on_a_terminal_after_two_seconds(files: Path) -> None:
    slow = KERNEL.replace(
        "for s, adapter_id", "import time; time.sleep(0.035)\n    for s, adapter_id"
    )
    (files / "slow.py").write_text(slow)
    ours, theirs = pty.openpty()
    seen = b""

    def read() -> None:
        nonlocal seen
        try:
            while chunk := os.read(ours, 4096):
                seen += chunk
        except OSError:  # Linux's end of a terminal
            pass

    reader = threading.Thread(target=read)
    reader.start()
    command = [sys.executable, "-m", "reference", "check", "slow.py:my_kernel"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, cwd=files, env=environment
    )
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert done.returncode == 0
    assert re.search(rb"\r\x1b\[K\d+ cases checked, 0 failed, [2-9] s", seen)
    assert seen.endswith(b"\r\x1b[K")  # and is gone at the end
