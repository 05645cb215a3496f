"""Measure the cost of a step without its forward pass.

The cost consists of scheduling, sampling, committing, and sending outputs to the server's process,
with 1, 8, 64 and 256 decoding requests. The runner returns the same logits at once. Cache,
scheduler, sampler and tokenizer are the engine's own.

    python -m experiments.benchmarks.overhead
    python -m experiments.benchmarks.overhead --waiting 1000  # time to order waiting requests
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from engine import Engine, EngineConfig, SamplingParams
from engine.front.worker.process_channel import Sockets
from engine.messages import Outputs
from engine.requests.request import RequestSpec
from engine.runner.sampler import Sampler
from engine.schedule.report import StepReport
from engine.schedule.scheduler import Batch
from engine.text.tokenizer_files import HFTokenizer
from experiments.studies.common import keep, plain_table, positive
from hybridcache import CacheConfig, Lease, LeaseRequest, ModelGeometry, build_prefix_cache
from hybridcache.lab.runs.closed_loop import SessionTurn, SimulatedRequest
from hybridcache.policies.admission import SessionGate
from hybridcache.policies.registry import DEFAULT_PLACEMENT, make_admission, parse_placement
from hybridcache.radix.protocol import PromptBoundaries
from hybridcache.scheduling.cache_manager import CacheManager, MemorySizes
from hybridcache.scheduling.planner import StepPlanner

PROMPT_LEN = 1_000
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=None, temperature=0, ignore_eos=True),
    "temperature 0.8": SamplingParams(max_tokens=None, temperature=0.8, ignore_eos=True),
}
STAGES = ("schedule_s", "sample_s", "commit_s")
ADMISSIONS = ("oldest", "cached-first", "longest-match", "live:64", "sessions", "sessions, in debt")
"""Admission policies to time. In debt, ``sessions`` separates resident sessions from others."""


class IdleRunner:
    """Runner with constant logits and unused memory."""

    max_model_len = 8_192
    vocab_size = 320
    is_asynchronous = False

    def __init__(self) -> None:
        self.geometry = geometry = ModelGeometry.preset("qwen3-next")
        self.memory = MemorySizes(
            "pools", 1_000_000, 512, geometry.kv_bytes_per_token, geometry.state_bytes
        )
        self._logits = torch.randn(256, self.vocab_size)

    def forward(self, batch: Batch, drawn: Any = None) -> torch.Tensor:
        return self._logits[: sum(segment.num_logits for segment in batch.segments)]


def measure(num_running: int, sampling: SamplingParams, num_steps: int = 1000) -> dict[str, float]:
    """Return median microseconds per stage of steps in which all requests decode, and the 99th
    percentile of their sum; and the processor time of a step with its sending."""
    reports: list[StepReport] = []
    sending_s, processor_s = list[float](), list[float]()
    engine = Engine(
        EngineConfig(max_running=num_running, token_budget=num_running * 1_024),
        runner=IdleRunner(),
        sampler=Sampler(),
        tokenizer=HFTokenizer(),
    )
    engine.observers.append(reports.append)
    for i in range(num_running):
        # As in a process: the outputs are added up where they are read.
        spec = RequestSpec([i % 256] * PROMPT_LEN, sampling)
        engine.enqueue(engine.make(engine.validate(spec)))
    with TemporaryDirectory(prefix="engine-") as folder, ExitStack() as sockets:
        server, channel = (Sockets(folder, is_server=one) for one in (True, False))
        for end in (server, channel):
            sockets.callback(end.close)
        while len(reports) < 50 + num_steps:
            used_s = time.process_time()
            outputs = engine.step()
            begin = time.perf_counter()
            channel.send(Outputs(tuple(outputs)))
            sending_s.append(time.perf_counter() - begin)
            processor_s.append(time.process_time() - used_s)
            while server.receive() is not None:
                pass  # Work of the receiving process.
    steps = [report for report in reports[50:] if report.num_decode_tokens == num_running]
    found = {
        stage.removesuffix("_s") + "_us": statistics.median(getattr(r, stage) for r in steps) * 1e6
        for stage in STAGES
    }
    totals = [sum(getattr(report, stage) for stage in STAGES) * 1e6 for report in steps]
    return found | {
        "send_us": statistics.median(sending_s[50:]) * 1e6,
        "total_us": statistics.median(totals) + statistics.median(sending_s[50:]) * 1e6,
        "processor_us": statistics.median(processor_s[50:]) * 1e6,
        "p99_us": statistics.quantiles(totals, n=100)[98],
    }


def ordering(admission: str, num_waiting: int, repeats: int = 51) -> dict[str, Any]:
    """Return the median milliseconds of processor time to order ``num_waiting`` requests.

    Prompts have 8,000 to 12,000 tokens, most of them cached for one in ten. ``same_ms``: the cache
    has not changed since the last step. ``changed_ms``: an answer was published in between.
    """
    policy, _, is_in_debt = admission.partition(", ")
    draw, num_rows, row_bytes, state_bytes = np.random.default_rng(0), 3_000_000, 100, 30_000
    config = CacheConfig(
        memory="arena",
        total_bytes=num_rows * row_bytes,
        kv_bytes_per_token=row_bytes,
        state_bytes=state_bytes,
    )
    cache, placement = build_prefix_cache(config), parse_placement(DEFAULT_PLACEMENT)
    planner: StepPlanner[SimulatedRequest] = StepPlanner(
        CacheManager(cache, placement, num_rows=4, stateful=True),
        max_running=4,
        token_budget=8192,
        admission=make_admission(policy),
        clock=time.process_time,
    )

    def publish(tokens: np.ndarray) -> None:
        lease = Lease.begin(cache, placement, LeaseRequest(tokens=tokens, stateful=True))
        assert lease is not None and lease.extend(len(tokens))
        lease.take_checkpoint_slots(lease.cached_len, len(tokens))
        cache.take_step().done()
        lease.finish(tokens, len(tokens))

    waiting: list[SimulatedRequest] = []
    for number in range(num_waiting):
        text = draw.integers(0, 50_000, draw.integers(8000, 12_000), dtype=np.int32)
        if number % 10 == 0:
            publish(text[:-500])
        turn = SessionTurn(text, len(text) - 1, 0.0, None, PromptBoundaries(), "", str(number))
        waiting.append(SimulatedRequest(turn, number, 0, arrival=number, arrival_s=0.0))
        planner.add(waiting[-1])
    if is_in_debt:
        assert isinstance(planner.admission, SessionGate)
        planner.admission.debt.seconds = 1e9

    def order_ms() -> float:
        begin = time.process_time()
        for _ in planner.admission.order(waiting, planner._load):
            pass
        return 1e3 * (time.process_time() - begin)

    order_ms()
    same = [order_ms() for _ in range(repeats)]
    changed = []
    for _ in range(repeats):
        publish(draw.integers(0, 50_000, 200, dtype=np.int32))
        changed.append(order_ms())
    return {
        "admission": admission,
        "waiting": num_waiting,
        "same_ms": statistics.median(same),
        "changed_ms": statistics.median(changed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=positive, default=0, help="only order this many requests")
    arguments = parser.parse_args()
    if arguments.waiting:
        name = "ordering"
        records = [ordering(admission, arguments.waiting) for admission in ADMISSIONS]
    else:
        torch.set_num_threads(1)
        name = "overhead"
        records = [
            {"running": count, "sampling": kind} | measure(count, sampling)
            for kind, sampling in SAMPLINGS.items()
            for count in (1, 8, 64, 256)
        ]
    keep(name, records, table=plain_table)


if __name__ == "__main__":
    main()
