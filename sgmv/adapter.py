"""One LoRA adapter of one layer, and the ways in which several of them are passed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from sgmv.dtypes import Array, check_matrix, promote
from sgmv.errors import DtypeError, SgmvError, ShapeError, ValueRangeError
from sgmv.segment import as_float, is_integer


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA adapter of one layer: delta(x) = scaling * (x @ A.T) @ B.T.

    Semantics: the arrays are checked, not copied.

    A        (r, h_in)   float32, float16, bfloat16 or float64
    B        (h_out, r)  likewise
    scaling  finite; lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA

    Raises ShapeError, DtypeError or ValueRangeError. Source: LoRA (arXiv 2106.09685), section 4.1;
    rsLoRA (arXiv 2312.03732).

    >>> Adapter(np.ones((8, 64), "float32"), np.ones((32, 8), "float32"), scaling=2.0)
    Adapter(r=8, h_in=64, h_out=32, float32, scaling=2.0)
    """

    A: Array
    B: Array
    scaling: float = 1.0

    def __post_init__(self) -> None:
        A, B = check_matrix("A", self.A), check_matrix("B", self.B)
        if A.shape[0] != B.shape[1]:
            raise ShapeError(
                "B",
                f"(h_out, {A.shape[0]}), as A has rank {A.shape[0]}",
                str(B.shape),
                "give A as (r, h_in) and B as (h_out, r)",
            )
        object.__setattr__(self, "scaling", check_scaling("scaling", self.scaling))

    @property
    def r(self) -> int:
        """The adapter's rank."""
        return int(self.A.shape[0])

    @property
    def h_in(self) -> int:
        """The width of the rows it reads."""
        return int(self.A.shape[1])

    @property
    def h_out(self) -> int:
        """The width of the rows it adds to."""
        return int(self.B.shape[0])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest type that holds both A and B exactly."""
        return promote(self.A.dtype, self.B.dtype)

    @classmethod
    def from_peft(cls, directory: str | os.PathLike[str], module: str) -> Adapter:
        """Read one module's adapter from a directory that PEFT wrote.

        Semantics: `load_peft(directory)[module]`, reading that module alone.

        directory  holds adapter_config.json and adapter_model.safetensors
        module     the module's name in the model, as in "model.layers.0.self_attn.q_proj"

        Raises PeftError for what cannot be read or is no plain LoRA, and for a name that matches
        nothing, with near names. Source: peft, src/peft/tuners/lora. Needs the extra `peft`.

        >>> Adapter.from_peft("no-such-place", "model.layers.0.mlp.up_proj")
        Traceback (most recent call last):
        sgmv.errors.PeftError: directory: expected a PEFT adapter directory, got no-such-place \
(no such directory); pass a local directory that save_pretrained wrote (nothing is downloaded)
        """
        from sgmv.peft import read_adapter

        return read_adapter(directory, module)

    def __repr__(self) -> str:
        return (
            f"Adapter(r={self.r}, h_in={self.h_in}, h_out={self.h_out}, "
            f"{self.dtype.name}, scaling={self.scaling})"
        )


AdapterLike: TypeAlias = "Adapter | tuple[Array, Array] | None"
Adapters: TypeAlias = "Mapping[int, AdapterLike] | Sequence[AdapterLike]"
Scalings: TypeAlias = "Mapping[int, float] | Sequence[float] | float | None"


def items(adapters: Adapters) -> list[tuple[int, AdapterLike]]:
    """Pairs of id and entry: of a mapping, or of a sequence indexed by id."""
    if isinstance(adapters, Mapping):
        return list(adapters.items())
    if isinstance(adapters, Sequence) and not isinstance(adapters, str):
        return list(enumerate(adapters))
    raise DtypeError(
        "adapters",
        "a mapping id -> adapter, or a sequence indexed by id",
        type(adapters).__name__,
        "pass a dict or a list of Adapter, (A, B) or None",
    )


def as_adapter(argument: str, entry: AdapterLike) -> Adapter | None:
    """An entry of `adapters` as an Adapter; None, base only, stays None."""
    if entry is None or isinstance(entry, Adapter):
        return entry
    if isinstance(entry, tuple | list) and len(entry) == 2:
        try:
            return Adapter(*entry)
        except SgmvError as error:  # it names A or B: say whose
            where = f"{argument}, {error.argument}"
            raise type(error)(where, error.expected, error.received, error.remedy) from None
    raise DtypeError(
        argument, "an Adapter, a pair (A, B) or None", type(entry).__name__, "wrap it in Adapter"
    )


def check_scaling(argument: str, scaling: object) -> float:
    """The scaling as a float, if it is a real number that float32 can hold."""
    if not is_integer(scaling) and not isinstance(scaling, (float, np.floating)):
        raise DtypeError(
            argument, "a real number", type(scaling).__name__, "pass lora_alpha / r, or 1.0"
        )
    value = as_float(scaling)
    if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
        raise ValueRangeError(
            argument, "a finite number that float32 holds", repr(value), "pass lora_alpha / r"
        )
    return value
