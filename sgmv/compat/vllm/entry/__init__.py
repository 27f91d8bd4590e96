"""vLLM's door to sgmv: the entry point `vllm.general_plugins`, which vLLM loads in every process.

With sgmv installed beside vLLM, and a CPU as vLLM's platform, vLLM's LoRA layers run on sgmv.
`SGMV_VLLM=0` turns that off; so does vLLM's own VLLM_PLUGINS, where it does not name sgmv.
`SGMV_VLLM=compile` keeps vLLM's torch.compile on, which it turns off for LoRA on CPUs.

Installed, this is the package `sgmv_vllm`, not a part of sgmv, as that imports numba. vLLM's CPU
worker looks into every module that is loaded when it starts (vllm/triton_utils/dispatcher.py), and
ends on llvmlite's, of which one object answers to any name. So nothing of sgmv is imported until
vLLM makes its wrapper.
"""

from __future__ import annotations

import os
import warnings
from importlib.metadata import version
from typing import Any

WRAPPER = "sgmv.compat.vllm.engine.sgmv_punica_wrapper"


def register() -> None:
    """Have the CPU platform name sgmv's wrapper. vLLM may call this several times."""
    if os.environ.get("SGMV_VLLM") == "0":
        return
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    own = getattr(platform, "get_punica_wrapper", None)
    if not current_platform.is_cpu() or own is None or hasattr(own, "without_sgmv"):
        return

    def get_punica_wrapper(cls: Any) -> str:
        return chosen(own())

    get_punica_wrapper.without_sgmv = own  # type: ignore[attr-defined]
    platform.get_punica_wrapper = classmethod(get_punica_wrapper)
    if os.environ.get("SGMV_VLLM") == "compile":
        keep_compiling(platform)


def keep_compiling(platform: Any) -> None:
    """With LoRA, too, compile as vLLM does without: sgmv's products are operations of torch's."""
    from vllm.config import CompilationMode

    own = platform.check_and_update_config

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        asked = compilation.mode
        own(vllm_config)
        if vllm_config.lora_config is not None and asked == CompilationMode.VLLM_COMPILE:
            compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE

    platform.check_and_update_config = classmethod(check_and_update_config)


def chosen(own: str) -> str:
    """The name of the wrapper that vLLM is to make: sgmv's, or its own where that cannot serve."""
    try:
        from sgmv.compat.vllm import engine

        why = engine.unlike(own)
    except Exception as error:  # whatever is wrong with the installation, vLLM still serves
        why = f"{type(error).__name__}: {error}"
    if not why:
        return WRAPPER
    reason = f"sgmv {version('sgmv')} leaves LoRA to vLLM {version_of_vllm()}: {why}"
    if os.environ.get("SGMV_VLLM") == "compile":  # vLLM's own products are not to be compiled
        raise RuntimeError(f"{reason}; SGMV_VLLM=compile needs sgmv's")
    warnings.warn(reason, RuntimeWarning, stacklevel=2)
    return own


def version_of_vllm() -> str:
    """The engine's version; its distributions have several names."""
    import vllm

    return str(getattr(vllm, "__version__", "of an unknown version"))
