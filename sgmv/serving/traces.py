"""Who asks for what, and when: a trace of requests, drawn from a seed or brought along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sgmv.checks import as_float, check_count, check_several, fits_memory
from sgmv.errors import ServingError, ShapeError, shown
from sgmv.ids import Integers, as_integers, is_integer
from sgmv.serving.arrivals import ARRIVALS, arrival_times, changed, mixed, of_crowd
from sgmv.serving.requests import BASE_MODEL

RANK = 16  # of an adapter, where none is said: what Costs.adapter_bytes is of


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order in which they arrive.

    Semantics: request i comes at `arrival_us[i]`, asks for `adapter_ids[i]` and runs for
    `tokens[i]` steps. All are integers, so that its simulation is the same everywhere.

    arrival_us   (n,) ascending microseconds, from 0
    adapter_ids  (n,) lora_int_id of each request's adapter; 0 = base model
    tokens       (n,) at least 1
    ranks        (n,) of each request's adapter, at least 1, the same wherever the adapter is; 16 if
                 left out
    tenants      (n,) at least 0, of each request; the adapter's id if left out. With new weights a
                 tenant has another adapter id from then on

    Raises DtypeError, ShapeError or ServingError.

    >>> Trace([0, 10, 10], [1, 2, 1], [5, 5, 5]).adapters
    2
    """

    arrival_us: Integers
    adapter_ids: Integers
    tokens: Integers
    ranks: Integers = None  # type: ignore[assignment]  # filled in below
    tenants: Integers = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name, least in (("arrival_us", 0), ("adapter_ids", BASE_MODEL), ("tokens", 1)):
            self._keep(name, least)
        if (np.diff(self.arrival_us) < 0).any():
            raise ServingError(
                "arrival_us", "ascending times", "a request before its forerunner", "sort the trace"
            )
        others = ("ranks", 1, np.full(self.n, RANK)), ("tenants", 0, self.adapter_ids)
        for name, least, default in others:
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            else:
                self._keep(name, least)
                self._check_one_for_each_adapter(name)

    def _keep(self, name: str, least: int) -> None:
        """A copy of a field, checked."""
        array = as_integers(name, getattr(self, name))
        if array.shape != (self.n,):
            expected = f"one for each of {self.n} requests"
            raise ShapeError(name, expected, f"shape {array.shape}", "give equal lengths")
        if array.size and array.min() < least:
            raise ServingError(name, f"at least {least}", str(array.min()), "correct the trace")
        object.__setattr__(self, name, array.copy())

    def _check_one_for_each_adapter(self, name: str) -> None:
        values = getattr(self, name)
        _, first, number = np.unique(self.adapter_ids, return_index=True, return_inverse=True)
        if (values != values[first][number]).any():
            remedy = "give other weights another adapter id"
            raise ServingError(name, "one for each adapter", "two for the same id", remedy)

    def with_ranks(self, ranks: Sequence[int]) -> Trace:
        """The same requests, with adapters of these ranks, each as likely; a tenant keeps its own.

        >>> sorted(set(draw_trace(100, 9).with_ranks([8, 64]).ranks.tolist()))
        [8, 64]
        """
        check_several("ranks", ranks, "ranks of adapters")
        of_each = np.array([check_count("ranks", rank, 1) for rank in ranks], np.int64)
        if not of_each.size:
            raise ServingError("ranks", "at least one", "none", "name the ranks of adapters")
        chosen = of_each[mixed(self.tenants) % np.uint64(len(of_each))]
        return replace(self, ranks=chosen)

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
    arrivals: str = "poisson",
    updates: float = 0.0,
    turnover: float = 0.0,
    seed: int = 0,
) -> Trace:
    """Requests that arrive at random for adapters of unequal popularity.

    Semantics: there are `rate / burst` arrivals a second on average; each brings a burst of
    requests for one adapter, until there are `requests` of them. The size of a burst is geometric
    with mean `burst`. Adapter k of 1..adapters is drawn with a probability in proportion to
    `k ** -alpha`. Tokens are geometric. Arrivals are

    poisson      a Poisson process
    diurnal      one whose rate rises and falls by 0.8 of its mean, in three waves
    flash-crowd  one whose rate is four times as high in one tenth of the time, from 0.4 of it on:
                 what comes in addition is all for one adapter that was never asked for before
    bursty       a Gamma process: the deviation of the gaps is four times their mean

    An update gives an adapter new weights, and so another id; its tenant remains. Turnover takes an
    adapter away, and puts a new one, of another tenant, in its place.

    requests     how many
    adapters     how many there are; id 1 is the most popular, ids beyond come with time
    rate         requests per second, on average
    alpha        Zipf's exponent; 0 = all alike
    burst        mean requests per arrival, at least 1
    mean_tokens  at least 1
    arrivals     one of the four
    updates, turnover  per second, each of an adapter that is drawn from all alike
    seed         the same seed draws the same trace

    Raises ServingError, DtypeError or ValueRangeError. Source: S-LoRA (arXiv 2311.03285), section
    7, draws adapters by a power law too; its bursts come from a Gamma process.

    >>> trace = draw_trace(1000, adapters=10)
    >>> trace.n, trace.adapters, bool((trace.adapter_ids == 1).sum() > 200)
    (1000, 10, True)
    >>> changing = draw_trace(1000, adapters=10, updates=1.0)
    >>> changing.adapters > 10, int(changing.tenants.max())
    (True, 10)
    """
    requests, adapters = check_count("requests", requests, 0), check_count("adapters", adapters, 1)
    rate = check_number("rate", rate, least=1e-6)
    alpha = check_number("alpha", alpha, least=0, limit=100)
    burst = check_number("burst", burst, least=1, limit=2**53)
    mean_tokens = check_number("mean_tokens", mean_tokens, least=1, limit=2**53)
    changes = [check_number("updates", updates, 0), check_number("turnover", turnover, 0)]
    if arrivals not in ARRIVALS:
        got = repr(arrivals)
        raise ServingError("arrivals", f"one of {ARRIVALS}", got, "choose one of them")
    rng = np.random.default_rng(check_count("seed", seed, 0, math.inf))
    with fits_memory("requests", requests):
        sizes = rng.geometric(1 / burst, requests)
    sizes = np.minimum(sizes, requests)  # what is beyond is cut off
    sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), requests)) + 1]
    times = arrival_times(rng, arrivals, len(sizes), burst / rate * 1e6)
    with fits_memory("adapters", adapters):
        share = np.arange(1, adapters + 1, dtype=np.float64) ** -alpha
    ids = 1 + np.searchsorted(np.cumsum(share) / share.sum(), rng.random(len(sizes)))
    ids = np.minimum(ids, adapters)  # the last sum may round to below 1
    tenants = ids
    if any(changes):
        ids, tenants = changed(rng, adapters, times, ids, *changes)
    if arrivals == "flash-crowd":
        ids, tenants = ids.copy(), tenants.copy()
        crowd = of_crowd(rng, times, len(sizes) * burst / rate * 1e6)
        ids[crowd] = tenants[crowd] = ids.max(initial=adapters) + 1
    times, ids, tenants = (np.repeat(each, sizes)[:requests] for each in (times, ids, tenants))
    tokens = rng.geometric(1 / mean_tokens, requests)
    others = {"tenants": tenants} if any(changes) else {}
    return Trace(times, ids, tokens, **others)


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
