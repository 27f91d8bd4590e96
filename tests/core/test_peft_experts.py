"""Adapters of experts on disk: what PEFT itself makes of each form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference import bounds
from reference import experts as reference
from reference.compare import check
from sgmv import experts
from sgmv.__main__ import main
from sgmv.adapter import Adapter, ExpertAdapter, load_peft
from sgmv.errors import PeftError
from sgmv.peft_experts import of_parameter
from tests.help.peft_files import FIXTURES, Array, halves, write_adapter

pytestmark = pytest.mark.once
EXPERTS = FIXTURES / "experts"
PLACE = "model.layers.0.mlp.experts"
GATE_UP, DOWN = f"{PLACE}.gate_up_proj", f"{PLACE}.down_proj"
FORMS = sorted(path.name for path in EXPERTS.iterdir())
# In the older release's model the module has another name: PEFT's own rules rename it.
OLDER = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def of_peft() -> Mapping[str, Array]:
    arrays: dict[str, Array] = {}
    for name in ("experts", "experts-before-0.19"):
        with np.load(FIXTURES / f"{name}.npz") as file:
            arrays |= file
    return arrays


def loaded(form: str) -> dict[str, ExpertAdapter]:
    """An adapter's experts by the names that they have in PEFT's model."""
    alone = load_peft(EXPERTS / form)
    if not form.endswith("-4"):
        return alone.experts
    place = OLDER if form == "mixtral-4" else PLACE
    found = load_peft(EXPERTS / form, [f"{place}.gate_up_proj", f"{place}.down_proj"]).experts
    return {name.replace(place, PLACE): adapter for name, adapter in found.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_expert_has_the_factors_that_peft_multiplies(
    of_peft: Mapping[str, Array], form: str
) -> None:
    changes = {
        name.partition("/")[2]: delta
        for name, delta in of_peft.items()
        if name.startswith(f"{form}/") and "/call/" not in name and delta.ndim == 3
    }
    found = loaded(form)
    assert found.keys() == changes.keys()
    for name, delta in changes.items():
        assert found[name].experts == len(delta)
        for e in range(len(delta)):
            its = found[name].of(e)
            A, B = its.A.astype(np.float64), its.B.astype(np.float64)
            # PEFT's: a sum of r products, and one more by the scaling, in float32.
            room = bounds.gamma(its.r + 2, bounds.unit_roundoff("float32"))
            size = abs(its.scaling) * (np.abs(B) @ np.abs(A))
            assert np.abs(delta[e]).max() > 1e-3
            check(delta[e], its.scaling * B @ A, room * size, f"{name}, expert {e}")


@pytest.mark.parametrize("form", ["mixtral", "mixtral-4", "qwen-4", "before-0.19"])
def test_a_layer_gives_what_the_model_gave_in_peft(of_peft: Mapping[str, Array], form: str) -> None:
    """The reference's bound of each; PEFT adds the delta to W first, which rounds once more."""
    call = {name: of_peft[f"{form}/call/{name}"] for name in ("x", "W13", "W2", "weights", "y")}
    ids, x, W13, W2 = of_peft[f"{form}/call/expert_ids"], call["x"], call["W13"], call["W2"]
    found = loaded(form)
    stacks = []
    factors: list[Any] = []
    for W, adapter in ((W13, found[GATE_UP]), (W2, found[DOWN])):
        E, h_out, h_in = W.shape
        stack = experts.ExpertStack(E, h_in, h_out, slots=1, max_rank=5)
        stack.load(3, adapter)
        stacks.append(stack)
        factors.append({3: reference.Factors(adapter.A, adapter.B, adapter.scaling)})
    of_row = [3] * len(x)
    ours = experts.moe_layer(
        x, (ids, call["weights"]), W13, W2, stack13=stacks[0], stack2=stacks[1], adapter_ids=of_row
    )
    exact, bound = reference.moe_layer(x, ids, call["weights"], W13, W2, *factors, of_row)
    check(ours, exact, bound, "sgmv")
    check(call["y"], exact, 2 * bound, "PEFT")


def test_a_router_is_a_linear_layer() -> None:
    found = load_peft(EXPERTS / "qwen-down-and-router")
    assert list(found) == ["model.layers.0.mlp.gate"]
    assert list(found.experts) == [DOWN]


def test_ranks_and_scalings_are_those_of_the_parameters_name() -> None:
    found = load_peft(EXPERTS / "mixtral").experts
    assert {name: (one.of(0).r, one.scaling) for name, one in found.items()} == {
        GATE_UP: (2, 1.5),
        DOWN: (5, 0.8),
    }
    assert load_peft(EXPERTS / "gpt-oss").experts[DOWN].scaling == 3 / 2**0.5


def test_experts_of_a_layer_each_are_one_stack_or_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    A, B = rng.random((2, 2, 3), np.float32), rng.random((2, 5, 2), np.float32)
    both = halves("experts.0.up", A[0], B[0]) | halves("experts.1.up", A[1], B[1])
    found = load_peft(write_adapter(tmp_path, both))
    assert (list(found), list(found.experts)) == ([], ["experts.up"])
    np.testing.assert_array_equal(found.experts["experts.up"].B, B)
    other = {"alpha_pattern": {"experts.1.up": 3}}
    found = load_peft(write_adapter(tmp_path, both, **other))
    assert (list(found), list(found.experts)) == (["experts.0.up", "experts.1.up"], [])
    gap = halves("experts.0.up", A[0], B[0]) | halves("experts.2.up", A[1], B[1])
    assert len(load_peft(write_adapter(tmp_path, gap))) == 2


def test_a_model_with_a_layer_for_each_expert() -> None:
    layers = [f"{PLACE}.{e}.{end}_proj" for e in range(4) for end in ("gate", "up", "down")]
    found = load_peft(EXPERTS / "qwen-4", layers)
    assert sorted(found.experts) == [f"{PLACE}.{end}_proj" for end in ("down", "gate", "up")]
    widths = {name: (8, 12) if "down" in name else (12, 8) for name in layers}
    assert load_peft(EXPERTS / "qwen-4", widths).experts.keys() == found.experts.keys()
    with pytest.raises(PeftError, match=r"\(experts, h_in, h_out\) = \(4, 8, 12\).*\(4, 8, 8\)"):
        load_peft(EXPERTS / "qwen-4", dict.fromkeys(layers, (8, 8)))
    with pytest.raises(PeftError, match="none called"):
        load_peft(EXPERTS / "qwen-4", ["model.layers.0.mlp.up_proj"])


def test_one_layer_alone_is_no_stack() -> None:
    with pytest.raises(PeftError, match=r"all experts'; take it from load_peft\(directory\)"):
        Adapter.from_peft(EXPERTS / "mixtral", DOWN)


def of_two(to: Path, gate_up: tuple[int, int], down: tuple[int, int], **options: Any) -> Path:
    """Three experts' factors of rank 2, of parameters with A and B of these widths."""
    tensors = {}
    for module, (a, b) in (("m.experts.base_layer", gate_up), ("m.experts", down)):
        tensors |= halves(module, np.ones((6, a), np.float32), np.ones((b, 6), np.float32))
    both = ["experts.gate_up_proj", "experts.down_proj"]
    return write_adapter(to, tensors, **{"target_parameters": both} | options)


def test_widths_tell_how_pefts_before_0_19_has_them(tmp_path: Path) -> None:
    for gate_up, down in (((4, 12), (6, 4)), ((12, 4), (4, 6))):
        found = load_peft(of_two(tmp_path, gate_up, down, peft_version="0.18.1")).experts
        of = {name: (one.of(0).h_in, one.of(0).h_out) for name, one in found.items()}
        assert of == {"m.experts.gate_up_proj": (4, 12), "m.experts.down_proj": (6, 4)}
    for version in ("0.18.1", None):
        with pytest.raises(PeftError, match="widths that tell which is h_in"):
            load_peft(of_two(tmp_path, (4, 6), (6, 4), peft_version=version))
    for version in ("0.19.0", "0.21.3.dev0", "1.0"):
        assert load_peft(of_two(tmp_path, (4, 6), (6, 4), peft_version=version)).experts


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        (["experts.gate_up_proj"], "expected 1, as target_parameters says, got 2 wrappers"),
        (["experts.w1", "experts.w2"], "whose order is known, got w1, w2 of one module"),
        (["experts.gate_up_proj_bias"], "got those of a bias"),
        (["experts.gate_up_proj", "m.experts.down_proj", "experts.other"], "whose order is known"),
        ([], "one lora_A of m.experts"),
    ],
)
def test_wrappers_that_the_config_does_not_name(
    targets: list[str], part: str, tmp_path: Path
) -> None:
    with pytest.raises(PeftError, match=part):
        load_peft(of_two(tmp_path, (4, 12), (6, 4), target_parameters=targets))


def test_a_parameter_that_the_file_lacks(tmp_path: Path) -> None:
    tensors = halves("m.experts", np.ones((6, 4), np.float32), np.ones((5, 6), np.float32))
    both = ["experts.gate_up_proj", "experts.down_proj"]
    with pytest.raises(PeftError, match=r"got none of gate_up_proj in m\.experts"):
        load_peft(write_adapter(tmp_path, tensors, target_parameters=both))


def test_ranks_that_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(PeftError, match=r"A \(4 \* E, h_in\) and B \(h_out, 4 \* E\)"):
        load_peft(of_two(tmp_path, (4, 12), (6, 4), r=4, peft_version="0.19.0"))


def test_the_outermost_wrapper_is_the_last_parameters() -> None:
    both = ["experts.down_proj", "mlp.experts.gate_up_proj"]
    assert of_parameter(PLACE, 0, both, Path("x")) == "down_proj"
    assert of_parameter(PLACE, 1, both, Path("x")) == "gate_up_proj"
    assert of_parameter("model.layers.0.mlp.shared_experts", 0, both, Path("x")) is None


def test_the_command_shows_experts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    main(["adapters", str(EXPERTS / "mixtral"), str(EXPERTS / "qwen-4")])
    out = capsys.readouterr().out
    assert f"experts among its layers: {DOWN} (3), {GATE_UP} (3)" in out
    assert f"{PLACE}.up_proj (4)" in out
    main(["adapters", "--json", str(EXPERTS / "mixtral")])
    assert json.loads(capsys.readouterr().out)[0]["experts"] == {DOWN: 3, GATE_UP: 3}
