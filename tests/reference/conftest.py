"""Files for the tests of `python -m reference check`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.help.my_kernel import KERNEL, PLANTED
from tests.help.planting import replaced


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two kernels in a file."""
    text, instead, _ = PLANTED["scaling dropped"]
    (tmp_path / "right.py").write_text(KERNEL)
    (tmp_path / "unscaled.py").write_text(replaced(KERNEL, text, instead))
    return tmp_path
