"""The benchmark of a layer times what it says it does, on results that are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sgmv
from benchmarks import __main__ as command
from benchmarks import batch, layer, machine, readme
from benchmarks.console import Console
from benchmarks.layer import LayerCase, LayerRecord
from benchmarks.record import RecordError, Times, save_as
from sgmv.models import Model

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
    assert list(batch.installed_kinds(Console(rich=False))) == list(batch.KINDS[:left])
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

    monkeypatch.setattr(layer, "check", lambda *operands: None)
    # It repeats what others disturb.
    monkeypatch.setattr(layer, "quietly", lambda measure: (measure(), 0.0))
    monkeypatch.setattr(sgmv, "add_lora", keep)
    case = layer.measure(library, dtype, "kv", 5, threads=2, rounds=2)
    assert [threads for threads, _ in seen] == 2 * (4 * [1] + 4 * [2])
    for _, y in seen:  # a product's last bits may depend on where its operands stand
        np.testing.assert_allclose(y.astype("f"), seen[0][1].astype("f"), rtol=0.02, atol=0.02)
    assert (case["h_in"], case["h_out"], case["rows"]) == (24, 8, 5)
    assert {name: times["calls"] for name, times in case["times"].items()} == {
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


def times(median: float) -> Times:
    return {"q20": median, "q50": median, "q80": median, "calls": 9}


def record() -> LayerRecord:
    def case(name: str, base: float, one: float, two: float) -> LayerCase:
        return {
            "library": "torch", "dtype": "bfloat16", "layer": name, "h_in": 24, "h_out": 8,
            "rows": 16, "foreign_cores": 0.0,
            "times": {"base": times(base), "1": times(one), "2": times(two)},
        }  # fmt: skip

    return {
        **layer.record_head(layer.SCHEMA, 2, 0.0),
        "model": layer.MODEL, "rank": 16, "adapters": 16,
        "cases": [case("q", 1000, 90, 40), case("kv", 4000, 160, 160)],
    }  # fmt: skip


def test_lines_are_geometric_means_over_layers() -> None:
    assert layer.lines(record())[1:] == [["torch bfloat16", "16", "2", "0.08", "4.0%", "1.50x"]]


def test_the_page_shows_the_committed_record(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(readme, "RECORDS", tmp_path)
    assert "Not measured yet" in readme.layer_table(None, "")  # type: ignore[arg-type]
    found = record()
    path = tmp_path / f"{layer.PREFIX}{machine.slug(found['machine'])}.json"
    save_as(LayerRecord, layer.SCHEMA, found, path)
    assert "| torch bfloat16 | 16 | 2 | 0.08 | 4.0% | 1.50x |" in readme.layer_table(None, "")  # type: ignore[arg-type]
    path.write_text(path.read_text().replace('"rank"', '"ranks"'))
    with pytest.raises(RecordError, match=r"layer-.*python -m benchmarks layer"):
        layer.load(path)


@pytest.mark.usefixtures("narrow")
def test_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["layer", "--threads", "2", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "1 thread / all" in shown
    found = layer.load(tmp_path / "layer.json")
    assert {case["rows"] for case in found["cases"]} == {1, 5}
    assert np.all([case["times"]["1"]["q50"] > 0 for case in found["cases"]])
