"""One LoRA adapter of one layer, and the ways in which several of them are passed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np

from sgmv.checks import check_columns, check_count, check_matrix, check_scaling
from sgmv.dtypes import Array, promote
from sgmv.errors import DtypeError, SgmvError, ShapeError
from sgmv.files import shown
from sgmv.peft import PathLike, Read, read_module, read_modules
from sgmv.peft_models import experts_in_model, in_model


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA adapter of one layer: delta(x) = scaling * (x @ A.T) @ B.T.

    Semantics: the arrays are checked, not copied. With magnitudes it is a DoRA adapter, whose rows
    get `gain * (y + delta)` with `gain = magnitude / length of each row of W + scaling * B @ A`.

    A          (r, h_in)   float32, float16, bfloat16 or float64
    B          (h_out, r)  likewise
    scaling    finite; lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
    magnitude  (h_out,)    likewise, or None. A stack that loads it needs the layer's W

    Raises ShapeError, DtypeError or ValueRangeError. Source: LoRA (arXiv 2106.09685), section 4.1;
    rsLoRA (arXiv 2312.03732); DoRA (arXiv 2402.09353), equation 5.

    >>> Adapter(np.ones((8, 64), "float32"), np.ones((32, 8), "float32"), scaling=2.0)
    Adapter(r=8, h_in=64, h_out=32, float32, scaling=2.0)
    """

    A: Array
    B: Array
    scaling: float = 1.0
    magnitude: Array | None = None
    _gains: ClassVar[Array | None] = None  # set by `with_gains`

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
        if self.magnitude is not None:
            check_columns("magnitude", self.magnitude, B.shape[0])

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
    def from_peft(cls, directory: PathLike, module: str) -> Adapter:
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
        found = read_module(directory, module)
        _warn(directory, found)
        return cls(*found.layers[module])

    def __repr__(self) -> str:
        dora = "" if self.magnitude is None else ", DoRA"
        return (
            f"Adapter(r={self.r}, h_in={self.h_in}, h_out={self.h_out}, "
            f"{self.dtype.name}, scaling={self.scaling}{dora})"
        )


def with_gains(adapter: Adapter, gains: Array) -> Adapter:
    """The same adapter, with the gains and offsets that it has in its layer; see dora.py."""
    made = replace(adapter)
    object.__setattr__(made, "_gains", gains)
    return made


@dataclass(frozen=True, eq=False)
class ExpertAdapter:
    """One adapter of a layer of experts: delta(x) of expert e = scaling * (x @ A[e].T) @ B[e].T.

    A        (E, r, h_in), or (r, h_in) if all experts share it
    B        (E, h_out, r), or (h_out, r) if all experts share it
    scaling  finite

    Raises ShapeError, DtypeError or ValueRangeError, as `Adapter` does.
    Source: LoRA (arXiv 2106.09685); PEFT, LoraConfig.target_parameters.

    >>> adapter = ExpertAdapter(np.ones((4, 2, 8)), np.ones((16, 2)), scaling=0.5)
    >>> adapter.experts, adapter.of(3).B.shape
    (4, (16, 2))
    """

    A: Array
    B: Array
    scaling: float = 1.0

    def __post_init__(self) -> None:
        for name in ("A", "B"):
            shape = getattr(getattr(self, name), "shape", ())
            if len(shape) not in (2, 3):
                raise ShapeError(
                    name, "(experts, rows, columns) or (rows, columns)", str(shape), "stack them"
                )
        counts = {len(each) for each in (self.A, self.B) if each.ndim == 3}
        if len(counts) != 1 or 0 in counts:
            raise ShapeError(
                "A and B",
                "the same number of experts, 1 or more, in one of them at least",
                f"{self.A.shape} and {self.B.shape}",
                "share one factor at most; for both shared use sgmv.Adapter",
            )
        object.__setattr__(self, "scaling", check_scaling("scaling", self.scaling))
        self.of(0)

    @property
    def experts(self) -> int:
        """E."""
        return len(self.A) if self.A.ndim == 3 else len(self.B)

    @classmethod
    def joined(cls, first: ExpertAdapter, second: ExpertAdapter) -> ExpertAdapter:
        """One adapter for weights that are put together, as a gate's rows and an up's in W13.

        Semantics: `delta(x)` is the first's, and behind it the second's. Its rank is the sum of
        both, as each column of B serves one of them: the other's rows are 0 there.

        returns  A (E, r1 + r2, h_in), B (E, h_out1 + h_out2, r1 + r2), scaling 1.0 if they differ

        Raises ShapeError for other numbers of experts or another h_in.
        Source: peft 0.21, utils/transformers_weight_conversion.py, `PeftConcatenate`.

        >>> one = ExpertAdapter(np.ones((4, 2, 8)), np.ones((4, 16, 2)))
        >>> ExpertAdapter.joined(one, one).of(0)
        Adapter(r=4, h_in=8, h_out=32, float64, scaling=1.0)
        """
        both = check_expert_adapter("first", first), check_expert_adapter("second", second)
        shapes = [(each.experts, each.of(0).h_in) for each in both]
        if shapes[0] != shapes[1]:
            raise ShapeError(
                "second",
                f"(experts, h_in) = {shapes[0]}, as the first has",
                str(shapes[1]),
                "join what reads the same x",
            )
        A = np.concatenate([each._of_all("A") for each in both], axis=1)
        parts = [each._of_all("B") for each in both]
        if first.scaling != second.scaling:
            parts = [
                part * part.dtype.type(each.scaling) for part, each in zip(parts, both, strict=True)
            ]
        rows, ranks = (sum(part.shape[axis] for part in parts) for axis in (1, 2))
        B = np.zeros((first.experts, rows, ranks), promote(*(part.dtype for part in parts)))
        B[:, : parts[0].shape[1], : parts[0].shape[2]] = parts[0]
        B[:, parts[0].shape[1] :, parts[0].shape[2] :] = parts[1]
        return cls(A, B, first.scaling if first.scaling == second.scaling else 1.0)

    def _of_all(self, half: str) -> Array:
        """A or B with an axis of experts."""
        factor: Array = getattr(self, half)
        return (
            factor if factor.ndim == 3 else np.broadcast_to(factor, (self.experts, *factor.shape))
        )

    def of(self, expert: int) -> Adapter:
        """One expert's adapter, over the same memory."""
        expert = check_count("expert", expert, 0, self.experts - 1)
        A, B = (each[expert] if each.ndim == 3 else each for each in (self.A, self.B))
        return Adapter(A, B, self.scaling)


def check_expert_adapter(argument: str, adapter: object) -> ExpertAdapter:
    """Refuse what is no ExpertAdapter."""
    if not isinstance(adapter, ExpertAdapter):
        got = type(adapter).__name__
        raise DtypeError(argument, "an ExpertAdapter", got, "make one of A (E, r, h_in) and B")
    return adapter


class PeftAdapter(dict[str, Adapter]):
    """What `load_peft` has read: the adapter of each layer by the layer's name, and what is beside.

    Semantics: a dict of linear layers and embeddings, with three attributes more.

    experts     name -> `ExpertAdapter`: "model.layers.0.mlp.experts.down_proj" of a model that
                keeps all experts in one parameter, as transformers 5, and of one with a layer for
                each expert, "...experts.3.down_proj", if their ranks and scalings are the same
    embeddings  the names of those layers that are embeddings: their A is (r, vocabulary), and a
                token's delta is that of a one-hot x, `scaling * A[:, token] @ B.T`
    saved       parameter -> array: what the adapter replaces in the model, as a classification
                head's "score.weight" (labels, h_in), or an embedding with added words.
                A delta of such a layer is added to the product of its saved weight

    Source: peft 0.21, `modules_to_save` and `save_embedding_layers`, lora.Embedding, ParamWrapper.

    >>> PeftAdapter({}).saved
    {}
    """

    def __init__(
        self,
        layers: Mapping[str, Adapter],
        embeddings: Collection[str] = (),
        saved: Mapping[str, Array] | None = None,
        experts: Mapping[str, ExpertAdapter] | None = None,
    ) -> None:
        super().__init__(layers)
        self.experts = dict(experts or {})
        self.embeddings = frozenset(embeddings)
        self.saved = dict(saved or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self.embeddings, self.saved, self.experts)


def load_peft(directory: PathLike, model: object = None) -> PeftAdapter:
    """Read every adapted layer of a directory that PEFT's `save_pretrained` wrote.

    Semantics: `{module: Adapter(A, B, scaling, magnitude)}`, where
        scaling = alpha / r, or alpha / sqrt(r) with use_rslora;
        r, alpha = those of the first key in rank_pattern, alpha_pattern that matches the module,
        else the config's r, lora_alpha. A key is a regular expression for the module's whole name
        or its end after a dot; with "^" in front, for the whole name alone.

    directory  local path; holds adapter_config.json and adapter_model.safetensors, or .bin, which
               needs torch 2.6; or MLX's adapters.safetensors; or diffusers' file, or is its path
    model      where the adapter is to run: a torch module, {name: (h_in, h_out)}, or names. The
               names are then the model's own, also for an adapter of an older release of it
    returns    `PeftAdapter`, a dict; what the adapter replaces in the model is in its `saved`, and
               what it adds to experts in its `experts`
    module     the layer's name in the base model, as in "model.layers.0.self_attn.q_proj"
               without what wrappers add: torch.compile, FSDP, DDP, checkpointing
    A (r, h_in), B (h_out, r)  as on disk: float32, float16, ml_dtypes.bfloat16 or float64, and
               float8 as float16

    magnitude (h_out,)         of DoRA; a stack that loads it needs the layer's W and bias, the
                               base model's own

    fan_in_fan_out says that the base layer keeps its weight as (h_in, h_out), as GPT-2's Conv1D
    does. PEFT writes A and B alike in both cases; pass that layer's weight as `W = weight.T`.

    Raises PeftError: a file is missing or damaged; config and tensors disagree; the adapter is
    more than LoRA and DoRA (biases, other peft types, changed base weights); the model lacks a
    layer, or has it in other widths; ml_dtypes, for bfloat16, is not installed; another process
    changed the files at each of three readings. Warns of options that PEFT does not have, either.
    What is returned is one version of all files, as far as their sizes and times tell: not of a
    save that waits half-way, unless it is made in a directory of its own.
    Source: peft 0.21, LoraConfig, get_pattern_key, LoraLayer.update_layer; rsLoRA (arXiv
    2312.03732); mlx_lm 0.32, `load_adapters`; diffusers 0.42, `load_lora_adapter`.

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
    _warn(directory, found)
    layers = {module: Adapter(*parts) for module, parts in found.layers.items()}
    experts = {name: ExpertAdapter(*parts) for name, parts in found.experts.items()}
    adapter = PeftAdapter(layers, found.embeddings, found.saved, experts)
    if model is None:
        return adapter
    place = os.fsdecode(directory)
    widths = {name: (one.h_in, one.h_out) for name, one in adapter.items()}
    names = in_model(model, widths, found.saved, place)
    shapes = {name: (one.experts, one.of(0).h_in, one.of(0).h_out) for name, one in experts.items()}
    parts = experts_in_model(model, shapes, place)
    return PeftAdapter(
        {names[module]: one for module, one in adapter.items()},
        [names[module] for module in adapter.embeddings],
        {names[name]: array for name, array in adapter.saved.items()},
        {
            name: experts[of[0]]
            if len(of) == 1
            else ExpertAdapter.joined(experts[of[0]], experts[of[1]])
            for name, of in parts.items()
        },
    )


def _warn(directory: PathLike, found: Read) -> None:
    """Of options that PEFT passes over, in the name of the caller of a public function here."""
    if found.unknown:
        place = shown(os.fsdecode(directory))
        text = f"{place}: options that PEFT does not have, passed over: {found.unknown}"
        warnings.warn(text, UserWarning, stacklevel=3)


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
