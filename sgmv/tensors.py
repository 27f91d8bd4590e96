"""Operands of engines as numpy arrays: numpy's own as they are, torch's CPU tensors without a copy.

torch is never imported here: a torch tensor can only come from a caller who did.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import numpy as np

from sgmv.checks import TO_FLOAT32, check_dtype
from sgmv.dtypes import Array
from sgmv.errors import DtypeError, MemoryLayoutError

TENSOR_TO_FLOAT32 = "convert it first, for example with .float()"


def as_array(argument: str, operand: object) -> Array:
    """A numpy array over the operand's own memory: what is written to it, the operand holds.

    operand  a numpy array, or a torch tensor on the CPU, of any strides; torch's bfloat16 becomes
             ml_dtypes' (which must be installed)

    Raises DtypeError for anything else, MemoryLayoutError for a tensor on another device.
    """
    if isinstance(operand, np.ndarray):
        return operand
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(operand, torch.Tensor):
        raise DtypeError(
            argument,
            "a numpy array or a torch tensor on the CPU",
            type(operand).__name__,
            "convert it first, for example with np.asarray",
        )
    tensor: Any = operand.detach()
    if not tensor.is_cpu:
        raise MemoryLayoutError(
            argument, "a tensor on the CPU", f"one on {tensor.device}", "pass tensor.cpu()"
        )
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()  # type: ignore[no-any-return]  # torch is untyped here
    array: Array = tensor.view(torch.int16).numpy()
    return array.view(float_dtype(argument, tensor.dtype))


def to_float32(operand: object) -> str:
    """How the operand's owner makes it a float32."""
    return TO_FLOAT32 if isinstance(operand, np.ndarray) else TENSOR_TO_FLOAT32


@lru_cache
def float_dtype(argument: str, dtype: object) -> np.dtype[Any]:
    """The type as numpy has it; raises DtypeError for what is no float type that sgmv takes."""
    name = str(dtype).removeprefix("torch.")
    if name != "bfloat16":
        return check_dtype(argument, name, TENSOR_TO_FLOAT32)
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise DtypeError(
            argument,
            "a float type that numpy has",
            "torch.bfloat16",
            "pip install ml_dtypes, which gives numpy this type",
        ) from error
    return check_dtype(argument, ml_dtypes.bfloat16)
