"""Adapters that PEFT wrote give what PEFT itself computed (tests/fixtures/peft)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sgmv
from reference import apply_batched, by_row
from reference.bounds import add_lora_bound, apply_batched_bound, gamma, unit_roundoff
from reference.compare import check, violations
from sgmv.adapter import load_peft
from tests.help.peft_files import (
    DOWN_PROJ,
    FIXTURES,
    FORMS,
    Q_PROJ,
    RECORD,
    RUNS,
    V_PROJ,
    Array,
    Float64,
    copy_of,
    form,
    needs_torch,
    outputs_in,
)

pytestmark = pytest.mark.once
CASES = [(run, layer) for run in RUNS for layer in RUNS[run]["layers"]]


@pytest.fixture(scope="module")
def outputs() -> Mapping[str, Array]:
    return outputs_in("outputs.npz")


class Layer:
    """One layer in one of PEFT's runs: what went in, and what PEFT made of it."""

    def __init__(self, outputs: Mapping[str, Array], run: str, layer: str) -> None:
        record = RUNS[run]
        self.name = layer
        self.x = outputs[f"{run}/{layer}/x"]
        self.W = outputs[f"{record['adapters']}-{record['dtype']}/{layer}/W"]
        self.y = outputs[f"{run}/{layer}/y"]
        self.folder = FIXTURES / record["adapters"]
        # "__base__" is no directory: index -1, and base only.
        self.directories = sorted(path.name for path in self.folder.iterdir())
        ids = [
            self.directories.index(name) if name in self.directories else -1
            for name in record["adapter_of_sample"]
        ]
        self.ids = np.repeat(ids, RECORD["tokens_per_sample"])

    def adapters(self, **replaced: Path) -> list[sgmv.Adapter | None]:
        """By id; None where the adapter does not change this layer."""
        directories = [replaced.get(name, self.folder / name) for name in self.directories]
        return [load_peft(directory).get(self.name) for directory in directories]

    def difference_bound(self, adapters: list[sgmv.Adapter | None], expected: Float64) -> Float64:
        """|ours - PEFT's| <= |ours - exact| + |PEFT's - exact|, each by its own roundings."""
        out = self.y.dtype
        ours = apply_batched_bound(self.x, self.W, adapters, self.ids, expected=expected, out=out)
        return ours + self.peft_bound(adapters, expected)

    def peft_bound(self, adapters: list[sgmv.Adapter | None], expected: Float64) -> Float64:
        """How far PEFT's own result may be from the exact one."""
        if self.y.dtype == np.float32:
            # PEFT works as the kernels do: base + lora_B(lora_A(x)) * scaling, all in float32.
            return apply_batched_bound(
                self.x, self.W, adapters, self.ids, expected=expected, out=np.float32
            )
        bound = np.zeros(expected.shape)
        for adapter_id in np.unique(self.ids):
            rows = np.flatnonzero(self.ids == adapter_id)
            adapter = None if adapter_id == -1 else adapters[adapter_id]
            bound[rows] = bfloat16_bound(self.x[rows], self.W, adapter)
        return bound


def rounded(size: Float64, error: Float64, u: float) -> Float64:
    """The error after one more rounding, of a value whose exact size is known."""
    return error + u * (size + error)


def matmul_error(x: Float64, x_error: Float64, weight: Float64) -> Float64:
    """Of x @ weight.T: x's own error, float32 sums, one rounding to bfloat16 at the end."""
    carried = x_error @ np.abs(weight).T
    sums = gamma(x.shape[1], unit_roundoff("float32")) * ((np.abs(x) + x_error) @ np.abs(weight).T)
    return rounded(np.abs(x @ weight.T), carried + sums, unit_roundoff("bfloat16"))


def bfloat16_bound(x: Array, W: Array, adapter: sgmv.Adapter | None) -> Float64:
    """PEFT in bfloat16 rounds at every stage, where sgmv rounds once.

    base = round(x @ W.T), v = round(x @ A.T), d = round(v @ B.T), s = round(d * scaling), with
    scaling itself perhaps rounded to bfloat16, y = round(base + s); sums inside a product are
    float32. No product here is near float32's smallest normal number.
    """
    exact_x = x.astype(np.float64)
    W = W.astype(np.float64)
    nothing = np.zeros(exact_x.shape)
    base_error = matmul_error(exact_x, nothing, W)
    if adapter is None:
        return base_error
    A, B = adapter.A.astype(np.float64), adapter.B.astype(np.float64)
    u, u32 = unit_roundoff("bfloat16"), unit_roundoff("float32")
    v = exact_x @ A.T
    d = v @ B.T
    d_error = matmul_error(v, matmul_error(exact_x, nothing, A), B)
    s = adapter.scaling * d
    scaled = abs(adapter.scaling) * (d_error + u * (np.abs(d) + d_error))
    s_error = rounded(np.abs(s), rounded(np.abs(s), scaled, u32), u)
    y = np.abs(exact_x @ W.T + s)
    return rounded(y, rounded(y, base_error + s_error, u32), u)


@pytest.mark.parametrize(("run", "layer"), CASES)
def test_apply_batched_equals_peft(outputs: Mapping[str, Array], run: str, layer: str) -> None:
    case = Layer(outputs, run, layer)
    adapters = case.adapters()
    actual = sgmv.apply_batched(case.x, case.W, adapters, case.ids)
    assert actual.dtype == case.y.dtype
    exact = apply_batched(case.x, case.W, adapters, case.ids)
    check(case.y, exact, case.peft_bound(adapters, exact), "PEFT's y against by_row")
    bound = case.difference_bound(adapters, exact)
    check(actual, case.y.astype(np.float64), bound, "sgmv's y against PEFT's")


OF_FORMS = [
    pytest.param(name, marks=needs_torch if name.startswith("pickle") else ()) for name in FORMS
]


@pytest.fixture(scope="module")
def of_forms() -> Mapping[str, Array]:
    with np.load(FIXTURES / "forms.npz") as file:
        return {
            key: array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array
            for key, array in file.items()
        }


@pytest.mark.parametrize("name", OF_FORMS)
def test_every_form_gives_what_its_library_computed(
    of_forms: Mapping[str, Array], name: str
) -> None:
    """The library's own load, over base weights of zero: PEFT's, diffusers', MLX's."""
    adapters, layers = load_peft(form(name)), FORMS[name]["layers"]
    assert adapters.keys() == layers.keys()
    assert adapters.embeddings == {module for module in layers if layers[module]["embedding"]}
    for module, facts in layers.items():
        adapter = adapters[module]
        assert (adapter.r, adapter.scaling) == (facts["r"], facts["scaling"])
        x, theirs = of_forms[f"{name}/{module}/x"], of_forms[f"{name}/{module}/y"]
        ids, stack = [0] * len(x), sgmv.AdapterStack.from_adapters([adapter])
        ours = np.zeros_like(theirs)
        if facts["embedding"]:
            sgmv.add_lora_embedding(ours, x, stack, ids)
            x = np.eye(adapter.h_in, dtype=np.float32)[x]
        else:
            sgmv.add_lora(ours, x, stack, ids)
        zero = np.zeros_like(theirs)
        exact = by_row.add_lora(zero, x, [adapter], ids)
        bound = add_lora_bound(zero, x, [adapter], ids, expected=exact)
        assert np.abs(exact).max() > 1e-3
        check(ours, exact, bound, "sgmv")
        check(theirs, exact, bound, "its library")


@pytest.mark.parametrize("name", OF_FORMS)
def test_what_an_adapter_replaces_is_returned_beside(
    of_forms: Mapping[str, Array], name: str
) -> None:
    """By the names and with the values that PEFT's own load gives them."""
    saved = load_peft(form(name)).saved
    expected = FORMS[name]["saved"]
    assert set(expected) <= saved.keys()
    assert not saved or expected
    for parameter in expected:
        np.testing.assert_array_equal(saved[parameter], of_forms[f"{name}/saved/{parameter}"])


def test_the_runs_hold_what_they_should() -> None:
    mixed = [run["adapter_of_sample"] for name, run in RUNS.items() if "mixed" in name]
    assert len(mixed) == 3
    assert all("__base__" in names and len(set(names)) >= 3 for names in mixed)
    assert {run["dtype"] for run in RUNS.values()} == {"float32", "bfloat16"}
    served = {name for run in RUNS.values() for name in run["adapter_of_sample"]}
    assert served - {"__base__"} == {name.partition("/")[2] for name in RECORD["adapters"]}


FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rslora-ignored": (V_PROJ, "rslora-f32", {"use_rslora": False}),
    "rslora-invented": (V_PROJ, "attention-f32", {"use_rslora": True}),
    "alpha-pattern-ignored": (Q_PROJ, "patterns-bf16", {"alpha_pattern": {}}),
    "alpha-pattern-on-a-suffix": (DOWN_PROJ, "patterns-bf16", {"alpha_pattern": {"proj": 24}}),
    "alpha-ignored": (DOWN_PROJ, "mlp-f16", {"lora_alpha": 17}),
    "alpha-one-off": (DOWN_PROJ, "mlp-bf16", {"lora_alpha": 10}),
}


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        (run, fault)
        for run in ("llama-mixed", "llama-mixed-bf16")
        for fault, (_, name, _) in FAULTS.items()
        if name in RUNS[run]["adapter_of_sample"]
    ],
)
def test_a_wrong_config_is_seen(
    outputs: Mapping[str, Array], tmp_path: Path, run: str, fault: str
) -> None:
    layer, name, options = FAULTS[fault]
    case = Layer(outputs, run, layer)
    wrong = case.adapters(**{name: copy_of(f"llama/{name}", tmp_path, **options)})
    assert is_seen_in_rows_of(case, wrong, name)


def test_a_rank_pattern_left_out_of_the_scaling_is_seen(outputs: Mapping[str, Array]) -> None:
    case = Layer(outputs, "llama-mixed", V_PROJ)
    index = case.directories.index("patterns-bf16")
    wrong = case.adapters()
    adapter = wrong[index]
    assert adapter is not None
    wrong[index] = sgmv.Adapter(adapter.A, adapter.B, scaling=12 / 16)
    assert is_seen_in_rows_of(case, wrong, "patterns-bf16")


def test_swapped_adapters_are_seen(outputs: Mapping[str, Array]) -> None:
    case = Layer(outputs, "llama-mixed", Q_PROJ)
    wrong = case.adapters()
    one, other = (case.directories.index(name) for name in ("attention-f32", "rslora-f32"))
    wrong[one], wrong[other] = wrong[other], wrong[one]
    assert is_seen_in_rows_of(case, wrong, "attention-f32", "rslora-f32")


def is_seen_in_rows_of(case: Layer, wrong: list[sgmv.Adapter | None], *names: str) -> bool:
    """Every row of these adapters differs from PEFT's by more than rounding; no other row does."""
    actual = sgmv.apply_batched(case.x, case.W, wrong, case.ids)
    exact = apply_batched(case.x, case.W, wrong, case.ids)
    bound = case.difference_bound(wrong, exact)
    seen = violations(actual, case.y.astype(np.float64), bound).any(axis=1)
    touched = np.isin(case.ids, [case.directories.index(name) for name in names])
    return bool(np.array_equal(seen, touched))
