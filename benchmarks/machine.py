"""Where and with what a run was made: the facts that a record carries."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import threadpoolctl

from sgmv.cpu import cores

# The instruction sets that decide how fast such kernels can be.
FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
    "asimd", "asimdhp", "bf16", "sve", "sve2",
)  # fmt: skip
THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "SGMV_NUM_THREADS",
)  # fmt: skip


class Machine(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """`cores`: those this process may use. `caches`: bytes by level, one core's view.

    `vendor` and `family` as /proc/cpuinfo has them, for names such as "AMD EPYC" say little;
    records before them have neither.
    """

    cpu: str
    cores: int
    caches: dict[str, int]
    flags: list[str]
    system: str
    vendor: str = ""
    family: str = ""


class Blas(msgspec.Struct, forbid_unknown_fields=True):
    """`threads`: the pool size, or None where there is no pool to ask."""

    name: str
    threads: int | None
    environment: dict[str, str]


class Commit(msgspec.Struct, forbid_unknown_fields=True):
    """`dirty`: tracked files differ from the commit."""

    hash: str
    dirty: bool


def machine() -> Machine:
    info = _cpuinfo()
    present = set(info.get("flags", info.get("Features", "")).split())
    return Machine(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        cores=cores(),
        caches=_caches(),
        flags=[flag for flag in FLAGS if flag in present],
        system=f"{platform.system()} {platform.release()}",
        vendor=info.get("vendor_id") or info.get("CPU implementer", ""),
        family=" ".join(info[name] for name in ("cpu family", "model", "CPU part") if name in info),
    )


def slug(facts: Machine) -> str:
    """The machine in a file name: a new run on it replaces its old record."""
    cpu = re.sub(r"(\((r|tm)\)|[^a-z0-9])+", "-", facts.cpu.lower()).strip("-")
    return f"{cpu}-{facts.cores}c"


def available_memory() -> int:
    """Bytes that can be had without swapping; 8 GiB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 8 << 30


class CpuUse(NamedTuple):
    """Seconds: of the clock, of use since boot of this process's cores, and of those by itself."""

    clock: float
    everyone: float
    own: float


def cpu_use(pids: Sequence[int] = ()) -> CpuUse | None:
    """What is used up to now; None where the system does not say.

    What the host stole counts as used: it slows a timing as another process does. What `pids` used,
    processes that this one started, counts as its own.
    """
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    ticks = 0
    for name, *fields in map(str.split, lines):
        if name in mine:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    tick = os.sysconf("SC_CLK_TCK")
    own = os.times()
    mine_s = own.user + own.system + sum(map(_ticks, pids)) / tick
    return CpuUse(time.perf_counter(), ticks / tick, mine_s)


def _ticks(pid: int) -> int:
    """Of user and system time, fields 14 and 15 of /proc/PID/stat; the name may hold spaces."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def foreign_cores(before: CpuUse | None, after: CpuUse | None) -> float | None:
    """Cores that other processes kept busy between two `cpu_use()`, on average.

    >>> foreign_cores(CpuUse(0.0, 10.0, 5.0), CpuUse(4.0, 18.0, 9.0))
    1.0
    """
    if before is None or after is None:
        return None
    others = (after.everyone - before.everyone) - (after.own - before.own)
    return round(max(others, 0.0) / (after.clock - before.clock), 2)


def versions() -> dict[str, str]:
    """Versions of python and of what decides the timings; a package not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("numpy", "numba", "llvmlite", "torch", "jax", "mkl", "ml_dtypes"):
        try:
            found[package] = version(package)
            if package == "torch":
                import torch

                found[package] += f", {torch.get_num_threads()} threads"
        except PackageNotFoundError:
            continue
    return found


def blas() -> Blas:
    config = np.show_config(mode="dicts")
    built = config["Build Dependencies"]["blas"]
    return Blas(
        name=f"{built['name']} {built['version']}",
        threads=_blas_threads(),
        environment={k: os.environ[k] for k in THREAD_VARIABLES if k in os.environ},
    )


def commit(root: Path) -> Commit:
    """The repository's commit; "unknown" outside of git."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return Commit(git("rev-parse", "HEAD"), bool(changed))
    except (OSError, subprocess.CalledProcessError):
        return Commit("unknown", True)


def _blas_threads() -> int | None:
    pools = [p for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"]
    return max((pool["num_threads"] for pool in pools), default=None)


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo, empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in lines}


def _caches() -> dict[str, int]:
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = (index / "type").read_text().strip()
        if kind != "Instruction":
            level = (index / "level").read_text().strip()
            size = (index / "size").read_text().strip()  # "2048K"
            sizes[f"L{level}"] = int(size.rstrip("K")) << 10
    return sizes
