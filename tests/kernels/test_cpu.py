"""The width of the vectors that tiles are compiled for, by what the CPU has and the environment."""

from __future__ import annotations

import numba
import pytest

from sgmv.kernels import cpu

pytestmark = pytest.mark.once

NARROW = {"avx2": True, "fma": True, "f16c": True}
WIDE = {**NARROW, **{f"avx512{part}": True for part in ("f", "bw", "dq", "vl")}}
CPUS = {
    "none": ({}, 128),
    "without f16c": ({**NARROW, "f16c": False}, 128),
    "256": (NARROW, 256),
    "some of 512": ({**WIDE, "avx512vl": False}, 256),
    "512": (WIDE, 512),
}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An x86 whose kernels are compiled, for itself."""
    monkeypatch.delenv("SGMV_VECTOR_BITS", raising=False)
    for name, value in {"JITTED": True, "X86": True, "ARM64": False}.items():
        monkeypatch.setattr(cpu, name, value)
    monkeypatch.setattr(numba.config, "CPU_FEATURES", None)
    monkeypatch.setattr(numba.config, "ENABLE_AVX", 1)
    return monkeypatch


@pytest.mark.parametrize("name", CPUS)
def test_the_widest_that_the_cpu_has_whole(name: str, here: pytest.MonkeyPatch) -> None:
    features, width = CPUS[name]
    here.setattr(cpu, "features", lambda: features)
    assert cpu._vector_bits() == width
    here.setattr(cpu, "JITTED", False)  # plain Python has no vectors
    assert cpu._vector_bits() == 0


def test_arm_has_128_bits_and_others_have_none(here: pytest.MonkeyPatch) -> None:
    here.setattr(cpu, "features", lambda: {})
    here.setattr(cpu, "X86", False)
    assert cpu._vector_bits() == 0
    here.setattr(cpu, "ARM64", True)
    assert cpu._vector_bits() == 128


@pytest.mark.parametrize(
    ("told", "avx", "width"),
    [
        ("+avx2,+fma,+f16c", 1, 256),
        ("+avx2,-fma,+f16c", 1, 128),
        ("", 1, 128),
        (None, 0, 128),
        (None, 1, 512),
    ],
)
def test_numba_may_be_told_of_less(
    told: str | None, avx: int, width: int, here: pytest.MonkeyPatch
) -> None:
    """What the CPU has beyond that is not used."""
    here.setattr(cpu, "features", lambda: WIDE)
    here.setattr(numba.config, "CPU_FEATURES", told)
    here.setattr(numba.config, "ENABLE_AVX", avx)
    assert cpu._vector_bits() == width


def test_numba_may_not_be_told_of_more(here: pytest.MonkeyPatch) -> None:
    here.setattr(cpu, "features", lambda: dict.fromkeys(WIDE, False))
    here.setattr(numba.config, "CPU_FEATURES", "+avx2,+fma,+f16c")
    assert cpu._vector_bits() == 128


@pytest.mark.parametrize("asked", ["0", "128", "256", "512"])
def test_the_environment_decides(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGMV_VECTOR_BITS", asked)
    monkeypatch.setattr(cpu, "JITTED", True)
    monkeypatch.setattr(cpu, "features", lambda: {})
    assert cpu._vector_bits() == int(asked)


def test_another_processor_has_none_of_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "X86", False)
    assert cpu.features() == {}
