"""`accelerate` inside torch.compile: PEFT's results, one graph for every mix, no break in it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sgmv.compat import peft_graphs
from sgmv.compat.peft import accelerate
from sgmv.errors import ShapeError
from tests.help.peft_models import NAMES, adapted, lora, needs_peft, net

pytestmark = [
    needs_peft,
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's of itself
]

MIXED = ["de", "en", "__base__", "de"]
MIXES: list[list[str] | None] = [MIXED, ["en"] * 4, None, ["__base__"] * 4, MIXED]


@pytest.fixture(autouse=True)
def _no_graphs_of_others(lib: SimpleNamespace) -> Iterator[None]:
    lib.torch._dynamo.reset()
    yield
    lib.torch._dynamo.reset()


class Graphs:
    """A backend that keeps what it is to compile, and runs it as it is."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def __call__(self, graph: Any, _inputs: Any, **_options: Any) -> Any:
        self.made.append(graph)
        return graph.forward

    def nodes(self) -> list[int]:
        """How many of sgmv's operations each graph has."""
        return [
            sum("sgmv.add_in_graph" in str(node.target) for node in graph.graph.nodes)
            for graph in self.made
        ]


def whole(model: Any, backend: Any) -> Any:
    return sys.modules["torch"].compile(model, backend=backend)


def by_layer(model: Any, backend: Any) -> Any:
    for layer in model.base_model.model.model.layers:
        layer.compile(backend=backend)
    return model


def inner(model: Any, backend: Any) -> Any:
    """As generate compiles the forward of the model inside; nothing may break the graph."""
    model.base_model.model.compile(backend=backend, fullgraph=True)
    return model


def undo(model: Any) -> None:
    for module in model.modules():
        module._compiled_call_impl = None


def logits(model: Any, tokens: Any, names: list[str] | None) -> Any:
    return model(tokens, **({} if names is None else {"adapter_names": names})).logits


# equal results, one graph


@pytest.mark.parametrize(("compiled", "graphs"), [(whole, 1), (by_layer, 2), (inner, 1)])
def test_one_graph_serves_every_mix(
    compiled: Callable[[Any, Any], Any], graphs: int, lib: SimpleNamespace, llama: Any
) -> None:
    """And plain batches have one of their own: PEFT alone takes theirs for the mixed ones after."""
    tokens = lib.torch.arange(20).reshape(4, 5)
    expected = [logits(llama, tokens, names) for names in MIXES]
    with accelerate(llama):
        eager = [logits(llama, tokens, names) for names in MIXES]
        found = Graphs()
        model = compiled(llama, found)
        for names, right, theirs in zip(MIXES, eager, expected, strict=True):
            result = logits(model, tokens, names)
            assert result.equal(right), names
            lib.torch.testing.assert_close(result, theirs)
        undo(llama)
    layers = 14  # of two decoder layers, seven linear ones each
    assert found.nodes() == [layers // graphs] * graphs + [0] * graphs
    assert not expected[0].allclose(expected[1])
    assert not expected[0].allclose(expected[2])


def test_rows_and_tokens_of_any_number_share_a_graph(lib: SimpleNamespace, llama: Any) -> None:
    sizes = [(2, 3), (3, 5), (5, 4), (6, 7), (4, 9)]
    batches = [(lib.torch.arange(n * m).reshape(n, m), (["de", "en"] * n)[:n]) for n, m in sizes]
    with accelerate(llama):
        expected = [logits(llama, *batch) for batch in batches]
        graphs = Graphs()
        llama.base_model.model.compile(backend=graphs, fullgraph=True, dynamic=True)
        for batch, right in zip(batches, expected, strict=True):
            assert logits(llama, *batch).equal(right)
        undo(llama)
    assert graphs.nodes() == [14]


def test_inductor_runs_the_node(lib: SimpleNamespace, model: Any) -> None:
    """The compiler that users have: in float64, as its own kernels round in another way."""
    model.double()
    x = lib.torch.randn(4, 3, 20, dtype=lib.torch.float64)
    with accelerate(model):
        expected = [model(x, adapter_names=names) for names in MIXES]
        compiled = lib.torch.compile(model)
        for names, right in zip(MIXES, expected, strict=True):
            lib.torch.testing.assert_close(compiled(x, adapter_names=names), right)


def test_generates_compiled_forward(
    lib: SimpleNamespace, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A static cache, as generate compiles for: the same tokens."""
    tokens = lib.torch.arange(1, 13).reshape(3, 4)
    names = ["en", "__base__", "de"]
    plain = {"input_ids": tokens, "max_new_tokens": 6, "do_sample": False}
    expected = llama.generate(**plain, adapter_names=names)
    graphs = Graphs()

    def backend(*its: Any) -> Any:  # transformers copies what is no function
        return graphs(*its)

    config = lib.transformers.CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True  # transformers leaves CPUs out
    monkeypatch.setattr(llama.generation_config, "compile_config", config, raising=False)
    monkeypatch.setattr(llama.generation_config, "cache_implementation", "static")
    with accelerate(llama):
        for _ in range(2):
            assert llama.generate(**plain, adapter_names=names).equal(expected)
    assert graphs.nodes() == [14]


def test_embeddings_are_nodes_too(lib: SimpleNamespace) -> None:
    class Net(lib.torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = lib.torch.nn.Embedding(11, 6), lib.torch.nn.Linear(6, 3)

        def forward(self, tokens: Any) -> Any:
            return self.up(self.embed(tokens))

    configs = {name: lora(lib, "embed", "up", r=2) for name in ("de", "en")}
    model = adapted(lib, Net(), configs)
    tokens, names = lib.torch.arange(8).reshape(4, 2), ["de", "__base__", "en", "en"]
    with accelerate(model):
        expected = model(tokens, adapter_names=names)
        graphs = Graphs()
        model.base_model.model.compile(backend=graphs, fullgraph=True)
        assert model(tokens, adapter_names=names).equal(expected)
    assert graphs.nodes() == [2]


# graphs that outlive what they were made for


def test_changed_and_new_adapters_need_no_other_graph(lib: SimpleNamespace, model: Any) -> None:
    x = lib.torch.ones(len(NAMES), 3, 20)
    graphs = Graphs()
    with accelerate(model):
        model.base_model.model.compile(backend=graphs, fullgraph=True)
        before = model(x, adapter_names=NAMES)
        model.base_model.model.up.lora_A["de"].weight[1, 2] += 3
        changed = model(x, adapter_names=NAMES)
        assert not changed.equal(before)
        seen = len(graphs.made)
        undo(model)
        assert changed.equal(model(x, adapter_names=NAMES))
    assert seen == 1


def test_no_graph_is_used_out_of_its_context(lib: SimpleNamespace, model: Any) -> None:
    """Each context makes its own; outside of all, PEFT's own products run."""
    x = lib.torch.ones(len(NAMES), 3, 20)
    theirs = model(x, adapter_names=NAMES)
    graphs = Graphs()
    model.base_model.model.compile(backend=graphs)
    for _ in range(3):
        with accelerate(model):
            for _ in range(2):
                lib.torch.testing.assert_close(model(x, adapter_names=NAMES), theirs)
        assert model(x, adapter_names=NAMES).equal(theirs)
    assert graphs.nodes() == [3, 0, 3, 3]


def test_a_compiled_model_is_taken(lib: SimpleNamespace, model: Any) -> None:
    x = lib.torch.ones(len(NAMES), 3, 20)
    theirs = model(x, adapter_names=NAMES)
    compiled = lib.torch.compile(model, backend=(graphs := Graphs()))
    with accelerate(compiled) as taken:
        lib.torch.testing.assert_close(compiled(x, adapter_names=NAMES), theirs)
        assert len(taken.layers) == 3
    assert graphs.nodes() == [3]


def test_nodes_keep_no_layer(lib: SimpleNamespace) -> None:
    model = adapted(lib, net(lib.torch), {"de": lora(lib, "up")})
    with accelerate(model):
        kept = weakref.ref(model)
        before = len(peft_graphs._layers()[0].by_number)
    del model
    gc.collect()
    assert kept() is None
    assert len(peft_graphs._layers()[0].by_number) < before


# what is PEFT's


def test_what_peft_computes_breaks_the_graph_and_is_right(lib: SimpleNamespace) -> None:
    """A layer with a forward hook on a half; gradients; and adapters switched off."""
    model = adapted(lib, net(lib.torch), {name: lora(lib, "up", "down") for name in ("de", "en")})
    x, names = lib.torch.ones(3, 2, 20), ["de", "__base__", "en"]
    model.base_model.model.up.lora_B["de"].register_forward_hook(lambda *its: 2 * its[-1])
    theirs = model(x, adapter_names=names)
    with model.disable_adapter():
        off = model(x, adapter_names=names)
    with accelerate(model) as taken:
        assert [*taken.fallbacks] == ["up, de"]
        graphs = Graphs()
        model.base_model.model.compile(backend=graphs)
        for mix in (names, names[::-1]):
            model(x, adapter_names=mix)
        lib.torch.testing.assert_close(model(x, adapter_names=names), theirs)
        with model.disable_adapter():
            assert model(x, adapter_names=names).equal(off)
        inputs = x.clone().requires_grad_()
        with lib.torch.enable_grad():
            with pytest.warns(UserWarning, match="gradients"):
                result = model(inputs, adapter_names=names)
            lib.torch.testing.assert_close(result.detach(), theirs)
            result.sum().backward()
        assert inputs.grad is not None
    assert max(graphs.nodes()) == 1


def test_a_batch_of_other_length_is_refused_in_a_graph(lib: SimpleNamespace, model: Any) -> None:
    x = lib.torch.ones(len(NAMES), 3, 20)
    with accelerate(model):
        model.base_model.model.compile(backend=Graphs(), fullgraph=True)
        with pytest.raises(ShapeError, match="one name in adapter_names per sample"):
            model(x, adapter_names=NAMES[:2])
        undo(model)
        with pytest.raises(ValueError, match="same as the number of inputs"):
            model(x, adapter_names=NAMES[:2])
