"""Campaigns on Ray, two nodes of this machine: the outcome is that of one process.

`make test-cluster` installs Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from sgmv.campaign import Where, run
from sgmv.errors import SgmvError
from tests.help.campaign_work import COUNT, ROOT, campaign, expected, killing, stop_after

if find_spec("ray") is None:
    pytest.skip("Ray is not installed; `make test-cluster` installs it", allow_module_level=True)

pytestmark = [pytest.mark.cluster, pytest.mark.once]

KERNEL = """
import numpy as np

def wrong_at_times(y, x, rows, seq_start, segment_ids, adapters, scalings):
    for s, i in enumerate(segment_ids):
        if adapters.get(int(i)) is not None:
            A, B = (w.astype(np.float64) for w in adapters[int(i)])
            p = rows[seq_start[s] : seq_start[s + 1]]
            delta = scalings[int(i)] * (x[p].astype(np.float64) @ A.T) @ B.T
            y[p] = (y[p].astype(np.float64) + delta).astype(y.dtype)
    if x.shape == (64, 65):
        y[0, 0] += 1
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster of two nodes, one core each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def test_the_outcome_is_that_of_one_process(address: str, tmp_path: Path) -> None:
    assert json.dumps(run(campaign(tmp_path), Where(ray=address))) == expected()


def test_workers_that_die(address: str, tmp_path: Path) -> None:
    assert json.dumps(run(campaign(tmp_path, "dies_once"), Where(ray=address))) == expected()
    assert len(list(tmp_path.glob("died-*"))) == 2


def test_a_worker_is_killed_by_its_id(address: str, tmp_path: Path) -> None:
    with killing(tmp_path):
        found = run(campaign(tmp_path, "waits_to_be_killed"), Where(ray=address))
    assert json.dumps(found) == expected()


def test_a_piece_that_always_ends_its_process_is_named(address: str, tmp_path: Path) -> None:
    with pytest.raises(SgmvError, match=r'a process that died .* times, over .*"number": 4'):
        run(campaign(tmp_path, "dies_always"), Where(ray=address))


def test_stopped_on_the_cluster_and_resumed_elsewhere(address: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    done: list[int] = []

    with pytest.raises(KeyboardInterrupt):
        run(campaign(tmp_path), Where(ray=address, journal=journal), stop_after(4, done))
    again: list[int] = []
    where = Where(2, journal=journal, resume=True)
    found = run(campaign(tmp_path), where, lambda number, _: again.append(number))
    assert json.dumps(found) == expected()
    assert sorted(done + again) == list(range(COUNT))


def test_no_cluster_at_this_address(tmp_path: Path) -> None:
    with pytest.raises(SgmvError, match="ray: expected the address of a cluster"):
        run(campaign(tmp_path), Where(ray="127.0.0.1:1"))


@pytest.mark.parametrize(
    "command",
    [
        ["reference", "check", "kernel.py:wrong_at_times", "--random", "1700", "--json"],
        ["sgmv", "simulate", "--requests", "2000", "--sweep", "alpha=0,1", "rate=3,5", "--json"],
    ],
    ids=lambda command: command[0],
)
def test_commands_print_the_same_bytes(address: str, command: list[str], tmp_path: Path) -> None:
    """One process, two, the cluster, and a cluster that starts by itself."""
    (tmp_path / "kernel.py").write_text(KERNEL)
    printed = {}
    for how in ([], ["--jobs", "2"], ["--ray", address]):
        done = subprocess.run(
            [sys.executable, "-m", *command, *how],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        printed[" ".join(how)] = done.stdout
    assert len(set(printed.values())) == 1, printed
    assert "{" in printed[""]


def test_a_cluster_of_its_own(tmp_path: Path) -> None:
    """Where none runs: in a process that knows of none."""
    program = (
        "import sys\n"
        "from sgmv.campaign import *\n"
        "from tests.help.campaign_work import *\n"
        "assert json.dumps(run(campaign(Path(sys.argv[1])), Where(ray='auto'))) == expected()"
    )
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
