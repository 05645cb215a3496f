"""Compare the engine with transformers on the same weights, and measure costs of its parts.

    python -m experiments.benchmarks.engine    # everything: about 3 minutes on two idle cores
    python -m experiments.benchmarks.engine --sizes 7m --share 0.3

Runs alternate, so noise of the machine affects both sides. Results are medians and their ratio,
with the spread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from engine import Engine, EngineConfig, SamplingParams
from engine.engine import StepReport
from engine.runner.backends import Kernels
from engine.runner.build import load_runner
from engine.runner.device import Device
from engine.runner.model_runner import ModelRunner
from engine.schedule.batch import Batch, Segment
from experiments.provenance import RESULTS, write_json_lines

GEOMETRY_7M: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000.0,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 0,
    "max_position_embeddings": 32768,
    "eos_token_id": [256, 258],
    "dtype": "float32",
}
"""Small byte-level hybrid like Qwen3-Next, about twice the size of the built-in one."""
GEOMETRY_530M = {
    "model_type": "qwen3_5_text",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""Qwen3.5-0.8B's layers with a smaller vocabulary."""
NUM_SLOTS = 9
"""Number of state slots that are used, from the first on."""

STATE_BYTES = 4096, 39936
"""Bytes of a state per layer and sequence: 4 KiB, and the built-in model's Gated DeltaNet in
float32."""


@dataclass(frozen=True, slots=True)
class Size:
    """Model geometry and lengths of its runs."""

    config: dict[str, Any]
    prefill_len: int
    prefill_turns: int
    decode_turns: int


SIZES = {
    "7m": Size(GEOMETRY_7M, prefill_len=1024, prefill_turns=11, decode_turns=64),
    "530m": Size(GEOMETRY_530M, prefill_len=512, prefill_turns=4, decode_turns=10),
}


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table. ``ratio`` is compared with ``goal``."""

    measure: str
    size: str
    dtype: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    goal: str
    reached: bool
    spread: float
    """Interquartile range of the ratios of single turns."""


class Turns:
    """Timer of two callables in alternation."""

    def __init__(self, clock: Callable[[], float], share: float = 1.0) -> None:
        self._clock = clock
        self._share = share

    def time(
        self, first: Callable[[], Any], second: Callable[[], Any], count: int
    ) -> tuple[list[float], list[float]]:
        """Return the seconds of each turn of both callables, after one unmeasured turn.

        A callable that returns a float has measured its own seconds, in another process.
        """
        first(), second()
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(max(round(count * self._share), 2)):
            for call, taken in zip((first, second), times, strict=True):
                start = self._clock()
                measured = call()
                end = self._clock()
                taken.append(measured if isinstance(measured, float) else end - start)
        return times


def compare(
    measure: str,
    size: str,
    dtype: str,
    ours: list[float],
    theirs: list[float],
    *,
    tokens: int,
    goal: float,
) -> Result:
    """Compare tokens per second. The goal is reached if ours / theirs is at least ``goal``."""
    ratio = statistics.median(theirs) / statistics.median(ours)
    return Result(
        measure,
        size,
        dtype,
        tokens / statistics.median(ours),
        tokens / statistics.median(theirs),
        "tokens/s",
        ratio,
        f">= {goal}",
        ratio >= goal,
        spread_of([t / o for o, t in zip(ours, theirs, strict=True)]),
    )


def spread_of(ratios: list[float]) -> float:
    """Return the interquartile range."""
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (0.0, 0.0, 0.0)
    return high - low


def against_transformers(size: str, dtype: str, turns: Turns) -> Iterator[Result]:
    """Compare prefill, and decode of one and eight streams, on one random checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        oracle = make_checkpoint(SIZES[size].config, dtype, directory)
        config = EngineConfig(
            model=directory, dtype=dtype, device="cpu", max_running=9, cache_gib=0.5
        )
        runner = load_runner(config)
    length = SIZES[size].prefill_len
    tokens = np.random.default_rng(0).integers(0, 256, length).astype(np.int32)
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    ours, theirs = turns.time(
        lambda: prefill(runner, tokens),
        lambda: oracle(ids, use_cache=True, logits_to_keep=1),
        SIZES[size].prefill_turns,
    )
    yield compare("prefill", size, dtype, ours, theirs, tokens=length, goal=1.0)
    context = length // 4
    for streams in (1, 8):
        cache = oracle(
            ids[:, :context].expand(streams, -1), use_cache=True, logits_to_keep=1
        ).past_key_values
        decode = Decode(runner, tokens[:context], streams)
        token = torch.full((streams, 1), 5)

        def step_theirs(token: torch.Tensor = token, cache: Any = cache) -> None:
            oracle(token, past_key_values=cache, use_cache=True)

        ours, theirs = turns.time(decode.step, step_theirs, SIZES[size].decode_turns)
        name = "decode, one stream" if streams == 1 else f"decode, {streams} at once"
        yield compare(name, size, dtype, ours, theirs, tokens=streams, goal=1.0)


def make_checkpoint(config: dict[str, Any], dtype: str, directory: str) -> Any:
    """Save a random transformers model to ``directory`` and return it."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    settings = {name: value for name, value in config.items() if name != "model_type"}
    loaded = transformers.AutoConfig.for_model(config["model_type"], **{**settings, "dtype": dtype})
    model = transformers.AutoModelForCausalLM.from_config(loaded, dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
    return model.eval()


def prefill(
    runner: ModelRunner,
    tokens: np.ndarray,
    *,
    row: int = 0,
    slot: int = 0,
    start: int = 0,
    exports: tuple[tuple[int, int], ...] = (),
    restores: tuple[tuple[int, int], ...] = (),
) -> None:
    """Compute ``tokens[start:]`` as one request. Its KV rows are the first after the slots."""
    rows = kv_rows(runner, 0, len(tokens))
    segment = Segment(row, slot, tokens[start:], start, False, exports)
    runner.forward(Batch((segment,), restores, ((row, 0, rows),)))


def kv_rows(runner: ModelRunner, start: int, end: int) -> npt.NDArray[np.int32]:
    """Return KV indices [start, end), counted from the first row that does not overlap the
    ``NUM_SLOTS`` slots."""
    return np.arange(start, end, dtype=np.int32) + NUM_SLOTS * runner.memory.slab_rows


class Decode:
    """Decode loop of ``streams`` requests with the same prompt."""

    def __init__(self, runner: ModelRunner, prompt: np.ndarray, streams: int) -> None:
        self._runner, self._streams, self._length = runner, streams, len(prompt)
        room = len(prompt) + 128
        writes = tuple(
            (row, 0, kv_rows(runner, row * room, (row + 1) * room)) for row in range(streams)
        )
        segments = tuple(Segment(row, row, prompt, 0, False) for row in range(streams))
        runner.forward(Batch(segments, (), writes))

    def step(self) -> torch.Tensor:
        """Compute one token per request. Returns logits ``[streams, vocab]``."""
        token = np.array([5], dtype=np.int32)
        segments = (Segment(row, row, token, self._length, True) for row in range(self._streams))
        logits = self._runner.forward(Batch(tuple(segments)))
        self._length += 1
        return logits


def checkpoint_cost(dtype: str, turns: Turns) -> Result:
    """Compare a prefill that saves three checkpoints with one that saves none."""
    runner = load_runner(EngineConfig(dtype=dtype, device="cpu", cache_gib=0.25))
    tokens = np.random.default_rng(1).integers(0, 256, 2048).astype(np.int32)
    exports = ((1024, 1), (1984, 2), (2048, 3))
    saving, plain = turns.time(
        lambda: prefill(runner, tokens, exports=exports), lambda: prefill(runner, tokens), 9
    )
    return at_most("prefill saving 3 checkpoints", dtype, saving, plain, goal=1.03)


def hit_cost(dtype: str, turns: Turns) -> Result:
    """Compare the TTFT of a prompt with a 90 % hit with that of the missing tokens as a separate
    prompt."""
    params = SamplingParams(max_tokens=1, temperature=0)
    random = np.random.default_rng(2)
    config = EngineConfig(
        dtype=dtype, device="cpu", cache_gib=0.25, max_model_len=4096, token_budget=1024
    )
    engine = Engine(config)
    base = random.integers(0, 256, 2304).tolist()
    engine.generate([[*base, 1]], params)
    missing = 256

    def hit() -> None:
        output = engine.generate([base + random.integers(0, 256, missing).tolist()], params)[0]
        assert output.cached_len == len(base), output.cached_len

    def alone() -> None:
        [output] = engine.generate([random.integers(0, 256, missing).tolist()], params)
        assert output.cached_len == 0

    ours, theirs = turns.time(hit, alone, 15)
    return at_most("TTFT at a 90 % hit", dtype, ours, theirs, goal=1.3)


def at_most(measure: str, dtype: str, ours: list[float], base: list[float], goal: float) -> Result:
    """Compare milliseconds. The goal is reached if ours / base is at most ``goal``."""
    ratio = statistics.median(ours) / statistics.median(base)
    return Result(
        measure,
        "7m",
        dtype,
        1e3 * statistics.median(ours),
        1e3 * statistics.median(base),
        "ms",
        ratio,
        f"<= {goal}",
        ratio <= goal,
        spread_of([o / b for o, b in zip(ours, base, strict=True)]),
    )


def step_overhead(num_steps: int = 200) -> Result:
    """Measure the milliseconds outside the forward pass in a step of eight decoding requests."""
    reports: list[StepReport] = []
    engine = Engine(EngineConfig(device="cpu", cache_gib=0.25), observer=reports.append)
    random = np.random.default_rng(3)
    prompts = [random.integers(0, 256, 64).tolist() for _ in range(8)]
    engine.generate(prompts, SamplingParams(max_tokens=num_steps, temperature=0, ignore_eos=True))
    outside, inside = [], []
    for report in reports:
        if report.num_decode_tokens == 8 and not report.num_prefill_tokens:
            outside.append(report.schedule_s + report.sample_s + report.commit_s)
            inside.append(report.forward_s)
    took = 1e3 * statistics.median(outside)
    whole = 1e3 * statistics.median(inside)
    spread = spread_of([1e3 * seconds for seconds in outside])
    return Result(
        "step of 8 outside the forward pass",
        "7m",
        "float32",
        took,
        whole,
        "ms",
        took,
        "<= 1",
        took <= 1,
        spread,
    )


def commit_cost(turns: Turns, layer_bytes: int) -> Result:
    """Compare one copy of the accepted states of 64 sequences with one copy per layer and sequence.

    The states have 36 layers of ``layer_bytes``. One copy moves whole slabs of an arena; the other
    moves the window and the recurrent state of each layer separately.
    """
    streams, layers = 64, 36
    slabs = torch.zeros(2 * streams, layers * layer_bytes, dtype=torch.uint8)
    window_bytes = layer_bytes // 8
    layered = slabs.unflatten(1, (layers, layer_bytes))
    windows, states = layered.split([window_bytes, layer_bytes - window_bytes], dim=2)
    views = [*windows.unbind(1), *states.unbind(1)]
    sources = torch.arange(streams, dtype=torch.int32)
    pairs = [(rank, streams + rank) for rank in range(streams)]
    kernel = Kernels.choose(Device.resolve("cpu"))["state_copy"]

    def by_layer() -> None:
        for view in views:
            for source, target in pairs:
                view[target] = view[source]

    one, many = turns.time(
        lambda: kernel.copy_states([slabs[None]], sources, sources + streams), by_layer, 15
    )
    ratio = statistics.median(many) / statistics.median(one)
    return Result(
        f"commit of 64, {layer_bytes / 1024:.3g} KiB a layer",
        "36 l.",
        "bytes",
        1e3 * statistics.median(one),
        1e3 * statistics.median(many),
        "ms",
        ratio,
        ">= 10",
        ratio >= 10,
        spread_of([m / o for m, o in zip(many, one, strict=True)]),
    )


def table(results: list[Result]) -> str:
    lines = [
        f"{'measure':36} {'size':5} {'dtype':9} {'ours':>10} {'theirs':>10} {'unit':9} "
        f"{'figure':>7} {'IQR':>6} goal"
    ]
    for r in results:
        mark = "" if r.reached else "  MISSED"
        lines.append(
            f"{r.measure:36} {r.size:5} {r.dtype:9} {r.ours:10.2f} {r.theirs:10.2f} {r.unit:9} "
            f"{r.ratio:7.2f} {r.spread:6.2f} {r.goal}{mark}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="7m,530m")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--share", type=float, default=1.0, help="share of the runs per measure")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: time of this thread, for a busy machine with --threads 1",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_engine.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    turns = Turns(time.perf_counter if args.clock == "wall" else time.thread_time, args.share)
    results: list[Result] = []
    pairs = [(size, dtype) for size in args.sizes.split(",") for dtype in args.dtypes.split(",")]
    with tqdm(total=len(pairs) + 7, unit="part") as progress, torch.inference_mode():
        for size, dtype in pairs:
            progress.set_description(f"{size} {dtype}")
            results += against_transformers(size, dtype, turns)
            progress.update()
        progress.set_description("parts of the engine")
        for dtype in ("float32", "bfloat16"):
            for measure in (checkpoint_cost, hit_cost):
                results.append(measure(dtype, turns))
                progress.update()
        for layer_bytes in STATE_BYTES:
            results.append(commit_cost(turns, layer_bytes))
            progress.update()
        results.append(step_overhead())
        progress.update()
    write_json_lines(
        args.out, ({"threads": args.threads, "clock": args.clock, **asdict(r)} for r in results)
    )
    print(table(results))


if __name__ == "__main__":
    main()
