"""What tiles are compiled for, by the CPU and the environment; and tiles for other CPUs."""

from __future__ import annotations

import numba
import pytest

from sgmv.kernels import cpu
from tests.help.planting import run_python

pytestmark = pytest.mark.once
jitted = pytest.mark.skipif(not cpu.JITTED, reason="nothing is compiled")
vectors = pytest.mark.skipif(cpu.VECTOR_BITS == 0, reason="this CPU, or this run, has no tiles")

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


# tiles for narrower vectors, or none, and for less than this CPU has, in processes of their own


@pytest.mark.compiles
@jitted
@vectors
@pytest.mark.parametrize("bits", [256, 128, 0])
def test_forced_vectors(bits: int) -> None:
    done = run_python(
        f"from tests.help import tile_checks; tile_checks.check_briefly({bits}); print('checked')",
        SGMV_VECTOR_BITS=str(bits),
        timeout=600,
    )
    assert done.stdout.strip() == "checked", done.stderr


@pytest.mark.compiles
@jitted
@pytest.mark.skipif(not cpu.X86, reason="every ARM64 has both")
def test_a_cpu_that_neither_fuses_nor_converts_float16() -> None:
    """As x86 was before AVX2: products and sums are rounded apart, float16 takes integers."""
    done = run_python(
        "from sgmv.kernels import cpu; from tests.help import tile_checks\n"
        "assert not cpu.FUSES and not cpu.CONVERTS_FLOAT16\n"
        "tile_checks.check_briefly(128); print('checked')",
        NUMBA_CPU_NAME="nehalem",
        NUMBA_CPU_FEATURES="+sse4.2",
        timeout=600,
    )
    assert done.stdout.strip() == "checked", done.stderr


OF_ANOTHER_CPU = [
    {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
    {"NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"},
    {"NUMBA_ENABLE_AVX": "0"},
]


@jitted
@pytest.mark.compiles
@pytest.mark.parametrize("variables", OF_ANOTHER_CPU, ids=["name", "features", "no AVX"])
def test_numba_may_compile_for_another_cpu(variables: dict[str, str]) -> None:
    """Over an instruction that it lacks the compiler ended the process."""
    program = (
        "import numpy as np, ml_dtypes, sgmv\n"
        "one = np.ones((3, 5), ml_dtypes.bfloat16)\n"
        "stack = sgmv.AdapterStack.from_adapters([(one[:2], one[:, :2])])\n"
        "print(sgmv.add_lora(np.zeros((3, 3), one.dtype), one, stack, [0, -1, 0]).tolist())"
    )
    done = run_python(program, timeout=300, **variables)
    assert done.stdout.split("\n")[0] == str([[10.0] * 3, [0.0] * 3, [10.0] * 3]), done.stderr[
        -500:
    ]
