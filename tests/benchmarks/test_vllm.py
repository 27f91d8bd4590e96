"""The vLLM study: what a record shows; and wrong products, which are not timed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import record as records
from benchmarks.engine import Served
from benchmarks.studies import vllm
from benchmarks.text import Console

pytestmark = pytest.mark.once


def case(step: str, tokens: int, stock: float, sgmv: float) -> vllm.VllmCase:
    """One case; of each product's three calls, one is off."""
    seconds = {"base": 0.1, "stock": 0.1 + stock, "sgmv": 0.1 + sgmv}
    return vllm.VllmCase(
        "Llama", 2, 16, 16, step, 16, tokens,
        {name: [its, 9.0, its] for name, its in seconds.items()},
        {"base": 2 * 10**9, "stock": 3 * 10**9, "sgmv": 4 * 10**9}, 0.0,
    )  # fmt: skip


def test_the_table_has_what_lora_adds_and_marks_missed_goals() -> None:
    cases = [
        case("decode", 1, stock=0.1, sgmv=0.02),
        case("decode", 1, stock=0.1, sgmv=0.026),  # more than a quarter of stock's
        case("decode", 1, stock=0.2, sgmv=0.021),  # more than a fifth of base
        case("prefill", 64, stock=1.0, sgmv=0.049),
        case("prefill", 64, stock=1.0, sgmv=0.051),
    ]
    assert [vllm.misses(each) for each in cases] == [False, True, True, False, True]
    head = {"schema": 1, "date": "", "versions": {}, "seconds": 0.0}
    record: Any = vllm.VllmRecord(
        **head,
        commit=None,
        machine=None,
        threads=2,
        dtype="bfloat16",
        cases=cases,  # type: ignore[arg-type]
    )
    [table] = vllm.tables(record)
    assert table.rows[0][4:9] == ["100.0", "100.0", "20.0", "0.200", "0.20"]
    assert table.rows[0][9:] == ["160", "80", "133", "2.0", "3.0", "4.0"]
    assert [row[7][-1] == "!" for row in table.rows] == [vllm.misses(each) for each in cases]


def answered(wrong: int) -> Any:
    """In the place of an engine: every call takes a millisecond; `wrong` tokens of sgmv's."""

    def serve(products: str, model: Path, jobs: list[Any], *_: Any, **engine: Any) -> Served:
        tokens = [[0]] * vllm.ROWS
        if products == "sgmv":
            tokens = [[1]] * wrong + tokens[wrong:]
        one = {
            "tokens": tokens, "seconds": 0.001, "margins": [1.0] * vllm.ROWS, "foreign_cores": 0.0,
        }  # fmt: skip
        assert ("max_loras" in engine) == (products != "base")
        return Served([one for _ in jobs], "", {"peak_rss": 10**9})

    return serve


def arguments() -> argparse.Namespace:
    return vllm.STUDY.parser("").parse_args(["--quick", "--rounds", "2"])


def test_a_run_has_every_products_calls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm, "serve", answered(0))
    monkeypatch.setattr(vllm, "find_spec", lambda name: True)
    found = vllm.run(arguments(), Console())["cases"]
    assert [each.step for each in found] == ["decode", "prefill"]
    assert all(len(its) == 2 * 3 for each in found for its in each.seconds.values())
    assert found[0].seconds["sgmv"][0] == pytest.approx(0.001 / vllm.STEPS)
    for each in found:
        assert msgspec.convert(msgspec.to_builtins(each), vllm.VllmCase) == each
    assert not records.noisy(found)


def test_wrong_tokens_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "serve", answered(1))
    monkeypatch.setattr(vllm, "find_spec", lambda name: True)
    with pytest.raises(vllm.Red, match="not those"):
        vllm.run(arguments(), Console())


def test_without_vllm_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="make test-vllm"):
        vllm.run(arguments(), Console())
