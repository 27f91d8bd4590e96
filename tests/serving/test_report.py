"""The simulator's table and figure."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from sgmv.errors import ServingError
from sgmv.serving import Failure, Trace, draw_trace, simulate, simulate_replicas
from sgmv.serving.report import figure, table
from sgmv.terminal import Terminal


@pytest.mark.once
def test_an_empty_trace() -> None:
    outcome = simulate(Trace([], [], []))
    assert outcome.end_us == 0
    assert "nan" in table([outcome])


@pytest.mark.once
@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_follows_the_width(width: int) -> None:
    """Every row begins with its slots and policy; nothing is cut."""
    outcomes = [simulate(draw_trace(900), slots, max_cpu_loras=64) for slots in (2, 64)]
    text = table(outcomes, Terminal(width))
    assert max(map(len, text.splitlines())) <= width
    parts = text.split("\n\n")
    assert len(parts) == (2 if width == 60 else 1)
    for part in parts:
        assert part.splitlines()[2].split()[:2] == ["slots", "policy"]
        assert [line.split()[:2] for line in part.splitlines()[3:]] == [["2", "lru"], ["64", "lru"]]
    cells = [cell for part in parts for cell in part.splitlines()[4].split()[2:]]
    assert cells == table(outcomes[1:], Terminal(200)).splitlines()[3].split()[2:]


@pytest.mark.once
def test_replicas_have_columns_of_their_own() -> None:
    """And one of failures, where there are any."""
    trace = draw_trace(900, 50, 60.0)
    calm = simulate_replicas(trace, 12, "least-loaded")
    broken = simulate_replicas(trace, 9, "ray", failures=[Failure(0, 2, 5)])
    lines = table([calm], Terminal(200)).splitlines()
    assert lines[2].split()[:4] == ["replicas", "placement", "slots", "policy"]
    assert lines[3].split()[:4] == ["12", "least-loaded", "8", "lru"]
    assert lines[2].split()[-1] == "mean"
    lines = table([calm, broken], Terminal(200)).splitlines()
    assert lines[2].split()[-1] == "again"
    assert [line.split()[-1] for line in lines[3:]] == ["0", str(broken.retries.sum())]
    assert broken.retries.sum() > 0


@pytest.mark.once
def test_replicas_are_drawn(tmp_path: Path) -> None:
    trace = draw_trace(900, 50, 60.0)
    outcomes = [simulate_replicas(trace, n, rule) for n in (1, 2) for rule in ("ray", "random")]
    figure(outcomes, tmp_path / "replicas.svg")
    text = (tmp_path / "replicas.svg").read_text()
    assert "900 requests for" in "".join(re.findall(r"<!-- (.*?) -->", text))
    for name in ("ray", "random", "busiest replica / mean"):
        assert f"<!-- {name} -->" in text


@pytest.mark.once
def test_a_figure_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ServingError, match="pip install matplotlib"):
        figure([], "a.png")
