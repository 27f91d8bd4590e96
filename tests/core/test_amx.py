"""Where tile products are used: for bfloat16 alone, and only where they are permitted and right."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import sgmv
from reference.workloads import real
from sgmv import amx, backend, cpu
from sgmv.cpu import JITTED, VECTOR_BITS
from sgmv.errors import SgmvError
from sgmv.kernels import cpu as kernels_cpu
from sgmv.kernels.amx_instructions import CPU, EMULATION
from tests.help import acceptance

BF16 = np.dtype(ml_dtypes.bfloat16)
pytestmark = [
    pytest.mark.skipif(not JITTED or VECTOR_BITS == 0, reason="no compiled tiles"),
    pytest.mark.usefixtures("one_blas_thread", "emulated_amx"),
]


@pytest.mark.once
def test_bfloat16_alone_has_tile_products() -> None:
    single = np.dtype(np.float32)
    assert backend.choose(None, single, bfloat16=True) == "amx"
    assert backend.choose("tiles", single, bfloat16=True) == "tiles"
    assert backend.choose(None, single) == "tiles"
    assert backend.choose(None, np.dtype(np.float64), bfloat16=True) == "loops"
    with pytest.raises(SgmvError, match="tiles or loops but for bfloat16"):
        backend.choose("amx", single)
    assert sgmv.info().amx == "emulated"
    assert sgmv.info().backend["bfloat16"] == "amx"
    mixed = real("mixed", "", [0], {0: 3}, 40, 20, dtype=BF16, weight_dtype=np.float32)
    assert acceptance.backends_of(mixed) == []


@pytest.mark.once
def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment, by a CPU or a system without it, or by a trial that went wrong."""
    features = {"amx-tile": True, "amx-bf16": True}
    monkeypatch.setattr(kernels_cpu, "compiled_for", lambda: features)
    for asked, permitted, expected in (
        ("0", True, None), ("", True, CPU), ("1", True, CPU), ("", False, None),
        ("emulate", False, EMULATION),
    ):  # fmt: skip
        monkeypatch.setenv("SGMV_AMX", asked)
        monkeypatch.setattr(cpu, "permits_amx", lambda permitted=permitted: permitted)
        assert type(amx.unit()) is type(expected)
        if expected is None:
            permission = "off; it needs the vector tiles, and Linux's permission"
            assert amx.state() == ("off by SGMV_AMX=0" if asked == "0" else permission)
    monkeypatch.setenv("SGMV_AMX", "")
    monkeypatch.setenv("SGMV_BFLOAT16", "exact")
    assert amx.unit() is None
    assert amx.state() == "off by SGMV_BFLOAT16=exact"
    monkeypatch.delenv("SGMV_BFLOAT16")
    features["amx-bf16"] = False
    monkeypatch.setenv("SGMV_AMX", "1")
    assert amx.unit() is None
    assert amx.state() == "none in this CPU"
    monkeypatch.setenv("SGMV_AMX", "emulate")
    monkeypatch.setattr(amx, "_is_right", lambda: False)
    is_on = amx.is_on.__wrapped__
    with pytest.warns(RuntimeWarning, match="wrong sums"):
        assert not is_on()
    monkeypatch.setattr(amx, "is_on", lambda: False)
    assert amx.state() == "off, it gave wrong sums"
    assert backend.choose(None, np.dtype(np.float32), bfloat16=True) == "tiles"
    with pytest.raises(SgmvError, match="tiles or loops where AMX is not on"):
        backend.choose("amx", np.dtype(np.float32), bfloat16=True)
