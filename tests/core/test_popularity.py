"""Popularities are those of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from reference import workloads
from sgmv.popularity import POPULARITIES, popularity

pytestmark = pytest.mark.once


@pytest.mark.parametrize("kind", POPULARITIES)
def test_popularities_are_those_of_the_reference(kind: str) -> None:
    assert POPULARITIES == workloads.POPULARITIES
    for n in (0, 1, 2, 7, 64, 65, 500):
        for seed in (0, 3):
            np.testing.assert_array_equal(
                popularity(kind, n, seed), workloads.popularity(kind, n, seed)
            )
