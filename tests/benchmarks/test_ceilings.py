"""The machine's limits are measured, and the larger one counts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks import ceilings

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


@pytest.mark.parametrize("threads", [1, 3])
def test_a_pass_reads_every_word_once(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit in any word is found, by either kernel, and by one thread alone."""
    arrays = [np.zeros(64 * threads, np.int64), np.zeros((8, 16 * threads), np.int64)]
    read: list[int] = []

    def concurrent(calls: list[Callable[[], int]]) -> float:
        read[:] = [call() for call in calls]
        return 1.0

    monkeypatch.setattr(ceilings, "_concurrent", concurrent)
    for kernel in ("_read", "_read_streams"):
        monkeypatch.setattr(ceilings, "_read", getattr(ceilings, kernel))
        found = ceilings.reading(arrays, threads, pass_s=1e-9)
        assert found.nbytes == sum(array.nbytes for array in arrays)
        for array in arrays:
            for i in range(array.size):
                array.flat[i] = 1 << 40
                found.once()
                assert sum(each >> 40 for each in read) == 1
                array.flat[i] = 0
