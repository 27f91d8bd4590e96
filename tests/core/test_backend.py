"""Which backend runs a call: the best that can, or the one that is asked for."""

from __future__ import annotations

import numpy as np
import pytest

import sgmv
from reference.workloads import real
from sgmv import backend
from sgmv.cpu import JITTED, VECTOR_BITS
from sgmv.errors import SgmvError
from tests.help.acceptance import stack_of
from tests.help.planting import run_python

pytestmark = pytest.mark.usefixtures("one_blas_thread")
jitted = pytest.mark.skipif(not JITTED, reason="plain Python has the loops alone")
vectors = pytest.mark.skipif(VECTOR_BITS == 0, reason="this CPU, or this run, has no tiles")


def test_the_backend_is_the_best_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGMV_BACKEND", raising=False)
    best = "tiles" if VECTOR_BITS else "loops"
    single, double = np.dtype(np.float32), np.dtype(np.float64)
    assert backend.choose(None, single) == best
    assert backend.choose(None, double) == "loops"
    assert backend.choose("loops", single) == "loops"
    for asked in ("loops", "tiles"):
        monkeypatch.setenv("SGMV_BACKEND", asked)
        assert backend.choose(None, single) == (asked if VECTOR_BITS else "loops")
        assert backend.choose(None, double) == "loops"
    monkeypatch.setenv("SGMV_BACKEND", "cuda")
    with pytest.raises(SgmvError, match=r"^backend: expected amx, tiles or loops, got 'cuda'"):
        backend.choose(None, single)


@pytest.mark.once
@jitted
@vectors
def test_the_environment_names_the_backend() -> None:
    """The loops' bits, which on this batch are not the tiles'."""
    program = (
        "import sgmv; from reference.workloads import real; "
        "from tests.help.acceptance import stack_of; "
        "c = real('env', '', [0, 0], {0: 9}, 300, 70); "
        "y = sgmv.add_lora(c.y.copy(), c.x, stack_of(c), [0, 0]); print(y.tobytes().hex())"
    )
    case = real("env", "", [0, 0], {0: 9}, 300, 70)
    bits = {}
    for name in ("tiles", "loops"):
        y = sgmv.add_lora(case.y.copy(), case.x, stack_of(case), [0, 0], backend=name)
        bits[name] = y.tobytes().hex()
    assert bits["tiles"] != bits["loops"]
    for name in ("tiles", "loops"):
        assert run_python(program, SGMV_BACKEND=name).stdout.strip() == bits[name]
