"""A server's steps: asyncio takes requests, a thread computes, two slots serve three adapters.

python examples/server_step.py

The event loop stays free, as `add_lora` releases the GIL. Several threads may call it at once.
"""

import asyncio

import numpy as np

import sgmv
from sgmv.serving import AdapterSlots, LoRARequest, Scheduler, Step, next_step

h = 512
MODULES = {f"layers.{i}.q_proj": (h, h) for i in range(4)}


def read(path: str) -> dict[str, sgmv.Adapter]:
    """In place of PEFT's directories, which AdapterSlots reads if `read` is left out."""
    rng = np.random.default_rng(len(path))
    A, B = rng.standard_normal((2, 16, h), "float32")
    return dict.fromkeys(MODULES, sgmv.Adapter(A, B.T, scaling=0.01))


slots = AdapterSlots(max_loras=2, max_cpu_loras=3, max_lora_rank=16, modules=MODULES, read=read)
scheduler = Scheduler[str](max_loras=2)
NAMES = ["french", "greek", "latin"]
FRENCH, GREEK, LATIN = (LoRARequest(n, i, f"adapters/{n}") for i, n in enumerate(NAMES, start=1))


def forward(step: Step[str]) -> None:
    """The model; each layer's base product would come before `add_lora`."""
    x = np.ones((step.n, h), "float32")
    for module in MODULES:
        x = step.add_lora(module, np.zeros((step.n, h), "float32"), x)


async def serve(requests: dict[str, tuple[LoRARequest | None, int]]) -> None:
    """Run every request for its number of tokens."""
    left = {request_id: tokens for request_id, (_, tokens) in requests.items()}
    for request_id, (lora, _) in requests.items():
        scheduler.add(request_id, lora)
    while left:
        step = await asyncio.to_thread(next_step, scheduler, slots)  # may read from disk
        print(f"rows of {', '.join(step.rows)}; adapters {slots.active}; slots {step.slots}")
        for request_id, lora, error in step.failed:  # the adapter could not be loaded
            print(f"{request_id} with {lora.lora_name} dropped: {error}")
            del left[request_id]
        await asyncio.to_thread(forward, step)
        for request_id in step.rows:
            left[request_id] -= 1
            if not left[request_id]:
                scheduler.finish(request_id)
                del left[request_id]


if __name__ == "__main__":
    sgmv.set_num_threads(min(2, sgmv.get_num_threads()))  # of one call; leaves the other cores free
    asyncio.run(serve({"r0": (FRENCH, 2), "r1": (GREEK, 3), "r2": (LATIN, 1), "r3": (None, 2)}))
