"""Compare the engine on the CPU with llama.cpp on the same weights.

Cases are one stream, eight streams, and a prompt of 512 tokens.

    make llama                                         # builds llama.cpp, some minutes
    python -m experiments.benchmarks.llama             # about 4 minutes on two idle cores
    python -m experiments.benchmarks.llama --sizes 530m --dtypes Q4_0

Bfloat16 and int8 (W8A8) are compared with BF16 and Q8_0, and int8 also with this engine's bfloat16.
In the other formats both sides read the same GGUF file. llama.cpp runs in a second process: if that
crashes, the result says so and the benchmark continues. Runs alternate, so noise of the machine
affects both sides. Waiting threads of both sleep soon, as those of ``engine serve`` do; while they
spin they halve the speed of the other side. Results are medians and their ratio, with the spread.
That both sides compute the same is a test (`tests/engine/models/test_beside_llama.py`). If
llama.cpp is not built, the script says so and ends.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from engine import EngineConfig
from engine.engine import load_runner
from engine.front.command.cli import SPIN_COUNT
from engine.runner.model_runner import ModelRunner
from engine.schedule.scheduler import Batch, Segment
from experiments.benchmarks import llama_cpp as rival
from experiments.benchmarks.timing import Call, alternate, ratio_spread
from experiments.studies.common import keep, plain_table, positive
from tests.gguf_files import write_gguf

NUM_SLOTS = 9
"""Number of state slots that are used, from the first on."""
SHARED: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "530m": SHARED
    | {"num_hidden_layers": 24, "linear_num_value_heads": 16, "intermediate_size": 3584},
    "1b-moe": SHARED
    | {"num_hidden_layers": 8, "linear_num_value_heads": 32, "moe_intermediate_size": 256}
    | {"shared_expert_intermediate_size": 256, "num_experts": 128, "num_experts_per_tok": 8},
}
"""Qwen3.5 models: a dense one with Qwen3.5-0.8B's layers and a smaller vocabulary, and one with 128
experts in each of eight layers."""
DIRECT = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
"""Formats of files that are written without llama.cpp."""
FORMATS = {"bfloat16": "BF16", "int8": "Q8_0"}
"""Formats of this engine for a checkpoint, and of llama.cpp's file."""
FILES = ("Q8_0", "Q4_0", "Q4_K_M", "Q6_K", "IQ4_XS")
"""Formats of files that both sides read."""
PROMPT, CONTEXT, ROOM = 512, 128, 768
TURNS = 9


def runner_of(directory: str, dtype: str) -> ModelRunner:
    """Return a runner for the checkpoint in ``directory``, or for the file of a format."""
    return load_runner(
        EngineConfig(
            model=f"{directory}/{dtype}.gguf" if dtype in FILES else directory,
            dtype="bfloat16",
            quantization="int8" if dtype == "int8" else None,
            device="cpu",
            max_running=9,
            cache_gib=0.5,
        )
    )


def against_llama(
    modules: tuple[ModuleType, ModuleType], size: str, dtype: str, directory: str, threads: int
) -> Iterator[dict[str, Any]]:
    """Compare prefill, one stream and eight streams on the checkpoint in ``directory``.

    Raises:
        CrashError: llama.cpp crashed. Its process is separate, so the benchmark can continue.
    """
    path, format = Path(directory) / f"{dtype}.gguf", FORMATS.get(dtype, dtype)
    write_file(modules, Path(directory), path, format, {"tokenizer.ggml.model": "none"})
    theirs = rival.RemoteModel(path, streams=8, room=ROOM, threads=threads)
    ours = runner_of(directory, dtype)
    tokens = prompt_tokens()
    prompt = tokens.tolist()

    def prefill_theirs() -> float:
        return theirs.clear() + theirs.forward([(0, 0, prompt)])

    yield record("prefill", size, dtype, lambda: prefill(ours, tokens), prefill_theirs, PROMPT)
    for streams in (1, 8):
        theirs.clear()
        for stream in range(streams):
            theirs.forward([(stream, 0, prompt[:CONTEXT])])
        decode = Decode(ours, tokens[:CONTEXT], streams)
        positions = itertools.count(CONTEXT)

        def step_theirs(streams: int = streams, positions: Iterator[int] = positions) -> float:
            position = next(positions)
            return theirs.forward([(stream, position, [5]) for stream in range(streams)])

        name = "one stream" if streams == 1 else f"{streams} streams"
        yield record(name, size, dtype, decode.step, step_theirs, streams)
    theirs.close()
    path.unlink()


def prompt_tokens() -> npt.NDArray[np.int32]:
    """Return the prompt of every measure."""
    return np.random.default_rng(0).integers(0, 256, PROMPT).astype(np.int32)


def record(
    measure: str,
    size: str,
    dtype: str,
    ours: Call,
    theirs: Call,
    tokens: int,
    rival: str = "llama.cpp",
) -> dict[str, Any]:
    """Time both sides, which compute ``tokens`` tokens a call. Returns one line of the results."""
    turns = TURNS // (3 if tokens == PROMPT else 1)
    both = tuple(alternate({0: ours, 1: theirs}, turns).values())
    one, two = map(statistics.median, both)
    return {
        "measure": f"{measure} beside {rival}",
        "size": size,
        "dtype": dtype,
        "unit": "tokens/s",
        "ours": tokens / one,
        "theirs": tokens / two,
        "ratio": two / one,
        "spread": ratio_spread(*both),
    }


def eight_bits(size: str, directory: str) -> Iterator[dict[str, Any]]:
    """Compare int8 with bfloat16, both in this engine."""
    int8, wide = (runner_of(directory, dtype) for dtype in ("int8", "bfloat16"))
    tokens = prompt_tokens()
    prefills = (lambda: prefill(int8, tokens), lambda: prefill(wide, tokens))
    yield record("prefill", size, "int8", *prefills, PROMPT, "bfloat16")
    first, second = (Decode(runner, tokens[:CONTEXT], 1) for runner in (int8, wide))
    yield record("one stream", size, "int8", first.step, second.step, 1, "bfloat16")


def make_checkpoint(config: dict[str, Any], directory: str) -> None:
    """Save a random Qwen3.5 model of transformers to ``directory``, in float32."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    kind = "qwen3_5_moe_text" if "num_experts" in config else "qwen3_5_text"
    loaded = transformers.AutoConfig.for_model(kind, **config, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_config(loaded, dtype=torch.float32)
    model.save_pretrained(directory)


def write_file(
    modules: tuple[ModuleType, ModuleType],
    source: Path,
    path: Path,
    format: str,
    more: Mapping[str, Any],
) -> None:
    """Write the GGUF file ``path`` of the checkpoint ``source``, with ``more`` metadata. llama.cpp
    quantizes it, except to a format that needs no choice."""
    llama, gguf = modules
    if format in DIRECT:
        write_gguf(gguf, source, path, format, more)
        return
    whole = path.with_name("whole.gguf")
    write_gguf(gguf, source, whole, "BF16", more)
    rival.quantize(llama, whole, path, format)
    whole.unlink()


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
    parser.add_argument("--sizes", nargs="+", choices=GEOMETRIES, default=list(GEOMETRIES))
    parser.add_argument(
        "--dtypes", nargs="+", choices=[*FORMATS, *FILES], default=[*FORMATS, *FILES[:3]]
    )
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    args = parser.parse_args()
    modules = rival.load()
    if modules is None:
        print(rival.ABSENT)
        return
    if "GOMP_SPINCOUNT" not in os.environ:  # It is read when torch and llama.cpp are imported.
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GOMP_SPINCOUNT": SPIN_COUNT})
    torch.set_num_threads(args.threads)
    results: list[dict[str, Any]] = []
    crashes: list[dict[str, str]] = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
            make_checkpoint(GEOMETRIES[size], directory)
            for dtype in tqdm(args.dtypes, desc=size):
                try:
                    results += against_llama(modules, size, dtype, directory, args.threads)
                except rival.CrashError:
                    failure = "the process of llama.cpp ended"
                    crashes.append({"size": size, "dtype": dtype, "failure": failure})
                if dtype == "int8" and size == "530m":
                    results += eight_bits(size, directory)
    facts = {"threads": args.threads, "llama_cpp": modules[0].__version__}
    keep("bench_llama", [*(facts | found for found in results), *crashes])
    print(plain_table(results))
    for found in crashes:
        print(f"{found['size']} {found['dtype']}: {found['failure']}")


if __name__ == "__main__":
    main()
