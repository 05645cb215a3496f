"""Compare the served engine with the simulator's forecast, for agents in closed loop.

    python -m experiments.studies.closed_loop [--seeds 5] [--processes 2]

Sessions arrive at random. Each waits for its answers and pauses between them. The memory holds a
third of them, so hits collapse above some rate of sessions. Step times are measured at moments of
the run, while its clock stands still (``measure_prefill``), on an engine of the same size: the
speed of a shared machine changes within a minute. The simulator serves the same requests with them
and with the built-in model's sizes.

A step that prefills while other requests decode takes longer than the sum of both on a CPU, in part
because only steps of decodes are recorded. The difference is measured too, and added to such steps.

The model computes, but the clock counts the processor time of this process, and pauses are skipped.
Other work on the machine therefore changes little. Results go to ``closed_loop.jsonl``.

The forecast of the same requests also has `lru@adaptive`, rebuilt systems, and the bound in any
order.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import BUILTIN_DIR
from engine.weights.model_config import read_config
from experiments.studies import common
from experiments.studies.common import Records, command_line, grouped, run_study
from experiments.tables import Column, Table
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import MeasuredTimes
from hybridcache.geometry.units import GIB
from hybridcache.lab.runs.closed_loop import run_closed_loop
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.intervals import interval, paired
from hybridcache.lab.traces.trace import Trace, TraceRequest

if TYPE_CHECKING:
    from engine import Engine

ADMISSIONS = ("oldest", "sessions")
RATES = (2.0, 4.0, 6.0)
"""Sessions per second."""
NUM_SESSIONS, MAX_RUNNING, MAX_LEN = 72, 4, 4096
NUM_PAUSES = 5
"""Measurements of the step times during a run."""


@dataclasses.dataclass(frozen=True, slots=True)
class TurnPlan:
    """One request: its new tokens, the length of the answer, and the pause before it."""

    added: np.ndarray
    """New tokens after the previous answer."""
    answer_len: int
    pause_s: float


def agents(num_sessions: int, seed: int) -> list[list[TurnPlan]]:
    """Return sessions of 5 to 12 turns that grow to about 1,000 to 2,500 tokens."""
    rng = np.random.default_rng(seed)

    def turn(number: int) -> TurnPlan:
        low, high = (400, 1000) if number == 0 else (40, 160)
        added = rng.integers(32, 127, rng.integers(low, high), dtype=np.int32)
        return TurnPlan(added, int(rng.integers(12, 32)), float(rng.lognormal(np.log(0.8), 0.8)))

    return [[turn(number) for number in range(rng.integers(5, 13))] for _ in range(num_sessions)]


class CpuClock:
    """Processor time of this process plus the skipped idle time."""

    def __init__(self) -> None:
        self.skipped_s = 0.0

    def __call__(self) -> float:
        return time.process_time() + self.skipped_s


def serve(
    engine: Engine,
    sessions: list[list[TurnPlan]],
    rate: float,
    seed: int,
    pause: Callable[[], None],
    num_pauses: int,
) -> tuple[dict[str, float], Trace]:
    """Serve ``sessions``. Returns hits and times, and the trace of the served requests.

    ``pause`` is called ``num_pauses`` times, after equal numbers of requests, and takes no time of
    the clock.
    """
    from engine import SamplingParams  # The results page needs no torch.

    clock, between = engine.clock, sum(map(len, sessions)) // num_pauses
    assert isinstance(clock, CpuClock)
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


def engine_of(num_bytes: float, **fields: Any) -> Engine:
    """Return an engine of the built-in model with ``fields`` of its settings."""
    from engine import Engine, EngineConfig

    sizes: dict[str, Any] = {"max_model_len": MAX_LEN, "max_running": MAX_RUNNING}
    config = EngineConfig(cache_gib=num_bytes / GIB, **sizes, **fields)
    return Engine(config, clock=CpuClock())


@dataclasses.dataclass(frozen=True, slots=True)
class MixedSteps:
    """Measured step times, with the additional time of steps that prefill and decode."""

    steps: MeasuredTimes
    mixed_s: float

    def step_seconds(
        self, prefills: Sequence[tuple[int, int]], num_decodes: int, context: int
    ) -> float:
        """See ``StepTimes``."""
        seconds = self.steps.step_seconds(prefills, num_decodes, context)
        return seconds + (self.mixed_s if prefills and num_decodes else 0.0)


def mixed_seconds(engine: Engine, steps: MeasuredTimes, context: int) -> float:
    """Return the mean time of steps that prefill and decode, less that of ``steps``."""
    from experiments.benchmarks.measure_prefill import mixed_step_seconds

    counts = {1, engine.config.max_running - 1}
    return fmean(
        seconds - steps.step_seconds([(0, length)], count, 0)
        for count in sorted(counts)
        for length, seconds in mixed_step_seconds(engine, count, context).items()
    )


def step_times(tables: Sequence[dict[str, Any]]) -> MeasuredTimes:
    """Return the means of tables of ``measure``."""
    means = {
        name: np.mean([table[name] for table in tables], axis=0).tolist()
        for name in ("table_s", "decode_s")
    }
    return MeasuredTimes.of(tables[0] | means, "measured on this engine")


def compare(
    job: tuple[str, float, int], num_sessions: int = NUM_SESSIONS, num_pauses: int = NUM_PAUSES
) -> list[dict[str, Any]]:
    """Serve and simulate the sessions of (admission policy, rate, seed). Returns the engine's
    record and the forecast."""
    import torch

    from experiments.benchmarks.measure_prefill import measure

    torch.set_num_threads(1)
    admission, rate, seed = job
    sessions = agents(num_sessions, seed)
    num_bytes = memory_bytes(sessions)
    engine = engine_of(num_bytes, admission=admission)
    measured = engine_of(num_bytes, admission="oldest", checkpoints=("backoff",))
    context = mean_prompt_len(sessions)
    tables: list[dict[str, Any]] = []
    mixed: list[float] = []

    def measure_steps() -> None:
        tables.append(measure(measured, 2048, 1, context))
        mixed.append(mixed_seconds(measured, step_times(tables[-1:]), context))

    found, trace = serve(engine, sessions, rate, seed, measure_steps, num_pauses)
    memory = engine.runner.memory
    times = step_times(tables)
    assert engine.config.token_budget is not None
    cell = Scenario(
        trace,
        model=geometry_of(engine),
        gib=memory.total_bytes / GIB,
        times=MixedSteps(times, fmean(mixed)),
        rate=rate,
        seeds=(seed,),
        max_running=MAX_RUNNING,
        token_budget=engine.config.token_budget,
        admission=admission,
    )
    geometry = cell.geometry()
    sizes = geometry.kv_bytes_per_token, geometry.state_bytes
    assert sizes == (memory.row_bytes, memory.state_bytes)
    run = run_closed_loop(trace, cell)
    forecast = {name: getattr(run, name) for name in ("ttft_mean_s", "ttft_p99_s", "makespan_s")}
    forecast["hit"] = 100 * run.token_hit_rate
    caches = {
        name: run_closed_loop(trace, dataclasses.replace(cell, **changes)).token_hit_rate
        for name, changes in (
            (common.LRU_ADAPTIVE, {"policy": "lru", "checkpoints": "adaptive"}),
            *((peer, {"baseline": peer}) for peer in common.REBUILT),
        )
    }
    forecast["caches"] = caches | {common.BOUND: common.bound_in_any_order(trace)}
    place = {"admission": admission, "rate": rate, "seed": seed}
    steps = {"prefill_s": times.table_s, "decode_s": times.decode_s, "mixed_s": fmean(mixed)}
    return [place | {"source": "engine"} | found, place | {"source": "forecast"} | forecast | steps]


def mean_prompt_len(sessions: Sequence[Sequence[TurnPlan]]) -> int:
    """Return the mean length of all prompts."""
    lengths = []
    for session in sessions:
        length = 0
        for turn in session:
            lengths.append(length + len(turn.added))
            length += len(turn.added) + turn.answer_len
    return round(fmean(lengths))


def memory_bytes(sessions: Sequence[Sequence[TurnPlan]]) -> float:
    """Return the memory for a third of ``sessions``, each with its text and one checkpoint."""
    memory = engine_of(2**27).runner.memory
    lengths = [sum(len(turn.added) + turn.answer_len for turn in session) for session in sessions]
    session_bytes = fmean(lengths) * memory.row_bytes + memory.slot_bytes
    return session_bytes * len(sessions) / 3


def table(records: Records) -> Table:
    """Return means over seeds of engine and forecast, and their differences."""
    rows = []
    ordered = sorted(records, key=lambda record: record["seed"])
    for (rate, admission), cells in sorted(grouped(ordered, "rate", "admission").items()):
        by_source = grouped(cells, "source")
        engine, forecast = by_source["engine"], by_source["forecast"]
        hits = [[run["hit"] for run in runs] for runs in (engine, forecast)]
        mean, p99, makespan = (
            fmean(run[name] for run in engine)
            for name in ("ttft_mean_s", "ttft_p99_s", "makespan_s")
        )
        forecast_mean = fmean(run["ttft_mean_s"] for run in forecast)
        row = [rate, admission, interval(hits[0]), paired(hits[1], hits[0])]
        row += [1000 * mean, 1000 * p99, 100 * (forecast_mean / mean - 1), makespan]
        known = [run["caches"] for run in forecast if "caches" in run]
        best = [max(of[peer] for peer in common.REBUILT) for of in known]
        rates = [of[common.LRU_ADAPTIVE] for of in known], best, [of[common.BOUND] for of in known]
        rows.append([*row, *map(common.percent, rates)])
    columns = [
        Column("sessions/s", form="g"), Column("admission"), Column("engine: hits", "%"),
        Column("forecast less engine", "points"), Column("engine: mean TTFT", "ms", ".0f"),
        Column("p99", "ms", ".0f"), Column("mean TTFT of the forecast less engine", "%", "+.0f"),
        Column("makespan", "s"), *common.references("forecast: {}, hits"),
    ]  # fmt: skip
    return Table(columns, rows)


def main() -> None:
    options = command_line(__doc__, seeds=5).parse_args()
    jobs = list(itertools.product(ADMISSIONS, RATES, range(options.seeds)))
    run_study("closed_loop", compare, jobs, table, options.processes)


if __name__ == "__main__":
    main()
