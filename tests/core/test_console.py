"""`sgmv` on the command line: errors in one style, progress on terminals; and its submodules."""

from __future__ import annotations

import argparse
import doctest
import io
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import sgmv
from sgmv import compat
from sgmv.__main__ import COMMANDS, main, make_parser
from sgmv.console import Parser, at_least, counts, joined, number, progress
from sgmv.errors import SgmvError

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
PUBLIC = [*sgmv.SUBMODULES, *(f"compat.{engine}" for engine in compat.ENGINES)]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT
    )


# Commands and errors


def test_the_script_is_python_m_sgmv() -> None:
    scripts = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[1].split("\n[")[0]
    [script] = re.findall(r'^sgmv = "(.+):(.+)"$', scripts, re.M)
    assert script == ("sgmv.__main__", "main")
    assert main.__module__ == script[0]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"sgmv {sgmv.__version__}\n"


def test_help_has_every_argument_of_every_command() -> None:
    """What completers read (shtab): the parser of all commands at once."""
    found = make_parser().format_help()
    for name, (_, text) in COMMANDS.items():
        assert name in found
        assert text[:20] in found
    assert "sgmv.__main__.make_parser" in found
    assert "--popularity" in run_python("-m", "sgmv", "explain", "--help").stdout


@pytest.mark.parametrize("program", ["sgmv", "benchmarks"])
def test_errors_are_one_line_and_status_2(program: str) -> None:
    for arguments in ([], ["no-such-command"], ["--no-such-flag"]):
        if program == "benchmarks" and not arguments:
            continue  # it runs
        done = run_python("-m", program, *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert re.fullmatch(rf"{program}: error: .+\n", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "--rank: expected at least 1, got 0"),
        (["--rank", "1.5"], "--rank: expected a whole number, got '1.5'"),
        (["--rate", "fast"], "--rate: expected a number, got 'fast'"),
        (["--slots", "1,a"], "--slots: expected whole numbers of at least 1, with commas, got 'a'"),
        (["--slots", "4,0"], "--slots: expected whole numbers of at least 1, with commas, got '0'"),
        (["--kind", "green"], "--kind: expected one of red, blue, got 'green'"),
        (["--rank"], "--rank: expected a value, got none"),
        (["--json", "--text"], "--text: expected no --json beside it; leave one of them out"),
        (["--other"], "--other: no such argument; see --help"),
        ([], "NAME: expected a value, got none; see --help"),
    ],
)
def test_argparses_own_errors_have_our_style(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(prog="python -m sgmv")
    parser.add_argument("name", nargs=None if not arguments else "?", metavar="NAME")
    parser.add_argument("--rank", type=at_least(1))
    parser.add_argument("--rate", type=number)
    parser.add_argument("--slots", type=counts(1))
    parser.add_argument("--kind", choices=["red", "blue"])
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--text", action="store_true")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"sgmv: error: {message}\n"


def test_the_librarys_errors_name_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    given = argparse.Namespace(h_in=0, html=None)
    for argument, named in (("h_in", "--h-in"), ("--html", "--html"), ("x", "x")):
        with pytest.raises(SystemExit) as ended:
            Parser(prog="sgmv").refuse(SgmvError(argument, "one", "none", "pass one"), given)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said == f"sgmv: error: {named}: expected one, got none; pass one\n"


def test_no_error_of_a_command_names_an_internal(capsys: pytest.CaptureFixture[str]) -> None:
    """Each flag of each command that takes a number, with one that is too small."""
    tried = []
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        flags = re.findall(r"^  (--[a-z-]+) [A-Z_]+\b", capsys.readouterr().out, re.MULTILINE)
        for flag in set(flags) - {"--html", "--figure", "--page", "--journal"}:
            with pytest.raises(SystemExit) as ended:
                main([name, flag, "-9"])
            assert ended.value.code == 2
            said = capsys.readouterr().err
            assert said.startswith(f"sgmv: error: {flag}: expected "), said
            tried.append(flag)
    assert len(tried) >= 20


def test_a_value_may_begin_with_a_minus() -> None:
    assert joined(["explain", "--ids", "-1,0"]) == ["explain", "--ids=-1,0"]
    assert joined(["--ids", "-1", "--n", "-2"]) == ["--ids=-1", "--n=-2"]
    for left in (["--ids=-1", "-1"], ["-1", "--json"], ["--json", "--ids", "0"], ["-v", "-1"]):
        assert joined(left) == left


class Stream(io.StringIO):
    def __init__(self, isatty: bool) -> None:
        super().__init__()
        self.isatty = lambda: isatty  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("isatty", "term", "shown"),
    [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)],
)
def test_progress_is_for_terminals(
    isatty: bool, term: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(isatty)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "20")
    with progress() as show:
        show("one of two, and more than fits")
    expected = "\r\x1b[Kone of two, and mor\r\x1b[K"
    assert stream.getvalue() == (expected if shown else "")


def test_simulate_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(True)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    main(["simulate", "--requests", "9", "--slots", "1,2", "--policy", "lru"])
    steps = [rf"simulations: {i} of 2 pieces, \S+ a second, \d+ s left" for i in (1, 2)]
    assert re.fullmatch("".join(rf"\r\x1b\[K{text}" for text in (*steps, "")), stream.getvalue())


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_alone_lists_every_target() -> None:
    told = subprocess.run(["make"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    [names] = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^make (\S+)", told, re.MULTILINE) == names.split()
    assert max(map(len, told.splitlines())) <= 120


# Submodules


@pytest.mark.parametrize("name", PUBLIC)
def test_submodules_are_there_after_import_sgmv(name: str) -> None:
    program = f"import sgmv; found = sgmv.{name}; print(found.__name__, 'numba' in dir(sgmv))"
    done = run_python("-c", program)
    assert done.stdout.split() == [f"sgmv.{name}", "False"], done.stderr


def test_submodules_are_imported_when_asked_for() -> None:
    program = "import json, sys, sgmv; print(json.dumps(list(sys.modules)))"
    loaded = set(json.loads(run_python("-c", program).stdout))
    assert not loaded & {f"sgmv.{name}" for name in PUBLIC}


def test_every_package_is_public_or_known_not_to_be() -> None:
    packages = {path.parent.name for path in (ROOT / "sgmv").glob("*/__init__.py")}
    assert packages - set(sgmv.SUBMODULES) == {
        "explain",
        "kernels",
        "replicas",
    }  # the command's, numba's
    engines = {path.stem for path in (ROOT / "sgmv" / "compat").glob("[!_]*")}
    parts = ("batches", "dora", "experts", "graphs", "hooks", "layers", "weights")
    inner = {"operator", *(f"peft_{part}" for part in parts)}
    assert engines - set(compat.ENGINES) == inner


@pytest.mark.parametrize("module", [sgmv, compat])
def test_what_is_not_there_is_an_attribute_error(module: types.ModuleType) -> None:
    with pytest.raises(AttributeError, match=rf"'{module.__name__}' has no attribute 'laoyuts'"):
        module.laoyuts  # noqa: B018
    assert {"layouts", "peft"} & set(dir(module))
    for name in getattr(module, "SUBMODULES", ()) or module.ENGINES:
        assert name in dir(module)


def test_documented_use_passes_mypy_strict(tmp_path: Path) -> None:
    """And submodules have their own types, not Any: what is not there is an error."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    page = doctest.script_from_examples((ROOT / "docs" / "serving.md").read_text())
    [ten_lines] = re.findall(
        r"^## The API in ten lines$.*?```python\n(.*?)```",
        (ROOT / "README.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    (tmp_path / "serving_page.py").write_text(page)
    (tmp_path / "ten_lines.py").write_text(ten_lines)
    (tmp_path / "wrong.py").write_text(
        "import sgmv\n\n"
        "layout: int = sgmv.layouts.vllm_v1\n"
        "model: int = sgmv.compat.peft.accelerate\n"
        "sgmv.laoyuts\n"
    )
    programs = sorted(map(str, tmp_path.glob("*.py")))
    server = str(ROOT / "examples" / "server_step.py")
    done = run_python("-m", "mypy", "--strict", *programs, server)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 3, done.stdout
    for line, expected in zip(errors, ("LoRAKernelMeta", "Accelerated", '"laoyuts"'), strict=True):
        assert "wrong.py" in line
        assert expected in line
