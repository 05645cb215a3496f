"""Compare the served engine with the simulator's forecast, for agents in closed loop.

    python -m experiments.studies.closed_loop [--sessions 24] [--rate 1]
        [--admission oldest sessions]

Sessions arrive at random. Each waits for its answers and pauses between them. The memory holds a
third of them. Step times are measure first on the same engine (``measure_prefill``), and the
simulator then serves the same requests with the built-in model's sizes.

The model computes, but the clock counts the processor time of this process, and pauses are skipped.
Other work on the machine therefore changes little. Set OMP_NUM_THREADS=1. Results go to
``results/closed_loop.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine import Engine, EngineConfig, SamplingParams
from engine.config import BUILTIN_DIR
from engine.weights.model_config import read_config
from experiments.benchmarks.measure_prefill import measure
from experiments.provenance import provenance
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import MeasuredSteps, MeasuredTimes
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.closed_loop import ClosedLoop, memory_sizes, run_closed_loop
from hybridcache.lab.simulation.target import RunConfig
from hybridcache.lab.trace import Trace, TraceRequest

RESULTS = Path(__file__).resolve().parents[1] / "results/closed_loop.json"
MAX_LEN = 4096
POLICY = "regret"


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One request: its new tokens, the length of the answer, and the pause before it."""

    added: np.ndarray
    """New tokens after the previous answer."""
    answer_len: int
    pause_s: float


def agents(num_sessions: int, seed: int) -> list[list[Turn]]:
    """Return sessions of 5 to 12 turns that grow to about 1,000 to 2,500 tokens."""
    rng = np.random.default_rng(seed)

    def turn(number: int) -> Turn:
        low, high = (400, 1000) if number == 0 else (40, 160)
        added = rng.integers(32, 127, rng.integers(low, high), dtype=np.int32)
        return Turn(added, int(rng.integers(12, 32)), float(rng.lognormal(np.log(0.8), 0.8)))

    return [[turn(number) for number in range(rng.integers(5, 13))] for _ in range(num_sessions)]


class CpuClock:
    """Processor time of this process plus the skipped idle time."""

    def __init__(self) -> None:
        self.skipped_s = 0.0

    def __call__(self) -> float:
        return time.process_time() + self.skipped_s


def serve(
    engine: Engine, clock: CpuClock, sessions: list[list[Turn]], rate: float, seed: int
) -> tuple[dict[str, float], Trace]:
    """Serve ``sessions``. Returns hits and times, and the trace of the served requests."""
    start_s = clock()
    arrivals = start_s + np.cumsum(np.random.default_rng(seed).exponential(1 / rate, len(sessions)))
    events = [(arrival_s, number, 0) for number, arrival_s in enumerate(arrivals.tolist())]
    texts = [np.zeros(0, np.int32) for _ in sessions]
    requests: dict[tuple[int, int], TraceRequest] = {}
    live: dict[str, tuple[int, int, float]] = {}
    ttfts, prompt_tokens, cached_tokens = [], 0, 0
    while events or live:
        if not live:
            clock.skipped_s += max(0.0, events[0][0] - clock())
        while events and events[0][0] <= clock():
            due_s, number, turn_number = heapq.heappop(events)
            turn = sessions[number][turn_number]
            texts[number] = np.concatenate((texts[number], turn.added))
            sampling = SamplingParams(max_tokens=turn.answer_len, temperature=0.0, ignore_eos=True)
            live[engine.submit(texts[number], sampling)] = number, turn_number, clock() - due_s
        for output in engine.step():
            if output.finish_reason is None:
                continue
            number, turn_number, late_s = live.pop(output.request_id)
            assert output.timings.ttft_s is not None
            ttfts.append(output.timings.ttft_s + late_s)
            prompt_tokens += len(texts[number])
            cached_tokens += output.cached_len
            answer = np.asarray(output.token_ids, np.int32)
            before = requests.get((number, turn_number - 1))
            at_s = before.timestamp_s + sessions[number][turn_number].pause_s if before else 0.0
            requests[number, turn_number] = TraceRequest(at_s, number, None, texts[number], answer)
            texts[number] = np.concatenate((texts[number], answer))
            if turn_number + 1 < len(sessions[number]):
                pause_s = sessions[number][turn_number + 1].pause_s
                heapq.heappush(events, (clock() + pause_s, number, turn_number + 1))
    figures = {
        "hit": 100 * cached_tokens / prompt_tokens,
        "ttft_mean_s": float(np.mean(ttfts)),
        "ttft_p99_s": float(np.percentile(ttfts, 99)),
        "makespan_s": clock() - start_s,
    }
    ordered = tuple(requests[key] for key in sorted(requests))
    return figures, Trace("agents on the built-in model", 1, ordered.__iter__)


def geometry_of(engine: Engine) -> ModelGeometry:
    """Return the model's geometry with the row and state sizes of the engine's memory."""
    geometry, memory = ModelGeometry.from_config(read_config(BUILTIN_DIR)), engine.runner.memory
    missing = memory.state_bytes - geometry.state_bytes
    return dataclasses.replace(
        geometry,
        kv_bytes_per_token=memory.row_bytes,
        conv_bytes=geometry.conv_bytes + missing // max(1, geometry.num_linear_layers),
    )


def engine_of(admission: str, num_bytes: float, max_running: int, clock: CpuClock) -> Engine:
    return Engine(
        EngineConfig(
            admission=admission,
            max_model_len=MAX_LEN,
            max_running=max_running,
            cache_gib=num_bytes / 2**30,
            eviction=POLICY,
            checkpoints=(POLICY,),
        ),
        clock=clock,
    )


def compare(admission: str, options: argparse.Namespace, num_bytes: float) -> dict[str, Any]:
    """Serve and simulate with one admission policy."""
    clock = CpuClock()
    engine = engine_of(admission, num_bytes, options.max_running, clock)
    tables = measure(engine, 2048, options.repeats)
    times = MeasuredTimes(
        tuple(tables["starts"]),
        tuple(tables["lengths"]),
        tuple(map(tuple, tables["table_s"])),
        "measured on this engine",
        tuple(tables["decodes"]),
        tuple(tables["decode_s"]),
    )
    engine.reset_prefix_cache()
    sessions = agents(options.sessions, options.seed)
    found, trace = serve(engine, clock, sessions, options.rate, options.seed)
    memory, geometry = engine.runner.memory, geometry_of(engine)
    config = RunConfig(geometry, budget_bytes=memory.total_bytes, policy=POLICY, checkpoints=POLICY)
    sizes = memory_sizes(config)
    assert (sizes.row_bytes, sizes.state_bytes) == (memory.row_bytes, memory.state_bytes)
    assert engine.config.token_budget is not None
    loop = ClosedLoop(
        MeasuredSteps(times),
        options.rate,
        seed=options.seed,
        max_running=options.max_running,
        token_budget=engine.config.token_budget,
        admission=admission,
    )
    run = run_closed_loop(trace, config, loop)
    forecast = {
        "hit": 100 * run.token_hit_rate,
        "ttft_mean_s": run.ttft_mean_s,
        "ttft_p99_s": run.ttft_p99_s,
        "makespan_s": run.makespan_s,
    }
    return {"admission": admission, "engine": found, "forecast": forecast, "times": tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-running", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--admission", nargs="+", default=["oldest", "sessions"])
    options = parser.parse_args()
    memory = engine_of("oldest", 2**27, options.max_running, CpuClock()).runner.memory
    lengths = [
        sum(len(turn.added) + turn.answer_len for turn in session)
        for session in agents(options.sessions, options.seed)
    ]
    session_bytes = float(np.mean(lengths)) * memory.row_bytes + memory.slot_bytes
    num_bytes = session_bytes * options.sessions / 3
    results = [compare(admission, options, num_bytes) for admission in options.admission]
    rows = [
        [f"{result['admission']}, {source}", *(f"{v:.3g}" for v in result[source].values())]
        for result in results
        for source in ("engine", "forecast")
    ]
    header = ["admission", "hit, %", "TTFT mean, s", "TTFT p99, s", "makespan, s"]
    print(text_table(header, rows))
    record = {"options": vars(options), "runs": results, "provenance": provenance()}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(RESULTS)


if __name__ == "__main__":
    main()
