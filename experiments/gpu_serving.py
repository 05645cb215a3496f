"""How fast does one device serve? Decoding at 1 to 64 streams, what a prefix hit spares, and a sweep of loads.

    python -m experiments.gpu_serving --geometry 2b|80b --out DIR [--dry]

Parts of `make gpu`: dummy weights in the geometry of real models, prompts of random tokens. Writes DIR/serve.jsonl (2b) or
DIR/big.jsonl (80b, 8-bit weights).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.async_engine import AsyncEngine
from engine.backends import Kernels
from engine.config import EngineConfig
from engine.device import Device
from engine.engine import Engine, StepReport
from engine.model_runner import ModelRunner
from engine.outputs import RequestOutput
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from experiments import interpreter
from experiments.bench_serving import random_jobs, sweep, table
from experiments.gpu_models import DENSE_2B, QWEN3_NEXT_80B, TINY, write_geometry
from experiments.provenance import write_json_lines
from experiments.serving_load import Client, EngineClient, Load, Targets

TARGETS = Targets(ttft_s=1.0, tpot_s=0.05)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    streams: tuple[int, ...]
    num_input: int
    num_output: int
    num_long: int
    """Length of the prompt that hits."""
    num_repeats: int
    concurrency: tuple[int, ...]
    num_jobs: int
    seconds: float
    """Longest time under one load."""


FULL = Scale((1, 4, 16, 64), 1024, 128, 8192, 5, (1, 4, 16, 64, 256), 256, 20.0)
DRY = Scale((2,), 8, 3, 72, 1, (2,), 2, 30.0)


class Bench:
    """One engine, and the reports of its steps."""

    def __init__(self, path: str, dry: bool, **options: Any) -> None:
        where: dict[str, Any] = {"max_running": 64}
        if dry:
            fused = ",".join(f"{name}=fused" for name in Kernels.__slots__)
            where = {"device": "cpu", "kernels": fused, "kv_gib": 0.01, "state_gib": 0.01}
        config = EngineConfig(model=path, load_format="dummy", **(where | options))
        self.steps: list[StepReport] = []
        begin = time.perf_counter()
        runner = ModelRunner(config)
        self.load_s = time.perf_counter() - begin
        self.engine = Engine(
            config, runner=runner, sampler=Sampler(runner.vocab_size), observer=self.steps.append
        )
        self._draw = np.random.default_rng(0)

    def close(self) -> None:
        """Give the device's memory back, so that the next engine is sized by all of it."""
        device = self.engine.runner.device
        del self.engine
        gc.collect()
        if not device.is_cpu:
            device.module.empty_cache()

    def tokens(self, count: int) -> list[int]:
        return self._draw.integers(0, 256, count).tolist()

    def answer(
        self, prompts: Sequence[list[int]], num_output: int, boundary: int | None = None
    ) -> list[RequestOutput]:
        """All prompts at once, to the end."""
        sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
        boundaries = () if boundary is None else (boundary,)
        for prompt in prompts:
            self.engine.submit(prompt, sampling, boundaries=boundaries)
        self.steps.clear()
        done = []
        while self.engine.has_work():
            done += [output for output in self.engine.step() if output.is_finished]
        return done

    def decoding(self, streams: int, scale: Scale) -> dict[str, Any]:
        """Streams that begin together; the step time is that of the steps in which all decode and nothing else happens."""
        prompts = [self.tokens(scale.num_input) for _ in range(streams)]
        self.answer(prompts, 2)
        self.engine.reset_prefix_cache()
        done = self.answer(prompts, scale.num_output)
        full = [
            s for s in self.steps if not s.num_prefill_tokens and s.num_decode_tokens == streams
        ]
        times = [s.schedule_s + s.forward_s + s.sample_s + s.wait_s + s.commit_s for s in full]
        hosts = [(s.schedule_s + s.commit_s) / t for s, t in zip(full, times, strict=True)]
        tpot = [output.timings.tpot_s(len(output.output)) or 0.0 for output in done]
        return {
            "measure": "decoding",
            "streams": streams,
            "input": scale.num_input,
            "output": scale.num_output,
            "ttft_ms_mean": 1e3 * statistics.mean(output.timings.ttft_s or 0.0 for output in done),
            "tpot_ms_median": 1e3 * statistics.median(tpot),
            "step_ms_median": 1e3 * statistics.median(times) if times else None,
            "host_share_median": statistics.median(hosts) if hosts else None,
        }

    def hit(self, scale: Scale, share: float = 0.9) -> dict[str, Any]:
        """TTFT of a prompt of which ``share`` was computed before, over that of one that is new."""
        at = int(scale.num_long * share) // 64 * 64
        self.answer([self.tokens(scale.num_long)], 1)
        cold, warm, cached = [], [], []
        for _ in range(scale.num_repeats):
            prefix = self.tokens(at)
            for times in (cold, warm):
                prompt = prefix + self.tokens(scale.num_long - at)
                [output] = self.answer([prompt], 1, boundary=at)
                times.append(output.timings.ttft_s or 0.0)
            cached.append(output.cached_len)
        return {
            "measure": "prefix hit",
            "prompt": scale.num_long,
            "cached": cached,
            "cold_ttft_ms": [1e3 * t for t in cold],
            "hit_ttft_ms": [1e3 * t for t in warm],
            "ratio_median": statistics.median(b / a for a, b in zip(cold, warm, strict=True)),
        }


def measure(path: str, dry: bool, scale: Scale, **options: Any) -> Iterator[dict[str, Any]]:
    bench = Bench(path, dry, **options)
    setting = {key: str(value) for key, value in options.items()}
    device = bench.engine.runner.device.describe()
    yield {"measure": "loading", "seconds": bench.load_s, "device": device, **setting}
    for streams in scale.streams:
        yield bench.decoding(streams, scale) | setting
    yield bench.hit(scale) | setting
    bench.close()


def serve(path: str, dry: bool, scale: Scale) -> list[dict[str, Any]]:
    """The loads of bench_serving, with and without the cache; half of each random prompt is shared."""

    @asynccontextmanager
    async def start(cache: Literal["hybrid", "none"]) -> AsyncIterator[Client]:
        bench = Bench(path, dry, prefix_cache=cache)
        # As many as ever run, come and gone one by one: what compiles or is captured on first use is no load's to wait for.
        prompts = [bench.tokens(scale.num_input) for _ in range(max(scale.streams))]
        bench.answer(prompts, scale.num_output)
        bench.engine.reset_prefix_cache()
        client = EngineClient(AsyncEngine(bench.engine))
        try:
            yield client
        finally:
            await client.close()
            del client
            bench.close()

    jobs = random_jobs(scale.num_jobs, scale.num_input, scale.num_output, scale.num_input // 2 - 1)
    servers = {cache: start(cache) for cache in ("hybrid", "none")}
    loads = [Load(concurrency=n) for n in scale.concurrency]
    records = asyncio.run(sweep(servers, jobs, loads, TARGETS, scale.seconds))
    print(table(records))
    return [{"measure": "serving"} | record for record in records]


def records_of(geometry: str, dry: bool, directory: Path) -> Iterator[dict[str, Any]]:
    scale = DRY if dry else FULL
    large = geometry == "80b"
    config = TINY if dry else QWEN3_NEXT_80B if large else DENSE_2B
    path = write_geometry(directory, config)
    if large:
        quantization = "fp8" if Device.resolve(None).supports("fp8") and not dry else "int8"
        yield from measure(path, dry, scale, quantization=quantization)
        return
    for graphs in ("auto",) if dry else ("off", "decode", "all"):
        yield from measure(path, dry, scale, graphs=graphs)
    yield from serve(path, dry, scale)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=("2b", "80b"), required=True)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, interpreted on the CPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_args()
    if options.dry:
        interpreter.repair()
    records = []
    file = options.out / ("big.jsonl" if options.geometry == "80b" else "serve.jsonl")
    with tempfile.TemporaryDirectory() as directory:
        for record in records_of(options.geometry, options.dry, Path(directory)):
            print(record, flush=True)
            records.append(record)
            write_json_lines(file, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
