"""Who asks for what, and when: a trace of requests, drawn from a seed or brought along."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgmv.checks import as_float, check_count, fits_memory
from sgmv.errors import ServingError, ShapeError, shown
from sgmv.ids import Integers, as_integers, is_integer
from sgmv.serving.requests import BASE_MODEL


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order in which they arrive.

    Semantics: request i comes at `arrival_us[i]`, asks for `adapter_ids[i]` and runs for
    `tokens[i]` steps. All are integers, so that its simulation is the same everywhere.

    arrival_us   (n,) ascending microseconds, from 0
    adapter_ids  (n,) lora_int_id of each request's adapter; 0 = base model
    tokens       (n,) at least 1

    Raises DtypeError, ShapeError or ServingError.

    >>> Trace([0, 10, 10], [1, 2, 1], [5, 5, 5]).adapters
    2
    """

    arrival_us: Integers
    adapter_ids: Integers
    tokens: Integers

    def __post_init__(self) -> None:
        for name, least in (("arrival_us", 0), ("adapter_ids", BASE_MODEL), ("tokens", 1)):
            array = as_integers(name, getattr(self, name))
            if array.shape != (self.n,):
                expected = f"one for each of {self.n} requests"
                raise ShapeError(name, expected, f"shape {array.shape}", "give three equal lengths")
            if array.size and array.min() < least:
                got = str(array.min())
                raise ServingError(name, f"at least {least}", got, "correct the trace")
            object.__setattr__(self, name, array.copy())
        if (np.diff(self.arrival_us) < 0).any():
            raise ServingError(
                "arrival_us", "ascending times", "a request before its forerunner", "sort the trace"
            )

    @property
    def n(self) -> int:
        """Requests."""
        return int(np.size(self.arrival_us))

    @property
    def adapters(self) -> int:
        """Distinct adapters asked for."""
        ids = np.unique(self.adapter_ids)
        return int((ids != BASE_MODEL).sum())


def draw_trace(
    requests: int = 100_000,
    adapters: int = 1_000,
    rate: float = 20.0,
    *,
    alpha: float = 1.0,
    burst: float = 1.0,
    mean_tokens: float = 64.0,
    seed: int = 0,
) -> Trace:
    """Requests that arrive at random for adapters of unequal popularity.

    Semantics: arrivals are a Poisson process of `rate / burst` arrivals a second; each brings a
    burst of requests for one adapter, until there are `requests` of them. The size of a burst is
    geometric with mean `burst`. Adapter k of 1..adapters is drawn with a probability in proportion
    to `k ** -alpha`. Tokens are geometric.

    requests     how many
    adapters     how many there are; id 1 is the most popular
    rate         requests per second, on average
    alpha        Zipf's exponent; 0 = all alike
    burst        mean requests per arrival, at least 1; 1 = Poisson arrivals
    mean_tokens  at least 1
    seed         the same seed draws the same trace

    Raises ServingError, DtypeError or ValueRangeError. Source: S-LoRA (arXiv 2311.03285), section
    7, draws adapters by a power law too; its bursts come from a Gamma process.

    >>> trace = draw_trace(1000, adapters=10)
    >>> trace.n, trace.adapters, bool((trace.adapter_ids == 1).sum() > 200)
    (1000, 10, True)
    """
    requests, adapters = check_count("requests", requests, 0), check_count("adapters", adapters, 1)
    rate = check_number("rate", rate, least=1e-6)
    alpha = check_number("alpha", alpha, least=0, limit=100)
    burst = check_number("burst", burst, least=1, limit=2**53)
    mean_tokens = check_number("mean_tokens", mean_tokens, least=1, limit=2**53)
    rng = np.random.default_rng(check_count("seed", seed, 0, math.inf))
    with fits_memory("requests", requests):
        sizes = rng.geometric(1 / burst, requests)
    sizes = np.minimum(sizes, requests)  # what is beyond is cut off
    sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), requests)) + 1]
    times = np.cumsum(rng.exponential(burst / rate * 1e6, len(sizes)))
    with fits_memory("adapters", adapters):
        share = np.arange(1, adapters + 1, dtype=np.float64) ** -alpha
    ids = 1 + np.searchsorted(np.cumsum(share) / share.sum(), rng.random(len(sizes)))
    ids = np.minimum(ids, adapters)  # the last sum may round to below 1
    return Trace(
        np.repeat(times.astype(np.int64), sizes)[:requests],
        np.repeat(ids, sizes)[:requests],
        rng.geometric(1 / mean_tokens, requests),
    )


def check_number(name: str, value: Any, least: float, limit: float = 1e300) -> float:
    """The value as a float, if it is a finite number from `least` to `limit`."""
    is_number = is_integer(value) or isinstance(value, (float, np.floating))
    number = as_float(value) if is_number else math.nan
    if not least <= number < math.inf:
        expected = f"a finite number of at least {least:g}"
        received = shown(value) if is_integer(value) else repr(value)
        raise ServingError(name, expected, received, "pass a number in that range")
    if number > limit:
        raise ServingError(name, f"at most {limit:g}", shown(value), "pass a smaller number")
    return number
