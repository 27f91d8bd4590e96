"""The width of the vectors that tiles are compiled for, by what the CPU has and the environment."""

from __future__ import annotations

import pytest

from sgmv.kernels import cpu

pytestmark = pytest.mark.once

NARROW = {"avx2": True, "fma": True, "f16c": True}
WIDE = {**NARROW, **{f"avx512{part}": True for part in ("f", "bw", "dq", "vl")}}
CPUS = {
    "none": ({}, 0),
    "without f16c": ({**NARROW, "f16c": False}, 0),
    "256": (NARROW, 256),
    "some of 512": ({**WIDE, "avx512vl": False}, 256),
    "512": (WIDE, 512),
}


@pytest.mark.parametrize("name", CPUS)
def test_the_widest_that_the_cpu_has_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, width = CPUS[name]
    monkeypatch.delenv("SGMV_VECTOR_BITS", raising=False)
    monkeypatch.setattr(cpu, "JITTED", True)
    monkeypatch.setattr(cpu, "features", lambda: features)
    assert cpu._vector_bits() == width
    monkeypatch.setattr(cpu, "JITTED", False)  # plain Python has no vectors
    assert cpu._vector_bits() == 0


@pytest.mark.parametrize("asked", ["0", "256", "512"])
def test_the_environment_decides(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGMV_VECTOR_BITS", asked)
    monkeypatch.setattr(cpu, "features", lambda: {})
    assert cpu._vector_bits() == int(asked)


def test_another_processor_has_none_of_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "X86", False)
    assert cpu.features() == {}
