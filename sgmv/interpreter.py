"""Imported first: a subinterpreter, in which numpy and numba hang or fail, is refused by name."""

from __future__ import annotations

import ctypes
import sys


def is_main() -> bool:
    """Whether this is the process's main interpreter."""
    if sys.implementation.name != "cpython":
        return True
    python = ctypes.PyDLL(None) if sys.platform != "win32" else ctypes.pythonapi
    states = []
    for name in ("PyInterpreterState_Get", "PyInterpreterState_Main"):
        state = python[name]
        state.restype = ctypes.c_void_p
        states.append(state())
    return bool(states[0] == states[1])


if not is_main():
    raise ImportError(
        "sgmv: expected the main interpreter, got a subinterpreter, in which numpy and numba do "
        "not work; import it in the main one, or in a process of its own (mod_wsgi: "
        "WSGIApplicationGroup %{GLOBAL})"
    )
