"""The emulator's public names."""

from __future__ import annotations

import pytest

from sgmv import emulator
from tests.help.emulated import KERNELS

pytestmark = pytest.mark.once


def test_public_names_have_contracts() -> None:
    for name in emulator.__all__:
        value = getattr(emulator, name)
        if not callable(value):
            continue
        doc = value.__doc__ or ""
        assert doc.splitlines()[0].strip(), name
        if name in KERNELS or name in ("Device", "half_v_error"):
            assert "Semantics:" in doc, name
            assert "Source:" in doc, name
            assert ">>>" in doc, name
