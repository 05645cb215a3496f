"""Compare request routers inside Ray Serve: RayRouter, and two of Ray's own.

    pip install 'ray[serve]>=2.60' && python examples/08_ray_routers.py [--traces chat agent]

Stub replicas stand for vLLM: a prefill takes its tokens' time, one at a time. A prompt leaves
states at its fork and its last unit, and the least recently used states are evicted. They send
vLLM's KV events over its sockets, and every third live batch is lost and replayed. Clients serve
the sessions of generated traces, one thread per live session. Verifies that RayRouter has more hits
than two choices.
"""

from __future__ import annotations

import argparse
import asyncio
import runpy
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from hybridcache import open_trace

UNIT, TOKENS_PER_S, LIVE = 64, 10_000, 16
VLLM = str(Path(__file__).resolve().parent / "07_ray_serve.py")
AFFINITY = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router"
SPEC = {"unit": UNIT, "num_state_groups": 1, "tokens_per_s": TOKENS_PER_S}
TRACES = ["chat", "agent", "few-shot", "conversations?live=16&num_conversations=40&turns=4"]
ROUTERS: dict[str, dict[str, Any]] = {
    "RayRouter": {
        "request_router_class": "hybridcache.adapters.routing.ray_serve:RayRouter",
        "request_router_kwargs": SPEC,
    },
    "PrefixCacheAffinityRouter": {"request_router_class": f"{AFFINITY}:PrefixCacheAffinityRouter"},
    "two choices": {},
}


@serve.deployment(max_ongoing_requests=200, ray_actor_options={"num_cpus": 0})
class Stub:
    """Replica with ``num_states`` states."""

    def __init__(self, num_states: int) -> None:
        self.publisher, self.num_states = runpy.run_path(VLLM)["Publisher"](loses=3), num_states
        self.known: set[int] = set()
        self.states: OrderedDict[int, None] = OrderedDict()
        self.turn = asyncio.Lock()

    def record_routing_stats(self) -> dict[str, Any]:
        return {"kv_event_metadata": self.publisher.sockets}

    async def __call__(self, text: Any, request_token_ids: list[int]) -> int:
        async with self.turn:
            ids, events, keys = request_token_ids, list[dict[str, Any]](), [0]
            hit = fork = 0
            for end in range(UNIT, len(ids) + 1, UNIT):
                part, parent = ids[end - UNIT : end], keys[-1] or None
                keys.append(key := hash((parent, *part)))
                if key not in self.known:
                    self.known.add(key)
                    named = {"block_hashes": [key], "parent_block_hash": parent}
                    named |= {"token_ids": part, "block_size": UNIT, "group_idx": 0}
                    events.append(named | {"type": "BlockStored"})
                elif end < len(ids):
                    fork = end
                    hit = end if key in self.states else hit
            await asyncio.sleep((len(ids) - hit) / TOKENS_PER_S)
            for key in keys[1:][-1:] + keys[fork // UNIT : fork // UNIT + 1] * (fork > 0):
                if key not in self.states:
                    state = {"block_hashes": [key], "block_size": UNIT, "group_idx": 1}
                    events.append(state | {"type": "BlockStored", "kv_cache_spec_kind": "mamba"})
                self.states[key] = None
                self.states.move_to_end(key)
            while len(self.states) > self.num_states:
                gone, _ = self.states.popitem(last=False)
                events.append({"type": "BlockRemoved", "block_hashes": [gone], "group_idx": 1})
            self.publisher.publish(events)
            return hit


def measure(
    trace: str, router: str, replicas: int, num_states: int, num_requests: int
) -> dict[str, Any]:
    """Serve a trace behind one router. Returns hits in percent and the mean TTFT in seconds."""
    config = RequestRouterConfig(request_routing_stats_period_s=0.2, **ROUTERS[router])
    stub = Stub.options(num_replicas=replicas, request_router_config=config)
    handle = serve.run(stub.bind(num_states), name=router.replace(" ", "-"), route_prefix=None)
    sessions: dict[Any, list[list[int]]] = {}
    for one in open_trace(trace).head(num_requests):
        sessions.setdefault(one.session, []).append((one.tokens % 20_000).tolist())
    for number in range(3 * replicas):
        ask(handle, [20_000 + number] * 10)
    time.sleep(2.0)
    with ThreadPoolExecutor(LIVE) as threads:
        turns = threads.map(
            lambda prompts: [ask(handle, one) for one in prompts], sessions.values()
        )
        served = [one for of in turns for one in of]
    serve.delete(router.replace(" ", "-"))
    hits, tokens, times = zip(*served, strict=True)
    return 100 * sum(hits) / sum(tokens), mean(times)


def ask(handle: Any, ids: list[int]) -> tuple[int, int, float]:
    """Return hit, tokens and seconds of a request. Each id is a character of its text."""
    began, text = time.perf_counter(), "".join(chr(0x4E00 + one) for one in ids)
    prompt = SimpleNamespace(prompt=text)
    hit = handle.remote(prompt, request_token_ids=ids).result(timeout_s=600)
    return hit, len(ids), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--states", type=int, default=16, help="of each replica")
    parser.add_argument("--requests", type=int, default=160, help="of each trace")
    parser.add_argument("--traces", nargs="+", default=TRACES)
    options = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    given = options.replicas, options.states, options.requests
    for trace in options.traces:
        hits = {}
        for router in ROUTERS:
            hits[router], ttft_s = measure(trace, router, *given)
            print(
                f"{trace[:13]:13} {router:26} hits {hits[router]:5.1f} %, mean TTFT {ttft_s:.2f} s"
            )
        assert hits["RayRouter"] > hits["two choices"]
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
