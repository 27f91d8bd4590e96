"""Samples become rows of their adapters, once for all layers of a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import sgmv
from benchmarks.studies import peft as benchmark
from sgmv.compat import peft_batches
from sgmv.compat.peft import accelerate
from tests.help.peft_models import (
    ALL_ROWS,
    NAMES,
    TOKENS,
    check,
    needs_peft,
)

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
]


def test_samples_become_rows_of_their_adapters() -> None:
    batches = peft_batches.Batches()
    batch = batches.of(["x", "__base__", "y", "x"])
    assert batch.used == ["x", "y"]
    segments = batch.segments(2)
    assert segments.adapter_ids.tolist() == [-1, batches.id("x"), batches.id("y")]
    assert segments.rows.tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    assert batches.of(["x", "__base__", "y", "x"]).segments(2) is segments
    assert batch.segments(1).rows.tolist() == [1, 0, 3, 2]
    assert batch.segments(0).n == 0


def test_names_changed_in_place_are_another_batch() -> None:
    batches, names = peft_batches.Batches(), ["x", "y"]
    before = batches.of(names)
    names[0] = "y"
    after = batches.of(names)
    assert (before.used, after.used) == (["x", "y"], ["y"])


@needs_peft
def test_a_step_makes_its_segments_once(
    model: Any, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(ids: Any) -> Any:
        made.append(len(ids))
        return sgmv.segment(ids)

    with accelerate(model):
        monkeypatch.setattr(peft_batches, "segment", counted)
        model(x, adapter_names=NAMES)
    assert made == [0, len(NAMES) * TOKENS]


@needs_peft
def test_names_that_no_adapter_has_leave_nothing(model: Any, x: Any) -> None:
    """PEFT's layers take any name, and its model refuses what no layer has."""
    up = model.base_model.model.up
    with accelerate(model) as taken:
        for i in range(20):
            names = [f"nobody{i}", "de", "fr"]
            benchmark.check(up, partial(up, x[:3], adapter_names=names), names, "up", most=ALL_ROWS)
            with pytest.raises(ValueError, match="non-existing"):
                model(x[:3], adapter_names=names)
        assert taken._batches.names == {"de", "en", "fr"}
        assert {len(layer.stack) for layer in taken._layers.values()} == {3}
        check(model, x)


def last_sample_wrong(batch: Any, tokens: int, _active: Any) -> Any:
    return sgmv.segment(np.repeat(np.roll(batch._ids, 1), tokens))


def tokens_interleaved(batch: Any, tokens: int, _active: Any) -> Any:
    return sgmv.segment(np.tile(batch._ids, tokens))


@needs_peft
@pytest.mark.parametrize("fault", [last_sample_wrong, tokens_interleaved])
def test_wrong_rows_would_be_found(
    fault: Callable[..., Any], model: Any, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_batches.Batch, "segments", fault)
    with accelerate(model), pytest.raises(AssertionError, match="elements wrong"):
        check(model, x)
