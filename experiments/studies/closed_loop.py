"""Compare the served engine with the simulator's forecast, for agents in closed loop.

    python -m experiments.studies.closed_loop [--sessions 72] [--rates 2 4 6]
        [--admission oldest sessions] [--seeds 0 1 2 3 4] [--workers 2]

Sessions arrive at random. Each waits for its answers and pauses between them. The memory holds a
third of them, so hits collapse above some rate of sessions. Step times are measured at moments of
the run, while its clock stands still (``measure_prefill``), on an engine of the same size: the
speed of a shared machine changes within a minute. The simulator serves the same requests with them
and with the built-in model's sizes.

A step that prefills while other requests decode takes longer than the sum of both on a CPU, in part
because only steps of decodes are recorded. The difference is measured too, and added to such steps.

The model computes, but the clock counts the processor time of this process, and pauses are skipped.
Other work on the machine therefore changes little. Results go to ``results/closed_loop.jsonl``.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine import Engine, EngineConfig, SamplingParams
from engine.config import BUILTIN_DIR
from engine.weights.model_config import read_config
from experiments.benchmarks.measure_prefill import measure, mixed_step_seconds
from experiments.provenance import RESULTS, write_json_lines
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import MeasuredTimes
from hybridcache.geometry.units import GIB
from hybridcache.lab.intervals import interval, paired
from hybridcache.lab.report import text_table
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.closed_loop import memory_sizes, run_closed_loop
from hybridcache.lab.simulation.step_times import MeasuredSteps
from hybridcache.lab.trace import Trace, TraceRequest

MAX_LEN = 4096


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
    engine: Engine,
    clock: CpuClock,
    sessions: list[list[Turn]],
    rate: float,
    seed: int,
    pause: Callable[[], None],
    num_pauses: int,
) -> tuple[dict[str, float], Trace]:
    """Serve ``sessions``. Returns hits and times, and the trace of the served requests.

    ``pause`` is called ``num_pauses`` times, after equal numbers of requests, and takes no time of
    the clock.
    """
    between = sum(map(len, sessions)) // num_pauses
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
            if len(ttfts) % between == between // 2:
                paused_s = clock()
                pause()
                clock.skipped_s -= clock() - paused_s
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


def engine_of(num_bytes: float, max_running: int, clock: CpuClock, **fields: Any) -> Engine:
    """Return an engine of the built-in model with ``fields`` of its settings."""
    return Engine(
        EngineConfig(
            max_model_len=MAX_LEN,
            max_running=max_running,
            cache_gib=num_bytes / 2**30,
            **fields,
        ),
        clock=clock,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class MixedSteps:
    """Measured step times, with the additional time of steps that prefill and decode."""

    steps: MeasuredSteps
    mixed_s: float

    def step_seconds(
        self, prefills: Sequence[tuple[int, int]], num_decodes: int, context: int
    ) -> float:
        """See ``StepTimes``."""
        seconds = self.steps.step_seconds(prefills, num_decodes, context)
        return seconds + (self.mixed_s if prefills and num_decodes else 0.0)


def mixed_seconds(engine: Engine, steps: MeasuredSteps, context: int) -> float:
    """Return the mean time of steps that prefill and decode, less that of ``steps``."""
    counts = {1, engine.config.max_running - 1}
    return fmean(
        seconds - steps.step_seconds([(0, length)], count, 0)
        for count in sorted(counts)
        for length, seconds in mixed_step_seconds(engine, count, context).items()
    )


def step_times(tables: Sequence[dict[str, Any]]) -> MeasuredTimes:
    """Return the means of tables of ``measure``."""
    prefill, decode = (
        np.mean([table[name] for table in tables], axis=0).tolist()
        for name in ("table_s", "decode_s")
    )
    first = tables[0]
    return MeasuredTimes(
        tuple(first["starts"]),
        tuple(first["lengths"]),
        tuple(map(tuple, prefill)),
        "measured on this engine",
        tuple(first["decodes"]),
        tuple(decode),
    )


def compare(
    admission: str, rate: float, seed: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Serve and simulate the sessions of one seed. Returns the engine's record and the forecast."""
    torch.set_num_threads(1)
    clock, sessions = CpuClock(), agents(options.sessions, seed)
    num_bytes = memory_bytes(sessions, options.max_running)
    engine = engine_of(num_bytes, options.max_running, clock, admission=admission)
    measured = engine_of(
        num_bytes,
        options.max_running,
        CpuClock(),
        admission="oldest",
        checkpoints=("backoff",),
    )
    context = mean_prompt_len(sessions)
    tables: list[dict[str, Any]] = []
    mixed: list[float] = []

    def measure_steps() -> None:
        tables.append(measure(measured, 2048, 1, context))
        mixed.append(mixed_seconds(measured, MeasuredSteps(step_times(tables[-1:])), context))

    found, trace = serve(engine, clock, sessions, rate, seed, measure_steps, options.repeats)
    memory = engine.runner.memory
    times = step_times(tables)
    assert engine.config.token_budget is not None
    cell = Scenario(
        trace,
        model=geometry_of(engine),
        gib=memory.total_bytes / GIB,
        times=MixedSteps(MeasuredSteps(times), fmean(mixed)),
        rate=rate,
        seeds=(seed,),
        max_running=options.max_running,
        token_budget=engine.config.token_budget,
        admission=admission,
    )
    sizes = memory_sizes(cell)
    assert (sizes.row_bytes, sizes.state_bytes) == (memory.row_bytes, memory.state_bytes)
    run = run_closed_loop(trace, cell)
    forecast = {
        "hit": 100 * run.token_hit_rate,
        "ttft_mean_s": run.ttft_mean_s,
        "ttft_p99_s": run.ttft_p99_s,
        "makespan_s": run.makespan_s,
    }
    place = {"admission": admission, "rate": rate, "seed": seed}
    steps = {"prefill_s": times.table_s, "decode_s": times.decode_s, "mixed_s": fmean(mixed)}
    return [
        place | {"source": "engine"} | found,
        place | {"source": "forecast"} | forecast | steps,
    ]


def mean_prompt_len(sessions: Sequence[Sequence[Turn]]) -> int:
    """Return the mean length of all prompts."""
    lengths = []
    for session in sessions:
        length = 0
        for turn in session:
            lengths.append(length + len(turn.added))
            length += len(turn.added) + turn.answer_len
    return round(fmean(lengths))


def memory_bytes(sessions: Sequence[Sequence[Turn]], max_running: int) -> float:
    """Return the memory for a third of ``sessions``, each with its text and one checkpoint."""
    memory = engine_of(2**27, max_running, CpuClock()).runner.memory
    lengths = [sum(len(turn.added) + turn.answer_len for turn in session) for session in sessions]
    session_bytes = fmean(lengths) * memory.row_bytes + memory.slot_bytes
    return session_bytes * len(sessions) / 3


def table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: means over seeds of engine and forecast, and their differences."""
    found: dict[tuple[float, str], dict[str, list[dict[str, Any]]]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        by_source = found.setdefault((record["rate"], record["admission"]), {})
        by_source.setdefault(record["source"], []).append(record)
    rows = []
    for (rate, admission), by_source in sorted(found.items()):
        engine, forecast = by_source["engine"], by_source["forecast"]
        hits, ttfts = (
            [[run[name] for run in runs] for runs in (engine, forecast)]
            for name in ("hit", "ttft_mean_s")
        )
        means = [fmean(times) for times in ttfts]
        rows.append(
            [
                f"{rate:g}",
                admission,
                str(interval(hits[0])),
                str(paired(hits[1], hits[0])),
                *(
                    f"{1000 * fmean(run[name] for run in engine):.0f}"
                    for name in ("ttft_mean_s", "ttft_p99_s")
                ),
                f"{100 * (means[1] / means[0] - 1):+.0f} %",
                f"{fmean(run['makespan_s'] for run in engine):.1f}",
            ]
        )
    header = [
        "sessions/s", "admission", "engine: hits, %", "forecast less engine, points",
        "engine: mean TTFT, ms", "p99, ms", "mean TTFT of the forecast", "makespan, s",
    ]  # fmt: skip
    return header, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=72)
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 4, 6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--max-running", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of the step times")
    parser.add_argument("--admission", nargs="+", default=["oldest", "sessions"])
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    cases = list(itertools.product(options.admission, options.rates, options.seeds))
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        started = [pool.submit(compare, *case, options) for case in cases]
        records = [record for run in tqdm(started, disable=None) for record in run.result()]
    header, rows = table(records)
    print(text_table(header, rows))
    path = RESULTS / "closed_loop.jsonl"
    write_json_lines(path, records, vars(options))
    print(path)


if __name__ == "__main__":
    main()
