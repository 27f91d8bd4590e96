"""The table of environment variables says what the code takes; what they do is tested with that."""

from __future__ import annotations

import pytest

from sgmv import settings
from sgmv.backend import BACKENDS
from sgmv.workers import MOST_THREADS

pytestmark = pytest.mark.once


def test_the_table_names_all_values() -> None:
    assert settings.NUM_THREADS.values == f"`1` to `{MOST_THREADS}`"
    assert settings.BACKEND.values == ", ".join(f"`{name}`" for name in BACKENDS)
    assert settings.BACKEND.default == f"`{BACKENDS[0]}`"


def test_a_variable_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGMV_AMX", raising=False)
    assert settings.AMX.read() is None
    monkeypatch.setenv("SGMV_AMX", "emulate")
    assert settings.AMX.read() == "emulate"
