"""What the CPU is called, and what the system allows of it."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import pytest

from sgmv import cpu

pytestmark = pytest.mark.once


def test_the_cpus_name_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not LLVM's, which is the nearest CPU that LLVM knows."""
    found = cpu.CPUINFO
    if found.exists() and "model name" in found.read_text():
        [name, *_] = re.findall(r"^model name\s*: (.+)$", found.read_text(), re.MULTILINE)
        assert cpu.name() == name.strip()
    monkeypatch.setattr(cpu, "CPUINFO", Path("no-such-file"))
    monkeypatch.setattr(platform, "processor", lambda: "")
    if sys.platform == "linux":
        assert cpu.name() == platform.machine()


def test_the_system_permits_only_what_the_cpu_has() -> None:
    flags = Path("/proc/cpuinfo")
    assert not cpu.permits_amx() or "amx_tile" in flags.read_text()
