"""PEFT's mixed batches through add_lora, held to the reference and to PEFT itself.

Most of it needs torch, peft and transformers (extra `torch`) and is skipped without them.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.studies import peft as benchmark
from reference import bounds, by_row, compare
from sgmv.compat import peft as compat
from sgmv.compat import peft_layers
from sgmv.compat.peft import accelerate
from sgmv.errors import MemoryLayoutError, PeftError, ShapeError
from sgmv.tensors import as_array
from tests.help.peft_models import (
    ALL_ROWS,
    NAMES,
    TOKENS,
    adapted,
    check,
    halves_of,
    lora,
    needs_peft,
    net,
)

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
]


# without torch


def test_what_is_no_peft_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # type: ignore[arg-type]  # as if never imported
    with (
        pytest.raises(PeftError, match=r"model: expected a peft\.PeftModel.*got dict"),
        accelerate({}),
    ):
        pass


# results


@needs_peft
def test_every_layer_is_right(model: Any, x: Any) -> None:
    with accelerate(model) as taken:
        assert sorted(taken.layers) == ["down", "gate", "up"]
        assert taken.fallbacks == {}
        check(model, x)
        check(model, x[:, 0])
        check(model, x[:1], ["en"])
        check(model, x[:2], ["__base__", "__base__"])


@needs_peft
@pytest.mark.parametrize(
    ("dtype", "adapters_as_base"),
    [("float32", True), ("bfloat16", False), ("bfloat16", True), ("float16", True)],
)
def test_a_layer_equals_pefts(dtype: str, adapters_as_base: bool, lib: SimpleNamespace) -> None:
    lib.torch.manual_seed(2)
    base = net(lib.torch).to(getattr(lib.torch, dtype))
    configs = {"de": lora(lib, "down", r=5, lora_alpha=4), "en": lora(lib, "down", r=16)}
    model = adapted(lib, base, configs, adapters_as_base)
    layer = model.base_model.model.down
    names = ["en", "de", "__base__", "en"]
    x = lib.torch.randn(len(names), 9, 33).to(getattr(lib.torch, dtype))
    theirs = layer(x, adapter_names=names)
    with accelerate(model):
        ours = layer(x, adapter_names=names)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)

    rows, y = (as_array("x", t).reshape(-1, t.shape[-1]) for t in (x, layer.base_layer(x)))
    adapters = {i: benchmark.adapter_of(layer, names[i]) for i in range(len(names))}
    ids = np.repeat(np.arange(len(names)), 9)
    expected = by_row.add_lora(y, rows, adapters, ids)
    bound = bounds.add_lora_bound(y, rows, adapters, ids, expected=expected)
    results = [as_array("y", t).reshape(-1, t.shape[-1]) for t in (ours, theirs)]
    compare.check(results[0], expected, bound)
    if dtype == "float32":
        compare.check(results[1], expected, bound)
        assert (np.abs(results[0] - results[1]) <= 2 * bound).all()
    else:  # PEFT rounds on the way, where the bound does not reach
        compare.check_no_worse(results[0], results[1], expected)


@needs_peft
def test_layers_of_other_tokens_share_no_segments(model: Any, x: Any) -> None:
    """As in an encoder-decoder model, whose cross attention reads what the encoder wrote."""
    with accelerate(model):
        for part in (x, x[:, :1], x, x[:, :2]):
            check(model, part)


@needs_peft
def test_x_and_result_may_have_any_strides(model: Any, x: Any) -> None:
    with accelerate(model):
        check(model, x.transpose(0, 1).contiguous().transpose(0, 1))
        check(model, x.repeat(1, 1, 2)[..., ::2])


@needs_peft
def test_x_may_be_negated_lazily(lib: SimpleNamespace, model: Any, x: Any) -> None:
    """Its bytes have the other sign."""
    layer, negated = model.base_model.model.up, lib.torch._neg_view(x)
    assert negated.is_neg()
    assert negated.is_contiguous()
    with accelerate(model):
        difference = layer(negated, adapter_names=NAMES) - layer(-x, adapter_names=NAMES)
    assert difference.abs().max() < 1e-4


@needs_peft
def test_a_base_layer_that_returns_what_it_should_not_is_refused(model: Any, x: Any) -> None:
    """The kernels take addresses: what they would read or write amiss is told before."""
    gate, n = model.base_model.model.gate, len(NAMES)
    memory = x.new_ones(n, 1, 33)
    x = memory.flatten()[: n * 20].view(n, 1, 20)
    with accelerate(model):
        with pytest.raises(ShapeError, match="gate: x and result"):
            gate._mixed_batch_forward(x, adapter_names=NAMES[:2])
        for returned, error, message in (
            (memory[..., :5], ShapeError, r"gate: x and result.*33\).*5\)"),
            (memory, MemoryLayoutError, "gate: result.*apart from x"),
        ):
            hook = gate.base_layer.register_forward_hook(lambda *_, its=returned: its)
            with pytest.raises(error, match=message):
                gate(x, adapter_names=NAMES)
            hook.remove()
    assert (memory == 1).all()


@needs_peft
def test_no_samples_and_no_tokens_are_fine(model: Any, x: Any) -> None:
    with accelerate(model):
        assert model(x[:0], adapter_names=[]).shape == (0, TOKENS, 20)
        assert model(x[:, :0], adapter_names=NAMES).shape == (len(NAMES), 0, 20)


@needs_peft
def test_entry_copies_and_compiles(model: Any, x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step finds all adapters in their stacks."""
    with accelerate(model):
        monkeypatch.setattr(peft_layers.Layer, "_load", must_not_run)
        check(model, x)


def must_not_run(*_args: object) -> None:
    raise AssertionError("ran")


# what is PEFT's


@needs_peft
def test_exit_leaves_nothing_behind(model: Any, x: Any) -> None:
    modules = [model.base_model, *model.base_model.model.children()]
    before = [dict(vars(module)) for module in modules]
    theirs = model(x, adapter_names=NAMES)
    with contextlib.suppress(KeyError), accelerate(model):
        assert compat.HOOKS in vars(modules[0])
        assert all(peft_layers.MIXED in vars(module) for module in modules[1:])
        raise KeyError
    assert [dict(vars(module)) for module in modules] == before
    assert model(x, adapter_names=NAMES).equal(theirs)


@needs_peft
def test_layers_that_are_gone_are_restored(lib: SimpleNamespace, model: Any) -> None:
    layer = model.base_model.model.up
    with accelerate(model) as taken:
        model.base_model.model.up = layer.base_layer
        model.add_adapter("z", lora(lib, "down"))
        model(lib.torch.zeros(1, 20), adapter_names=["z"])
        assert peft_layers.MIXED not in vars(layer)
        assert "up" not in taken.layers


@needs_peft
def test_all_but_mixed_batches_is_as_ever(model: Any, x: Any) -> None:
    def others() -> list[Any]:
        outputs = [model(x)]
        model.set_adapter("en")
        outputs.append(model(x))
        with model.disable_adapter():
            outputs += [model(x), model(x, adapter_names=NAMES)]
        model.set_adapter("fr")
        return outputs

    theirs = others()
    with accelerate(model):
        assert all(ours.equal(its) for ours, its in zip(others(), theirs, strict=True))


@needs_peft
def test_gradients_take_pefts_path_and_say_so(model: Any, x: Any, lib: SimpleNamespace) -> None:
    layer, weight = model.base_model.model.up, halves_of(model)[0].weight.requires_grad_()
    with lib.torch.enable_grad():
        layer(x, adapter_names=NAMES).sum().backward()
        theirs, weight.grad = weight.grad, None
        with accelerate(model):
            with pytest.warns(UserWarning, match="inference_mode"):
                layer(x, adapter_names=NAMES).sum().backward()
            assert weight.grad.equal(theirs)
            weight.requires_grad_(False)
            check(model, x)  # nothing to record, nothing to lose


@needs_peft
def test_pefts_refusals_stay(lib: SimpleNamespace, model: Any, x: Any) -> None:
    with accelerate(model):
        with pytest.raises(ValueError, match="non-existing adapter"):
            model(x, adapter_names=["nobody"] * len(x))
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            model.base_model.model.up(x, adapter_names=["de"])
        model.train()
        with pytest.raises(ValueError, match="training mode"):
            model(x, adapter_names=NAMES)
        model.eval()
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            model.base_model.model.gate(x, adapter_names=NAMES)


@needs_peft
def test_accelerate_refuses(lib: SimpleNamespace, model: Any, x: Any) -> None:
    def refused(model: Any, words: str) -> None:
        with pytest.raises(PeftError, match=words), accelerate(model):
            pass

    refused(net(lib.torch), "peft.PeftModel with LoRA adapters, got Net")
    ia3 = lib.peft.IA3Config(target_modules=["up"], feedforward_modules=[])
    refused(lib.peft.get_peft_model(net(lib.torch), ia3), "got IA3Model")
    refused(model.train(), "training mode.*model.eval")
    model.eval()
    with accelerate(model):
        refused(model, "one accelerate at a time")
        check(model, x)
    odd = adapted(lib, net(lib.torch), {"de": lora(lib, "up")})
    odd.base_model.model.up.lora_B["de"].register_forward_hook(lambda *_: None)
    refused(odd, "up, de: a forward hook")
    assert compat.HOOKS not in vars(odd.base_model)
    assert peft_layers.MIXED not in vars(odd.base_model.model.up)


@needs_peft
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_made_inside_is_pefts_alone(how: str, lib: SimpleNamespace, x: Any) -> None:
    def copied(model: Any) -> Any:
        return copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))

    linear = lib.torch.nn.Linear
    configs = {name: lora(lib, "0", "1", r=r) for name, r in (("de", 3), ("en", 5), ("fr", 1))}
    model = adapted(lib, lib.torch.nn.Sequential(linear(20, 9), linear(9, 20)), configs)
    theirs, plain = model(x, adapter_names=NAMES), model(x)
    with accelerate(model):
        twin = copied(model)
        twins = copied(twin)
        check(twin, x)
    for one in (twin, twins):
        assert one(x, adapter_names=NAMES).equal(theirs)
        assert one(x).equal(plain)
        with accelerate(one) as taken:
            assert taken.layers == ["0", "1"]
            one.base_model.model[0].lora_B["de"].weight.mul_(2)
            check(one, x)
        one.base_model.model[0].lora_B["de"].weight.div_(2)
        assert one(x, adapter_names=NAMES).equal(theirs)
    assert model(x, adapter_names=NAMES).equal(theirs)


# whole models


@needs_peft
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_writes_what_peft_writes(beams: int, lib: SimpleNamespace, llama: Any) -> None:
    names = ["en", "__base__", "de"]
    tokens = lib.torch.randint(
        1, 64, (len(names), 5), generator=lib.torch.Generator().manual_seed(4)
    )
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    generate = partial(llama.generate, input_ids=tokens, adapter_names=names, **options)
    theirs = generate()
    repeated = [name for name in names for _ in range(beams)]
    with accelerate(llama) as taken:
        assert len(taken.layers) == 14
        benchmark.check(llama, generate, repeated, "llama", most=ALL_ROWS)
        assert generate().equal(theirs)
