"""Two replicas of the built-in model on Ray Serve, a chat load with the engine's own answers: the
hit rate beside the simulator's forecast for the very requests that were asked.

    python -m experiments.bench_replicas [--replicas 2] [--routers checkpoint,text,text-ray]

By default one system prompt and more conversations at a time than one replica can hold, but not
more than two can: what a router knows decides what is still there.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import numpy as np

from engine import EngineConfig, SamplingParams
from engine.command.inspect import load_geometry
from engine.plugins.replicas.replicas_client import FleetEngine
from engine.plugins.replicas.start_replicas import FleetSize, PerToken, start_fleet
from engine.requests.spec import RequestSpec
from experiments.lab import STATIC_PLACEMENT, keep, rounded
from hybridcache import Trace, TraceRequest
from hybridcache.lab.replicas.fleet import FleetConfig
from hybridcache.lab.replicas.runs import FleetJob, run_fleet
from hybridcache.lab.simulation.target import RunConfig

SYSTEM, QUESTION, ANSWER = 320, 60, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--routers", default="checkpoint,text,text-ray")
    parser.add_argument("--systems", type=int, default=1, help="prompts that conversations share")
    parser.add_argument("--conversations", type=int, default=48)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--cache-gib", type=float, default=0.008, help="of one replica")
    parser.add_argument(
        "--pause", type=float, default=1.0, help="seconds between turns, on average"
    )
    options = parser.parse_args()
    records = []
    for router in options.routers.split(","):
        config = EngineConfig(
            cache_gib=options.cache_gib,
            max_model_len=2048,
            eviction="lru",
            checkpoints=tuple(STATIC_PLACEMENT.split(",")),
        )
        fleet = start_fleet(config, FleetSize(options.replicas), router, f"bench-{router}")
        records.append(asyncio.run(_measure(fleet, router, options)))
        print(records[-1], flush=True)
    keep("bench_replicas", records)


async def _measure(fleet: FleetEngine, router: str, options: argparse.Namespace) -> dict[str, Any]:
    fleet.start()
    asked: list[TraceRequest] = []
    rng = np.random.default_rng(0)
    vocab = fleet.facts.vocab_size
    systems = [rng.integers(0, vocab, SYSTEM, dtype=np.int32) for _ in range(options.systems)]
    start = time.perf_counter()
    hits: list[tuple[int, int, float, float]] = []

    async def talk(number: int) -> None:
        own = np.random.default_rng((1, number))
        history = systems[number % options.systems]
        await asyncio.sleep(own.uniform(0, options.pause * options.conversations / 4))
        for _ in range(options.turns):
            question = own.integers(0, vocab, QUESTION, dtype=np.int32)
            prompt = np.concatenate((history, question))
            sampling = SamplingParams(max_tokens=ANSWER, ignore_eos=True, temperature=0.0)
            spec = RequestSpec(prompt, sampling, boundaries=(SYSTEM,))
            began = time.perf_counter()
            first = 0.0
            outputs = []
            async for output in fleet.submit(spec):
                first = first or time.perf_counter() - began
                outputs.append(output)
            tpot_s = (time.perf_counter() - began - first) / (ANSWER - 1)
            hits.append((outputs[-1].cached_len, len(prompt), first, tpot_s))
            answer = outputs[-1].output.copy()
            asked.append(TraceRequest(began - start, number, None, prompt, answer, (SYSTEM,)))
            history = np.concatenate((prompt, answer))
            await asyncio.sleep(own.exponential(options.pause))

    await asyncio.gather(*map(talk, range(options.conversations)))
    facts = fleet.facts
    await fleet.drain()
    asked.sort(key=lambda request: request.timestamp_s)
    times, tpot_s = PerToken(facts.prefill_tokens_per_s), float(np.median([hit[3] for hit in hits]))
    forecast = run_fleet(
        Trace("bench_replicas", 1, tuple(asked).__iter__),
        FleetJob(
            RunConfig(
                load_geometry(None),
                budget_bytes=facts.capacity_bytes,
                policy="lru",
                checkpoints=STATIC_PLACEMENT,
            ),
            FleetConfig(options.replicas, router, tpot_s=tpot_s),
            times,
        ),
    )
    cached, tokens = sum(hit[0] for hit in hits), sum(hit[1] for hit in hits)
    return rounded(
        {
            "router": router,
            "replicas": options.replicas,
            "conversations": options.conversations,
            "systems": options.systems,
            "requests": len(hits),
            "token_hit_rate": cached / tokens,
            "forecast_token_hit_rate": forecast.token_hit_rate,
            "ttft_p50_s": float(np.median([hit[2] for hit in hits])),
            "forecast_ttft_p50_s": forecast.ttft_s[50],
            "prefill_tokens_per_s": facts.prefill_tokens_per_s,
            "tpot_s": tpot_s,
            "cache_mib": facts.capacity_bytes / 2**20,
        }
    )


if __name__ == "__main__":
    main()
