"""All that sgmv knows of torch: its CPU tensors as numpy arrays without a copy, and its threads.

torch is imported for a file of torch.save alone: a tensor comes from a caller that has imported it.
"""

from __future__ import annotations

import ctypes
import io
import re
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from sgmv.checks import TO_FLOAT32, check_dtype
from sgmv.dtypes import Array
from sgmv.errors import DtypeError, MemoryLayoutError
from sgmv.extras import load

TENSOR_TO_FLOAT32 = "convert it first, for example with .float()"


def torch() -> Any:
    """The package, if somebody has imported it; else None."""
    return sys.modules.get("torch")


def is_tensor(value: object) -> bool:
    """Whether the value is a tensor, on whatever device."""
    package = torch()
    return package is not None and isinstance(value, package.Tensor)


def are_of_torch(array: Array) -> bool:
    """Whether an array's elements are a tensor's."""
    owner = array.base
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return is_tensor(owner)


def as_array(argument: str, operand: object) -> Array:
    """A numpy array over the operand's own memory: what is written to it, the operand holds.

    operand  a numpy array, or a torch tensor on the CPU, of any strides; torch's bfloat16 becomes
             ml_dtypes' (which must be installed)

    Raises DtypeError for anything else, MemoryLayoutError for a tensor on another device.
    """
    if isinstance(operand, np.ndarray):
        return operand
    package = torch()
    if package is None or not isinstance(operand, package.Tensor):
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
    brain = tensor.dtype == package.bfloat16
    try:
        array: Array = (tensor.view(package.int16) if brain else tensor).numpy()
    except (RuntimeError, TypeError) as error:  # sparse, quantized, conjugated on paper, float8
        raise DtypeError(
            argument,
            "a dense tensor of a type that numpy has",
            f"{tensor.dtype} that is none ({error})",
            "convert it first, for example with .to_dense(), .dequantize(), .resolve_conj(), "
            ".resolve_neg() or .float()",
        ) from error
    return array.view(float_dtype(argument, tensor.dtype)) if brain else array


def like(array: Array, operand: object) -> Any:
    """The array; or a tensor over its memory, where the operand is one."""
    return torch().from_numpy(array) if is_tensor(operand) else array


def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array, or for a dtype of torch's a tensor."""
    package = torch()
    return (package if is_torchs(dtype) else np).zeros(shape, dtype=dtype)


def is_torchs(dtype: object) -> bool:
    """Whether the type is one of torch's own, as torch.float16 is."""
    package = torch()
    return package is not None and isinstance(dtype, package.dtype)


def name_of(dtype: object) -> str:
    """The type's name, which numpy and torch agree on: "float16"."""
    return str(dtype).removeprefix("torch.")


def to_float32(operand: object) -> str:
    """How the operand's owner makes it a float32."""
    return TO_FLOAT32 if isinstance(operand, np.ndarray) else TENSOR_TO_FLOAT32


@lru_cache
def float_dtype(argument: str, dtype: object) -> np.dtype[Any]:
    """The type as numpy has it; raises DtypeError for what is no float type that sgmv takes."""
    name = name_of(dtype)
    if name != "bfloat16":
        return check_dtype(argument, name, TENSOR_TO_FLOAT32)
    try:
        ml_dtypes: Any = load("ml_dtypes")
    except ModuleNotFoundError as error:
        raise DtypeError(
            argument,
            "a float type that numpy has",
            "torch.bfloat16",
            "pip install ml_dtypes, which gives numpy this type",
        ) from error
    return check_dtype(argument, ml_dtypes.bfloat16)


def why_no_pickles() -> str:
    """Why files of torch.save cannot be read here; "" if they can."""
    try:
        version: str = load("torch").__version__
    except ImportError:
        return "torch is not installed"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and tuple(map(int, found.groups())) < (2, 6):  # CVE-2025-32434
        return f"torch {version} may run code from it, which 2.6 does not"
    return ""


def unpickled(data: bytes) -> dict[str, Any]:
    """The tensors by name that torch.save wrote, on the CPU; nothing of the file is run.

    Raises ValueError for a file that holds anything else.
    """
    try:
        state = load("torch").load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of whatever kind torch's parts raise for a damaged file
        raise ValueError(str(error).partition("\n")[0]) from error
    if not isinstance(state, dict) or not all(map(is_tensor, state.values())):
        raise ValueError(f"a {type(state).__name__} of something else than tensors by name")
    return {str(name): tensor for name, tensor in state.items()}


def gomp_parallel() -> int:
    """The address of GOMP_parallel in the OpenMP library that torch is linked with; 0 if none."""
    try:
        function = ctypes.CDLL(torch()._C.__file__).GOMP_parallel
    except (OSError, AttributeError):  # Windows; or macOS, with Clang's OpenMP
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
