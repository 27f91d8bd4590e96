"""Imports of a call: none but of other libraries, and none that a fork could leave half done."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.help.planting import run_python

pytestmark = pytest.mark.once

# Names the modules that are looked for from here on, unless a fork would wait until they are there.
WATCH = """
import sys
from numba.core.compiler_lock import global_compiler_lock
from sgmv import extras
found = set()
class Watch:
    def find_spec(self, name, path=None, target=None):
        held = global_compiler_lock.is_locked() or extras._importing._is_owned()
        found.add((name, 'held' if held else 'not held'))
sys.meta_path.insert(0, Watch())
"""
SURFACE = """
from tests.help import surface
from sgmv import compat
import sgmv.compat.peft
{watch}
for name, make in surface.CALLS.items():
    before = set(found)
    call, arguments = make()
    call(**arguments)
    for module, held in found - before:
        if held != 'held':
            print(name, module)
"""


def test_no_call_imports_what_a_fork_may_interrupt() -> None:
    done = run_python(SURFACE.replace("{watch}", WATCH), timeout=300)
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr


BFLOAT16 = """
import sgmv, sys
from sgmv.compat import vllm
{before}
{watch}
{call}
print(*[held for name, held in found if name == 'ml_dtypes'])
"""
TORCH = """
a = torch.ones(2, 2, dtype=torch.bfloat16)
vllm.bgmv_shrink(a, a[None], a.clone(), torch.tensor([0, -1]))
"""


@pytest.mark.parametrize("where", ["a file", "a tensor"])
def test_ml_dtypes_is_imported_where_a_fork_waits(where: str, tmp_path: Path) -> None:
    if where == "a tensor":
        pytest.importorskip("torch")
        before, call = "import torch", TORCH
    else:
        ones = np.ones((2, 2), ml_dtypes.bfloat16)
        name = "base_model.model.up.lora"
        save_file(
            {f"{name}_A.weight": ones, f"{name}_B.weight": ones},
            tmp_path / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        before, call = "", f"sgmv.load_peft({str(tmp_path)!r})"
    program = BFLOAT16.format(before=before, watch=WATCH, call=call)
    done = run_python(program)
    assert done.stdout.split() == ["held"], done.stderr


FORK = """
import os, sys, threading, time
from sgmv import extras
thread = threading.Thread(target=extras.load, args=('slow',))
thread.start()
while 'slow' not in sys.modules:
    time.sleep(0.001)
child = os.fork()
if child == 0:
    os._exit(0 if extras.load('slow').done else 1)
deadline = time.monotonic() + 20
while time.monotonic() < deadline:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        print(os.waitstatus_to_exitcode(status))
        break
    time.sleep(0.01)
else:
    os.kill(child, 9)
    print('the child hangs')
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_in_the_midst_of_an_import(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.5)\ndone = True\n")
    done = run_python(FORK, tmp_path, timeout=60, PYTHONWARNINGS="ignore")
    assert done.stdout.split() == ["0"], done.stdout + done.stderr
