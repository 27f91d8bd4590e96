"""vLLM on sgmv in replicas of Ray Serve: a request goes where its adapter is loaded.

python examples/ray_serve.py MODEL ADAPTERS [REPLICAS]

MODEL as vLLM takes it; ADAPTERS, a directory with a directory for each adapter, by its name:
curl localhost:8000 -d '{"prompt": "Bonjour", "adapter": "french", "sampling": {"max_tokens": 8}}'
Needs the extras ray and vllm. docs/cluster.md says why each part is as it is.
"""

import asyncio
import itertools
import os
import sys
import uuid
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from starlette.requests import Request
from starlette.responses import JSONResponse

KEPT = 64  # adapters in the memory of a replica: of its engine, and in Serve's list
TRIES = 3  # a request that ends every engine that takes it ends no more of them


@serve.deployment(max_ongoing_requests=256, health_check_period_s=2)
class Replica:
    """An engine: its steps hold rows of all requests that are here, whatever their adapters."""

    def __init__(self, model: str, adapters: str, engine: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs, AsyncLLMEngine

        arguments = AsyncEngineArgs(model=model, enable_lora=True, max_cpu_loras=KEPT, **engine)
        self.engine = AsyncLLMEngine.from_engine_args(arguments)
        self.adapters, self.numbers = Path(adapters), {}

    @serve.multiplexed(max_num_models_per_replica=KEPT)
    async def adapter(self, name: str) -> Any:
        """Load it: from then on Serve sends its requests here."""
        from vllm.lora.request import LoRARequest

        if name not in os.listdir(self.adapters):
            raise FileNotFoundError(f"no adapter {name!r}")
        number = self.numbers.setdefault(name, len(self.numbers) + 1)
        loaded = LoRARequest(name, number, str(self.adapters / name))
        await self.engine.add_lora(loaded)
        return loaded

    async def generate(self, prompt: str | list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        """An answer, of the base model where the request names no adapter."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        name, where = serve.get_multiplexed_model_id(), serve.get_replica_context().replica_tag
        params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        asked = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        try:
            lora = await self.adapter(name) if name else None
            outputs = self.engine.generate(asked, params, uuid.uuid4().hex, lora_request=lora)
            [answer] = [each.outputs[0] async for each in outputs]
        except EngineDeadError:
            os._exit(1)  # Serve starts another replica, and the gateway asks again
        return {"text": answer.text, "tokens": list(answer.token_ids), "replica": where}

    async def check_health(self) -> None:
        """Serve asks; what waits for an adapter of a dead engine would wait for ever."""
        if self.engine.errored:
            os._exit(1)

    async def report(self) -> dict[str, Any]:
        """Which replica this is, the adapters that its engine has in memory, requests under way."""
        there = await self.engine.list_loras()
        return {
            "replica": serve.get_replica_context().replica_tag,
            "process": os.getpid(),
            "adapters": sorted(name for name, number in self.numbers.items() if number in there),
            "running": self.engine.get_num_unfinished_requests(),
        }


@serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
class Gateway:
    """Tells Serve which adapter a request wants, and asks again if a replica dies over it."""

    def __init__(self, replicas: Any) -> None:
        self.replicas = replicas

    async def __call__(self, request: Request) -> Any:
        try:
            return await self.ask(**await request.json())
        except FileNotFoundError as error:
            return JSONResponse({"error": str(error)}, status_code=404)

    async def ask(
        self, prompt: str | list[int], adapter: str = "", sampling: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One whole answer. Nothing of it is told before its end, so asking again is safe."""
        replicas = self.replicas.options(multiplexed_model_id=adapter)
        for tries in itertools.count(1):
            try:
                answer = await replicas.generate.remote(prompt, sampling or {})
                return {**answer, "tries": tries}
            except RayActorError:
                if tries == TRIES:
                    raise
                await asyncio.sleep(0.1)


def app(
    model: str, adapters: str, replicas: int = 2, cores: float = 1, **engine: Any
) -> serve.Application:
    """What `serve.run` takes; engine: what vLLM's AsyncEngineArgs take besides."""
    # Left to vLLM, all engines of a machine would bind their threads to the same cores.
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, int(cores)))}
    actor = {"num_cpus": cores, "runtime_env": {"env_vars": threads}}
    engines = Replica.options(num_replicas=replicas, ray_actor_options=actor)
    return Gateway.bind(engines.bind(model, adapters, engine))


if __name__ == "__main__":
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")  # engines end with replicas
    model, adapters, *replicas = sys.argv[1:]
    engine = {"max_loras": 8, "max_lora_rank": 64, "kv_cache_memory_bytes": 4 << 30}
    serve.run(app(model, os.path.abspath(adapters), *map(int, replicas), **engine), blocking=True)
