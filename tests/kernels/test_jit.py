"""The cache on disk: hit by the next process, missed after an edit of any file that is compiled."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numba.core import event

from sgmv.kernels import jit
from sgmv.kernels.call import start
from sgmv.replicas.events import run
from tests.conftest import JITTED
from tests.help.acceptance import backends
from tests.help.planting import ROOT, Fault, change, imported, plant, run_python

pytestmark = pytest.mark.once


jitted = pytest.mark.skipif(not JITTED, reason="nothing is compiled")
PROGRAM = """
import numpy as np, sgmv, sys
one = np.ones((1, 1), np.float16)
stack = sgmv.AdapterStack.from_adapters([(one, one)])
for backend in sys.argv[1:] or [None]:
    print(sgmv.add_lora(np.zeros_like(one), one, stack, [0], backend=backend)[0, 0])
"""
COUNT = """
from sgmv.kernels import call, jit
compiled = [*jit._entries.values(), call.start]
print(sum(sum(c.stats.cache_hits.values()) for c in compiled))
print(sum(sum(c.stats.cache_misses.values()) for c in compiled))
"""
# The results become twice as large, or eight times: what each backend alone makes of it.
EDITS = {
    "loops": (Fault("kernels.floats", "np.float32(2.0**112)", "np.float32(2.0**113)"), "8.0"),
    "tiles": (Fault("kernels.tile_kernels", "np.float32(vector(", "np.float32(2 * vector("), "2.0"),
}


@jitted
@pytest.mark.compiles
def test_hit_by_the_next_process_and_missed_after_an_edit(tmp_path: Path) -> None:
    """A process compiles, or finds, each backend's kernels, a call's two parts, and helpers."""
    names = backends(np.float16)
    helpers = sys.platform.startswith("linux")  # native threads, whose life is compiled
    kernels = str(2 * len(names) + 2 + helpers)

    def printed() -> list[str]:
        variables = {"NUMBA_CACHE_DIR": None, "SGMV_NUM_THREADS": "2"}
        done = run_python(PROGRAM + COUNT, tmp_path, arguments=names, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    plant(tmp_path)
    assert printed() == ["1.0" for _ in names] + ["0", kernels]
    assert printed() == ["1.0" for _ in names] + [kernels, "0"]
    for name in names:
        change(tmp_path, EDITS[name][0])
    assert printed() == [EDITS[name][1] for name in names] + ["0", kernels]


@pytest.mark.parametrize("package", ["kernels", "replicas"])
def test_an_edit_of_any_compiled_file_counts(package: str, tmp_path: Path) -> None:
    """A comment is enough: what a change means is not asked."""
    folder = plant(tmp_path) / "sgmv" / package
    before = jit.digest_of(folder)
    for path in folder.glob("*.py"):
        text = path.read_text()
        path.write_text(text + "# edited\n")
        assert jit.digest_of(folder) != before, path
        path.write_text(text)
    assert jit.digest_of(folder) == before


@jitted
@pytest.mark.parametrize(("package", "function"), [("kernels", start), ("replicas", run)])
def test_an_edit_elsewhere_does_not(package: str, function: Any) -> None:
    """What is kept of a function belongs to its own folder's sources."""
    assert jit.digest_of(ROOT / "sgmv" / package) in function._cache._files._stamp


@jitted
@pytest.mark.compiles
def test_works_where_nothing_can_be_written() -> None:
    """numba, as if no folder would take a cache, refuses; the kernels compile all the same."""
    no_cache = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "c.CompileResultCacheImpl._locator_classes = []\n"
    )
    done = run_python(no_cache + PROGRAM, NUMBA_CACHE_LOCATOR_CLASSES="")
    assert done.stdout.split() == ["1.0"], done.stderr


def test_a_planted_copy_hears_nothing_of_what_is_compiled_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each copy's notice logged its warning once more, in any test that compiled later."""
    monkeypatch.setattr(jit.notice, "seconds", 0.0)
    copy = imported(plant(tmp_path), monkeypatch)["sgmv.kernels.jit"].notice
    ours = SimpleNamespace(py_func=SimpleNamespace(__module__="sgmv.kernels.tiles"))
    with event.trigger_event("numba:compile", data={"dispatcher": ours}):
        pass
    assert copy.seconds == 0.0 < jit.notice.seconds
