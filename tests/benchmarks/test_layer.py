"""The benchmark of a layer times what it says it does, on results that are right."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

import sgmv
from benchmarks import __main__ as command
from benchmarks import batch
from benchmarks import record as records
from benchmarks.record import RecordError, load, save
from benchmarks.studies import layer
from benchmarks.studies.layer import LayerCase, LayerRecord
from benchmarks.text import Console
from sgmv.models import Model
from tests.help.benched import times

pytestmark = pytest.mark.once


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Model(24, 40, heads=3, kv_heads=1, head_dim=8)
    for name, value in (
        ("MODELS", {layer.MODEL: small}), ("ADAPTERS", 3), ("RANK", 2), ("ROWS", (1, 5)),
        ("TURN_S", 0.0), ("ROUNDS", 1),
    ):  # fmt: skip
        monkeypatch.setattr(layer, name, value)


@pytest.mark.parametrize(("missing", "left"), [("torch", 1), ("ml_dtypes", 2), ("", 3)])
def test_kinds_that_are_not_installed_are_left_out(
    missing: str, left: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "find_spec", lambda name: name != missing)
    assert list(batch.installed_kinds(Console())) == list(batch.KINDS[:left])
    assert capsys.readouterr().out.count("not installed, left out") == len(batch.KINDS) - left


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("library", "dtype"), batch.KINDS)
def test_every_call_adds_to_a_fresh_base_product(
    library: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    seen: list[tuple[int, Any]] = []
    add_lora = sgmv.add_lora

    def keep(y: Any, *args: Any) -> None:
        seen.append((sgmv.get_num_threads(), y.copy()))
        add_lora(y, *args)

    monkeypatch.setattr(layer, "check_rows", lambda *operands: None)
    # It repeats what others disturb.
    monkeypatch.setattr(layer, "quietly", lambda measure: (measure(), 0.0))
    monkeypatch.setattr(sgmv, "add_lora", keep)
    case = layer.measure(library, dtype, "kv", 5, threads=2, rounds=2)
    assert [threads for threads, _ in seen] == 2 * (4 * [1] + 4 * [2])
    for _, y in seen:  # a product's last bits may depend on where its operands stand
        np.testing.assert_allclose(y.astype("f"), seen[0][1].astype("f"), rtol=0.02, atol=0.02)
    assert (case.h_in, case.h_out, case.rows) == (24, 8, 5)
    assert {name: taken.calls for name, taken in case.times.items()} == {
        "base": 12, "1": 6, "2": 6
    }  # fmt: skip


@pytest.mark.usefixtures("narrow")
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    add_lora = sgmv.add_lora

    def wrong(y: Any, *args: Any) -> Any:
        add_lora(y, *args)
        y[0, 0] += 1
        return y

    monkeypatch.setattr(sgmv, "add_lora", wrong)
    with pytest.raises(AssertionError, match=r"1 of .* elements wrong"):
        layer.measure("numpy", "float32", "q", 5, threads=1)


def record() -> LayerRecord:
    def case(name: str, base: float, one: float, two: float) -> LayerCase:
        taken = {"base": times(base), "1": times(one), "2": times(two)}
        return LayerCase("torch", "bfloat16", name, 24, 8, 16, taken, 0.0)

    cases = [case("q", 1000, 90, 40), case("kv", 4000, 160, 160)]
    fields = {"threads": 2, "model": layer.MODEL, "rank": 16, "adapters": 16, "cases": cases}
    return records.made(LayerRecord, 0.0, (), fields)


def test_lines_are_geometric_means_over_layers() -> None:
    (table,) = layer.tables(record())
    assert table.rows == [["torch bfloat16", "16", "2", "0.08", "4.0%", "1.50x"]]


def test_the_page_shows_the_committed_record(tmp_path: Any) -> None:
    assert layer.STUDY.shown(tmp_path) is None
    path = tmp_path / "layer-here.json"
    save(record(), path)
    found = layer.STUDY.shown(tmp_path)
    assert found is not None
    (page,) = layer.STUDY.pages.values()
    assert "| torch bfloat16 | 16 | 2 | 0.08 | 4.0% | 1.50x |" in page(found[1], path.name)
    older = msgspec.structs.replace(record(), date="2025-01-01T00:00:00+00:00")
    save(older, tmp_path / "layer-a.json")
    assert layer.STUDY.shown(tmp_path) == found  # the newest
    path.write_text(path.read_text().replace('"rank"', '"ranks"'))
    with pytest.raises(RecordError, match=r"layer-.*python -m benchmarks layer"):
        layer.STUDY.shown(tmp_path)


@pytest.mark.usefixtures("narrow")
def test_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["layer", "--threads", "2", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "1 thread / all" in shown
    found = load(LayerRecord, tmp_path / "layer.json")
    assert {case.rows for case in found.cases} == {1, 5}
    assert np.all([case.times["1"].q50 > 0 for case in found.cases])
