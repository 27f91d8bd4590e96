"""The page of replicas: what it knows of an outcome. tests/page looks at it in a browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sgmv.errors import ServingError
from sgmv.serving import Trace, draw_trace, simulate_replicas
from sgmv.serving.page import PARTS, PERCENTS, shown, write_page
from sgmv.serving.report import figures

pytestmark = pytest.mark.once


def test_what_is_shown_adds_up() -> None:
    trace = draw_trace(3_000, 100, 40.0)
    outcome = simulate_replicas(trace, 3, "rendezvous")
    data = shown(outcome, figures(outcome))
    assert data["figures"] == figures(outcome)
    for percent, wait in zip(PERCENTS, data["waits"], strict=True):
        assert wait == outcome.wait_s(percent)
    served = np.array(data["served"])
    assert served.sum(axis=1).tolist() == np.bincount(outcome.replica_of, minlength=3).tolist()
    assert np.array(data["found"]).sum(axis=1).tolist() == np.bincount(outcome.found).tolist()
    np.testing.assert_array_equal(np.sum(data["found"], axis=0), served.sum(axis=0))
    part = trace.arrival_us * PARTS // (trace.arrival_us[-1] + 1)
    for row, percent in zip(data["over_time"], (50, 99), strict=True):
        for i in range(PARTS):
            waits = outcome.wait_us[part == i] / 1e6
            expected = np.percentile(waits, percent, method="inverted_cdf") if waits.size else None
            assert row[i] == expected


def test_an_empty_trace_has_a_page(tmp_path: Path) -> None:
    outcome = simulate_replicas(Trace([], [], []), 2)
    page = write_page(tmp_path / "a.html", [outcome], [figures(outcome)])
    assert page.read_text().startswith("<!doctype html>")


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="outcomes: expected at least one"):
        write_page(tmp_path / "a.html", [], [])
    outcome = simulate_replicas(Trace([0], [1], [1]), 1)
    with pytest.raises(ServingError, match="page: expected a file that can be written"):
        write_page(tmp_path / "none" / "a.html", [outcome], [figures(outcome)])
