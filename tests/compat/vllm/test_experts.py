"""Deltas of vLLM's layers of experts: what its own kernels added (fixtures/vllm_experts.npz)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from reference import by_row
from reference.bounds import add_lora_bound
from reference.compare import check
from sgmv.compat.vllm import LoRAMapping, PunicaWrapper
from sgmv.errors import ShapeError, UnknownAdapterError, ValueRangeError
from tests.help.planting import Fault, verdict

FIXTURE = Path(__file__).parents[2] / "fixtures" / "vllm_experts.npz"
Array = np.ndarray
PACKAGE = "sgmv.compat.vllm"


def of_vllm() -> dict[str, dict[str, Array]]:
    found: dict[str, dict[str, Array]] = {}
    with np.load(FIXTURE) as file:
        for name, array in file.items():
            case, _, key = name.partition("/")
            found.setdefault(case, {})[key] = array
    return found


CASES = of_vllm()


class Case:
    """One call of vLLM's: its operands, and what the definition says of the result."""

    def __init__(self, its: Mapping[str, Array]) -> None:
        self.its = its
        self.weighted, self.overwritten = (bool(flag) for flag in its["flags"])
        self.slices = sum(name.startswith("A") for name in its)
        self.E = its["B0"].shape[1]
        self.A = [
            np.broadcast_to(A := its[f"A{i}"], (len(A), self.E, *A.shape[2:]))
            for i in range(self.slices)
        ]
        self.B = [its[f"B{i}"] for i in range(self.slices)]
        self.ids = its["topk_ids"]

    @property
    def pair_ids(self) -> Array:
        """Of each pair (adapter, expert) as one number, -1 for none."""
        adapters = np.repeat(self.its["adapters"], self.ids.shape[1])
        experts = self.ids.reshape(-1)
        none = (adapters < 0) | (experts < 0) | (self.its["enabled"][adapters] == 0)
        return np.where(none, -1, adapters * self.E + experts)

    def right(self, y: Array, x: Array) -> tuple[Array, Array]:
        """y by the definition, and the bound, for y and x in these types; flat over pairs."""
        k, ids = self.ids.shape[1], self.pair_ids
        rows = x if self.weighted else np.repeat(x, k, axis=0)
        flat = y.reshape(-1, y.shape[-1]).copy()
        if self.overwritten:
            flat[ids >= 0] = 0
        exact, bound = np.zeros(flat.shape), np.zeros(flat.shape)
        factor = self.its["weights"].reshape(-1) if self.weighted else None
        for i, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            columns = slice(i * B.shape[2], (i + 1) * B.shape[2])
            adapters = dict(
                enumerate(
                    zip(A.reshape(-1, *A.shape[2:]), B.reshape(-1, *B.shape[2:]), strict=True)
                )
            )
            given: Any = adapters, ids[:, np.newaxis]
            weights = None if factor is None else factor[:, np.newaxis]
            part = np.ascontiguousarray(flat[:, columns])
            exact[:, columns] = by_row.add_lora(part, rows, *given, weights=weights)
            bound[:, columns] = add_lora_bound(
                part, rows, *given, weights=weights, expected=exact[:, columns]
            )
        return exact, bound

    def run(
        self, y: Any, x: Any, A: Any, B: Any, *, ordered: bool = False, wrapper: Any = PunicaWrapper
    ) -> None:
        """add_lora_fused_moe, by vLLM's arguments."""
        its = self.its
        routed = (its["sorted_ids"], its["expert_ids"], its["counts"]) if ordered else None
        routed = routed or (None, self.ids.reshape(-1), None)
        wrapper(999, 999).add_lora_fused_moe(
            y, x, A, B, its["weights"], *routed, 0, self.ids.shape[1], {"BLOCK_SIZE_M": 16}, {},
            its["enabled"], self.weighted, False, 0, its["adapters"], not self.overwritten,
        )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_deltas_are_those_of_vllms_kernels(name: str) -> None:
    case = Case(CASES[name])
    y, x = case.its["y"], case.its["x"]
    exact, bound = case.right(y, x)
    check(case.its["out"].reshape(exact.shape), exact, bound, "vLLM's kernels")
    for ordered in (False, True)[: 1 + ("sorted_ids" in case.its)]:
        out = y.copy()
        case.run(out, x, tuple(case.A), tuple(case.B), ordered=ordered)
        check(out.reshape(exact.shape), exact, bound, "sgmv")
        untouched = case.pair_ids < 0
        flat, before = (array.reshape(exact.shape) for array in (out, y))
        assert flat[untouched].tobytes() == before[untouched].tobytes()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_float_type(dtype: Any) -> None:
    case = Case(CASES["sorted, down"])
    y, x = (case.its[name].astype(dtype) for name in ("y", "x"))
    case.A, case.B = ([each.astype(dtype) for each in of] for of in (case.A, case.B))
    exact, bound = case.right(y, x)
    case.run(y, x, tuple(case.A), tuple(case.B))
    check(y.reshape(exact.shape), exact, bound, "sgmv")


def test_torchs_tensors_are_read_in_place() -> None:
    """As vLLM passes them: A as a view of one factor for all experts."""
    torch = pytest.importorskip("torch")
    case = Case(CASES["A shared"])
    exact, bound = case.right(case.its["y"], case.its["x"])
    y, x = (torch.from_numpy(case.its[name].copy()) for name in ("y", "x"))
    A = [torch.from_numpy(case.its[f"A{i}"]).expand(-1, case.E, -1, -1) for i in range(2)]
    B = [torch.from_numpy(each) for each in case.B]
    case.run(y, x, tuple(A), tuple(B))
    check(y.numpy().reshape(exact.shape), exact, bound, "sgmv")


def test_a_stack_whose_weights_are_not_contiguous() -> None:
    case = Case(CASES["sorted"])
    exact, bound = case.right(case.its["y"], case.its["x"])
    A = tuple(np.asfortranarray(each) for each in case.A)
    B = tuple(np.asfortranarray(each) for each in case.B)
    y = case.its["y"].copy()
    case.run(y, case.its["x"], A, B)
    check(y.reshape(exact.shape), exact, bound, "sgmv")


FAULTS = {
    "an expert off by one": ("adapters * E + experts)", "adapters * E + (experts + 1) % E)"),
    "another adapter's expert": ("adapters * E + experts)", "experts * len(A) + adapters)"),
    "a disabled adapter adds": (" | (enabled[np.maximum(adapters, 0)] == 0)", ""),
    "weights of other pairs": ("weights[batch.rows][:, ", "weights[: len(batch.rows)][:, "),
    "a pair reads its token's row twice": ("not mul_routed_weight)", "mul_routed_weight)"),
    "an expert's block of other rows": ("at // rows", "at // (2 * rows)"),
    "y is kept where it is overwritten": ("if not add_inputs:", "if add_inputs:"),
}


@np.errstate(all="ignore")
def check_all(modules: Mapping[str, Any]) -> None:
    wrapper = modules[PACKAGE].PunicaWrapper
    for name in ("small batch", "sorted, down", "sorted, overwritten"):
        case = Case(its := CASES[name])
        exact, bound = case.right(its["y"], its["x"])
        y, operands = its["y"].copy(), (its["x"], tuple(case.A), tuple(case.B))
        case.run(y, *operands, ordered="sorted_ids" in its, wrapper=wrapper)
        check(y.reshape(exact.shape), exact, bound, name)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str) -> None:
    found = verdict(check_all, Fault("compat.vllm.experts", *FAULTS[fault]), name=PACKAGE)
    assert "AssertionError" in found, found


def test_without_a_fault_nothing_is_seen() -> None:
    assert verdict(check_all, name=PACKAGE) == "nothing"


def test_both_products_of_a_layer_by_vllms_calls() -> None:
    """w2 takes what w13 returned; the adapters are the step's own."""
    case, down = Case(CASES["small batch"]), Case(CASES["small batch, down"])
    wrapper = PunicaWrapper(64, 64)
    ids = tuple(int(i) + 1 for i in case.its["adapters"])
    wrapper.update_metadata(LoRAMapping(ids, ids), [1, 2, 3], max_loras=3)
    for mapping in (None, case.its["adapters"]):
        y = case.its["y"].copy()
        n, k = case.ids.shape
        handed = wrapper.add_lora_w13(
            y.reshape(n * k, -1), case.its["x"], tuple(case.A), tuple(case.B), case.ids,
            case.its["weights"], None, None, None, n, k, 3, case.its["enabled"], case.E, k, 2,
            False, False, add_inputs=True, token_lora_mapping=mapping,
        )  # fmt: skip
        check(y.reshape(n * k, -1), *case.right(case.its["y"], case.its["x"]), "w13")
        down.ids = case.ids
        down.its = down.its | {"adapters": case.its["adapters"]}
        y = down.its["y"].copy()
        wrapper.add_lora_w2(
            y, down.its["x"], tuple(down.A), tuple(down.B), down.its["weights"], *handed, n, None,
            None, k, 3, case.its["enabled"], k, False, 0, False, add_inputs=True,
        )  # fmt: skip
        check(y.reshape(n * k, -1), *down.right(down.its["y"], down.its["x"]), "w2")


def test_experts_of_another_device_add_nothing() -> None:
    case = Case(CASES["small batch"])
    y, (n, k) = case.its["y"].copy(), case.ids.shape
    here = np.array([-1, 1, 0, -1])
    PunicaWrapper(64, 64).add_lora_w13(
        y, case.its["x"], tuple(case.A), tuple(case.B), case.ids, case.its["weights"], here, None,
        None, n, k, 3, case.its["enabled"], token_lora_mapping=case.its["adapters"],
    )  # fmt: skip
    case.ids = np.where(case.ids < 0, -1, here[case.ids])
    check(y.reshape(n * k, -1), *case.right(case.its["y"], case.its["x"]), "w13")


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    case = Case(CASES["sorted"])
    x, A, B = case.its["x"], tuple(case.A), tuple(case.B)
    y = case.its["y"].copy()
    wrong = [
        (ShapeError, "x: expected", (y, x[1:], A, B)),
        (ShapeError, "lora_a_stacked", (y, x, A[0], B)),
        (ShapeError, r"lora_a_stacked\[0\]", (y, x, (A[0][0],), B)),
        (ShapeError, "lora_b_stacked", (y, x, A, (B[0][..., :1], B[1]))),
        (ShapeError, "lora_b_stacked", (y, x, A, B[:1])),
        (ShapeError, "y", (y[..., :-1], x, A, B)),
        (UnknownAdapterError, "expert_ids", (y, x, tuple(a[:, :2] for a in A), B)),
        (UnknownAdapterError, "token_lora_mapping", (y, x, tuple(a[:1] for a in A), B)),
    ]
    for error, argument, operands in wrong:
        with pytest.raises(error, match=argument):
            case.run(*operands)
    its = case.its
    with pytest.raises(ValueRangeError, match="fully_sharded"):
        PunicaWrapper(9, 9).add_lora_fused_moe(
            y, x, A, B, its["weights"], None, case.ids, None, 0, 2, {}, {}, its["enabled"],
            fully_sharded=True,
        )  # fmt: skip
    with pytest.raises(ShapeError, match="sorted_token_ids"):
        PunicaWrapper(9, 9).add_lora_fused_moe(
            y, x, A, B, its["weights"], its["sorted_ids"], case.ids, None, 0, 2, {}, {},
            its["enabled"], token_lora_mapping=its["adapters"],
        )  # fmt: skip
    assert y.tobytes() == its["y"].tobytes()
