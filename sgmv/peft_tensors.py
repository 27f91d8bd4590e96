"""The tensors of an adapter's file: names, shapes and types now, values when asked.

adapter_model.safetensors   read as it is, see files.py
adapter_model.bin           a pickle: by torch's loader that runs nothing of what is in it
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from sgmv import forms, tensors
from sgmv.dtypes import Array
from sgmv.errors import PeftError, SgmvError
from sgmv.extras import load
from sgmv.files import Entry, Opened, TensorFile, beginning, existing, read_all, shown

# Types of tensors by safetensors' name. An 8-bit float becomes the float16 of the same value.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
EIGHT_BITS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_COUNTS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
_TYPES = FLOATS | _COUNTS | {"BOOL": "bool"} | dict.fromkeys(EIGHT_BITS, "uint8")
_TORCHS = {
    name: short for short, name in (FLOATS | _COUNTS | {"BOOL": "bool"} | EIGHT_BITS).items()
}
_AGAIN = "copy or save it again; if it is being written, try again"


class Tensors:
    """The tensors of one file.

    path      the file, for messages
    entries   name -> its type and shape
    metadata  what a safetensors file says about itself
    """

    def __init__(self, path: Path, file: Opened) -> None:
        self.path = path
        self._opened = file
        self._file: TensorFile | _Pickled
        try:
            of_kind = _Pickled if path.suffix == ".bin" else TensorFile
            self._file = of_kind(existing(file))
        except FileNotFoundError as error:
            got, remedy = forms.without_weights(path.parent)
            raise PeftError("directory", path.name, got, remedy) from error
        except (OSError, ValueError) as error:
            raise damaged(path, self._kind, error, file) from error
        self.entries = self._file.entries
        self.metadata = self._file.metadata

    @property
    def _kind(self) -> str:
        return "tensors alone" if self.path.suffix == ".bin" else "a safetensors file"

    def value(self, name: str, source: str, is_weight: bool = True) -> Array:
        """One tensor's values: a weight's are floats; `source` names it in messages."""
        dtype = self.entries[name].dtype
        if dtype not in _TYPES or (is_weight and dtype not in FLOATS | EIGHT_BITS):
            known = ", ".join((*FLOATS, *EIGHT_BITS))
            raise PeftError(source, f"one of {known}", dtype, "save it in one of these types")
        if dtype == "BF16":
            _need_bfloat16(source)
        try:
            return _widened(self._file.tensor(name, _TYPES[dtype]), dtype)
        except (OSError, ValueError) as error:
            raise damaged(self.path, self._kind, error, self._opened) from error


class _Pickled:
    """A file of torch.save that holds tensors by name, and nothing else.

    Raises OSError, and ValueError for a file that is not so.
    """

    def __init__(self, file: io.FileIO) -> None:
        state = tensors.unpickled(read_all(file))
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        for name, tensor in state.items():
            dtype = tensors.name_of(tensor.dtype)
            self.entries[name] = Entry(_TORCHS.get(dtype, dtype), tuple(tensor.shape), 0, 0)
        self._state = state

    def tensor(self, name: str, dtype: str) -> Array:
        tensor = self._state[name]
        if self.entries[name].dtype in EIGHT_BITS:
            tensor = tensor.view(tensors.torch().uint8)
        try:
            array = tensors.as_array(name, tensor)
        except SgmvError as error:  # sparse, say
            raise ValueError(str(error)) from error
        return np.array(array, dtype=array.dtype)  # of its own: not a part of torch's storage


def bytes_of(entry: Entry) -> int:
    """The bytes of a tensor's values; 0 for a type that is not read."""
    if entry.dtype not in _TYPES:
        return 0
    name = _TYPES[entry.dtype]
    return math.prod(entry.shape) * (2 if name == "bfloat16" else np.dtype(name).itemsize)


def _widened(array: Array, dtype: str) -> Array:
    """The values of 8-bit floats, as float16 holds them exactly; others as they are."""
    if dtype == "F8_E5M2":  # the upper half of a float16
        doubled: Array = array.astype(np.uint16) << 8
        return doubled.view(np.float16)
    if dtype == "F8_E4M3":
        found: Array = _E4M3[array]
        return found
    return array


def _e4m3() -> Array:
    """The value of each byte: no infinities, and NaN is all ones but for the sign.

    Source: FP8 Formats for Deep Learning (arXiv 2209.05433), table 1; torch.float8_e4m3fn.
    """
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, fraction, 8 + fraction) * 2.0 ** (np.maximum(exponent, 1) - 10)
    size[bits & 127 == 127] = np.nan
    values: Array = np.where(bits & 128, -size, size)
    return values.astype(np.float16)


_E4M3 = _e4m3()


def damaged(path: Path, expected: str, error: Exception, file: Opened) -> PeftError:
    """A file that cannot be read, or that is something else."""
    if not isinstance(error, OSError):
        try:
            start = beginning(existing(file))
        except OSError as caught:
            error = caught
        else:
            is_pickle = path.suffix == ".bin" and start.startswith(b"PK")
            what = None if is_pickle else forms.of_start(start)
            return PeftError(shown(path), expected, *(what or (f"damaged data ({error})", _AGAIN)))
    got = error.strerror or str(error)
    return PeftError(shown(path), expected, got, "try again, or copy the file again")


def _need_bfloat16(source: str) -> None:
    try:
        load("ml_dtypes")  # which teaches numpy the type's name
    except ImportError as error:
        remedy = "pip install ml_dtypes"
        raise PeftError(source, "ml_dtypes, to hold bfloat16", "none", remedy) from error
