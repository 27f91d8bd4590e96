"""Faults planted in the views, which their checks must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.help.explained import check_group, check_layout, check_tasks
from tests.help.planting import Fault, verdict

pytestmark = pytest.mark.once


FAULTS: dict[str, tuple[Fault, Callable[..., None]]] = {
    "rows unsorted": (
        Fault("explain.cpu", "segments.rows.tolist()", "list(range(segments.n))"),
        check_group,
    ),
    "starts one row late": (
        Fault("explain.cpu", "segments.seq_start.tolist()", "(segments.seq_start + 1).tolist()"),
        check_group,
    ),
    "ranks cut twice": (
        Fault("explain.cpu", "_parts(shrink_cuts, question.rank, RANK_UNIT)", "[[0, 8], [0, 8]]"),
        check_tasks,
    ),
    "base-only rows in a block": (
        Fault("explain.cpu", "np.where(has_adapter, question.rank, 0)", "np.full(segments.S, 1)"),
        check_tasks,
    ),
    "another engine's order": (
        Fault(
            "explain.engines",
            "lambda layout: layout.token_indices_sorted_by_lora_ids",
            "lambda layout: None",
        ),
        check_layout,
    ),
    "edges of the padding": (
        Fault("explain.engines", "[: int(np.count_nonzero(layout.num_tokens_per_lora))]", ""),
        check_layout,
    ),
}


def verdict_on(check: Callable[..., None], *faults: Fault) -> str:
    """What the check says of a copy of the package: of its own question, and its own view."""
    module = "sgmv.explain.engines" if check is check_layout else "sgmv.explain.cpu"
    ids = [4, -1, 9, 4, 9, 9, 4, -1, 4, 4]

    def check_copy(modules: dict[str, Any]) -> None:
        question = modules["sgmv.explain.question"].Question(
            segments=modules["sgmv"].segment(ids),
            **dict(h_in=64, h_out=70, rank=17, max_loras=4, threads=2),
            device=modules["sgmv.emulator"].A100,
        )
        check(modules[module], question, ids)

    return verdict(check_copy, *faults, name=module)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str) -> None:
    fault, check = FAULTS[name]
    assert verdict_on(check, fault).startswith("AssertionError")


@pytest.mark.parametrize("check", [check_group, check_tasks, check_layout])
def test_without_a_fault_nothing_is_found(check: Callable[..., None]) -> None:
    assert verdict_on(check) == "nothing"
