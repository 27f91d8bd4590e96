"""Libraries that the first call that needs them imports, so that the rest works without them.

A fork in the midst of an import leaves its child a module that no thread will ever finish, and the
child's own first use waits for it for ever. So a fork waits until the import is done.
"""

from __future__ import annotations

import os
import threading
from importlib import import_module
from types import ModuleType

_importing = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_importing.acquire,
        after_in_parent=_importing.release,
        after_in_child=_importing.release,
    )


def load(name: str) -> ModuleType:
    """The module of this name; raises ImportError where it is not installed.

    For other libraries alone. A module of sgmv that loads another would wait for this lock, while
    the thread that holds the lock waits for the module.
    """
    with _importing:
        return import_module(name)
