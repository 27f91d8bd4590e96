"""Many LoRA adapters in one batch, on the CPU: Punica's SGMV kernel in Python.

SGMV: Segmented Gather Matrix-Vector multiplication. Papers: Punica, https://arxiv.org/abs/2310.18547;
S-LoRA, https://arxiv.org/abs/2311.03285.

    x (n, h_in) ───────────────── @ W.T, once for all rows ──────────────────> y (n, h_out)
     │                                                                          ^ +=
     │ rows sorted by adapter        shrink                  expand             │
     └──> segment 0  adapter 3  ──>  x @ A.T  ──> v (m, r)  ──> scaling * v @ B.T
          segment 1  adapter 8  ──>  x @ A.T  ──> v (m, r)  ──> scaling * v @ B.T

Words, the same from the paper to the tests:

    n, S             rows (tokens) in the batch; segments
    h_in, r, h_out   input width, rank, output width
    x, W, y          activations (n, h_in), base weight (h_out, h_in), output (n, h_out)
    A, B             one adapter as PEFT writes it: (r, h_in), (h_out, r)
    wa, wb           the same in Punica's storage order: (r, h_in), (r, h_out); wb is B.T
    v                what shrink hands to expand: (n, r), in sorted order
    scaling          per adapter: lora_alpha / r, or lora_alpha / sqrt(r)
    adapter_ids      one id per row; -1 means base only

Start reading at sgmv/lora.py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import sgmv.interpreter  # noqa: F401  # isort: split  # first: the rest hangs in a subinterpreter
from sgmv.adapter import Adapter, PeftAdapter, load_peft
from sgmv.embedding import add_lora_embedding
from sgmv.errors import SgmvError
from sgmv.expand import expand
from sgmv.info import info
from sgmv.lora import add_lora, apply_batched, apply_single, lora_delta
from sgmv.segment import Segments, segment
from sgmv.shrink import shrink
from sgmv.stack import AdapterStack
from sgmv.warm_up import warm_up
from sgmv.workers import get_num_threads, set_num_threads

__version__ = "0.1.0"

# Imported when they are first asked for: `import sgmv` stays as fast as the calls above need.
SUBMODULES = (
    "compat",
    "emulator",
    "experts",
    "explorer",
    "layouts",
    "models",
    "popularity",
    "serving",
)

if TYPE_CHECKING:
    from sgmv import compat as compat
    from sgmv import emulator as emulator
    from sgmv import experts as experts
    from sgmv import explorer as explorer
    from sgmv import layouts as layouts
    from sgmv import models as models
    from sgmv import popularity as popularity
    from sgmv import serving as serving
else:

    def __getattr__(name: str) -> Any:
        """`sgmv.layouts` and the others, after no more than `import sgmv`."""
        if name in SUBMODULES:
            return import_module(f"sgmv.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *SUBMODULES})


__all__ = [
    "Adapter",
    "AdapterStack",
    "PeftAdapter",
    "Segments",
    "SgmvError",
    "add_lora",
    "add_lora_embedding",
    "apply_batched",
    "apply_single",
    "expand",
    "get_num_threads",
    "info",
    "load_peft",
    "lora_delta",
    "segment",
    "set_num_threads",
    "shrink",
    "warm_up",
]
