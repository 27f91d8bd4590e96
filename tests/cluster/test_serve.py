"""vLLM's engine in two replicas of Ray Serve on this machine: what examples/ray_serve.py says.

`make test-cluster` installs Ray and vLLM, which wants Python 3.11 or later.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from benchmarks import engine as engines
from benchmarks.engine import TINY, write_adapter
from tests.help.planting import ROOT

for name, title in (("ray", "Ray"), ("vllm", "vLLM")):
    if find_spec(name) is None:
        pytest.skip(f"{title} is not installed; see `make test-cluster`", allow_module_level=True)

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray Serve's, as it is imported
]

NAMES = [f"tenant-{i}" for i in range(1, 9)]
RANKS = (4, 16, 8)
SLOTS = 4  # less than there are adapters
TOKENS, PROMPTS = 12, 12
CLEAR = 1e-3  # of two tokens nearer than this, float32 sums in another order may take the other
CLIENTS = 8
LONG = 900  # seconds after which something hangs


class Asked(NamedTuple):
    """A request, "" for the base model, and the tokens with which one engine answers it."""

    prompt: list[int]
    adapter: str
    tokens: list[int]

    def arguments(self) -> dict[str, Any]:
        """What the gateway takes."""
        length = {"max_tokens": TOKENS, "min_tokens": TOKENS, "ignore_eos": True}
        sampling = {"temperature": 0, "detokenize": False, **length}
        return {"prompt": self.prompt, "adapter": self.adapter, "sampling": sampling}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and adapters of several ranks."""
    found = tmp_path_factory.mktemp("serve")
    TINY.write(found / "model")
    for i, name in enumerate(NAMES, start=1):
        write_adapter(found / "adapters" / name, TINY.modules(), RANKS[i % 3], seed=i)
    return found


@pytest.fixture(scope="module")
def asked(folder: Path) -> list[Asked]:
    """The same prompts for each adapter and for the base model, without those with a near tie."""
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(3, TINY.vocabulary, rng.integers(2, 40)).tolist() for _ in range(PROMPTS)
    ]
    adapters = {name: [i, str(folder / "adapters" / name)] for i, name in enumerate(NAMES, start=1)}
    wanted = [(prompt, name) for name in ("", *NAMES) for prompt in prompts]
    requests = [[prompt, adapters.get(name), TOKENS] for prompt, name in wanted]
    # One after the other: no answer can depend on another request.
    jobs = [{"do": "generate", "requests": [request], "margins": True} for request in requests]
    alone = engines.serve(
        "sgmv", folder / "model", jobs,
        {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        enable_lora=True, max_loras=len(NAMES), max_lora_rank=max(RANKS),
    )  # fmt: skip
    found = [
        Asked(prompt, name, one["tokens"][0])
        for (prompt, name), one in zip(wanted, alone.results, strict=True)
        if one["margins"][0] > CLEAR
    ]
    for name in ("", *NAMES):
        assert sum(one.adapter == name for one in found) >= PROMPTS // 2
    # A request that got another's adapter would be seen.
    assert len({(*one.prompt, *one.tokens) for one in found}) == len(found)
    return found


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def logs() -> list[Path]:
    """Where Ray keeps what its processes print, once it runs."""
    return []


def start(folder: Path, replicas: int, *, name: str, path: str, **engine: Any) -> Any:
    """The gateway of an application on the cluster that runs; half a core for each replica."""
    from ray import serve

    from examples import ray_serve

    engine |= {
        "skip_tokenizer_init": True, "seed": 0, "max_model_len": 128, "max_num_seqs": 32,
        "dtype": "float32", "max_loras": SLOTS, "max_lora_rank": max(RANKS),
        "kv_cache_memory_bytes": 64 << 20,
    }  # fmt: skip
    model, adapters = str(folder / "model"), str(folder / "adapters")
    application = ray_serve.app(model, adapters, replicas=replicas, cores=0.5, **engine)
    return serve.run(application, name=name, route_prefix=path)


@pytest.fixture(scope="module")
def gateway(folder: Path, port: int, logs: list[Path]) -> Iterator[Any]:
    """Two replicas on a cluster of their own."""
    import ray
    from ray import serve

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        environment.setenv("RAY_process_group_cleanup_enabled", "1")
        environment.setenv("RAY_worker_niceness", "0")  # 15, if left out: other programs come first
        # On a busy machine a replica is not taken for a full one, nor a proxy for a dead one.
        environment.setenv("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "10")
        environment.setenv("RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "10")
        environment.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
        environment.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "120")
        environment.setenv("PYTHONPATH", str(ROOT))
        for variable in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"):
            environment.setenv(variable, "1")
        started = ray.init(
            "local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20
        )
        logs.append(Path(started.address_info["session_dir"]) / "logs")
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield start(folder, 2, name="default", path="/")
        serve.shutdown()
        ray.shutdown()


def ask(gateway: Any, requests: Sequence[Asked]) -> list[dict[str, Any]]:
    """All at once; their answers."""
    sent = [gateway.ask.remote(**request.arguments()) for request in requests]
    return [each.result(timeout_s=LONG) for each in sent]


def check(requests: Sequence[Asked], answers: Sequence[dict[str, Any]]) -> None:
    """Each has the tokens of the single engine."""
    for request, answer in zip(requests, answers, strict=True):
        assert answer["tokens"] == request.tokens, (request.adapter, answer)


def reports() -> dict[str, dict[str, Any]]:
    """What each replica that lives says of itself, by its name."""
    from ray import serve

    replicas = serve.get_deployment_handle("Replica", "default")
    found = replicas.broadcast("report").results(timeout_s=LONG, return_exceptions=True)
    return {each["replica"]: each for each in found if isinstance(each, dict)}


def places() -> dict[str, list[str]]:
    """The adapters that each replica has loaded."""
    return {name: report["adapters"] for name, report in reports().items()}


def wait_until(true: Callable[[], Any], clients: Sequence[Future[None]] = ()) -> Any:
    """What it returns as soon as that is true. Raises the error of a client that failed."""
    end = time.monotonic() + LONG
    while not (found := true()):
        for each in clients:
            if each.done():
                each.result()
        assert time.monotonic() < end, true
        time.sleep(0.05)
    return found


def settle(gateway: Any, asked: Sequence[Asked]) -> dict[str, list[str]]:
    """Ask for one adapter after the other until none is loaded anew; where they are."""
    firsts = [next(one for one in asked if one.adapter == name) for name in NAMES]
    before: dict[str, list[str]] = {}

    def settled() -> bool:
        nonlocal before
        for one in firsts:
            check([one], ask(gateway, [one]))
        before, earlier = places(), before
        return before == earlier

    wait_until(settled)
    return before


def test_adapters_are_loaded_where_they_are_routed(gateway: Any, asked: list[Asked]) -> None:
    known = settle(gateway, asked)
    assert len(known) == 2
    assert all(known.values()), "one replica has them all"
    assert sum(map(len, known.values())) < 2 * len(NAMES), "each replica has them all"
    answers = ask(gateway, asked)
    for one, answer in zip(asked, answers, strict=True):
        assert not one.adapter or one.adapter in known[answer["replica"]]
    assert places() == known
    check(asked, answers)


def test_every_answer_is_the_single_engines(gateway: Any, asked: list[Asked]) -> None:
    """In several orders; both replicas take part, and their engines have several at a time."""
    chance, most = random.Random(0), 0
    for _ in range(4):
        mixed = chance.sample(asked, len(asked))
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask, gateway, mixed)
            while not asking.done():
                most = max([most, *(each["running"] for each in reports().values())])
            answers = asking.result()
        check(mixed, answers)
        assert len({answer["replica"] for answer in answers}) == 2
        assert {answer["tries"] for answer in answers} == {1}
    assert most > len(NAMES)


def test_sgmv_has_the_products(gateway: Any, logs: list[Path]) -> None:
    """The plugin is loaded in the processes of both engines, with no line of the example's."""
    printed = [path.read_text(errors="replace") for path in logs[0].rglob("*") if path.is_file()]
    assert sum("Using sgmv_punica_wrapper" in text for text in printed) >= 2
    assert not any("Using PunicaWrapperCPU" in text for text in printed)


def post(port: int, body: dict[str, Any]) -> tuple[int, Any]:
    """Status, and what came."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=LONG) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_over_http(gateway: Any, port: int, asked: list[Asked]) -> None:
    """And what is refused stops nobody else."""
    for one in (asked[0], asked[-1]):
        status, answer = post(port, one.arguments())
        assert (status, answer["tokens"]) == (200, one.tokens)
    for name in ("tenant-99", "../adapters/tenant-1", ".."):
        status, told = post(port, {**asked[0].arguments(), "adapter": name})
        assert status == 404
        assert f"no adapter '{name}'" in told
    check(asked, ask(gateway, asked))


def test_a_damaged_adapter_fails_its_own_requests(
    gateway: Any, folder: Path, asked: list[Asked]
) -> None:
    before = reports()
    damaged = write_adapter(folder / "adapters" / "damaged", TINY.modules(), 4, seed=99)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    wrong = asked[0]._replace(adapter="damaged")
    sent = [gateway.ask.remote(**one.arguments()) for one in (wrong, *asked, wrong)]
    for each in (sent[0], sent[-1]):
        with pytest.raises(Exception, match="add_lora"):
            each.result(timeout_s=LONG)
    check(asked, [each.result(timeout_s=LONG) for each in sent[1:-1]])
    assert {name: each["process"] for name, each in reports().items()} == {
        name: each["process"] for name, each in before.items()
    }


@contextmanager
def traffic(
    gateway: Any, asked: Sequence[Asked]
) -> Iterator[tuple[list[tuple[Asked, dict[str, Any]]], list[Future[None]]]]:
    """The answers to clients that ask until the block ends, and the clients.

    A failure of one is raised at once: others may wait for answers that never come.
    """
    answers: list[tuple[Asked, dict[str, Any]]] = []
    stop = threading.Event()

    def client(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            one = chance.choice(asked)
            answers.append((one, *ask(gateway, [one])))

    pool = ThreadPoolExecutor(CLIENTS)
    clients = [pool.submit(client, seed) for seed in range(CLIENTS)]
    try:
        yield answers, clients
        stop.set()
        for each in as_completed(clients):
            each.result()
    finally:
        stop.set()
        pool.shutdown(wait=False)


def lives(process: Any) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("part", ["replica", "engine"])
def test_killed_in_mid_traffic(part: str, gateway: Any, asked: list[Asked]) -> None:
    """No answer is wrong or lost, requests are retried, nothing is left, another replica comes.

    The engine is stopped first: what it has is not answered by chance before the kill.
    """
    import psutil

    def busy() -> Any:
        return next((each for each in reports().values() if each["running"] >= 2), None)

    def hangs() -> bool:
        count = len(answers)
        time.sleep(3)
        return len(answers) == count

    wait_until(lambda: len(reports()) == 2)
    with traffic(gateway, asked) as (answers, clients):
        victim = wait_until(busy, clients)
        replica = psutil.Process(victim["process"])
        children = replica.children(recursive=True)
        [core] = [each for each in replica.children() if "EngineCore" in "".join(each.cmdline())]
        for each in children:
            each.suspend()
        wait_until(hangs, clients)  # every client has come to an adapter of this replica
        count = len(answers)
        (replica if part == "replica" else core).kill()
        for each in children:
            with suppress(psutil.NoSuchProcess):
                each.resume()
        wait_until(lambda: len(answers) >= count + 2 * CLIENTS, clients)
    check(*zip(*answers, strict=True))
    assert any(answer["tries"] > 1 for _, answer in answers[count:])
    wait_until(lambda: not any(map(lives, (replica, *children))))
    wait_until(lambda: len(reports()) == 2)
    assert victim["replica"] not in reports()
    again = ask(gateway, asked)
    check(asked, again)
    known = places()
    for one, answer in zip(asked, again, strict=True):
        assert not one.adapter or one.adapter in known[answer["replica"]]


def test_a_replica_of_two_ranks(gateway: Any, folder: Path, asked: list[Asked]) -> None:
    """Tensor parallelism is the engine's own, under a replica as without one."""
    import psutil
    from ray import serve

    ranks = start(folder, 1, name="ranks", path="/ranks", tensor_parallel_size=2)
    try:
        check(asked, ask(ranks, asked))
        [report] = serve.get_deployment_handle("Replica", "ranks").broadcast("report").results()
        below = psutil.Process(report["process"]).children(recursive=True)
        assert sum("Worker" in "".join(each.cmdline()) for each in below) == 2
    finally:
        serve.delete("ranks")
