"""The packages that `accelerate` is tried with, and models of PEFT's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.help.peft_models import NAMES, TOKENS, adapted, lora, net


@pytest.fixture(scope="module")
def lib() -> SimpleNamespace:
    """The three packages; what they warn of when imported is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch
        import transformers
    return SimpleNamespace(torch=torch, peft=peft, transformers=transformers)


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


@pytest.fixture(autouse=True)
def _inference(request: pytest.FixtureRequest) -> Iterator[None]:
    """What users do; a test of gradients asks for them itself."""
    if "lib" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("lib").torch.no_grad():
        yield
