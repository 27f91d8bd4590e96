"""`sgmv simulate`."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgmv.__main__ import COMMANDS, main
from sgmv.serving import Costs, Failure, draw_trace, simulate, simulate_replicas
from sgmv.serving.replicas import RULES
from sgmv.serving.report import figures, table
from sgmv.serving.residency import POLICIES
from tests.help.planting import run_python


@pytest.mark.once
def test_the_command_prints_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "serving.png"
    main(["simulate", "--requests", "300", "--slots", "1,4", "--figure", str(path)])
    printed = capsys.readouterr().out
    outcomes = [
        simulate(draw_trace(300, 10_000, 6.0), slots, policy)
        for slots in (1, 4)
        for policy in POLICIES
    ]
    headline, _, printed_table = printed.partition("\n\n")
    adapters = draw_trace(300, 10_000, 6.0).adapters
    assert headline.startswith(
        f"300 requests for {adapters} adapters, 6 per second, seed 0; a step"
    )
    assert printed_table.strip() == table(outcomes).strip()
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.once
def test_the_command_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--slots", "0"], "--slots: expected whole numbers of at least 1, with commas, got '0'"),
        (["--slots", "x"], "--slots: expected whole numbers of at least 1, with commas, got 'x'"),
        (["--slots", ""], "--slots: expected numbers of slots, got none"),
        (["--slots", "300"], "--max-cpu-loras: expected at least the 300 of --slots"),
        (["--requests", "0"], "--requests: expected at least 1, got 0\n"),
        (["--adapters", "0"], "--adapters: expected at least 1, got 0\n"),
        (["--rate", "x"], "--rate: expected a number, got 'x'\n"),
        (["--mean-tokens", "0"], "--mean-tokens: expected a finite number of at least 1, got 0.0"),
        (["--load-rate", "0"], "--load-rate: expected a finite number of at least 1, got 0.0"),
        (["--policy", "mru"], "--policy: expected one of lru, fifo, got 'mru'\n"),
        (["--figure", "a.xyz", "--requests", "9"], "--figure: expected a name that ends in .png"),
        (["--fail", "0:1:2"], "--fail: expected --replicas beside it"),
        (["--replicas", "2", "--fail", "x"], "--fail: expected REPLICA:FROM:UNTIL, got 'x'"),
        (["--arrivals", "x"], "--arrivals: expected one of"),
        (["--ranks", ""], "--ranks: expected ranks, with commas, got none"),
        (["--costs", "none.json"], "--costs: expected a record of a step's costs"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["simulate", *arguments])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith(f"sgmv: error: {message}")
        assert len(said.splitlines()) == 1


FLEET = ["--requests", "400", "--rate", "60", "--slots", "4", "--policy", "lru", "--json"]


def fleet(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    main(["simulate", *FLEET, *arguments])
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["outcomes"]
    return found


@pytest.mark.once
def test_replicas_by_placement(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "replicas.html"
    found = fleet(capsys, "--replicas", "1,3", "--page", str(page), "--fail", "0:1:2")
    assert [(each["replicas"], each["placement"]) for each in found] == [
        (count, rule) for count in (1, 3) for rule in RULES
    ]
    trace, failures = draw_trace(400, 10_000, 60.0), [Failure(0, 1, 2)]
    for each in found:
        rule, count = each["placement"], each["replicas"]
        outcome = simulate_replicas(trace, count, rule, 4, failures=failures)
        assert each == figures(outcome)
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.once
def test_as_few_replicas_as_a_target_needs(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--adapters", "50", "--placement", "ray", "--target-p99", "1"]
    [found] = fleet(capsys, "--replicas", "32", *few)
    assert 1 < found["replicas"] < 32
    assert found["wait_p99_s"] <= 1


@pytest.mark.once
def test_options_reach_the_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    """Each of them changes what is found."""
    plain = fleet(capsys, "--replicas", "3")
    for options in (
        ["--arrivals", "bursty"], ["--updates", "5"], ["--turnover", "5"], ["--ranks", "8,64"],
        ["--adapter-us", "900"], ["--rank-us", "9"], ["--max-ongoing", "5"], ["--spill", "2"],
        ["--plan-s", "0.5"], ["--fail", "1:0.5:3"],
    ):  # fmt: skip
        assert fleet(capsys, "--replicas", "3", *options) != plain, options
    ranks = ["--replicas", "3", "--ranks", "8,64", "--rank-us", "9"]
    assert fleet(capsys, *ranks, "--padded") != fleet(capsys, *ranks)


@pytest.mark.once
def test_costs_are_read_and_flags_are_stronger(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    costs = {**asdict(Costs()), "base_us": [[1, 50_000], [8, 90_000]], "rank_us": 3.0}
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"costs": costs}))
    read = fleet(capsys, "--costs", str(path))
    expected = simulate(draw_trace(400, 10_000, 60.0), 4, costs=Costs(**costs))
    assert read == [figures(expected)]
    stronger = fleet(capsys, "--costs", str(path), "--row-us", "7", "--rank-us", "0")
    assert stronger == fleet(capsys, "--row-us", "7")


@pytest.mark.once
def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["simulate", "--requests", "300", "--slots", "4", "--json"])
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told["arguments"]["requests"] == 300
    assert [each["policy"] for each in told["outcomes"]] == list(POLICIES)
    outcome = simulate(draw_trace(300, 10_000, 6.0), 4, "lru")
    assert told["outcomes"][0] == {
        "slots": 4,
        "policy": "lru",
        "hit_rate": outcome.hit_rate,
        "deferral_rate": outcome.deferral_rate,
        "wait_p50_s": outcome.wait_s(50),
        "wait_p99_s": outcome.wait_s(99),
        "tenant_median_p99_s": float(np.median(outcome.tenants().p99_s)),
        "tenant_worst_p99_s": float(outcome.tenants().p99_s.max()),
        "loaded_bytes": outcome.loaded_bytes,
        "read_bytes": outcome.read_bytes,
        "requests_per_s": outcome.requests_per_s,
    }


@pytest.mark.once
def test_commands_are_imported_when_asked_for() -> None:
    program = (
        "import json, sys; from sgmv.__main__ import main; main(['info']);"
        "print(json.dumps([m for m in sys.modules if 'serving' in m]))"
    )
    done = run_python(program)
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr
    for module, text in COMMANDS.values():
        assert hasattr(importlib.import_module(module), "command")
        assert text
