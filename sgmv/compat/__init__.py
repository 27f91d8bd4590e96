"""The calls and layouts of other engines, by their own names."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

ENGINES = ("peft", "punica", "vllm")

if TYPE_CHECKING:
    from sgmv.compat import peft as peft
    from sgmv.compat import punica as punica
    from sgmv.compat import vllm as vllm
else:

    def __getattr__(name: str) -> Any:
        """`sgmv.compat.vllm` and the others, after no more than `import sgmv`."""
        if name in ENGINES:
            return import_module(f"sgmv.compat.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *ENGINES})
