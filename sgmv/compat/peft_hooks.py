"""What `accelerate` does to PEFT's objects: methods replaced, and hooks of failed calls removed."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, cast

from sgmv import tensors


def hook_id() -> int:
    """An id that torch gave to no hook; ids grow."""
    return int(tensors.torch().utils.hooks.RemovableHandle(OrderedDict()).id)


def remove_hooks(modules: Iterable[Any], ids: range) -> None:
    """Remove PEFT's hooks of these ids: PEFT does it only after a call that ended well."""
    for module in modules:
        hooks = module._forward_pre_hooks
        for i in [i for i in hooks if i in ids and _is_pefts(hooks[i])]:
            module._forward_pre_hooks_with_kwargs.pop(i, None)
            del hooks[i]


def _is_pefts(hook: object) -> bool:
    return isinstance(hook, partial) and str(hook.func.__module__).startswith("peft.")


@cache
def listener() -> Any:
    """A class that stands in for adapted layers where PEFT gives each a hook that tells names."""
    lora: Any = sys.modules["peft"].tuners.lora

    class Listener(lora.LoraLayer):  # type: ignore[misc]
        """The names of a call: the caller's, or as often as there are beams."""

        def __init__(self) -> None:
            self.names: Sequence[str] = ()
            self.is_over = False
            self.lora_A: dict[str, None] = {}  # the adapters that there are
            self.lora_embedding_A: dict[str, None] = {}

        def register_forward_pre_hook(self, hook: Any, **_options: Any) -> Any:
            _, kwargs = hook(self, (), {})
            self.names = kwargs["adapter_names"]
            return self

        def remove(self) -> None:
            """As a hook's handle: there is none."""

    return Listener


def untraced(name: str) -> Callable[..., Any]:
    """A call of an object's method of this name, which torch.compile does not look into."""

    def call(owner: Any, *args: Any) -> Any:
        return getattr(owner, name)(*args)

    return cast("Callable[..., Any]", tensors.torch().compiler.disable(call))


class Outside(AbstractContextManager[Any]):
    """A context entered and left by these calls."""

    def __init__(self, context: Any, begin: Callable[..., Any], end: Callable[..., Any]) -> None:
        self._context, self._begin, self._end = context, begin, end

    def __enter__(self) -> Any:
        return self._begin(self._context)

    def __exit__(self, *raised: Any) -> bool | None:
        return bool(self._end(self._context, *raised))


class Replacement:
    """A method of one object, replaced. A copy of the object, deep or pickled, has its class's."""

    def __init__(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        self._owner, self._name, self._method = owner, name, method
        self._before: object = None  # what another library had put there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        # Asked of the copy before it has any attribute but its class's.
        return getattr, (self._owner, self._name)

    def take(self) -> None:
        held = vars(self._owner).get(self._name)
        if held is not self:
            self._before = held
            setattr(self._owner, self._name, self)

    def restore(self) -> None:
        if vars(self._owner).get(self._name) is not self:
            return
        if self._before is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._before)
