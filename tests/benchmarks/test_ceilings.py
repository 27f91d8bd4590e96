"""The machine's limits are measured, and the larger one counts."""

from __future__ import annotations

import os
import re

import pytest

from benchmarks import ceilings
from benchmarks.ceilings import Ceilings

pytestmark = pytest.mark.once


@pytest.mark.skipif(
    os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="the probe is an intrinsic of the compiler"
)
def test_probe_measures_every_footprint_and_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "FOOTPRINTS", (1 << 15, 1 << 17))
    found = ceilings.probe([1, 2], pass_s=1e-4, repeats=1)
    assert set(found.bandwidth) == set(found.peak) == {1, 2}
    for measured in found.bandwidth.values():
        assert [size for size, _ in measured] == [1 << 15, 1 << 17]
        assert all(rate > 0 for _, rate in measured)
    assert all(peak > 0 for peak in found.peak.values())
    # The optimiser has left every chain: one fused instruction for each, in the widest registers.
    (assembly,) = ceilings._fma.inspect_asm().values()
    register = {16: r"%zmm\d+", 8: r"%ymm\d+", 4: r"(%xmm\d+|v\d+\.4s)"}[ceilings.vector_lanes()]
    fused = re.findall(rf"(?:vfmadd\w+|fmla)\s[^\n]*{register}", assembly)
    assert len(fused) >= ceilings.ACCUMULATORS


def test_failure_in_a_probe_thread_is_not_swallowed() -> None:
    def fail() -> None:
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        ceilings._concurrent([fail])


def test_limit_is_the_larger_of_memory_and_arithmetic() -> None:
    found = Ceilings({2: [(1 << 20, 1e9), (1 << 22, 1e9)]}, {2: 1e10})
    assert found.limit_s(10**6, 10**6, 2) == pytest.approx(1e-3)
    assert found.limit_s(10**6, 10**9, 2) == pytest.approx(1e-1)
