"""Random batches by a campaign of sgmv's: in several processes, on Ray, with a journal."""

import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from reference import drawn
from reference.loading import load
from reference.runner import Found, Piece, draw
from reference.signatures import Kernel


def work(asked: list[Any]) -> Found:
    """What a worker does: `draw`, of [kernel, like, torch, piece], values of JSON.

    >>> work(["math:sqrt", "reference", False, ["float32", 0, 0, 1]])[0][2]
    'raised'
    """
    kernel, like, torch, piece = asked
    return draw(_load(kernel), like, torch, Piece(*piece))


Where = tuple[int, str | None, Path | None, bool]


def run(kernel: str, like: str, torch: bool, pieces: list[Piece], where: Where) -> Iterable[Found]:
    """What `draw` finds in each piece, in their order; the first that fails is named at once.

    where  processes, Ray's address, a journal, whether to go on with it: sgmv/campaign.py

    Raises as `sgmv.campaign.run` does.
    """
    from sgmv import campaign  # with numba, which a check in one process does without

    path, _, names = kernel.rpartition(":")
    if path.endswith(".py"):
        kernel = f"{Path(path).resolve()}:{names}"  # a worker may run elsewhere
    named = False

    def heard(number: int, found: Found) -> None:
        nonlocal named
        if found and not named:
            named, piece = True, pieces[number]
            sys.stderr.write(f"failed: {drawn.name(piece.seed, found[0][0], piece.dtype)}\n")

    asked = [[kernel, like, torch, list(piece)] for piece in pieces]
    whole = campaign.Campaign("random batches", "reference.pieces:work", asked)
    return campaign.run(whole, campaign.Where(*where), heard)


@cache
def _load(kernel: str) -> tuple[Kernel, ...]:
    return load(kernel)
