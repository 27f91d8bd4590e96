"""What sgmv says when it refuses an argument: which one, what was expected, what came, what to do.

Every refusal happens before any output is written. All cases are `SgmvError`, a `ValueError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice


class SgmvError(ValueError):
    """A call that sgmv refuses: the argument, what was expected, what came, and the remedy.

    Semantics: `str(error) == f"{argument}: expected {expected}, got {received}; {remedy}"`.

    >>> raise SgmvError("scaling", "a finite number", "nan", "pass lora_alpha / r")
    Traceback (most recent call last):
    sgmv.errors.SgmvError: scaling: expected a finite number, got nan; pass lora_alpha / r
    """

    def __init__(self, argument: str, expected: str, received: str, remedy: str) -> None:
        super().__init__(f"{argument}: expected {expected}, got {received}; {remedy}")
        self.argument = argument
        self.expected = expected
        self.received = received
        self.remedy = remedy


class ShapeError(SgmvError):
    """Shapes of arrays that do not fit each other, the stack or the segments."""


class DtypeError(SgmvError, TypeError):
    """An argument of a type that no kernel takes."""


class ValueRangeError(SgmvError):
    """A number outside the range in which it means anything."""


class MemoryLayoutError(SgmvError):
    """An output that cannot be written safely: read-only, or overlapping an input or itself."""


class UnknownAdapterError(SgmvError, LookupError):
    """Adapter ids that the stack, or the given adapters, do not hold."""


class StackError(SgmvError):
    """An adapter that does not fit the stack: no free slot, or a rank above max_rank."""


class PeftError(SgmvError):
    """A PEFT directory that cannot be read, or that asks for more than low-rank adapters."""


class ServingError(SgmvError):
    """A request, an adapter or a setting that the serving room cannot take."""


class StaleStepError(ServingError):
    """A step that was made before one of its adapters was evicted or replaced."""


def shown(value: object, limit: int = 60) -> str:
    """The value for a message, cut short where it is long.

    >>> shown(2**64), shown(16**400, 12)
    ('18446744073709551616', '0x100000...')
    """
    # Python refuses to print very long integers in decimal.
    text = hex(value) if isinstance(value, int) and abs(value) >= 10**limit else str(value)
    return text if len(text) <= limit else f"{text[: limit - 4]}..."


def some(values: Iterable[object], limit: int = 8) -> str:
    """The first few of the values, for a message.

    >>> some([7, 9]), some(range(100))
    ('[7, 9]', '[0, 1, 2, 3, 4, 5, 6, 7, ...]')
    """
    shown = [str(value) for value in islice(values, limit + 1)]
    return f"[{', '.join([*shown[:limit], '...'] if shown[limit:] else shown)}]"
