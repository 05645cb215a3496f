"""Compare the engine on the CPU with llama.cpp on the same weights.

Cases are one stream, eight streams, and a prompt of 512 tokens.

    make llama                                         # builds llama.cpp, some minutes
    python -m experiments.benchmarks.llama             # about 4 minutes on two idle cores
    python -m experiments.benchmarks.llama --sizes 7m --dtypes float32

Float32, bfloat16 and int8 (W8A8) are compared with F32, BF16 and Q8_0. int8 is also compared with
this engine's bfloat16. llama.cpp runs in a second process: if that crashes, the result says so
and the benchmark continues. Runs alternate, so noise of the machine affects both sides. Results are
medians and their ratio, with the spread. If llama.cpp is not built, the script says so and ends.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from engine import EngineConfig
from engine.runner.build import load_runner
from engine.runner.model_runner import ModelRunner
from engine.schedule.batch import Batch, Segment
from experiments.benchmarks import llama_cpp as rival
from experiments.benchmarks.timing import CLOCKS, Call, Compared
from experiments.provenance import RESULTS, write_json_lines
from experiments.studies.common import show

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

NOT_DENSE_QWEN35 = {"model_type", "full_attention_interval", "num_experts", "dtype"}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "7m": {
        **{name: value for name, value in GEOMETRY_7M.items() if name not in NOT_DENSE_QWEN35},
        "model_type": "qwen3_5_text",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": GEOMETRY_7M["rope_theta"],
            "partial_rotary_factor": GEOMETRY_7M["partial_rotary_factor"],
        },
    },
    "530m": GEOMETRY_530M,
}
"""Geometries by name. The small one uses Qwen3.5's fields, because llama.cpp's Qwen3-Next has
experts in every layer."""
FORMATS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
GOALS = {
    ("530m", "one stream", "llama.cpp"): 1.0,
    ("530m", "8 streams", "llama.cpp"): 1.3,
    ("530m", "prefill", "llama.cpp"): 1.3,
    ("7m", "one stream", "llama.cpp"): 0.6,
    ("530m", "prefill", "bfloat16"): 1.5,
    ("530m", "one stream", "bfloat16"): 1.8,
}
PROMPT, CONTEXT, ROOM = 512, 128, 768
TURNS = {"7m": 60, "530m": 15}
MAX_ERROR = 2e-2
"""Maximum difference of float32 logits from llama.cpp's (with float16 KV), relative to their
standard deviation."""


def runner_of(directory: str, dtype: str) -> ModelRunner:
    """Return a runner for the checkpoint in ``directory`` with weights in ``dtype``."""
    quantization: Literal["int8"] | None = "int8" if dtype == "int8" else None
    return load_runner(
        EngineConfig(
            model=directory,
            dtype="float32" if dtype == "float32" else "bfloat16",
            quantization=quantization,
            device="cpu",
            max_running=9,
            cache_gib=0.5,
        )
    )


def against_llama(
    gguf: ModuleType,
    size: str,
    dtype: str,
    directory: str,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Compare prefill, one stream and eight streams on the checkpoint in ``directory``.

    Raises:
        CrashError: llama.cpp crashed. Its process is separate, so the benchmark can continue.
    """
    path = Path(directory) / f"{FORMATS[dtype]}.gguf"
    rival.export(gguf, Path(directory), path, FORMATS[dtype])
    theirs = rival.Remote(
        options.llama, path, options.clock, streams=8, room=ROOM, threads=options.threads
    )
    ours = runner_of(directory, dtype)
    tokens = np.random.default_rng(0).integers(0, 256, PROMPT).astype(np.int32)
    prompt = tokens.tolist()

    def prefill_theirs() -> float:
        return theirs.clear() + theirs.forward([(0, 0, prompt)])

    if dtype == "float32":
        check(ours, theirs, tokens)
    yield record(
        "prefill", size, dtype, options, lambda: prefill(ours, tokens), prefill_theirs, PROMPT
    )
    for streams in (1, 8):
        theirs.clear()
        for stream in range(streams):
            theirs.forward([(stream, 0, prompt[:CONTEXT])])
        decode = Decode(ours, tokens[:CONTEXT], streams)
        position = CONTEXT

        def step_theirs(streams: int = streams) -> float:
            nonlocal position
            seconds = theirs.forward([(stream, position, [5]) for stream in range(streams)])
            position += 1
            return seconds

        name = "one stream" if streams == 1 else f"{streams} streams"
        yield record(name, size, dtype, options, decode.step, step_theirs, streams)
    theirs.close()
    path.unlink()


def check(ours: ModelRunner, theirs: rival.Remote, tokens: np.ndarray) -> None:
    """Raise ValueError if the logits after the prompt differ by more than ``MAX_ERROR``."""
    prefill(ours, tokens)
    decode = Decode(ours, tokens[:CONTEXT], 1)
    logits = decode.step().float()[0].numpy()
    theirs.clear()
    theirs.forward([(0, 0, [*tokens[:CONTEXT].tolist(), 5])])
    error = np.abs(logits - theirs.logits()).max() / logits.std()
    if not error < MAX_ERROR:
        raise ValueError(
            f"Logits differ by {error:.3g} standard deviations, so the models are not the same."
        )


def record(
    measure: str,
    size: str,
    dtype: str,
    options: argparse.Namespace,
    ours: Call,
    theirs: Call,
    tokens: int,
    rival: str = "llama.cpp",
) -> dict[str, Any]:
    """Time both sides and return one line of the result file."""
    turns = TURNS[size] // (3 if tokens == PROMPT else 1)
    clock = CLOCKS[options.clock]
    found = Compared.of(
        ours, theirs, tokens=tokens, turns=round(turns * options.share), clock=clock
    )
    place = {"measure": f"{measure} beside {rival}", "size": size, "dtype": dtype}
    goal = GOALS.get((size, measure, rival), 0.0)
    reached = {"goal": f">= {goal}", "reached": found.ratio >= goal}
    return place | {"unit": "tokens/s"} | asdict(found) | reached


def eight_bits(size: str, directory: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compare int8 with bfloat16, both in this engine."""
    int8, wide = (runner_of(directory, dtype) for dtype in ("int8", "bfloat16"))
    tokens = np.random.default_rng(0).integers(0, 256, PROMPT).astype(np.int32)
    prefills = (lambda: prefill(int8, tokens), lambda: prefill(wide, tokens))
    yield record("prefill", size, "int8", options, *prefills, PROMPT, "bfloat16")
    first, second = (Decode(runner, tokens[:CONTEXT], 1) for runner in (int8, wide))
    yield record("one stream", size, "int8", options, first.step, second.step, 1, "bfloat16")


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


def prefill(runner: ModelRunner, tokens: np.ndarray) -> None:
    """Compute ``tokens`` as one request. Its KV rows are the first after the slots."""
    rows = kv_rows(runner, 0, len(tokens))
    runner.forward(Batch((Segment(0, 0, tokens, 0, False),), (), ((0, 0, rows),)))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="7m,530m")
    parser.add_argument("--dtypes", default=",".join(FORMATS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--share", type=float, default=1.0, help="share of the runs per measure")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: time of this thread, for a busy machine with --threads 1",
    )
    parser.add_argument("--llama", type=Path, default=rival.FOLDER, help="folder of llama.cpp")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_llama.jsonl")
    args = parser.parse_args()
    modules = rival.load(args.llama)
    if modules is None:
        print(rival.ABSENT)
        return
    torch.set_num_threads(args.threads)
    results: list[dict[str, Any]] = []
    crashes: list[dict[str, str]] = []
    sizes, dtypes = args.sizes.split(","), args.dtypes.split(",")
    with tqdm(total=len(sizes) * len(dtypes), unit="part") as progress, torch.inference_mode():
        for size in sizes:
            with tempfile.TemporaryDirectory() as directory:
                make_checkpoint(GEOMETRIES[size], "float32", directory)
                for dtype in dtypes:
                    progress.set_description(f"{size} {dtype}")
                    try:
                        results += against_llama(modules[1], size, dtype, directory, args)
                    except rival.CrashError as crash:
                        crashes.append({"size": size, "dtype": dtype, "failure": str(crash)})
                    if dtype == "int8" and size == "530m":
                        results += eight_bits(size, directory, args)
                    progress.update()
    version = modules[0].__version__
    facts = {"threads": args.threads, "clock": args.clock, "llama_cpp": version}
    write_json_lines(args.out, [*(facts | found for found in results), *crashes])
    show(results)
    for found in crashes:
        print(f"{found['size']} {found['dtype']}: {found['failure']}")


if __name__ == "__main__":
    main()
