"""PEFT's mixed batches through add_lora, held to the reference and to PEFT itself.

Most of it needs torch, peft and transformers (extra `torch`) and is skipped without them.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sgmv
from benchmarks import peft as benchmark
from reference import bounds, by_row, compare
from sgmv.compat import peft as compat
from sgmv.compat.peft import accelerate
from sgmv.errors import MemoryLayoutError, PeftError, ShapeError
from sgmv.tensors import as_array

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
]

WANTED = ("torch", "peft", "transformers")
MISSING = [name for name in WANTED if find_spec(name) is None]
needs_peft = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install -e '.[torch]')"
)
NAMES = ["de", "en", "__base__", "de", "fr", "en", "de"]
TOKENS = 3
ALL_ROWS = 10_000


@pytest.fixture(scope="module")
def lib() -> SimpleNamespace:
    """The three packages; what they warn of when imported is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch
        import transformers
    return SimpleNamespace(torch=torch, peft=peft, transformers=transformers)


def net(torch: Any) -> Any:
    """Three linear layers, two of them side by side; widths that no tile divides."""

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(20, 33, bias=False)
            self.up = torch.nn.Linear(20, 33)
            self.down = torch.nn.Linear(33, 20)

        def forward(self, x: Any) -> Any:
            return x + self.down(self.gate(x) * self.up(x))

    return Net()


def lora(lib: SimpleNamespace, *targets: str, r: int = 4, **options: Any) -> Any:
    return lib.peft.LoraConfig(r=r, target_modules=list(targets), **options)


def adapted(
    lib: SimpleNamespace, base: Any, configs: dict[str, Any], adapters_as_base: bool = False
) -> Any:
    """The base with these adapters, random and frozen, in eval mode."""
    (first, config), *others = configs.items()
    cast = {"autocast_adapter_dtype": not adapters_as_base}
    model = lib.peft.get_peft_model(base, config, adapter_name=first, **cast)
    for name, config in others:
        model.add_adapter(name, config, **cast)
    randomise(lib, model)
    return model.eval().requires_grad_(False)


def randomise(lib: SimpleNamespace, model: Any) -> None:
    """PEFT starts B at zero, where no fault could show."""
    for name, weight in model.named_parameters():
        if "lora_" in name:
            lib.torch.nn.init.normal_(weight, std=0.3)


@pytest.fixture
def model(lib: SimpleNamespace) -> Any:
    """Adapters of unequal ranks and scalings; none adapts every layer."""
    lib.torch.manual_seed(0)
    configs = {
        "de": lora(lib, "gate", "up", r=4, lora_alpha=8),
        "en": lora(lib, "up", "down", r=7, lora_alpha=5, use_rslora=True),
        "fr": lora(lib, "gate", "down", r=1, rank_pattern={"down": 9}, alpha_pattern={"down": -3}),
    }
    model = adapted(lib, net(lib.torch), configs)
    model.set_adapter("fr", inference_mode=True)
    return model


@pytest.fixture
def x(lib: SimpleNamespace) -> Any:
    generator = lib.torch.Generator().manual_seed(1)
    return lib.torch.randn(len(NAMES), TOKENS, 20, generator=generator)


@pytest.fixture(autouse=True)
def _inference(request: pytest.FixtureRequest) -> Iterator[None]:
    """What users do; a test of gradients asks for them itself."""
    if "lib" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("lib").torch.no_grad():
        yield


def check(model: Any, x: Any, names: list[str] = NAMES) -> None:
    benchmark.check(model, partial(model, x, adapter_names=names), names, "net", most=ALL_ROWS)


# without torch


def test_what_is_no_peft_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # type: ignore[arg-type]  # as if never imported
    with (
        pytest.raises(PeftError, match=r"model: expected a peft\.PeftModel.*got dict"),
        accelerate({}),
    ):
        pass


def test_samples_become_rows_of_their_adapters() -> None:
    batches = compat._Batches()
    batch = batches.of(["x", "__base__", "y", "x"])
    assert batch.used == ["x", "y"]
    segments = batch.segments(2)
    assert segments.adapter_ids.tolist() == [-1, batches.id("x"), batches.id("y")]
    assert segments.rows.tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    assert batches.of(["x", "__base__", "y", "x"]).segments(2) is segments
    assert batch.segments(1).rows.tolist() == [1, 0, 3, 2]
    assert batch.segments(0).n == 0


def test_names_changed_in_place_are_another_batch() -> None:
    batches, names = compat._Batches(), ["x", "y"]
    before = batches.of(names)
    names[0] = "y"
    after = batches.of(names)
    assert (before.used, after.used) == (["x", "y"], ["y"])


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
def test_a_step_makes_its_segments_once(
    model: Any, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(ids: Any) -> Any:
        made.append(len(ids))
        return sgmv.segment(ids)

    with accelerate(model):
        monkeypatch.setattr(compat, "segment", counted)
        model(x, adapter_names=NAMES)
    assert made == [0, len(NAMES) * TOKENS]


@needs_peft
def test_entry_copies_and_compiles(model: Any, x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step finds all adapters in their stacks."""
    with accelerate(model):
        monkeypatch.setattr(compat._Layer, "_load", must_not_run)
        check(model, x)


def must_not_run(*_args: object) -> None:
    raise AssertionError("ran")


# what changes while the context lasts


def halves(model: Any) -> tuple[Any, Any]:
    """A and B of adapter de in layer up."""
    layer = model.base_model.model.up
    return layer.lora_A["de"], layer.lora_B["de"]


def in_place(_lib: SimpleNamespace, model: Any) -> None:
    halves(model)[0].weight[1, 2] += 3


def under_inference_mode(lib: SimpleNamespace, model: Any) -> None:
    with lib.torch.inference_mode():
        halves(model)[1].weight.mul_(-2)


def reassigned(_lib: SimpleNamespace, model: Any) -> None:
    weight = halves(model)[1].weight
    weight.data = weight.data * 2


def written_through_data(lib: SimpleNamespace, model: Any) -> None:
    """As PEFT's hotswap does: torch does not count it."""
    weight = halves(model)[0].weight
    count = weight._version
    weight.data.copy_(lib.torch.randn(weight.shape))
    assert weight._version == count


def hotswapped(lib: SimpleNamespace, model: Any) -> None:
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    its = [(name, weight) for name, weight in model.named_parameters() if ".fr." in name]
    state = {name: lib.torch.randn(weight.shape) for name, weight in its}
    hotswap_adapter_from_state_dict(model, state, "fr", model.peft_config["fr"])


def another_parameter(lib: SimpleNamespace, model: Any) -> None:
    """Over the same memory, with a count of its own that stands where the old one stood."""
    for half in halves(model):
        old = half.weight
        half.weight = lib.torch.nn.Parameter(old.data, requires_grad=False)
        while half.weight._version < old._version:
            half.weight.mul_(1.5)
        half.weight.data[-1, -1] += 1


def rescaled(_lib: SimpleNamespace, model: Any) -> None:
    model.base_model.model.up.set_scale("de", 3.0)


def cast(lib: SimpleNamespace, model: Any) -> None:
    for half in halves(model):
        half.to(lib.torch.float16)


def longer(lib: SimpleNamespace, model: Any) -> None:
    """A higher rank under the same name, which the stack has no room for."""
    model.delete_adapter("de")
    model.add_adapter("de", lora(lib, "gate", "up", r=12))
    randomise(lib, model)


def fewer_layers(lib: SimpleNamespace, model: Any) -> None:
    model.delete_adapter("de")
    model.add_adapter("de", lora(lib, "down", r=2))
    randomise(lib, model)


def deleted_from_a_layer(_lib: SimpleNamespace, model: Any) -> None:
    model.base_model.model.up.delete_adapter("de")


CHANGES = [
    in_place, under_inference_mode, reassigned, written_through_data, hotswapped,
    another_parameter, rescaled, cast, longer, fewer_layers, deleted_from_a_layer,
]  # fmt: skip


@needs_peft
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change.__name__))
def test_a_change_is_seen(
    change: Callable[..., None], lib: SimpleNamespace, model: Any, x: Any
) -> None:
    with accelerate(model):
        check(model, x)
        change(lib, model)
        check(model, x)
        check(model, x)


@needs_peft
def test_a_layer_called_by_itself_sees_changes(lib: SimpleNamespace, model: Any, x: Any) -> None:
    layer = model.base_model.model.up
    forward = partial(layer, x, adapter_names=NAMES)
    with accelerate(model):
        check(model, x)
        for change in (in_place, reassigned, written_through_data, rescaled):
            change(lib, model)
            benchmark.check(layer, forward, NAMES, "up", most=ALL_ROWS)


@needs_peft
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change.__name__))
def test_stale_weights_would_be_found(
    change: Callable[..., None],
    lib: SimpleNamespace,
    model: Any,
    x: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test above can fail: here nothing looks for changes."""
    with accelerate(model):
        check(model, x)
        monkeypatch.setattr(compat._Layer, "_is_current", lambda *_: True)
        change(lib, model)
        with pytest.raises(AssertionError, match="elements wrong"):
            check(model, x)


@needs_peft
def test_new_adapters_and_their_layers_are_found(lib: SimpleNamespace, x: Any) -> None:
    model = adapted(lib, net(lib.torch), {"de": lora(lib, "up")})
    with accelerate(model) as taken:
        check(model, x[:3], ["de", "__base__", "de"])
        assert taken.layers == ["up"]
        for i in range(5):
            model.add_adapter(f"n{i}", lora(lib, "down", "up", r=2 + i))
            randomise(lib, model)
            check(model, x[:3], ["de", f"n{i}", "n0"])
        assert taken.layers == ["up", "down"]
        stacks = [layer.stack for layer in taken._layers.values()]
        model.delete_adapter("n3")
        check(model, x[:3], ["de", "n4", "n0"])
        assert all(len([i for i in stack if stack[i]]) < 6 for stack in stacks)


@needs_peft
def test_names_that_are_gone_leave_nothing(lib: SimpleNamespace, x: Any) -> None:
    """A server loads and deletes adapters under ever new names."""
    model = adapted(lib, net(lib.torch), {"de": lora(lib, "up", "down")})
    with accelerate(model) as taken:
        for i in range(8):
            model.add_adapter(f"n{i}", lora(lib, "down", "up", r=2 + i))
            randomise(lib, model)
            check(model, x[:3], ["de", f"n{i}", f"n{i}"])
            if i:
                model.delete_adapter(f"n{i - 1}")
                check(model, x[:3], [f"n{i}", "__base__", "de"])
            assert taken._batches.names == {"de", f"n{i}"}
            for layer in taken._layers.values():
                assert set(layer.sources) <= {"de", f"n{i}"}
                assert len(layer.stack) <= 2


@needs_peft
def test_memory_of_what_was_copied_is_not_reused(lib: SimpleNamespace, model: Any) -> None:
    """Else another tensor could stand at the address that tells whether this one still does."""
    weight = halves(model)[0].weight
    address = weight.data_ptr()
    with accelerate(model):
        weight.data = weight.data.clone()
        tensors = [lib.torch.empty_like(weight) for _ in range(50)]
        assert all(tensor.data_ptr() != address for tensor in tensors)


# what is PEFT's


@needs_peft
def test_exit_leaves_nothing_behind(model: Any, x: Any) -> None:
    modules = [model.base_model, *model.base_model.model.children()]
    before = [dict(vars(module)) for module in modules]
    theirs = model(x, adapter_names=NAMES)
    with contextlib.suppress(KeyError), accelerate(model):
        assert compat.HOOKS in vars(modules[0])
        assert all(compat.MIXED in vars(module) for module in modules[1:])
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
        assert compat.MIXED not in vars(layer)
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
def test_odd_adapters_take_pefts_path(lib: SimpleNamespace, model: Any, x: Any) -> None:
    model.add_adapter("biased", lora(lib, "up", r=3, lora_bias=True))
    randomise(lib, model)
    model.requires_grad_(False).eval()
    names = ["biased", "de"]
    layer = model.base_model.model.up
    theirs = layer(x[:2], adapter_names=names)
    with accelerate(model) as taken:
        assert taken.fallbacks == {"up, biased": "lora_bias adds a bias to B"}
        assert str(taken) == "3 layers through add_lora\nup, biased: lora_bias adds a bias to B"
        assert layer(x[:2], adapter_names=names).equal(theirs)
        check(model, x[:2], ["de", "en"])


@needs_peft
def test_other_layers_take_pefts_path(lib: SimpleNamespace) -> None:
    torch = lib.torch

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(10, 6)
            self.conv = torch.nn.Conv1d(6, 6, 3, padding=1)
            self.linear = torch.nn.Linear(6, 5)

        def forward(self, tokens: Any) -> Any:
            return self.linear(self.conv(self.embed(tokens).mT).mT)

    config = lora(lib, "embed", "conv", "linear", r=2)
    model = adapted(lib, Net(), {"de": config, "en": config})
    tokens, names = torch.arange(8).reshape(4, 2), ["en", "de", "__base__", "en"]
    inner: list[Any] = []
    model.base_model.model.conv.register_forward_hook(lambda *its: inner.append(its[-1].clone()))
    model(tokens, adapter_names=names)
    with accelerate(model) as taken:
        assert taken.layers == ["linear"]
        assert taken.fallbacks == {
            "embed": "a LoRA layer of type Embedding",
            "conv": "a LoRA layer of type Conv1d",
        }
        model(tokens, adapter_names=names)
    assert inner[0].equal(inner[1])


@needs_peft
def test_dora_is_refused_by_peft(lib: SimpleNamespace, model: Any, x: Any) -> None:
    model.add_adapter("dora", lora(lib, "up", use_dora=True))
    model.requires_grad_(False).eval()
    with accelerate(model) as taken:
        assert taken.fallbacks == {"up, dora": "DoraLinearVariant"}
        with pytest.raises(ValueError, match="DoRA"):
            model.base_model.model.up(x, adapter_names=["dora"] * len(x))
        check(model, x)


@needs_peft
def test_gradients_take_pefts_path_and_say_so(model: Any, x: Any, lib: SimpleNamespace) -> None:
    layer, weight = model.base_model.model.up, halves(model)[0].weight.requires_grad_()
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
    odd = adapted(lib, net(lib.torch), {"de": lora(lib, "up", lora_bias=True)})
    refused(odd, "up, de: lora_bias")
    assert compat.HOOKS not in vars(odd.base_model)
    assert compat.MIXED not in vars(odd.base_model.model.up)


# planted faults


def last_sample_wrong(batch: Any, tokens: int) -> Any:
    return sgmv.segment(np.repeat(np.roll(batch._ids, 1), tokens))


def tokens_interleaved(batch: Any, tokens: int) -> Any:
    return sgmv.segment(np.tile(batch._ids, tokens))


@needs_peft
@pytest.mark.parametrize("fault", [last_sample_wrong, tokens_interleaved])
def test_wrong_rows_would_be_found(
    fault: Callable[..., Any], model: Any, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat._Batch, "segments", fault)
    with accelerate(model), pytest.raises(AssertionError, match="elements wrong"):
        check(model, x)


# whole models


@pytest.fixture(scope="module")
def llama(lib: SimpleNamespace) -> Any:
    lib.torch.manual_seed(3)
    config = lib.transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=112, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip
    base = lib.transformers.LlamaForCausalLM(config)
    configs = {
        name: lib.peft.LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
        for name, r in (("de", 3), ("en", 16))
    }
    return adapted(lib, base, configs)


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
