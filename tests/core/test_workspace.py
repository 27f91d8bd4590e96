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
    for n in (3, 700, 2):
        space.plan_rows(n)
        v = space.v_of(4 * n)
    assert v == space.v_of(4 * 700)
    assert space.call[0].scratch != 0
    workspace.give_back(other)
    workspace.give_back(space)
    assert workspace.take() is space
