"""A call's memory: large enough for its plan and v, used by one call at a time, and then again."""

from __future__ import annotations

import numpy as np
import pytest

from sgmv import workspace
from sgmv.kernels.plan import scratch_size, views
from sgmv.kernels.records import CACHE_LINE

pytestmark = pytest.mark.once


@pytest.mark.parametrize("n", [0, 1, 5, 12, 300])
def test_a_plans_arrays_are_side_by_side_in_its_memory(n: int) -> None:
    memory = np.zeros(scratch_size(n), np.uint8)
    end = memory.ctypes.data
    for array in views(end, n):
        assert array.ctypes.data == end
        end += array.nbytes
    assert end == memory.ctypes.data + len(memory)


def test_a_workspace_grows_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_idle", [])
    space = workspace.take()
    assert space.address % CACHE_LINE == 0
    other = workspace.take()
    assert other is not space
    held = []
    for n in (3, 700, 2, 700):
        space.prepare(n, 4 * n, threads=2)
        held.append((int(space.call[0].scratch), int(space.call[0].v_room)))
    assert len(set(held)) == 2
    assert held[1] == held[2] == held[3]
    assert 0 not in held[0] + held[1]
    workspace.give_back(other)
    workspace.give_back(space)
    assert workspace.take() is space
