"""Measure serving on one device: decoding, drafts, prefix hits, `--exact` and load on a server.

    python -m experiments.gpu.serving --part serve|http|big --out DIR [--dry]

Decoding runs 1 to 64 streams with graphs and without. Steps that verify drafts run with a separate
graph and without.

These are parts of `make gpu`, with dummy weights in the geometry of real models. ``serve`` and
``http`` use one of 2 billion parameters, ``big`` Qwen3-Next-80B-A3B's with 8-bit weights. Each
writes DIR/<part>.jsonl, and keeps the records of the same code.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.engine import Engine, load_runner
from engine.requests.request import SamplingParams
from engine.runner.backends import override_all
from engine.runner.device import Device
from engine.runner.model_runner import ModelRunner
from engine.runner.sampler import Sampler
from engine.runner.steps import Graphs
from engine.schedule.report import StepReport
from engine.text.answers import RequestOutput
from experiments.benchmarks.serving import Targets, conversation_jobs, over_http, sweep
from experiments.gpu.parity import Talk, converse
from experiments.provenance import code_hash, resumed
from hybridcache.geometry.units import GIB
from hybridcache.radix.protocol import PromptBoundaries
from tests.engine.device_models import (
    DENSE_2B,
    QWEN3_NEXT_80B,
    TINY,
    write_geometry,
    write_tokenizer,
)
from tests.kernels import interpreter

MAX_RUNNING = 64
MAX_DRAFTED = 4
"""Streams with drafts. More would not get full drafts."""
SERVED_RUNNING = 256
"""Running requests of a server under load, as many as its clients."""
SERVED_SHARE = 0.5
"""Share of the free memory for a server, with or without the cache.

Fixed, because otherwise the memory that one run leaves would determine the next.
"""

EIGHT_BIT_BYTES, FOUR_BIT_BYTES = 90 * GIB, 56 * GIB
"""Memory for Qwen3-Next-80B-A3B with 8-bit weights (75 GiB), and with 4 bits (39 GiB): the weights,
a layer in 16 bits while it is converted, and the cache. An H100 has less than the former."""

TARGETS = Targets(ttft_s=1.0, tpot_s=0.05)


@dataclass(frozen=True, slots=True)
class Scale:
    """Extent of the measurements."""

    streams: tuple[int, ...]
    num_input: int
    num_output: int
    num_long: int
    """Length of the prompt for prefix hits."""
    num_repeats: int
    talk: Talk
    num_talks: int
    """Number of runs of all conversations in each mode."""
    concurrency: tuple[int, ...]
    num_jobs: int
    num_answer: int
    seconds: float
    """Time of one load, after its ramp."""
    ramp: int
    """Turns of each conversation before that time."""
    max_model_len: int
    graphs: tuple[str, ...] = ("all", "decode", "off")
    """Uses of the graphs that are compared."""
    max_running: int = MAX_RUNNING


FULL = Scale(
    streams=(1, 4, 16, 64),
    num_input=1024,
    num_output=128,
    num_long=8192,
    num_repeats=5,
    talk=Talk(16, 4, 500, 100),
    num_talks=2,
    concurrency=(256, 64),
    num_jobs=512,
    num_answer=128,
    seconds=20.0,
    ramp=2,
    max_model_len=16384,
)
BIG = replace(
    FULL,
    streams=(1, 4, 8, 16, 32, 64, 128, 256),
    num_output=48,
    talk=Talk(16, 3, 500, 100),
    num_talks=1,
    graphs=("all",),
    max_running=256,
)
"""The batches of SGLang's tables, once each, so that the whole part takes two minutes."""
DRY = Scale(
    streams=(2,),
    num_input=8,
    num_output=3,
    num_long=72,
    num_repeats=1,
    talk=Talk(1, 2, 60, 5),
    num_talks=1,
    concurrency=(2,),
    num_jobs=2,
    num_answer=3,
    seconds=30.0,
    ramp=0,
    max_model_len=1024,
)
DRY_BIG = replace(DRY, talk=Talk(1, 2, 2, 2))


class Bench:
    """One engine, and the reports of its steps."""

    def __init__(self, path: str, dry: bool, scale: Scale, **options: Any) -> None:
        sizes: dict[str, Any] = {
            "max_running": scale.max_running,
            "max_model_len": scale.max_model_len,
        }
        if dry:
            sizes = {"device": "cpu", "kernels": override_all("fused"), "cache_gib": 0.02}
        self.config = EngineConfig(model=path, load_format="dummy", **(sizes | options))
        self.steps: list[StepReport] = []
        begin = time.perf_counter()
        self.runner = load_runner(self.config)
        self.load_s = time.perf_counter() - begin
        self.engine = Engine(
            self.config,
            runner=self.runner,
            sampler=Sampler(),
        )
        self.engine.observers.append(self.steps.append)
        self._draw = np.random.default_rng(0)

    def start(self) -> dict[str, Any]:
        """Return the times of the start, and the sizes that it chose."""
        warmed = self.runner.warmed
        return {
            "measure": "start",
            "load_s": self.load_s,
            "warm_up_s": warmed.seconds if warmed else None,
            "warm_up_bytes": warmed.num_bytes if warmed else None,
            "warm_up": warmed.describe() if warmed else None,
            "token_budget": self.engine.config.token_budget,
            "max_running": self.config.max_running,
            "device": self.runner.device.describe(),
        }

    def close(self) -> None:
        """Free the device's memory, so that the next engine can use all of it."""
        device = self.runner.device
        del self.engine, self.runner
        gc.collect()
        device.release()

    def tokens(self, count: int) -> list[int]:
        return self._draw.integers(0, 256, count).tolist()

    def answer(
        self, prompts: Sequence[list[int]], num_output: int, *boundaries: int
    ) -> list[RequestOutput]:
        """Serve all prompts at once, until their end."""
        sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
        for prompt in prompts:
            self.engine.submit(prompt, sampling, boundaries=PromptBoundaries(boundaries))
        self.steps.clear()
        done = []
        while self.engine.has_work():
            done += [output for output in self.engine.step() if output.is_finished]
        return done

    def decoding(self, streams: int, scale: Scale) -> dict[str, Any]:
        """Measure streams that begin together.

        The decode step is a step in which all streams decode and nothing else happens, as in
        published times per token. TPOT also contains steps shared with the prefills of later
        prompts.
        """
        prompts = [self.tokens(scale.num_input) for _ in range(streams)]
        self.answer(prompts, 2)
        self.engine.reset_prefix_cache()
        done = self.answer(prompts, scale.num_output)
        full = [
            s for s in self.steps if not s.num_prefill_tokens and s.num_decode_tokens == streams
        ]
        times = [seconds(step) for step in full]
        hosts = [(s.schedule_s + s.commit_s) / t for s, t in zip(full, times, strict=True)]
        tpot = [output.timings.tpot_s(len(output.output)) or 0.0 for output in done]
        return {
            "measure": "decoding",
            "streams": streams,
            "input": scale.num_input,
            "output": scale.num_output,
            "ttft_ms_mean": 1e3 * statistics.mean(output.timings.ttft_s or 0.0 for output in done),
            "decode_step_ms_median": median([1e3 * time for time in times]),
            "decode_steps": len(full),
            "tpot_with_others_prefills_ms_median": 1e3 * statistics.median(tpot),
            "host_share_median": median(hosts),
        }

    def verifying(self, streams: int, scale: Scale) -> dict[str, Any]:
        """Measure steps that only verify drafts. Answers are generated twice, so the tree predicts
        the second."""
        prompts = [self.tokens(scale.num_input) for _ in range(streams)]
        self.engine.reset_prefix_cache()
        self.answer(prompts, scale.num_output)
        done = self.answer(prompts, scale.num_output)
        full = [s for s in self.steps if not s.num_prefill_tokens and s.num_decode_tokens > streams]
        drafts = [output.drafts for output in done]
        lengths = [1 + sum(d.accepted.values()) / max(d.num_verified, 1) for d in drafts]
        return {
            "measure": "verifying",
            "streams": streams,
            "input": scale.num_input,
            "output": scale.num_output,
            "verify_step_ms_median": median([1e3 * seconds(step) for step in full]),
            "verify_steps": len(full),
            "tokens_verified_median": median([step.num_decode_tokens for step in full]),
            "acceptance_len": lengths,
        }

    def hit(self, scale: Scale, share: float = 0.9) -> dict[str, Any]:
        """Measure the TTFT of a prompt with a cached ``share``, relative to that of a new
        prompt."""
        at = int(scale.num_long * share) // 64 * 64
        self.answer([self.tokens(scale.num_long)], 1)
        cold, warm, cached = [], [], []
        for _ in range(scale.num_repeats):
            prefix = self.tokens(at)
            for times in (cold, warm):
                prompt = prefix + self.tokens(scale.num_long - at)
                [output] = self.answer([prompt], 1, at)
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


def median(values: Sequence[float]) -> float | None:
    """Return the median, or None without values."""
    return statistics.median(values) if values else None


def seconds(step: StepReport) -> float:
    """Return the seconds from the scheduling of a step to its commit."""
    return step.schedule_s + step.forward_s + step.sample_s + step.wait_s + step.commit_s


Work = Callable[[], dict[str, Any]]


def measure(path: str, dry: bool, scale: Scale, **options: Any) -> Iterator[tuple[str, Work]]:
    """Yield (name, work) for all records of one model, with the captured graphs and without them.

    Each work must be done before the next one is taken, because the graphs are changed.
    """
    bench = Bench(path, dry, scale, **options)
    runner = bench.runner
    yield "start", lambda: bench.start() | options
    captured = runner.graphs
    uses = {"all": captured, "decode": Graphs(captured.decodes), "off": Graphs()}
    for graphs in scale.graphs if captured.decodes is not None else ("off",):
        runner.graphs = uses[graphs]
        setting = {"graphs": graphs, **options}
        for streams in scale.streams:
            work = partial(bench.decoding, streams, scale)
            yield f"decoding {streams}, graphs {graphs}", lambda: work() | setting  # noqa: B023
        yield f"prefix hit, graphs {graphs}", lambda: bench.hit(scale) | setting  # noqa: B023
    runner.graphs = captured
    yield "exact", lambda: price(runner, bench.config, scale) | options
    bench.close()


def price(runner: ModelRunner, config: EngineConfig, scale: Scale) -> dict[str, Any]:
    """Measure `--exact`: medians over runs and turns but the first, with it and without.

    Conversations reuse all computed tokens, or with `--exact` only those of prefills: the states
    and KV of an answer are computed again as part of the next prompt. No kernel is slower, so the
    cost consists of these tokens. The runs of both modes alternate.
    """
    runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for repeat in range(scale.num_talks):
        for exact in (False, True) if repeat % 2 else (True, False):
            engine = Engine(replace(config, exact=exact), runner=runner, sampler=Sampler())
            begin = time.perf_counter()
            turns = converse(engine, scale.talk, seed=repeat)
            seconds = time.perf_counter() - begin
            runs[exact].append({"seconds": seconds} | later_turns(turns))
    fast, slow = (
        {key: statistics.median(run[key] for run in found) for key in found[0]}
        for found in (runs[False], runs[True])
    )
    pairs = zip(runs[True], runs[False], strict=True)
    ratios = [exact["ttft_ms"] / fast["ttft_ms"] for exact, fast in pairs]
    return {
        "measure": "exact",
        "without": fast,
        "exact": slow,
        "ttft_ratio_median": statistics.median(ratios),
        "ttft_ratios": [min(ratios), max(ratios)],
    }


def later_turns(turns: Sequence[Sequence[RequestOutput]]) -> dict[str, float]:
    """Return the figures of all turns but the first."""
    later = [output for turn in turns[1:] for output in turn]
    num_prompt = sum(len(output.prompt_token_ids) for output in later)
    num_cached = sum(output.cached_len for output in later)
    return {
        "token_hit_rate": num_cached / num_prompt,
        "computed_per_turn": (num_prompt - num_cached) / len(later),
        "ttft_ms": 1e3 * statistics.median(output.timings.ttft_s or 0.0 for output in later),
        "tpot_ms": 1e3 * statistics.median(o.timings.tpot_s(len(o.output)) or 0.0 for o in later),
    }


def drafted(path: str, dry: bool, scale: Scale) -> Iterator[tuple[str, Work]]:
    """Yield (name, work) for steps with drafts: as one graph, as a graph per dense piece, and
    without graphs."""
    bench = Bench(path, dry, scale, draft="tree:4", max_running=MAX_DRAFTED)
    runner = bench.runner
    captured = runner.graphs
    uses = {"all": captured, "pieces": captured._replace(verifies=None)}
    uses = (uses if captured.verifies is not None else {}) | {"off": Graphs()}
    for name, runner.graphs in uses.items():
        for count in sorted({min(count, MAX_DRAFTED) for count in scale.streams}):
            work = partial(bench.verifying, count, scale)
            yield f"verifying {count}, {name}", lambda: work() | {"graphs": name}  # noqa: B023
    bench.close()


def http(path: str, dry: bool, scale: Scale, vocab_size: int) -> Iterator[tuple[str, Work]]:
    """Yield (name, work) for loads of generated conversations on a server process, with the cache
    and without."""
    scale = replace(scale, max_model_len=scale.max_model_len // 2)  # Twice the longest prompt.
    device = Device.resolve("cpu" if dry else None)
    settings: dict[str, Any] = {
        "max_running": SERVED_RUNNING,
        "max_model_len": scale.max_model_len,
        "cache_gib": 0.02 if dry else round(SERVED_SHARE * device.free_bytes() / GIB, 1),
    }
    flags = ["--model", path, *(["--device", "cpu"] if dry else [])]
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    settings["token_budget"] = EngineConfig().settled(on_cpu=device.is_cpu).token_budget
    flags += ["--token-budget", str(settings["token_budget"])]
    dummy = {"load_format": "dummy"}
    admissions = {"hybrid": EngineConfig().admission, "none": "oldest"}
    servers = {
        cache: over_http([*flags, "--prefix-cache", cache, "--admission", admission], dummy)
        for cache, admission in admissions.items()
    }
    jobs = conversation_jobs(
        scale.num_jobs,
        vocab_size=vocab_size,
        cap=scale.max_model_len // 2,
        num_output=scale.num_answer,
    )
    window = {"seconds": scale.seconds, "ramp": scale.ramp}
    for name, work in sweep(servers, jobs, scale.concurrency, TARGETS, **window):
        yield name, lambda: {"measure": "serving"} | window | work() | settings  # noqa: B023


def formats_for(free_bytes: int, *, has_fp8: bool) -> list[dict[str, Any]]:
    """Return the formats of the weights of ``big`` that fit, in the order of their value."""
    formats: list[dict[str, Any]] = []
    if free_bytes >= EIGHT_BIT_BYTES:
        eight = {"quantization": "fp8" if has_fp8 else "int8"}
        formats += [eight | {"fp8_activations": True}] * has_fp8 + [eight]
    if free_bytes >= FOUR_BIT_BYTES:
        formats.append({"quantization": "int4-128"})
    return formats


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--part", choices=("serve", "http", "big"), required=True)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, interpreted on the CPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_args()
    part, dry = options.part, options.dry
    if dry:
        interpreter.repair()
    formats = [{"quantization": "int8"}] if part == "big" and dry else []
    if part == "big" and not dry:
        device = Device.resolve(None)
        formats = formats_for(free := device.free_bytes(), has_fp8=device.supports("fp8"))
        if not formats:
            needed = FOUR_BIT_BYTES // GIB
            print(f"Skipped: big needs {needed} GiB; {free // GIB} GiB are free.", file=sys.stderr)
            return 0
    settings, file = {"code": code_hash()}, options.out / f"{part}.jsonl"
    full, small = (BIG, DRY_BIG) if part == "big" else (FULL, DRY)
    scale = small if dry else full
    config = TINY if dry else QWEN3_NEXT_80B if part == "big" else DENSE_2B
    with tempfile.TemporaryDirectory() as folder:
        path = write_geometry(Path(folder), config)
        if part == "http":
            write_tokenizer(Path(folder))
            jobs = http(path, dry, scale, config["vocab_size"])
        elif part == "big":
            jobs = (
                (", ".join([name, *map(str, options.values())]), work)
                for options in formats
                for name, work in measure(path, dry, scale, **options)
            )
        else:
            jobs = chain(measure(path, dry, scale), drafted(path, dry, scale))
        for record in resumed(file, settings, jobs):
            print(record, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
