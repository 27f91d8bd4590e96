"""The process of `benchmarks/engine.py`: an engine of vLLM's, and jobs that it runs.

It reads {"model", "engine"} as a line of JSON from standard input, then a job a line, and prints a
line "answer: " and JSON with each job's result; at the end of its input, what it knows of itself:

    {"do": "generate", "requests": [[prompt, adapter, tokens], ...]}   tokens, seconds, peak
    {"do": "load", "adapter": [number, directory], "inplace": true}    an adapter, perhaps again
    {"do": "pin", "adapter": [number, directory]}
    {"do": "logprobs", "requests": ...}                                of every first token
    {"do": "traffic", "requests": ..., "seconds": 60, "seed": 0}       random arrivals, see there

adapter is null for the base model alone. A margin is how far apart a request's two likeliest tokens
were at the closest: less than what another order of sums can do to it decides nothing.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from typing import Any


def prompt_of(request: Any) -> Any:
    """A request's prompt as vLLM takes it."""
    return {"prompt_token_ids": request[0]}


def adapter_of(adapter: Any, inplace: bool = False) -> Any:
    """The adapter [number, directory] as vLLM takes it."""
    from vllm.lora.request import LoRARequest

    if adapter is None:
        return None
    number, path = adapter
    return LoRARequest(f"adapter-{number}", number, path, load_inplace=inplace)


def sampling(tokens: int, **more: Any) -> Any:
    """Greedy, of exactly this number of tokens."""
    from vllm import SamplingParams

    length = {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True}
    return SamplingParams(temperature=0, detokenize=False, **length, **more)


def generate(llm: Any, job: Any) -> Any:
    """All requests at once."""
    requests, margins = job["requests"], job.get("margins", False)
    used, start = cpu_seconds(), time.perf_counter()
    outputs = llm.generate(
        [prompt_of(request) for request in requests],
        [sampling(request[2], **({"logprobs": 2} if margins else {})) for request in requests],
        lora_request=lora_of(requests),
        use_tqdm=False,
    )
    seconds = time.perf_counter() - start
    foreign = None if used is None else max(0.0, (cpu_seconds() - used) / seconds)
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"tokens": tokens, "seconds": seconds, "foreign_cores": foreign, "peak": peak}
    if margins:
        found["margins"] = [margin(o.outputs[0].logprobs) for o in outputs]
    return found


def cpu_seconds() -> Any:
    """What other processes have used of all cores; None where the system does not say.

    As benchmarks/machine.py has it, which imports sgmv.
    """
    try:
        with open("/proc/stat") as lines:
            user, nice, system, _idle, _wait, irq, soft, steal = map(int, next(lines).split()[1:9])
    except OSError:
        return None
    own = os.times()
    busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system


def lora_of(requests: Any) -> Any:
    """The adapters of requests; None where no request names one, as an engine without LoRA asks."""
    adapters = [adapter_of(request[1]) for request in requests]
    return adapters if any(adapters) else None


def margin(logprobs: Any) -> float:
    """The least difference between the two likeliest tokens of a step."""
    least = float("inf")
    for step in logprobs:
        best, second = sorted((each.logprob for each in step.values()), reverse=True)[:2]
        least = min(least, best - second)
    return least


def logprobs(llm: Any, job: Any) -> Any:
    """The log-probability of every token, in their order, as each request's first.

    Not those of prompts: with LoRA vLLM 0.32 ends on them: its metadata has other rows.
    """
    requests, size = job["requests"], llm.model_config.get_vocab_size()
    outputs = llm.generate(
        [prompt_of(request) for request in requests],
        [sampling(1, logprobs=size) for _ in requests],
        lora_request=lora_of(requests),
        use_tqdm=False,
    )
    return [
        [output.outputs[0].logprobs[0][token].logprob for token in range(size)]
        for output in outputs
    ]


def traffic(llm: Any, job: Any) -> Any:
    """Random arrivals for some seconds, then what differed from the same request alone.

    Each request has been served alone before; those with a small margin are left out.
    """
    alone = [generate(llm, {"requests": [request], "margins": True}) for request in job["requests"]]
    clear = [i for i, one in enumerate(alone) if one["margins"][0] > job["margin"]]
    engine, chance = llm.llm_engine, random.Random(job["seed"])
    asked: dict[str, int] = {}
    wrong, served, most = [], 0, 0
    end = time.monotonic() + job["seconds"]
    while asked or time.monotonic() < end:
        while time.monotonic() < end and len(asked) < 24 and chance.random() < 0.5:
            index = chance.choice(clear)
            request, name = job["requests"][index], f"{served + len(asked)}-{chance.random()}"
            engine.add_request(
                name,
                prompt_of(request),
                sampling(request[2]),
                lora_request=adapter_of(request[1]),
            )
            asked[name] = index
        most = max(most, len(asked))
        for output in engine.step():
            if output.finished:
                index = next(asked.pop(name) for name in list(asked) if known(output, name))
                served += 1
                if list(output.outputs[0].token_ids) != alone[index]["tokens"][0]:
                    wrong.append(index)
    return {"served": served, "wrong": wrong, "clear": len(clear), "most_at_once": most}


def known(output: Any, name: str) -> bool:
    """Whether an output is this request's; vLLM may add to the name."""
    return bool(output.request_id == name or output.request_id.startswith(f"{name}-"))


def load(llm: Any, job: Any) -> Any:
    """Load an adapter; in place, over the weights that its number has."""
    return bool(llm.llm_engine.add_lora(adapter_of(job["adapter"], job.get("inplace", False))))


def pin(llm: Any, job: Any) -> Any:
    """Keep an adapter in its slot."""
    return bool(llm.llm_engine.pin_lora(job["adapter"][0]))


JOBS = {
    "generate": generate, "logprobs": logprobs, "traffic": traffic, "load": load, "pin": pin,
}  # fmt: skip


def main() -> None:
    """Make the engine, run job after job as they come, and print each one's result."""
    asked = json.loads(sys.stdin.readline())
    import torch._dynamo.utils
    from vllm import LLM

    options = {
        "skip_tokenizer_init": True, "enforce_eager": True, "seed": 0, "max_model_len": 512,
        "max_num_seqs": 32, "dtype": "float32", **asked["engine"],
    }  # fmt: skip
    llm = LLM(asked["model"], **options)
    for line in sys.stdin:
        job = json.loads(line)
        answer(JOBS[job["do"]](llm, job))
    answer(
        {
            "sgmv": "sgmv.compat.vllm.engine" in sys.modules,
            "numba": "numba" in sys.modules,
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        }
    )


def answer(result: Any) -> None:
    """Print a line that no other print has begun."""
    sys.stdout.flush()
    print("\nanswer: " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
