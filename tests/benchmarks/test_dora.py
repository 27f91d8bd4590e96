"""The study of DoRA times what it says, and nothing that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sgmv
from benchmarks import __main__ as command
from benchmarks.record import load
from benchmarks.studies import dora
from benchmarks.studies.dora import DoraRecord
from tests.help.benched import ONE_CALL, must_not_run

pytestmark = pytest.mark.once


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "H", 96)
    monkeypatch.setattr(dora, "ROWS", (3, 20))
    measure = dora.measure
    monkeypatch.setattr(dora, "measure", lambda *case: measure(*case, budget=ONE_CALL))


@pytest.mark.usefixtures("narrow")
def test_every_form_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["dora", "--threads", "1", "--output", str(tmp_path)]
    assert command.main(argv) == 0
    cases = load(DoraRecord, tmp_path / "dora.json").cases
    assert [(case.dtype, case.rows, case.S) for case in cases] == [
        (dtype, *sizes) for dtype in ("float32", "bfloat16") for sizes in ((3, 3), (20, 16))
    ]
    ours = {"plain", "dora", "biased"}
    assert [set(case.times) for case in cases] == [ours | {"numpy"}] * 2 + [ours] * 2
    assert "geometric mean: DoRA" in capsys.readouterr().out


def test_numpys_form_is_the_same_sum() -> None:
    layer, rng = dora.layer_of("float32", 96), np.random.default_rng(0)
    x, y = (rng.standard_normal((9, 96), np.float32) for _ in range(2))
    segments = sgmv.segment(np.arange(9) % 4)
    adapters: list[Any] = [layer.stacks["dora"][i] for i in range(4)]
    expected = sgmv.add_lora(y.copy(), x, layer.stacks["dora"], segments)
    dora.by_numpy(y, x, [(a.A, a.B, np.sign(a.magnitude)) for a in adapters], segments)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("narrow")
def test_what_leaves_gains_out_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_lora = sgmv.add_lora

    def plain(y: Any, x: Any, stack: Any, segments: Any) -> Any:
        return add_lora(y, x, dora.layer_of("float32", 96).stacks["plain"], segments)

    monkeypatch.setattr(sgmv, "add_lora", plain)
    monkeypatch.setattr(dora, "time_quietly", must_not_run)
    assert command.main(["dora", "--output", str(tmp_path)]) == 1
    assert "RED, nothing was timed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
