"""One LoRA adapter of one layer, and the ways in which several of them are passed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from sgmv.checks import check_matrix, check_scaling
from sgmv.dtypes import Array, promote
from sgmv.errors import DtypeError, SgmvError, ShapeError
from sgmv.peft import read_module, read_modules


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
        return cls(*read_module(directory, module))

    def __repr__(self) -> str:
        return (
            f"Adapter(r={self.r}, h_in={self.h_in}, h_out={self.h_out}, "
            f"{self.dtype.name}, scaling={self.scaling})"
        )


def load_peft(directory: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> dict[str, Adapter]:
    """Read every adapted layer of a directory that PEFT's `save_pretrained` wrote.

    Semantics: `{module: Adapter(A, B, scaling)}`, where
        scaling = alpha / r, or alpha / sqrt(r) with use_rslora;
        r, alpha = those of the first key in rank_pattern, alpha_pattern that matches the module,
        else the config's r, lora_alpha. A key is a regular expression for the module's whole name
        or its end after a dot; with "^" in front, for the whole name alone.

    directory  local path; holds adapter_config.json and adapter_model.safetensors
    module     the layer's name in the base model, as in "model.layers.0.self_attn.q_proj"
               without what wrappers add: torch.compile, FSDP, DDP, checkpointing
    A (r, h_in), B (h_out, r)  as on disk: float32, float16, ml_dtypes.bfloat16 or float64

    fan_in_fan_out says that the base layer keeps its weight as (h_in, h_out), as GPT-2's Conv1D
    does. PEFT writes A and B alike in both cases; pass that layer's weight as `W = weight.T`.

    Raises PeftError: a file is missing or damaged; config and tensors disagree; the adapter is
    more than plain LoRA (DoRA, biases, other peft types, changed base weights); an option is
    unknown; ml_dtypes, for bfloat16, is not installed; another process changed the files at each
    of three readings. What is returned is one version of both files, as far as their sizes and
    times tell: not of a save that waits half-way, unless it is made in a directory of its own.
    Source: peft 0.21, LoraConfig, get_pattern_key, LoraLayer.update_layer; rsLoRA (arXiv
    2312.03732).

    >>> import json, pathlib, tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> scratch = tempfile.TemporaryDirectory()
    >>> directory = pathlib.Path(scratch.name)
    >>> config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    >>> _ = (directory / "adapter_config.json").write_text(json.dumps(config))
    >>> A, B = np.ones((2, 3), "float32"), np.ones((5, 2), "float32")
    >>> name = "base_model.model.mlp.up_proj"
    >>> tensors = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    >>> save_file(tensors, directory / "adapter_model.safetensors")
    >>> load_peft(directory)
    {'mlp.up_proj': Adapter(r=2, h_in=3, h_out=5, float32, scaling=4.0)}
    >>> scratch.cleanup()
    """
    found = read_modules(directory)
    return {module: Adapter(*parts) for module, parts in found.items()}


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
        except SgmvError as error:  # it names A or B, not the entry
            named = f"{argument}, {error.argument}"
            raise type(error)(named, error.expected, error.received, error.remedy) from None
    raise DtypeError(
        argument, "an Adapter, a pair (A, B) or None", type(entry).__name__, "wrap it in Adapter"
    )
