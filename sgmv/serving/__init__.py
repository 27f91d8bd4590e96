"""Serving: which adapters are in memory, which requests run, and one step of the model.

    requests ──Scheduler──> running ──────AdapterSlots──────> slots ──────Step──────> y, per layer
    waiting, oldest first   at most       disk -> host memory         rows -> segments,
    FIFO, never overtaken   max_loras     -> slots, evicted           then one add_lora
    too often               adapters      by LRU or FIFO,             for every layer
                                          or read ahead by a thread
                                            ^
                                       AdapterStore: very many adapters, one directory or address

Start reading at sgmv/serving/step.py. The simulator drives the same Scheduler and the same rules of
eviction with requests that are only numbers: `python -m sgmv simulate`; one of many servers behind
a router does the same in compiled code.
"""

from sgmv.serving.replicas import (
    Failure,
    Placement,
    ReplicasOutcome,
    fewest_replicas,
    simulate_replicas,
)
from sgmv.serving.requests import LoRAMixture, LoRARequest
from sgmv.serving.residency import POLICIES, Counters
from sgmv.serving.scheduler import Scheduler
from sgmv.serving.simulate import Costs, Outcome, simulate
from sgmv.serving.slots import AdapterSlots
from sgmv.serving.step import Step, make_step, next_step
from sgmv.serving.store import AdapterStore
from sgmv.serving.traces import Trace, draw_trace

__all__ = [
    "POLICIES",
    "AdapterSlots",
    "AdapterStore",
    "Costs",
    "Counters",
    "Failure",
    "LoRAMixture",
    "LoRARequest",
    "Outcome",
    "Placement",
    "ReplicasOutcome",
    "Scheduler",
    "Step",
    "Trace",
    "draw_trace",
    "fewest_replicas",
    "make_step",
    "next_step",
    "simulate",
    "simulate_replicas",
]
