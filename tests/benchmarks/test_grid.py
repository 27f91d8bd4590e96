"""The grid: widths are the models' own, and every case that is promised is there."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.batch import ONE_ROW
from benchmarks.studies.grid.cases import FULL_ROWS, RANKS, Case, Filters, cases, shapes
from reference import workloads
from sgmv.models import LAYERS, MODELS

pytestmark = pytest.mark.once


# Layers, vocabulary, whether the embedding is also the output layer, and billions of parameters:
# the model cards' own figures, which the widths in models.py must add up to.
CARDS = {
    "Llama-2-7B": (32, 32000, False, 6.74),
    "Llama-3-8B": (32, 128256, False, 8.03),
    "Qwen2.5-7B": (28, 152064, False, 7.62),
    "Mistral-7B": (32, 32000, False, 7.24),
    "Gemma-2-9B": (42, 256000, True, 9.24),
}


@pytest.mark.parametrize("name", MODELS)
def test_widths_add_up_to_the_models_size(name: str) -> None:
    layers, vocabulary, tied, billions = CARDS[name]
    model = MODELS[name]
    q, kv, gate_up, down = (np.prod(model.layer(layer)) for layer in LAYERS)
    total = layers * (2 * q + 2 * kv + 2 * gate_up + down)  # the output projection is q's mirror
    total += vocabulary * model.hidden * (1 if tied else 2)
    assert total / 1e9 == pytest.approx(billions, abs=0.006)  # cards give two decimals


@pytest.mark.parametrize("name", MODELS)
def test_widths_follow_from_heads(name: str) -> None:
    model = MODELS[name]
    assert model.heads % model.kv_heads == 0
    assert model.layer("q") == (model.hidden, model.heads * model.head_dim)
    assert model.layer("kv")[1] * model.heads == model.layer("q")[1] * model.kv_heads
    assert model.layer("down") == model.layer("gate/up")[::-1]


def test_equal_shapes_are_timed_once_and_carry_all_names() -> None:
    found = shapes(["Llama-3-8B", "Mistral-7B"], list(LAYERS))
    assert found[4096, 14336] == ["Llama-3-8B gate/up", "Mistral-7B gate/up"]
    assert len(found) == len(LAYERS)


def test_full_grid_is_the_product_of_all_axes_and_a_layer_in_16_bits() -> None:
    everything = cases("full", Filters())
    found = [case for case in everything if case.dtype == "float32"]
    halves = [case for case in everything if case.dtype != "float32"]
    assert {(c.h_in, c.h_out, c.dtype) for c in halves} == {(4096, 4096, "bfloat16")}
    twins = {case for case in found if (case.h_in, case.h_out) == (4096, 4096)}
    assert len(halves) == len(twins) == 63
    keys = {(c.h_in, c.h_out, c.rank, c.rows, c.popularity) for c in found}
    expected = {
        (*shape, rank, n, popularity)
        for shape in shapes(list(MODELS), list(LAYERS))
        for rank in RANKS
        for n in FULL_ROWS
        for popularity in (workloads.POPULARITIES if n > 1 else [ONE_ROW])
    }
    assert keys == expected
    assert len(found) == len(keys)


def test_quick_grid_touches_every_value_of_every_axis_but_the_model() -> None:
    found = cases("quick", Filters())
    assert {c.rank for c in found} == set(RANKS)
    assert {c.popularity for c in found} == {*workloads.POPULARITIES, ONE_ROW}
    assert {name.split()[1] for c in found for name in c.names} == set(LAYERS)


def test_filters_narrow_their_axis() -> None:
    filters = Filters(["Gemma-2-9B"], ["q"], [3], [2], ["skewed"], ["float16"])
    assert cases("quick", filters) == cases("full", filters)
    assert cases("quick", filters) == [
        Case(3584, 4096, 3, 2, "skewed", "float16", ("Gemma-2-9B q",))
    ]
