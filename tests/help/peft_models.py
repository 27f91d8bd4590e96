"""PEFT models to try `accelerate` on, changes to their weights, and the check of every layer."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.studies import peft as benchmark

WANTED = ("torch", "peft", "transformers")
MISSING = [name for name in WANTED if find_spec(name) is None]
needs_peft = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install -e '.[torch]')"
)
NAMES = ["de", "en", "__base__", "de", "fr", "en", "de"]
TOKENS = 3
ALL_ROWS = 10_000


def net(torch: Any, width: int = 20, inner: int = 33) -> Any:
    """Three linear layers, two of them side by side; widths that no tile divides."""

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(width, inner, bias=False)
            self.up = torch.nn.Linear(width, inner)
            self.down = torch.nn.Linear(inner, width)

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


def check(model: Any, x: Any, names: list[str] = NAMES) -> None:
    benchmark.check(model, partial(model, x, adapter_names=names), names, "net", most=ALL_ROWS)


def halves_of(model: Any) -> tuple[Any, Any]:
    """A and B of adapter de in layer up."""
    layer = model.base_model.model.up
    return layer.lora_A["de"], layer.lora_B["de"]


def in_place(_lib: SimpleNamespace, model: Any) -> None:
    halves_of(model)[0].weight[1, 2] += 3


def reassigned(_lib: SimpleNamespace, model: Any) -> None:
    weight = halves_of(model)[1].weight
    weight.data = weight.data * 2


def written_through_data(lib: SimpleNamespace, model: Any) -> None:
    """As PEFT's hotswap does: torch does not count it."""
    weight = halves_of(model)[0].weight
    count = weight._version
    weight.data.copy_(lib.torch.randn(weight.shape))
    assert weight._version == count


def rescaled(_lib: SimpleNamespace, model: Any) -> None:
    model.base_model.model.up.set_scale("de", 3.0)
