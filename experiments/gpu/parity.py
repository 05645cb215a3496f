"""Compare the engine on this device with the CPU, and hits with cold runs bit for bit.

    python -m experiments.gpu.parity --out DIR [--dry]

A part of `make gpu`. Fails if logits are far from the CPU's or a hit changes a bit. In float32,
logits may differ only by the order of sums. In bfloat16, every device rounds differently, so both
are compared with the CPU in float32. The device may then be slightly farther from it than the CPU
in bfloat16. That comparison has no experts, because rounding decides between near-equal ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from msgspec.structs import asdict

from engine.config import EngineConfig
from engine.engine import Engine, load_runner
from engine.requests.request import SamplingParams
from engine.runner.backends import override_all
from engine.runner.build import check_exactness
from engine.runner.device import Device
from engine.runner.model_runner import ModelRunner
from engine.runner.sampler import Sampler
from engine.schedule.scheduler import Batch, Segment
from engine.text.answers import RequestOutput
from experiments.provenance import code_hash, resumed
from tests.engine.device_models import SMALL, SMALL_DENSE, TINY, write_checkpoint, write_geometry
from tests.kernels import interpreter

FLOAT32_ERROR = 1e-3
"""Maximum root mean square error of logits against the CPU in float32, relative to their standard
deviation."""
MORE_THAN_CPU = 1.5
"""Maximum error in bfloat16, relative to the CPU's error in bfloat16."""

MAX_RUNNING = 64


@dataclass
class Prompt:
    """Prompt with its row, slot and KV rows in one runner."""

    tokens: list[int]
    row: int
    slot: int
    kv: np.ndarray
    checkpoints: dict[int, int] = field(default_factory=dict)
    """Slot by position."""


class Feed:
    """Driver of a runner without an engine. Rows, slots and scattered KV rows are never
    returned."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        memory = runner.memory
        num_slots = memory.num_slots // 2
        self._rows = iter(range(MAX_RUNNING))
        self._slots = iter(range(num_slots))
        # States and KV share one memory: the second half of its slabs holds KV.
        first = num_slots * memory.slab_rows
        rows = np.arange(first, memory.num_kv_tokens, dtype=np.int32)
        self._kv = np.random.default_rng(1).permutation(rows)

    def place(self, tokens: Sequence[int], base: Prompt | None = None, at: int = 0) -> Prompt:
        """Return a new prompt that shares the KV rows of the first ``at`` tokens of ``base``."""
        new, self._kv = np.split(self._kv, [len(tokens) - at])
        kv = np.concatenate([base.kv[:at], new]) if base is not None else new
        return Prompt(list(tokens), next(self._rows), next(self._slots), kv)

    def forward(
        self, parts: Sequence[tuple[Prompt, int, int]], restores: Sequence[tuple[int, int]] = ()
    ) -> list[torch.Tensor]:
        """Return the logits of tokens start:end of each prompt, in one batch.

        States at multiples of 64 are saved in ``checkpoints``.
        """
        segments = []
        for prompt, start, end in parts:
            exports = [(at, next(self._slots)) for at in range(start + 64, end + 1, 64)]
            prompt.checkpoints.update(exports)
            tokens = np.array(prompt.tokens[start:end], np.int32)
            segments.append(
                Segment(prompt.row, prompt.slot, tokens, start, False, tuple(exports), len(tokens))
            )
        writes = tuple((prompt.row, 0, prompt.kv) for prompt, _, _ in parts)
        logits = self.runner.forward(Batch(tuple(segments), tuple(restores), writes))
        return list(logits.cpu().split([end - start for _, start, end in parts]))


def make_runner(path: str, dry: bool, dtype: str, **options: Any) -> ModelRunner:
    """Return a runner on the device with all kernels fused, or on the CPU with the interpreter if
    ``dry``."""
    placement: dict[str, Any] = {"device": "cpu", "kernels": override_all("fused")} if dry else {}
    memory = {"cache_gib": 0.02 if dry else 10.0}
    config = EngineConfig(
        model=path,
        dtype=dtype,
        max_running=MAX_RUNNING,
        warm_up=False,
        **(placement | memory | options),
    )
    return load_runner(config)


def parity(path: str, dry: bool, dtype: str, tokens: list[int]) -> dict[str, Any]:
    """Compare the logits of one prompt with those of the CPU's PyTorch kernels."""

    def logits(runner: ModelRunner) -> torch.Tensor:
        feed = Feed(runner)
        return feed.forward([(feed.place(tokens), 0, len(tokens))])[0].float()

    def on_cpu(dtype: str) -> torch.Tensor:
        plain: dict[str, Any] = {"device": "cpu", "kernels": "", "cache_gib": 0.6}
        return logits(make_runner(path, dry, dtype, **plain))

    expected = on_cpu("float32")
    rounded = on_cpu(dtype) if dtype != "float32" else None
    return {"check": "parity", "dtype": dtype} | compare(
        logits(make_runner(path, dry, dtype)), expected, rounded
    )


def compare(
    got: torch.Tensor, expected: torch.Tensor, rounded: torch.Tensor | None = None
) -> dict[str, Any]:
    """Return the distance of ``got`` from ``expected``, both ``[T, vocab]``, and whether it passes.

    ``rounded`` is the CPU's result in the dtype of ``got``, or None for float32.
    """

    def error(logits: torch.Tensor) -> float:
        return float((logits - expected).square().mean().sqrt() / expected.std())

    bound = FLOAT32_ERROR if rounded is None else MORE_THAN_CPU * error(rounded)
    divergence = torch.nn.functional.kl_div(
        got.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return {
        "passed": error(got) < bound,
        "relative_error": error(got),
        "bound": bound,
        "kl": float(divergence),
        "same_argmax": float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


def exactness(
    path: str, dry: bool, dtype: str, lengths: Sequence[int], **options: Any
) -> dict[str, Any]:
    """Compute every prompt separately from zero, then resume all in one batch, and compare the
    logits.

    The first prompt resumes at its last checkpoint, the others at random ones.
    """
    feed = Feed(make_runner(path, dry, dtype, load_format="dummy", **options))
    draw = np.random.default_rng(2)
    cold, logits, resumed, parts, restores = [], [], [], [], []
    for length in lengths:
        tokens = draw.integers(0, 256, length).tolist()
        prompt = feed.place(tokens)
        cold.append(prompt)
        logits += feed.forward([(prompt, 0, length)])
        last = (length - 1) // 64
        at = 64 * int(draw.integers(0, last + 1) if resumed else last)
        resumed.append(feed.place(tokens, prompt, at))
        parts.append((resumed[-1], at, length))
        if at:
            restores.append((prompt.checkpoints[at], resumed[-1].slot))
    hits = feed.forward(parts, restores)
    num_wrong = sum(
        int((hit != whole[start:]).sum())
        for hit, whole, (_, start, _) in zip(hits, logits, parts, strict=True)
    )
    return {
        "check": "hits are exact",
        "dtype": dtype,
        "passed": num_wrong == 0,
        "prompts": len(lengths),
        "resumed_at": [start for _, start, _ in parts],
        "logits": sum(hit.numel() for hit in hits),
        "logits_that_differ": num_wrong,
        **options,
    }


def at_start(path: str, dry: bool, dtype: str) -> dict[str, Any]:
    """Run the check of every start on the device."""
    found = check_exactness(make_runner(path, dry, dtype, load_format="dummy").loaded)
    return {"check": "at the start", "dtype": dtype, "passed": not found.different} | asdict(found)


class Talk(NamedTuple):
    """Size of conversations. Lengths in tokens."""

    num_conversations: int
    """Number of concurrent conversations."""
    num_turns: int
    num_question: int
    num_answer: int


def converse(engine: Engine, talk: Talk, seed: int) -> list[list[RequestOutput]]:
    """Run all conversations, one turn of each at once. Returns the outputs of each turn."""
    draw = np.random.default_rng(seed)

    def random_tokens() -> list[int]:
        return draw.integers(0, 256, talk.num_question).tolist()

    histories = [random_tokens() for _ in range(talk.num_conversations)]
    sampling = SamplingParams(max_tokens=talk.num_answer, temperature=0.0, ignore_eos=True)
    turns = []
    for _ in range(talk.num_turns):
        turns.append(engine.generate(histories, sampling))
        for history, output in zip(histories, turns[-1], strict=True):
            history += [*output.token_ids, *random_tokens()]
    return turns


def same_answers(path: str, dry: bool, talk: Talk) -> dict[str, Any]:
    """Compare greedy answers of conversations in the whole engine, with and without the cache."""
    answers, cached = {}, {}
    for cache in ("hybrid", "none"):
        dtype = "float32" if dry else "bfloat16"
        runner = make_runner(path, dry, dtype, load_format="dummy", prefix_cache=cache)
        config = EngineConfig(model=path, prefix_cache=cache, exact=cache != "none")
        engine = Engine(config, runner=runner, sampler=Sampler())
        turns = converse(engine, talk, seed=3)
        answers[cache] = [[output.token_ids for output in turn] for turn in turns]
        cached[cache] = sum(output.cached_len for turn in turns for output in turn)
        engine.check()
    same = sum(a == b for a, b in zip(answers["hybrid"], answers["none"], strict=True))
    return {
        "check": "a cache changes no answer",
        "passed": same == talk.num_turns and cached["hybrid"] > 0 == cached["none"],
        "turns": talk.num_turns,
        "turns_alike": same,
        "cached_tokens": cached["hybrid"],
    }


def checks(dry: bool, directory: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return all checks by name, in the order of a run: float32 compiles longest and comes last.

    Parity uses stored weights, which are the same on both devices. Other checks draw weights on the
    device.
    """
    geometry = TINY if dry else SMALL
    path = write_geometry(directory / "drawn", geometry)
    tokens = np.random.default_rng(0).integers(0, 256, 40 if dry else 700).tolist()
    lengths = [70, 40] if dry else [2500, 1, 63, 64, 65, 130, 700, 1030, 333, 96]

    def logits_of(name: str, model: dict[str, Any], dtype: str) -> dict[str, Any]:
        return parity(write_checkpoint(directory / name, model), dry, dtype, tokens)

    found: dict[str, Callable[[], dict[str, Any]]] = {}
    if not dry:  # Triton's interpreter cannot multiply bfloat16.
        found["hits bfloat16"] = lambda: exactness(path, dry, "bfloat16", lengths)
        for quantization in ("fp8", "int8"):
            if Device.resolve(None).supports(quantization):
                found[f"hits {quantization}"] = partial(
                    exactness, path, dry, "bfloat16", lengths, quantization=quantization
                )
    usual = "float32" if dry else "bfloat16"
    found["start"] = lambda: at_start(path, dry, usual)
    found["answers"] = lambda: same_answers(
        path, dry, Talk(1, 2, 66, 1) if dry else Talk(16, 4, 300, 32)
    )
    if not dry:
        found["parity bfloat16"] = lambda: logits_of("dense", SMALL_DENSE, "bfloat16")
    found["hits float32"] = lambda: exactness(path, dry, "float32", lengths)
    found["parity float32"] = lambda: logits_of("experts", geometry, "float32")
    return found


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the record of a check. A failure costs this check only."""
    try:
        return work()
    except Exception as failure:
        traceback.print_exc()
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        return {"passed": False, "failure": reason}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny shapes, interpreted on the CPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of parity.jsonl")
    options = parser.parse_args()
    if options.dry:
        interpreter.repair()
    file, settings, passed = options.out / "parity.jsonl", {"code": code_hash()}, []
    with tempfile.TemporaryDirectory() as directory:
        works = checks(options.dry, Path(directory)).items()
        jobs = [(name, partial(guarded, work)) for name, work in works]
        for record in resumed(file, settings, jobs, is_final=lambda record: record["passed"]):
            print(record, flush=True)
            passed.append(record["passed"])
    print(f"{sum(passed)} of {len(passed)} checks passed.")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
