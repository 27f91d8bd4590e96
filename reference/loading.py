"""A kernel by its name: FILE:FUNCTION or MODULE:FUNCTION, with two functions FILE:SHRINK,EXPAND."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from reference.signatures import Kernel


def load(spec: str) -> tuple[Kernel, ...]:
    """The functions that are named.

    Semantics: `my/kernel.py:f` imports that file, whose folder then comes first on sys.path, as for
    a program; `package.kernel:f` imports that module; `...:f,g` names both halves of a kernel.
    Raises: ValueError for what is not there, is no function, or cannot be imported.

    >>> load("math:sqrt")[0](9.0)
    3.0
    """
    where, separator, names = spec.rpartition(":")
    if not separator or not where or not names:
        raise ValueError(
            f"kernel: expected FILE:FUNCTION or MODULE:FUNCTION, got {spec}; "
            "name the function after a colon"
        )
    module = _file(Path(where)) if where.endswith(".py") else _module(where)
    functions = []
    for name in names.split(","):
        function = getattr(module, name, None)
        if not callable(function):
            known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise ValueError(
                f"kernel: expected a function of {where}, got {name}; "
                f"it has {', '.join(known[:8]) or 'none'}"
            )
        functions.append(function)
    return tuple(functions)


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(
            f"kernel: expected a file, got {path}, which is not there; look at the path"
        )
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"kernel: expected a Python file, got {path}; name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # numba and pickle look modules up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _not_imported(str(path), error) from error
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise _not_imported(name, error) from error


def _not_imported(where: str, error: BaseException) -> ValueError:
    return ValueError(
        f"kernel: expected {where} to be importable, got {type(error).__name__}: {error}; "
        "import it by itself to see where"
    )
