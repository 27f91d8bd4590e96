"""README.md and docs/: what they print for the reader to run, runs.

Here in the environment at hand; tests/docs/fresh_pages.py does it in fresh ones.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
import textwrap
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

import sgmv
from benchmarks.registry import STUDIES
from tests.help import api_page, pages, punica_page
from tests.help.pages import FOR_DEVELOPERS, PAGES, ROOT
from tests.help.planting import run_python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.once

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
COMMANDS = {*STUDIES, "pages", "report"}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
NAMES = [page.name for page in PAGES]


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}


PACKAGES = names_of([r for extra in EXTRAS.values() for r in extra]) - {"sgmv"}


def install_fault(arguments: list[str], in_a_clone: bool) -> str:
    """What is wrong with `pip install` of this; "" if nothing is."""
    if arguments[:1] == ["-e"] and in_a_clone:
        found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", arguments[1])
        unknown = set((found[1] or "").split(",")) - {"", *EXTRAS} if found else {arguments[1]}
    else:
        unknown = set(arguments) - PACKAGES
    return f"cannot be installed: {', '.join(sorted(unknown))}" if unknown else ""


@cache
def fault(command: str) -> str:
    """What is wrong with a command of a page, from the root of a clone; "" if nothing is."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    while re.fullmatch(r"python3?", words[0]) and words[1] == "-m" and words[2] == "sgmv":
        words = words[2:]
    match words:
        case ["make", target, *_]:
            return "" if target in TARGETS else f"no target {target}"
        case ["pip", "install", *arguments]:
            return install_fault(arguments, in_a_clone=True)
        case ["source", path]:
            return "" if path == ".venv/bin/activate" else f"no {path}"
        case ["python3", "-m", "venv", ".venv"]:
            return ""
        case ["jupyter", "lab", path]:
            return "" if (ROOT / path).is_file() else f"no {path}"
        case ["sgmv", *arguments]:
            return sgmv_fault(arguments)
        case ["python", "-m", "benchmarks", study, *_] if study[0] != "-" and study not in COMMANDS:
            return f"no study {study}"
        case ["python", "-m", "benchmarks" as module, *arguments]:
            done = run_python(
                f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)",
                arguments=[*arguments, "--help"],
            )
            return "" if done.returncode == 0 else done.stderr
        case ["python", "-m", "pytest", *arguments]:
            files = [word for word in arguments if word.endswith(".py")]
            return "" if all((ROOT / file).is_file() for file in files) else f"no {files}"
        case ["python", "-m", module, *_]:
            path = Path(*module.split("."))
            places = path.with_suffix(".py"), path / "__main__.py"
            return "" if any((ROOT / place).is_file() for place in places) else f"no {module}"
        case ["python", path, *_]:
            return "" if (ROOT / path).is_file() else f"no {path}"
    return "no test knows this command"


def sgmv_fault(arguments: list[str]) -> str:
    if any(name.endswith((".html", ".png")) for name in arguments) or arguments == ["explorer"]:
        arguments = [arguments[0], "--help"]  # it would write a file
    if arguments[:1] == ["simulate"]:
        arguments = [*arguments, "--help"]  # its figures are held by test_serving_page.py
    try:
        punica_page.printed(shlex.join(arguments))
    except SystemExit as error:
        return "" if not error.code else f"exit status {error.code}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_says_what_it_is(page: Path) -> None:
    """So that none is left out in silence: what does not run is ```text."""
    found = pages.blocks(page)
    assert page.read_text().count("```") == 2 * len(found)
    for block in found:
        assert block.language in pages.LANGUAGES, f"{page.name}:{block.line}"
        assert block.language != "pycon" or page == api_page.PAGE
        if block.language == "text":
            assert not re.search(r"^(\$|>>>|make|pip|sgmv|import) ", block.text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_run(page: Path) -> None:
    """As a reader runs them: in a process of their own, from the clone's root."""
    program = (
        "import runpy; runpy.run_module('tests.help.pages', run_name='__main__', alter_sys=True)"
    )
    done = run_python(program, arguments=[str(page)], timeout=240)
    assert done.returncode == 0, done.stderr
    here = [b for b in pages.blocks(page) if b.language == "python" and not pages.missing(b.text)]
    assert f"{len(here)} Python blocks of {page.name} ran" in done.stdout


@pytest.mark.parametrize("page", [*PAGES, *FOR_DEVELOPERS], ids=lambda page: page.name)
def test_commands_are_right(page: Path) -> None:
    """Those that take long only as far as their --help; docs/fresh_pages.py runs the blocks."""
    commands = [
        *pages.commands(page, "sh"), *pages.commands(page, "console"),
        *pages.commands_in_prose(page),
    ]  # fmt: skip
    for command in commands:
        assert not fault(command), f"{page.name}: {command}: {fault(command)}"


def test_what_commands_print_is_held_by_a_test() -> None:
    """A page with ```console blocks needs one: these have theirs."""
    held = {"examples.md", "punica.md", "serving.md", "simulation.md"}
    assert {p.name for p in PAGES if pages.commands(p, "console")} == held


@pytest.mark.parametrize(
    "command",
    [
        "make tset",
        "pip install 'sgmv[peft]'",
        "pip install -e '.[pefft]'",
        "pip install satetensors",
        "sgmv explane",
        "sgmv explain --rnak 8",
        "python -m benchmarks groth",
        "python -m tests.no_such_page",
        "python examples/no_such.py",
        "rm -rf .venv",
    ],
)
def test_a_wrong_command_is_seen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fault(command)


def test_links_of_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
                assert anchor in slugs, f"{page.name}: {link}"


# The API


def test_the_page_of_the_api_is_fresh() -> None:
    """Remedy: python -m tests.help.api_page."""
    assert api_page.rendered() == api_page.PAGE.read_text()


def test_the_page_of_the_api_has_every_public_call() -> None:
    page = api_page.PAGE.read_text()
    packages = {p.parent.name for p in ROOT.glob("sgmv/*/__init__.py")}
    listed = {name.split(".")[1] for name in api_page.MODULES if name.startswith("sgmv.")}
    assert packages - listed == {"kernels", "replicas", "explain"}  # compiled code; a command
    for name in (*sgmv.__all__, "AdapterStack.load", "Segments.stats", "serving.next_step"):
        assert f"\n### sgmv.{name}\n" in page


# The first screen


def test_the_first_screen_says_what_sgmv_is() -> None:
    screen = (ROOT / "README.md").read_text().split("## Install")[0]
    for text in (screen, sgmv.__doc__ or ""):
        assert "Segmented Gather Matrix-Vector multiplication" in " ".join(text.split())
        assert "https://arxiv.org/abs/2310.18547" in text  # Punica
        assert "https://arxiv.org/abs/2311.03285" in text  # S-LoRA
    assert len(screen.splitlines()) < 55
    assert pages.commands(ROOT / "README.md", "sh")[:2] == ["make bench", "make test"]


def test_the_table_of_extras_has_all_of_them() -> None:
    table = dict(
        re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    )
    assert set(table) == set(EXTRAS)
    for extra, brings in table.items():
        for name in re.findall(r"[\w-]+", brings.split(", and ")[0]):
            assert name in names_of(EXTRAS[extra]), f"{extra} does not bring {name}"


# Advice in messages


def strings(package: str, docstrings: bool = True) -> list[tuple[str, str]]:
    """(file, text) of every string of the package's source."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        found += [
            (str(path.relative_to(ROOT)), node.value)
            for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            if docstrings or id(node) not in alone
        ]
    return found


@pytest.mark.parametrize("package", ["sgmv", "reference", "benchmarks"])
def test_advice_to_install_works(package: str) -> None:
    """`pip install 'sgmv[peft]'` did not: no registry has sgmv."""
    advice = [
        (file, words)
        for file, text in strings(package)
        for words in re.findall(r"pip install ((?:(?:-e|'[^']+'|[\w.-]+) ?)+)", text)
    ]
    assert advice or package == "reference"
    for file, words in advice:
        wrong = install_fault(shlex.split(words), in_a_clone=package == "benchmarks")
        assert not wrong, f"{file}: pip install {words}: {wrong}"


def test_advice_to_run_a_module_works_without_a_clone() -> None:
    """A wheel has sgmv alone: no docs, no benchmarks, no tests, no make."""
    for file, text in strings("sgmv"):
        modules = re.findall(r"python -m ([\w.]+)", text)
        assert set(modules) <= {"sgmv"}, f"{file}: python -m {modules}"
    for file, text in strings("sgmv", docstrings=False):
        if " " in text:  # a message
            assert not re.search(r"`make |docs/\w+\.md", text), f"{file}: {text}"


# The wheel's own page


def test_the_wheel_has_every_folder() -> None:
    folders = [path.parent.relative_to(ROOT) for path in ROOT.glob("sgmv/**/__init__.py")]
    declared = PYPROJECT["tool"]["setuptools"]["packages"]
    elsewhere = PYPROJECT["tool"]["setuptools"]["package-dir"]
    found = [elsewhere.get(name, name.replace(".", "/")) for name in declared]
    assert sorted(found) == sorted(each.as_posix() for each in folders)


def test_the_wheels_page_has_no_dead_link() -> None:
    text = PROJECT["readme"]["text"]
    assert not re.search(r"\]\((?!https://)", text)
    assert "Segmented Gather Matrix-Vector multiplication" in " ".join(text.split())
    exec(textwrap.dedent("".join(re.findall(r"^ {4}.*\n|^\n", text, re.MULTILINE))), {})
    assert metadata.metadata("sgmv")["Name"] == "sgmv"
    assert all(url.startswith("https://") for url in PROJECT["urls"].values())
