"""The adapter that a request asks for: `LoRARequest`, as in vLLM."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

from sgmv.checks import check_count, check_several
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


def check_lora_request(lora_request: object) -> None:
    """Refuse anything but a LoRARequest, or None for the base model."""
    if lora_request is not None and not isinstance(lora_request, LoRARequest):
        raise DtypeError(
            "lora_request",
            "a LoRARequest, or None for the base model",
            type(lora_request).__name__,
            "make one with LoRARequest(lora_name, lora_int_id, lora_path)",
        )


def by_id(lora_requests: Iterable[LoRARequest | None]) -> dict[int, LoRARequest]:
    """The adapters that are asked for; refuses two under one id."""
    wanted: dict[int, LoRARequest] = {}
    check_several("lora_requests", lora_requests, "a LoRARequest, or None, for each")
    for lora_request in lora_requests:
        check_lora_request(lora_request)
        if lora_request is None:
            continue
        first = wanted.setdefault(lora_request.lora_int_id, lora_request)
        if first != lora_request:
            raise ServingError(
                "lora_requests",
                f"one adapter for each id, as {first}",
                repr(lora_request),
                "give other weights another lora_int_id",
            )
    return wanted
