"""The PEFT benchmark measures what it says. No test looks at how long anything took."""

from __future__ import annotations

import math
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import sgmv
from benchmarks import __main__ as command
from benchmarks import machine, pages
from benchmarks import record as records
from benchmarks.record import RecordError, load, save
from benchmarks.studies import peft
from benchmarks.studies.peft import PeftRecord
from benchmarks.text import Console
from sgmv.compat import peft as compat
from sgmv.compat import peft_layers
from sgmv.models import Model
from tests.help.benched import must_not_run

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
]

MISSING = [name for name in ("torch", "peft", "transformers") if find_spec(name) is None]
needs_peft = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install -e '.[torch]')"
)


def synthetic_record() -> peft.PeftRecord:
    """Two cases: sgmv adds 1 ms where PEFT adds 10, and 4 ms where PEFT adds 8.

    The machine's speed changes between rounds by more than that, and one round is off.
    """

    def times(**milliseconds: float) -> Any:
        return {
            name: {"q20": t * 900, "q50": t * 1000, "q80": t * 1100, "calls": 5}
            | ({} if name == "one_at_a_time" else {"rounds": rounds(t - milliseconds["base"])})
            for name, t in milliseconds.items()
        }

    def rounds(added: float) -> list[float]:
        slow, off = [160.0, 320.0, 170.0], [0.0, 0.0, 90.0 if added else 0.0]
        return [1000 * (t + added + wrong) for t, wrong in zip(slow, off, strict=True)]

    sizes = {"dtype": "bfloat16", "adapter_dtype": "float32", "adapters": 16, "samples": 32}
    cases: list[Any] = [
        {**sizes, "tokens": 1, "steps": 8, "foreign_cores": 0.0,
         "times": times(base=160, peft=240, sgmv=168, one_at_a_time=2560),
         "inside": {"peft": [7e4], "sgmv": [6300.0]}},
        {**sizes, "tokens": 64, "steps": 1, "foreign_cores": None,
         "times": times(base=200, peft=208, sgmv=204, one_at_a_time=250),
         "inside": {"peft": [8e3], "sgmv": [3e3]}},
    ]  # fmt: skip
    found: Any = {
        "schema": PeftRecord.SCHEMA, "date": "2025-01-01T00:00:00+00:00", "threads": 2,
        "commit": {"hash": "0" * 40, "dirty": False}, "machine": machine.machine(),
        "versions": {**machine.versions(), "torch": "2", "peft": "0.21"}, "hidden": 2048,
        "intermediate": 8192, "layers": 2, "rank": 16, "seconds": 1.0, "cases": cases,
    }  # fmt: skip
    return msgspec.convert(msgspec.to_builtins(found), PeftRecord)


def test_table_tells_what_lora_adds() -> None:
    decode, prefill = peft.tables(synthetic_record())[0].rows
    types = ["bfloat16", "16 float32"]
    low, high = (f"± {peft.share(case)[1]:.2f}" for case in synthetic_record().cases)
    assert decode == [
        *types, "decode", "32 x 1", "20.0", "10.00", "1.00", f"0.10 {low}", "0.09", "300"
    ]  # fmt: skip
    assert prefill == [
        *types, "prefill", "32 x 64", "200.0", "8.00", "4.00", f"0.50 {high} !", "0.38", "50"
    ]  # fmt: skip
    text = peft.page(synthetic_record(), "peft-x.json")
    assert "| bfloat16 | 16 float32 | decode |" in text
    assert "`benchmarks/records/peft-x.json`" in text


def test_the_error_of_a_share_is_that_of_its_medians() -> None:
    """Of n rounds with normal noise s, a median's standard error is about s sqrt(pi / 2n)."""
    case, rng, n = synthetic_record().cases[1], np.random.default_rng(0), 200
    noise = 1000 * rng.normal(0, 2, n)
    base = 1000 * rng.normal(200, 50, n)
    for name, added in (("base", 0.0), ("peft", 80_000.0), ("sgmv", 8_000.0 + noise)):
        case.times[name].rounds = list(base + added)
    part, error = peft.share(case)
    expected = 2 * math.sqrt(math.pi / 2 / n) / 80
    assert abs(part - 0.1) < 3 * expected
    assert expected / 2 < error < 2 * expected


def test_noise_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    record = synthetic_record()
    peft.STUDY.show(record, Console())
    assert "WARNING" not in capsys.readouterr().out
    record.cases[0].foreign_cores = 0.5
    peft.STUDY.show(record, Console())
    assert "WARNING: other processes ran during 1 cases" in capsys.readouterr().out


def test_record_survives_saving_and_is_checked(tmp_path: Path) -> None:
    record, path = synthetic_record(), tmp_path / "peft-x.json"
    save(record, path)
    assert load(PeftRecord, path) == record
    record.cases[1].times["peft"].q50 = float("inf")
    with pytest.raises(RecordError, match=r"Expected `float`, .*cases\[1\]\.times\[\.\.\.\]\.q50"):
        save(record, path)
    path.write_text(path.read_text().replace(f'"schema": {PeftRecord.SCHEMA}', '"schema": 9'))
    with pytest.raises(RecordError, match=r"peft-x\.json.*expected \d, got 9.*benchmarks peft"):
        load(PeftRecord, path)


def test_page_shows_the_record(tmp_path: Path) -> None:
    record, path = synthetic_record(), tmp_path / "peft-x.json"
    assert peft.STUDY.shown(tmp_path) is None
    save(record, path)
    assert peft.STUDY.shown(tmp_path) == (path, record)
    assert peft.STUDY.pages == {("docs/engines.md", "peft"): peft.page}
    with pytest.raises(pages.StaleError, match="no record for summary"):
        pages.tables(tmp_path)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "find_spec", lambda name: None if name == "peft" else name)
    with pytest.raises(SystemExit, match=r"not installed: peft; pip install -e '\.\[torch,bench"):
        command.main(["peft"])


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():  # what the packages warn of when imported is theirs
        warnings.simplefilter("ignore")
        for name in ("peft", "transformers"):
            import_module(name)
    monkeypatch.setattr(peft, "LLAMA", Model(32, 80, heads=4, kv_heads=2, head_dim=8))
    monkeypatch.setattr(peft, "LAYERS", 1)
    monkeypatch.setattr(peft, "DECODE_ROUNDS", 3)
    monkeypatch.setattr(peft, "PREFILL_ROUNDS", 1)
    monkeypatch.setattr(peft, "INSIDE_ROUNDS", 2)


@needs_peft
@pytest.mark.usefixtures("narrow")
def test_variants_are_the_same_weights() -> None:
    models = peft.make_models("bfloat16", "float32", 3)
    layers = [
        (models.base.model.layers[0].self_attn.q_proj),
        *(m.base_model.model.model.layers[0].self_attn.q_proj for m in (models.peft, models.sgmv)),
    ]
    addresses = {getattr(layer, "base_layer", layer).weight.data_ptr() for layer in layers}
    assert len(addresses) == 1
    ours, theirs = (peft.adapter_of(layer, "2") for layer in layers[1:])
    assert ours is not None
    assert theirs is not None
    assert ours.B.ctypes.data == theirs.B.ctypes.data
    assert (ours.dtype.name, ours.r) == ("float32", peft.RANK)


@needs_peft
def test_inside_the_layers_only_lora_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    now = 0
    monkeypatch.setattr(peft.time, "perf_counter_ns", lambda: now)

    class Other(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            nonlocal now
            now += 1_000_000
            return x

    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A, self.base_layer = torch.nn.ModuleDict(), Other()

        def forward(self, x: Any) -> Any:
            nonlocal now
            x = self.base_layer(x)
            now += 7_000
            return x

    model = torch.nn.Sequential(Adapted(), Other(), Adapted())
    assert peft.inside_us(model, lambda: model(1)) == 14
    assert not any(module._forward_hooks for module in model.modules())


@needs_peft
@pytest.mark.usefixtures("narrow")
def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    models = peft.make_models("float32", "float32", 2)
    monkeypatch.setattr(peft, "time_quietly", must_not_run)
    monkeypatch.setattr(peft_layers.LinearLayer, "_add_lora", lambda self, y, x, batch: None)
    with (
        compat.accelerate(models.sgmv),
        pytest.raises(AssertionError, match=r"float32/float32, 2 adapters.*q_proj"),
    ):
        peft.measure(peft.Case("float32", "float32", 2, 4, 1), models)


@needs_peft
@pytest.mark.usefixtures("narrow")
def test_command_records_what_was_quiet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = peft.measure

    def quick(case: peft.Case, models: peft.Models) -> peft.CaseRecord:
        found = measure(case, models)
        found.foreign_cores = (case.tokens - 1) / 2
        return found

    monkeypatch.setattr(peft, "measure", quick)
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    for tokens, folder in ((2, "out"), (1, "records")):
        case = peft.Case("bfloat16", "float32", 2, 4, tokens)
        monkeypatch.setattr(peft, "CASES", [case])
        argv = ["peft", "--record", "--threads", "1", "--output", str(tmp_path / "out")]
        assert command.main(argv) == 0
        assert ("not recorded" in capsys.readouterr().out) == (folder == "out")
    (path,) = (tmp_path / "records").glob("peft*.json")
    (recorded,) = load(PeftRecord, path).cases
    assert recorded.times.keys() == {"base", "peft", "sgmv", "one_at_a_time"}
    assert {name: len(its.rounds) for name, its in recorded.times.items()} == {
        "base": 3, "peft": 3, "sgmv": 3, "one_at_a_time": 1
    }  # fmt: skip
    assert {name: len(its) for name, its in recorded.inside.items()} == {"peft": 2, "sgmv": 2}
    assert sgmv.get_num_threads() == 1
