"""The house: imports point one way, kernels are jitted in one place, the core needs no extra."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once


ROOT = Path(__file__).parents[2]
# Each file may import from those before it in its own line's reach, and from no other.
FLOORS = [
    {"errors", "interpreter", "kernels.disk", "threads"},
    {"files", "kernels.jit"},
    {"dtypes", "forms", "kernels.atomics", "kernels.emit", "kernels.floats", "kernels.modes"},
    {
        "tensors",
        "console",
        "emulator.blocks",
        "kernels.amx_instructions",
        "kernels.call",
        "memory",
    },
    {"kernels.panels", "kernels.plan", "kernels.pool"},
    {"kernels.amx", "kernels.loops", "kernels.start", "kernels.tiles", "segment"},
    {"serving.requests", "serving.residency", "terminal"},
    {"amx", "peft"},
    {"adapter", "backend", "serving.scheduler", "serving.traces", "table", "workers"},
    {"stack"},
    {"checks", "launch", "layouts.rows", "serving.simulate"},
    {"cache", "expand", "layouts.names", "layouts.pointers", "layouts.vllm", "lora", "shrink"},
    {"info", "warm_up"},
    {
        "compat.peft",
        "compat.products",
        "emulator.accuracy",
        "emulator.device",
        "emulator.run",
        "layouts.findings",
        "layouts.grouped",
        "serving.report",
        "serving.slots",
    },
    {
        "compat.punica.pointers",
        "compat.vllm.slices",
        "emulator.launch",
        "serving.command",
        "serving.step",
    },
    {
        "compat.punica.ops",
        "compat.punica.weights",
        "compat.vllm.ops",
        "compat.vllm.wrapper",
        "emulator.bgmv",
        "emulator.punica",
        "emulator.sglang",
        "emulator.vllm",
    },
    {"explain.question", "explorer.write", "models", "popularity"},
    {"explain.cpu", "explain.engines", "explain.launches", "explain.mixes"},
    {"explain.punica"},
    {"explain.command"},
    {"__init__", "__main__"},
]
# Who may know numba and llvmlite; info tells their versions, and amx asks for the CPU's features.
COMPILERS = {
    f"kernels.{name}"
    for name in ("jit", "atomics", "disk", "emit", "floats", "modes", "panels", "tiles")
}
COMPILERS |= {"kernels.amx", "kernels.amx_instructions"}
EXTRAS = {"rich", "matplotlib", "safetensors", "ml_dtypes", "torch", "peft", "transformers"}


# Adapter.from_peft is a way to make an Adapter, and reading one needs Adapter.
INSIDE_A_FUNCTION: set[tuple[str, str]] = set()


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


def test_every_file_has_a_floor() -> None:
    assert set(sources("sgmv")) == set().union(*FLOORS)


def test_imports_point_one_way() -> None:
    files = sources("sgmv")
    for floor, names in enumerate(FLOORS):
        below = set().union(*FLOORS[:floor])
        for name in names:
            used = {f.removeprefix("sgmv.") for f in imports(files[name])}
            own = {m for m in files if m in used and (name, m) not in INSIDE_A_FUNCTION}
            assert own <= below, f"sgmv/{name}.py imports {own - below}"


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
        assert not used & never, f"{package}/{name}.py imports {used & never}"


def test_compiled_code_is_in_one_folder_and_knows_no_other() -> None:
    """The stamp on the cached kernels is made from this folder's files."""
    for name, path in sources("sgmv").items():
        own = {m for m in imports(path) if m.startswith("sgmv.")}
        if name.startswith("kernels."):
            assert all(m.startswith("sgmv.kernels.") for m in own), name
        else:
            assert "sgmv.kernels.jit.jit" not in own, name


def test_numba_flags_stand_in_one_place() -> None:
    allowed = {"numba", "numba.types", "llvmlite", "llvmlite.ir", "llvmlite.binding"}
    allowed |= {f"numba.extending{name}" for name in ("", ".intrinsic", ".overload")}
    # What jit and disk build on beneath numba's public names.
    inside = ("event", "caching", "caching.FunctionCache", "serialize", "serialize.dumps")
    inside += ("compiler_lock", "compiler_lock.global_compiler_lock")
    allowed |= {"numba.core", *(f"numba.core.{name}" for name in inside)}
    for name, path in sources("sgmv").items():
        used = {m for m in imports(path) if m.split(".")[0] in ("numba", "llvmlite")}
        assert not used or name in {*COMPILERS, "amx", "info"}, f"{name} imports {used}"
        assert used <= allowed, f"{name} imports {used - allowed}"
        if name == "kernels.jit":
            continue
        text = path.read_text()
        assert "njit" not in text, name
        assert "prange" not in text.replace("not prange", "").replace("numba's prange", ""), name


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
                isinstance(d, ast.Call) and getattr(d.func, "id", "") == "jit"
                for d in node.decorator_list
            ):
                assert lines(node) <= 45, f"{name}.{node.name} has {lines(node)} lines"
                assert len(node.args.args) <= 10, f"{name}.{node.name}"


def test_functions_that_emit_code_are_short() -> None:
    """A tile's drawing and its loops should be seen at once."""
    files = sources("sgmv")
    for name in ("amx", "amx_instructions", "emit", "tiles"):
        for node in functions(files[f"kernels.{name}"]):
            assert lines(node) < 60, f"{name}.{node.name} has {lines(node)} lines"


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
