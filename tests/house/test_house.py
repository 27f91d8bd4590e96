"""The house: imports point one way, kernels are jitted in one place, the core needs no extra."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

from sgmv.settings import SETTINGS

pytestmark = pytest.mark.once


ROOT = Path(__file__).parents[2]
# From which other folders a folder imports. "core" are the files of sgmv/ itself, apart from
# "command", which is __init__ and __main__.
ARROWS = {
    "kernels": set(),
    "core": {"kernels"},
    "layouts": {"core"},
    "compat": {"core", "experts", "layouts"},
    "experts": {"core"},
    "replicas": {"kernels"},
    "serving": {"core", "replicas"},
    "emulator": {"core", "layouts"},
    "explorer": {"core", "emulator", "layouts"},
    "explain": {"core", "emulator", "explorer", "kernels", "layouts"},
    "command": {"core", "compat", "emulator", "experts", "explorer", "layouts", "serving"},
}
MOST_LINES = 450
MOST_ARGUMENTS = 10
TOO_MANY = {"compat.vllm.ops.sgmv_expand_slice"}  # vLLM's own signatures
TOO_MANY |= {f"compat.vllm.experts.add_lora_{name}" for name in ("fused_moe", "w13", "w2")}
BANNER = re.compile(r"^\s*(?:#|//|/\*).*([-=*#~_─━═])\1{3}", re.MULTILINE)
# Who may know numba and llvmlite; info tells their versions.
COMPILERS = {
    f"kernels.{name}"
    for name in ("cpu", "jit", "atomics", "disk", "emit", "floats", "modes", "panels", "tiles")
}
COMPILERS |= {"kernels.amx", "kernels.amx_expand", "kernels.amx_instructions", "kernels.widened"}
# Besides sgmv's own settings: what the terminal is, and whether there is a screen.
ENVIRONMENT = {"settings", "kernels.cpu", "console", "terminal", "html"}
EXTRAS = {"rich", "matplotlib", "safetensors", "ml_dtypes", "torch", "peft", "transformers"}


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(package: str) -> dict[str, Path]:
    folder = ROOT / package
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path
        for path in folder.rglob("*.py")
        if path.name != "__init__.py" or path.parent == folder
    }


def own_imports() -> dict[str, set[str]]:
    """For each file of sgmv those that it names in an import, wherever that stands in it."""
    folder = ROOT / "sgmv"
    files = {
        ".".join(("sgmv", *path.relative_to(folder).with_suffix("").parts)): path
        for path in folder.rglob("*.py")
    }
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module, f"{name}: a relative import"
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= (full & files.keys()) or {node.module}
    return {name: names & files.keys() for name, names in found.items()}


def folder_of(name: str) -> str:
    """Where a file is, as ARROWS has it."""
    parts = name.split(".")
    if name in ("sgmv", "sgmv.__main__"):
        return "command"
    return parts[1] if (ROOT / "sgmv" / parts[1]).is_dir() else "core"


def circle(arrows: Mapping[str, Collection[str]]) -> list[str]:
    """One way that comes back to where it begins; empty if there is none."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_folders_import_along_the_arrows() -> None:
    """Both ways: an arrow along which nothing is imported any more is taken out."""
    found: dict[str, dict[str, set[str]]] = {folder: {} for folder in ARROWS}
    for name, names in own_imports().items():
        for other in names:
            if folder_of(other) != folder_of(name):
                found[folder_of(name)].setdefault(folder_of(other), set()).add(f"{name}: {other}")
    for folder, others in found.items():
        new = {other: names for other, names in others.items() if other not in ARROWS[folder]}
        assert not new, f"{folder} may not import from {new}"
        assert ARROWS[folder] <= others.keys(), f"{folder} imports nothing from some of its arrows"


def test_no_circle_among_folders() -> None:
    assert circle(ARROWS) == []


def test_no_circle_among_files() -> None:
    assert circle(own_imports()) == []


def test_a_circle_is_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert set(circle(arrows)) == {"a", "b", "c"}
    assert circle({**arrows, "c": set()}) == []


# Commands import what they need, so that each begins as fast as it can; they fork no servers.
LAZY = {"sgmv", "sgmv.__main__", "sgmv.compat", "sgmv.explain.command", "sgmv.extras"}
LAZY.add("sgmv.compat.vllm.entry")  # installed apart: it must import nothing of sgmv


def test_functions_import_nothing_but_by_one_door() -> None:
    """A fork beside a first call would leave its child a module that is never whole."""
    for name in own_imports().keys() - LAZY:
        path = ROOT.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert "importlib.import_module" not in imports(path), name
        for node in functions(path):
            inside = [
                each for each in ast.walk(node) if isinstance(each, ast.Import | ast.ImportFrom)
            ]
            assert not inside, f"{name}.{node.name} imports"


def test_shrink_and_expand_never_import_each_other() -> None:
    files = sources("sgmv")
    assert "sgmv.expand" not in imports(files["shrink"])
    assert "sgmv.shrink" not in imports(files["expand"])


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("sgmv", {"reference", "tests", "benchmarks"}),
        ("reference", {"sgmv", "tests", "benchmarks", "numba", *EXTRAS}),
    ],
)
def test_packages_that_must_not_know_each_other(package: str, never: set[str]) -> None:
    for name, path in sources(package).items():
        used = {module.split(".")[0] for module in imports(path)}
        # What is right is decided without sgmv; who runs the random batches may be its campaigns.
        allowed = {"sgmv"} if (package, name) == ("reference", "pieces") else set()
        assert not used & never - allowed, f"{package}/{name}.py imports {used & never}"


def test_compiled_code_is_in_two_folders_and_knows_no_other() -> None:
    """The stamps on what is cached are made from the files of a folder, for each of the two."""
    for name, path in sources("sgmv").items():
        own = {m for m in imports(path) if m.startswith("sgmv.")}
        if name.startswith("kernels."):
            assert all(m.startswith("sgmv.kernels.") for m in own), name
        elif name.startswith("replicas."):
            others = {m for m in own if not m.startswith("sgmv.replicas.")}
            assert all(m.startswith("sgmv.kernels.jit") for m in others), name
        else:
            assert "sgmv.kernels.jit.jit" not in own, name
            assert "sgmv.replicas.records.compiled" not in own, name


def test_numba_flags_stand_in_one_place() -> None:
    allowed = {"numba", "numba.types", "llvmlite", "llvmlite.ir", "llvmlite.binding"}
    allowed |= {f"numba.extending{name}" for name in ("", ".intrinsic", ".overload")}
    # What jit and disk build on beneath numba's public names.
    inside = ("event", "caching", "caching.FunctionCache", "serialize", "serialize.dumps")
    inside += ("compiler_lock", "compiler_lock.global_compiler_lock")
    allowed |= {"numba.core", *(f"numba.core.{name}" for name in inside)}
    for name, path in sources("sgmv").items():
        used = {m for m in imports(path) if m.split(".")[0] in ("numba", "llvmlite")}
        assert not used or name in {*COMPILERS, "info"}, f"{name} imports {used}"
        assert used <= allowed, f"{name} imports {used - allowed}"
        if name == "kernels.jit":
            continue
        text = path.read_text()
        assert "njit" not in text, name
        assert "prange" not in text.replace("not prange", "").replace("numba's prange", ""), name


def test_torch_is_looked_up_in_one_place() -> None:
    for name, path in sources("sgmv").items():
        assert "torch" not in imports(path), name
        assert ('"torch"' in path.read_text()) == (name == "tensors"), name


def test_environment_variables_are_read_in_one_place() -> None:
    """And those of the table are those that the sources name. kernels/ reads its own."""
    named = set()
    for name, path in sources("sgmv").items():
        text = path.read_text()
        named |= set(re.findall(r"\bSGMV_[A-Z0-9_]+\b", text))
        assert ("os.environ" in text) <= (name in ENVIRONMENT), name
        assert bool(re.search(r"os\.environ.*SGMV_", text)) == (name == "kernels.cpu"), name
    assert named == {setting.name for setting in SETTINGS}


def test_no_fast_math_that_forgets_nan_and_inf() -> None:
    from sgmv.kernels import jit

    assert set(jit.ANY_ORDER) == {"contract", "reassoc"}
    assert set(jit.IN_ORDER) == {"contract"}


def functions(path: Path) -> list[ast.FunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


def lines(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def test_jitted_functions_are_short() -> None:
    for name, path in sources("sgmv").items():
        for node in functions(path):
            if node.name.endswith("_kernel") or any(
                (isinstance(d, ast.Call) and getattr(d.func, "id", "") == "jit")
                or getattr(d, "id", "") == "compiled"
                for d in node.decorator_list
            ):
                assert lines(node) <= 45, f"{name}.{node.name} has {lines(node)} lines"
                assert len(node.args.args) <= 10, f"{name}.{node.name}"


def test_a_call_is_launched_with_few_names() -> None:
    """Compiled code is entered by one module of it, whose fields have names."""
    path = sources("sgmv")["launch"]
    froms = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in froms for alias in node.names if node.module != "__future__"]
    assert len(names) < 15
    inside = {name for name in imports(path) if name.startswith("sgmv.kernels.")}
    assert inside == {"sgmv.kernels.call"}


def test_functions_that_emit_code_are_short() -> None:
    """A tile's drawing and its loops should be seen at once."""
    files = sources("sgmv")
    for name in ("amx", "amx_expand", "amx_instructions", "emit", "tiles", "widened"):
        for node in functions(files[f"kernels.{name}"]):
            assert lines(node) < 60, f"{name}.{node.name} has {lines(node)} lines"


def test_files_are_read_in_one_sitting() -> None:
    for pattern in ("*.py", "*.js"):
        for path in (ROOT / "sgmv").rglob(pattern):
            name = path.relative_to(ROOT / "sgmv").as_posix()
            count = len(path.read_text().splitlines())
            assert count <= MOST_LINES, f"sgmv/{name} has {count} lines"


def test_no_file_has_banners() -> None:
    """What needs a heading inside a file is a file."""
    for pattern in ("*.py", "*.js", "*.css"):
        for path in (ROOT / "sgmv").rglob(pattern):
            found = BANNER.search(path.read_text())
            assert not found, f"{path}: {found}"
    for line in ("# --- the file ----", "    // ====", "/* ~~~~ tiles */", "# ────"):
        assert BANNER.search(line), line


def test_functions_take_few_arguments() -> None:
    for name, path in sources("sgmv").items():
        for node in functions(path):
            given = node.args
            count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
            full = f"{name}.{node.name}"
            assert (count > MOST_ARGUMENTS) == (full in TOO_MANY), f"{full} takes {count}"


def test_the_core_imports_no_extra() -> None:
    program = f"import sys, sgmv; print(sorted(set({sorted(EXTRAS)!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_have_contracts() -> None:
    """One line, `Semantics:`, and an example; a source, where somebody else defined the thing."""
    import sgmv

    ours = {"SgmvError", "get_num_threads", "info", "set_num_threads", "warm_up"}
    public = {name: getattr(sgmv, name) for name in sgmv.__all__}
    public |= {
        f"{owner.__name__}.{name}": getattr(owner, name)
        for owner in (sgmv.Adapter, sgmv.AdapterStack, sgmv.Segments)
        for name in ("from_peft", "from_adapters", "load", "unload", "stats")
        if hasattr(owner, name)
    }
    for name, value in public.items():
        doc = value.__doc__ or ""
        assert doc.splitlines()[0].strip(), name
        assert ">>>" in doc, f"{name} has no example"
        assert "Semantics:" in doc, f"{name} has no Semantics"
        assert name in ours or "Source:" in doc, f"{name} has no source"


@pytest.mark.parametrize("engine", ["punica", "vllm"])
def test_calls_of_other_engines_have_contracts(engine: str) -> None:
    module = importlib.import_module(f"sgmv.compat.{engine}")
    calls = {name: getattr(module, name) for name in module.__all__}
    assert len(calls) >= 8
    for name, value in calls.items():
        for part in ("Semantics:", "Source:", ">>>"):
            assert part in (value.__doc__ or ""), f"{name} has no {part}"


def test_no_bare_assert_refuses_a_user() -> None:
    for name, path in sources("sgmv").items():
        nodes = ast.walk(ast.parse(path.read_text()))
        assert not any(isinstance(node, ast.Assert) for node in nodes), name
