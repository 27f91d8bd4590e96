"""What a request asks for: one adapter, as vLLM's `LoRARequest`; or several, `LoRAMixture`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from sgmv.checks import check_count, check_scaling, check_several
from sgmv.errors import DtypeError, ServingError

BASE_MODEL = 0  # the id that vLLM gives to requests without an adapter


@dataclass(frozen=True)
class LoRARequest:
    """An adapter that a request asks for: its name, its id, and where its weights are.

    Semantics: two are the same adapter if all three fields are equal. None in place of one asks for
    the base model, id 0.

    lora_name    for people, and for messages
    lora_int_id  an integer >= 1, one for each adapter
    lora_path    what AdapterSlots reads it from: a directory that PEFT wrote

    Raises ServingError, DtypeError or ValueRangeError. Source: vLLM, vllm/lora/request.py.

    >>> LoRARequest("french", 7, "adapters/french")
    LoRARequest(lora_name='french', lora_int_id=7, lora_path='adapters/french')
    """

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ServingError(
                "lora_name", "a name", repr(self.lora_name), "name the adapter for messages"
            )
        # Of any size: vLLM's may be made of hashes.
        object.__setattr__(
            self, "lora_int_id", check_count("lora_int_id", self.lora_int_id, 1, math.inf)
        )
        if not isinstance(self.lora_path, (str, os.PathLike)) or not os.fspath(self.lora_path):
            raise ServingError(
                "lora_path", "a path", repr(self.lora_path), "name the directory that PEFT wrote"
            )
        object.__setattr__(self, "lora_path", os.fspath(self.lora_path))


@dataclass(frozen=True)
class LoRAMixture:
    """Several adapters that a request asks for at once, each with a weight.

    Semantics: rows get the sum of their deltas, each times its weight, as in `sgmv.add_lora`, added
    in the order in which the adapters came into slots. All of them hold slots while the request
    runs; an adapter named twice adds twice, and holds one.

    members  pairs of LoRARequest and weight, a finite number; at least one

    Raises ServingError, DtypeError or ValueRangeError. Source: llama.cpp, the list `lora` of a
    request of its server, {id, scale}; it batches no requests of different lists.

    >>> french, legal = LoRARequest("french", 7, "a/fr"), LoRARequest("legal", 9, "a/legal")
    >>> LoRAMixture([(french, 0.75), (legal, 0.5)]).lora_int_ids
    (7, 9)
    """

    members: Sequence[tuple[LoRARequest, float]]  # kept as a tuple

    def __post_init__(self) -> None:
        given = self.members
        check_several("members", given, "pairs of a LoRARequest and a weight")
        members = []
        for pair in given:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                got = repr(pair)
                raise DtypeError("members", "pairs of a LoRARequest and a weight", got, "pair them")
            lora_request, weight = pair
            if not isinstance(lora_request, LoRARequest):
                got = type(lora_request).__name__
                raise DtypeError("members", "a LoRARequest in each pair", got, "make one")
            members.append((lora_request, check_scaling("members", weight)))
        if not members:
            raise ServingError("members", "at least one", "none", "pass None for the base model")
        object.__setattr__(self, "members", tuple(members))
        by_id([lora_request for lora_request, _ in members])

    @property
    def lora_int_ids(self) -> tuple[int, ...]:
        """The ids of its adapters, each once, in ascending order."""
        return tuple(sorted({lora_request.lora_int_id for lora_request, _ in self.members}))


Asked: TypeAlias = "LoRARequest | LoRAMixture | None"  # None: the base model


def members_of(asked: Asked) -> tuple[tuple[LoRARequest, float], ...]:
    """The adapters that are asked for, with their weights."""
    if asked is None:
        return ()
    return tuple(asked.members if isinstance(asked, LoRAMixture) else ((asked, 1.0),))


def ids_of(asked: Asked) -> tuple[int, ...]:
    """Their ids, each once, in ascending order."""
    if asked is None:
        return ()
    return asked.lora_int_ids if isinstance(asked, LoRAMixture) else (asked.lora_int_id,)


def check_lora_request(lora_request: object) -> None:
    """Refuse anything but a LoRARequest, a LoRAMixture, or None for the base model."""
    if lora_request is not None and not isinstance(lora_request, LoRARequest | LoRAMixture):
        raise DtypeError(
            "lora_request",
            "a LoRARequest, a LoRAMixture, or None for the base model",
            type(lora_request).__name__,
            "make one with LoRARequest(lora_name, lora_int_id, lora_path)",
        )


def by_id(lora_requests: Iterable[Asked]) -> dict[int, LoRARequest]:
    """The adapters that are asked for; refuses two under one id."""
    wanted: dict[int, LoRARequest] = {}
    check_several("lora_requests", lora_requests, "a LoRARequest, or None, for each")
    for lora_request in lora_requests:
        check_lora_request(lora_request)
        for member, _ in members_of(lora_request):
            first = wanted.setdefault(member.lora_int_id, member)
            if first != member:
                raise ServingError(
                    "lora_requests",
                    f"one adapter for each id, as {first}",
                    repr(member),
                    "give other weights another lora_int_id",
                )
    return wanted
