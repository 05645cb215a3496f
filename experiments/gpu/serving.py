"""Measure serving on one device: decoding, drafts, prefix hits, `--exact` and load on a server.

Decoding runs 1 to 64 streams with graphs and without. Steps that verify drafts run with a separate
graph and without. These are parts of `make gpu`, with dummy weights in the geometry of real models:
one of 2 billion parameters, or Qwen3-Next-80B-A3B's with 8-bit and with 4-bit weights (``big``).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.engine import Engine, load_runner
from engine.requests.request import SamplingParams
from engine.runner.backends import override_all
from engine.runner.device import Device
from engine.runner.sampler import Sampler
from engine.runner.steps import Graphs
from engine.schedule.report import StepReport
from engine.text.answers import RequestOutput
from experiments.benchmarks.serving import (
    Job,
    Targets,
    conversation_jobs,
    drive,
    measured_load,
    over_http,
)
from experiments.gpu.parity import Talk, converse
from experiments.gpu.report import IS_DRY, Record
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

NEEDED_BYTES = {"fp8": 90 * GIB, "int8": 90 * GIB, "int4-128": 56 * GIB}
"""Memory for Qwen3-Next-80B-A3B with 8-bit weights (75 GiB), and with 4 bits (39 GiB): the weights,
a layer in 16 bits while it is converted, and the cache. An H100 has less than the former."""

TARGETS = Targets(ttft_s=1.0, tpot_s=0.05)


LONG_TALK = Talk(16, 4, 500, 100)


@dataclass(frozen=True, slots=True)
class Scale:
    """Extent of the measurements."""

    streams: tuple[int, ...] = (1, 4, 16, 64)
    num_input: int = 1024
    num_output: int = 128
    num_long: int = 8192
    """Length of the prompt for prefix hits."""
    num_repeats: int = 5
    talk: Talk = LONG_TALK
    num_talks: int = 2
    """Number of runs of all conversations in each mode."""
    concurrency: tuple[int, ...] = (256, 64)
    num_jobs: int = 512
    num_answer: int = 128
    seconds: float = 20.0
    """Time of one load, after its ramp."""
    ramp: int = 2
    """Turns of each conversation before that time."""
    max_model_len: int = 16384
    graphs: tuple[str, ...] = ("all", "decode", "off")
    """Uses of the graphs that are compared."""
    max_running: int = MAX_RUNNING


STREAMS = (1, 4, 8, 16, 32, 64, 128, 256)
"""The batches of SGLang's tables, once each, so that the whole part takes two minutes."""
BIG = Scale(
    STREAMS,
    num_output=48,
    talk=Talk(16, 3, 500, 100),
    num_talks=1,
    graphs=("all",),
    max_running=256,
)
DRY = Scale((2,), 8, 3, 72, 1, Talk(1, 2, 60, 5), 1, (2,), 2, 3, 30.0, 0, 1024)
SCALES = {"serve": DRY if IS_DRY else Scale()}
SCALES["big"] = replace(DRY, talk=Talk(1, 2, 2, 2)) if IS_DRY else BIG
FORMATS: dict[str, dict[str, Any]] = {
    "serve": {},
    "big fp8 rows": {"quantization": "fp8", "fp8_activations": True},
    "big fp8": {"quantization": "fp8"},
    "big int8": {"quantization": "int8"},
    "big int4": {"quantization": "int4-128"},
}
MODELS = ("serve", "big int8") if IS_DRY else tuple(FORMATS)


class Bench:
    """One engine, and the reports of its steps."""

    def __init__(self, path: str, scale: Scale, **options: Any) -> None:
        self.scale = scale
        sizes: dict[str, Any] = {
            "max_running": scale.max_running,
            "max_model_len": scale.max_model_len,
        }
        if IS_DRY:
            sizes = {"device": "cpu", "kernels": override_all("fused"), "cache_gib": 0.02}
        self.config = EngineConfig(model=path, load_format="dummy", **(sizes | options))
        self.steps: list[StepReport] = []
        begin = time.perf_counter()
        self.runner = load_runner(self.config)
        self.load_s = time.perf_counter() - begin
        self.engine = Engine(self.config, runner=self.runner, sampler=Sampler())
        self.engine.observers.append(self.steps.append)
        self._draw = np.random.default_rng(0)
        self._captured = self.runner.graphs

    def start(self) -> dict[str, Any]:
        """Return the times of the start, and the sizes that it chose."""
        warmed = self.runner.warmed
        return {
            "load_s": self.load_s,
            "warm_up_s": warmed.seconds if warmed else None,
            "warm_up_bytes": warmed.num_bytes if warmed else None,
            "warm_up": warmed.describe() if warmed else None,
            "token_budget": self.engine.config.token_budget,
            "max_running": self.config.max_running,
            "device": self.runner.device.describe(),
        }

    def use(self, graphs: str) -> None:
        """Run the next steps with ``all`` graphs, those of ``decode`` steps, a graph per dense
        piece of steps that verify drafts (``pieces``), or none (``off``)."""
        captured = self._captured
        uses = {"all": captured, "decode": Graphs(captured.decodes), "off": Graphs()}
        if captured.decodes is None and graphs != "off":
            pytest.skip("The device has no graphs.")
        self.runner.graphs = (uses | {"pieces": captured._replace(verifies=None)})[graphs]

    def close(self) -> None:
        """Free the device's memory, so that the next engine can use all of it."""
        device = self.runner.device
        del self.engine, self.runner, self._captured
        gc.collect()
        device.release()

    def tokens(self, count: int) -> list[int]:
        return self._draw.integers(0, 256, count).tolist()

    def answer(
        self, prompts: Sequence[list[int]], num_output: int, *boundaries: int
    ) -> list[RequestOutput]:
        """Serve all prompts at once, until their end."""
        sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
        self.steps.clear()
        return self.engine.generate(prompts, sampling, boundaries=PromptBoundaries(boundaries))

    def decoding(self, streams: int) -> dict[str, Any]:
        """Measure streams that begin together.

        The decode step is a step in which all streams decode and nothing else happens, as in
        published times per token. TPOT also contains steps shared with the prefills of later
        prompts.
        """
        prompts = [self.tokens(self.scale.num_input) for _ in range(streams)]
        self.answer(prompts, 2)
        self.engine.reset_prefix_cache()
        done = self.answer(prompts, self.scale.num_output)
        full = [
            s for s in self.steps if not s.num_prefill_tokens and s.num_decode_tokens == streams
        ]
        times = [seconds(step) for step in full]
        hosts = [(s.schedule_s + s.commit_s) / t for s, t in zip(full, times, strict=True)]
        tpot = [output.timings.tpot_s(len(output.output)) or 0.0 for output in done]
        return {
            "streams": streams,
            "input": self.scale.num_input,
            "output": self.scale.num_output,
            "ttft_ms_mean": 1e3 * statistics.mean(output.timings.ttft_s or 0.0 for output in done),
            "decode_step_ms_median": median([1e3 * time for time in times]),
            "decode_steps": len(full),
            "tpot_with_others_prefills_ms_median": 1e3 * statistics.median(tpot),
            "host_share_median": median(hosts),
        }

    def verifying(self, streams: int) -> dict[str, Any]:
        """Measure steps that only verify drafts. Answers are generated twice, so the tree predicts
        the second."""
        prompts = [self.tokens(self.scale.num_input) for _ in range(streams)]
        self.engine.reset_prefix_cache()
        self.answer(prompts, self.scale.num_output)
        done = self.answer(prompts, self.scale.num_output)
        full = [s for s in self.steps if not s.num_prefill_tokens and s.num_decode_tokens > streams]
        drafts = [output.drafts for output in done]
        lengths = [1 + sum(d.accepted.values()) / max(d.num_verified, 1) for d in drafts]
        return {
            "streams": streams,
            "input": self.scale.num_input,
            "output": self.scale.num_output,
            "verify_step_ms_median": median([1e3 * seconds(step) for step in full]),
            "verify_steps": len(full),
            "tokens_verified_median": median([step.num_decode_tokens for step in full]),
            "acceptance_len": lengths,
        }

    def hit(self, share: float = 0.9) -> dict[str, Any]:
        """Measure the TTFT of a prompt with a cached ``share``, relative to that of a new
        prompt."""
        at = int(self.scale.num_long * share) // 64 * 64
        self.answer([self.tokens(self.scale.num_long)], 1)
        cold, warm, cached = [], [], []
        for _ in range(self.scale.num_repeats):
            prefix = self.tokens(at)
            for times in (cold, warm):
                prompt = prefix + self.tokens(self.scale.num_long - at)
                [output] = self.answer([prompt], 1, at)
                times.append(output.timings.ttft_s or 0.0)
            cached.append(output.cached_len)
        return {
            "prompt": self.scale.num_long,
            "cached": cached,
            "cold_ttft_ms": [1e3 * t for t in cold],
            "hit_ttft_ms": [1e3 * t for t in warm],
            "ratio_median": statistics.median(b / a for a, b in zip(cold, warm, strict=True)),
        }

    def price(self) -> dict[str, Any]:
        """Measure `--exact`: medians over runs and turns but the first, with it and without.

        Conversations reuse all computed tokens, or with `--exact` only those of prefills: the
        states and KV of an answer are computed again as part of the next prompt. No kernel is
        slower, so the cost consists of these tokens. The runs of both modes alternate.
        """
        self.runner.graphs = self._captured
        runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for repeat in range(self.scale.num_talks):
            for exact in (False, True) if repeat % 2 else (True, False):
                engine = Engine(
                    replace(self.config, exact=exact), runner=self.runner, sampler=Sampler()
                )
                begin = time.perf_counter()
                turns = converse(engine, self.scale.talk, seed=repeat)
                seconds = time.perf_counter() - begin
                runs[exact].append({"seconds": seconds} | later_turns(turns))
        fast, slow = (
            {key: statistics.median(run[key] for run in found) for key in found[0]}
            for found in (runs[False], runs[True])
        )
        pairs = zip(runs[True], runs[False], strict=True)
        ratios = [exact["ttft_ms"] / fast["ttft_ms"] for exact, fast in pairs]
        return {
            "without": fast,
            "exact": slow,
            "ttft_ratio_median": statistics.median(ratios),
            "ttft_ratios": [min(ratios), max(ratios)],
        }


def median(values: Sequence[float]) -> float | None:
    """Return the median, or None without values."""
    return statistics.median(values) if values else None


def seconds(step: StepReport) -> float:
    """Return the seconds from the scheduling of a step to its commit."""
    return step.schedule_s + step.forward_s + step.sample_s + step.wait_s + step.commit_s


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


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Bench]:
    """Engine of a model of ``FORMATS``, or with drafts."""
    name = request.param
    kind = "big" if name.startswith("big") else "serve"
    options = {"draft": "tree:4", "max_running": MAX_DRAFTED} if name == "drafts" else FORMATS[name]
    if IS_DRY:
        interpreter.repair()
    elif kind == "big":
        device, quantization = Device.resolve(None), options["quantization"]
        missing = missing_for(quantization, device.free_bytes(), has_fp8=device.supports("fp8"))
        if missing:
            pytest.skip(missing)
    config = TINY if IS_DRY else QWEN3_NEXT_80B if kind == "big" else DENSE_2B
    path = write_geometry(tmp_path_factory.mktemp("model"), config)
    found = Bench(path, SCALES[kind], **options)
    yield found
    found.close()


def missing_for(quantization: str, free_bytes: int, *, has_fp8: bool) -> str:
    """Return why weights of a format are not measured, or an empty text. 8-bit integers take the
    place of floats on a device without them."""
    if quantization in ("fp8", "int8") and has_fp8 != (quantization == "fp8"):
        return f"The device {'has' if has_fp8 else 'lacks'} fp8."
    needed = NEEDED_BYTES[quantization]
    if free_bytes < needed:
        return f"{quantization} needs {needed // GIB} GiB; {free_bytes // GIB} GiB are free."
    return ""


def scale_of(name: str) -> Scale:
    return SCALES[name.split()[0]]


GRAPHS = [(name, graphs) for name in MODELS for graphs in scale_of(name).graphs]
DECODED = [(*one, count) for one in GRAPHS for count in scale_of(one[0]).streams]
DRAFTED = sorted({min(count, MAX_DRAFTED) for count in SCALES["serve"].streams})


@pytest.mark.parametrize("bench", MODELS, indirect=True)
def test_start(bench: Bench, record: Record) -> None:
    record(**bench.start())


@pytest.mark.parametrize("bench, graphs, streams", DECODED, indirect=["bench"])
def test_decoding(bench: Bench, graphs: str, streams: int, record: Record) -> None:
    bench.use(graphs)
    record(graphs=graphs, **bench.decoding(streams))


@pytest.mark.parametrize("bench, graphs", GRAPHS, indirect=["bench"])
def test_prefix_hits(bench: Bench, graphs: str, record: Record) -> None:
    bench.use(graphs)
    record(graphs=graphs, **bench.hit())


@pytest.mark.parametrize("bench", MODELS, indirect=True)
def test_exact(bench: Bench, record: Record) -> None:
    record(**bench.price())


@pytest.mark.parametrize("streams", DRAFTED)
@pytest.mark.parametrize("graphs", ["all", "pieces", "off"])
@pytest.mark.parametrize("bench", ["drafts"], indirect=True)
def test_verifying(bench: Bench, graphs: str, streams: int, record: Record) -> None:
    bench.use(graphs)
    record(graphs=graphs, **bench.verifying(streams))


class Server(NamedTuple):
    """Server process, the conversations of its load, and its settings."""

    port: int
    jobs: Sequence[Job]
    settings: dict[str, Any]


ADMISSIONS = {"hybrid": EngineConfig().admission, "none": "oldest"}


@pytest.fixture(scope="module", params=ADMISSIONS)
def server(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Server]:
    """Server with the cache or without, which has answered one prompt."""
    for package in ("starlette", "uvicorn", "httpx", "prometheus_client", "zmq"):
        pytest.importorskip(package)
    config, scale = TINY if IS_DRY else DENSE_2B, SCALES["serve"]
    path = write_geometry(folder := tmp_path_factory.mktemp("served"), config)
    write_tokenizer(folder)
    device, cap = Device.resolve("cpu" if IS_DRY else None), scale.max_model_len // 4
    free = 0.02 if IS_DRY else round(SERVED_SHARE * device.free_bytes() / GIB, 1)
    settings: dict[str, Any] = {
        "max_running": SERVED_RUNNING,
        "max_model_len": 2 * cap,  # Twice the longest prompt.
        "cache_gib": free,
        "token_budget": EngineConfig().settled(on_cpu=device.is_cpu).token_budget,
        "prefix_cache": request.param,
        "admission": ADMISSIONS[request.param],
    }
    fields = settings | {"model": path, "load_format": "dummy"}
    fields |= {"device": "cpu"} if IS_DRY else {}
    given = {"vocab_size": config["vocab_size"], "cap": cap, "num_output": scale.num_answer}
    jobs = conversation_jobs(scale.num_jobs, **given)
    with over_http(fields) as port:
        drive(port, [jobs[0][:1]], 1, seconds=scale.seconds)
        yield Server(port, jobs, settings)


@pytest.mark.parametrize("load", SCALES["serve"].concurrency)
def test_http(server: Server, load: int, record: Record) -> None:
    window = {"seconds": SCALES["serve"].seconds, "ramp": SCALES["serve"].ramp}
    found = measured_load(server.port, server.jobs, load, TARGETS, **window)
    record(cache=server.settings["prefix_cache"], load=f"{load} at once")
    record(**window | found | server.settings)
