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


class Answers:
    """In the place of an engine: every call takes a millisecond; `wrong` tokens of sgmv's.

    noisy  how many of the first calls other programs disturb
    """

    wrong, noisy = 0, 0

    def __init__(self, products: str, model: Path, *_: Any, **options: Any) -> None:
        self.products, self.calls = products, 0
        assert ("max_loras" in options) == (products != "base")

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_raised: object) -> None:
        """Nothing to end."""

    def run(self, job: Any) -> Any:
        self.calls += 1
        named = {request[1] is not None for request in job["requests"]}
        assert named == {self.products != "base"}
        wrong = self.wrong if self.products == "sgmv" else 0
        return {
            "tokens": [[1]] * wrong + [[0]] * (vllm.ROWS - wrong), "seconds": 0.001, "peak": 10**9,
            "margins": [1.0] * vllm.ROWS, "foreign_cores": float(self.calls <= self.noisy),
        }  # fmt: skip


def serve(products: str, model: Path, jobs: list[Any], **options: Any) -> Served:
    engine = Answers(products, model, **options)
    return Served([engine.run(job) for job in jobs], "")


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "Engine", Answers)
    monkeypatch.setattr(vllm, "serve", serve)
    monkeypatch.setattr(vllm, "find_spec", lambda name: True)


def arguments() -> argparse.Namespace:
    return vllm.STUDY.parser("").parse_args(["--quick", "--rounds", "2"])


def test_a_run_has_every_products_calls() -> None:
    found = vllm.run(arguments(), Console())["cases"]
    assert [each.step for each in found] == ["decode", "prefill"]
    assert all(len(its) == 2 for each in found for its in each.seconds.values())
    assert found[0].seconds["sgmv"][0] == pytest.approx(0.001 / vllm.STEPS, rel=1e-3)
    for each in found:
        assert msgspec.convert(msgspec.to_builtins(each), vllm.VllmCase) == each
    assert not records.noisy(found)


def test_a_record_to_commit_names_the_cases_that_it_leaves_out() -> None:
    cases = vllm.run(arguments(), Console())["cases"]
    for case in cases:
        case.seconds["stock"] = [2 * seconds for seconds in case.seconds["base"]]
    cases[1].foreign_cores = 0.3
    fields = {"threads": 2, "dtype": "bfloat16", "cases": cases}
    quiet = vllm.STUDY.quiet(records.made(vllm.VllmRecord, 0.0, (), fields))
    assert quiet is not None
    assert [case.step for case in quiet.cases] == ["decode"]
    [name] = quiet.disturbed
    assert "prefill, rank 16, 16 adapters" in name
    assert vllm.tables(quiet)[0].notes == [f"Left out, as other programs ran: {name}."]


@pytest.mark.parametrize(("noisy", "kept"), [(0, 0), (2, 0), (3, 0), (4, 1), (9, 2)])
def test_disturbed_rounds_are_made_again(
    noisy: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up, then two rounds; at most two more."""
    monkeypatch.setattr(Answers, "noisy", noisy)
    engines: Any = {products: Answers(products, Path(), max_loras=1) for products in ("sgmv",)}
    job = {"requests": [[[1], [1, ""], 1]]}
    found = vllm.turns(engines, {"sgmv": job}, 2)
    assert len(found) == 2
    assert sum(each["sgmv"]["foreign_cores"] for each in found) == kept


def test_wrong_tokens_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answers, "wrong", 1)
    with pytest.raises(vllm.Red, match="not those"):
        vllm.run(arguments(), Console())


def test_without_vllm_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="make test-vllm"):
        vllm.run(arguments(), Console())
