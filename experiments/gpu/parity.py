"""Compare the engine on this device with the CPU, and hits with cold runs bit for bit.

A part of `make gpu`. Fails if logits are far from the CPU's or a hit changes a bit. In float32,
logits may differ only by the order of sums. In bfloat16, every device rounds differently, so both
are compared with the CPU in float32. The device may then be slightly farther from it than the CPU
in bfloat16. That comparison has no experts, because rounding decides between near-equal ones.
Parity uses stored weights, which are the same on both devices. Other tests draw weights on the
device. float32 compiles longest and comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
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
from experiments.gpu.report import IS_DRY, Record
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


DRAWN = {"load_format": "dummy"}
USUAL = "float32" if IS_DRY else "bfloat16"
"""Number format. Triton's interpreter cannot multiply bfloat16."""
FORMATS: tuple[tuple[str, str | None], ...] = ("bfloat16", None), ("bfloat16", "fp8")
FORMATS += ("bfloat16", "int8"), ("float32", None)
FORMATS = FORMATS[3 * IS_DRY :]
LENGTHS = [70, 40] if IS_DRY else [2500, 1, 63, 64, 65, 130, 700, 1030, 333, 96]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a model without weights."""
    if IS_DRY:
        interpreter.repair()
    return write_geometry(tmp_path_factory.mktemp("drawn"), TINY if IS_DRY else SMALL)


def make_runner(path: str, dtype: str, **options: Any) -> ModelRunner:
    """Return a runner on the device with all kernels fused, or on the CPU with the interpreter."""
    placement: dict[str, Any] = {"device": "cpu", "kernels": override_all("fused")}
    placement = placement if IS_DRY else {}
    memory = {"cache_gib": 0.02 if IS_DRY else 10.0}
    sizes = {"max_running": MAX_RUNNING, "warm_up": False}
    settings = placement | memory | sizes | options
    return load_runner(EngineConfig(model=path, dtype=dtype, **settings))


@pytest.mark.parametrize("dtype, quantization", FORMATS)
def test_hits_are_exact(dtype: str, quantization: str | None, drawn: str, record: Record) -> None:
    """Every prompt is computed separately from zero, then all are resumed in one batch: the first
    at its last checkpoint, the others at random ones."""
    if not Device.resolve("cpu" if IS_DRY else None).supports(quantization):
        pytest.skip(f"The device has no {quantization}.")
    feed = Feed(make_runner(drawn, dtype, **DRAWN, quantization=quantization))
    draw = np.random.default_rng(2)
    logits, resumed, parts, restores = [], [], [], []
    for length in LENGTHS:
        tokens = draw.integers(0, 256, length).tolist()
        prompt = feed.place(tokens)
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
    starts = [start for _, start, _ in parts]
    record(resumed_at=starts, logits=sum(map(torch.numel, hits)), logits_that_differ=num_wrong)
    assert not num_wrong


def test_the_check_of_every_start_passes(drawn: str, record: Record) -> None:
    found = check_exactness(make_runner(drawn, USUAL, **DRAWN).loaded)
    record(**asdict(found))
    assert not found.different


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


def test_a_cache_changes_no_answer(drawn: str, record: Record) -> None:
    """Greedy answers of conversations in the whole engine, with and without the cache."""
    talk = Talk(1, 2, 66, 1) if IS_DRY else Talk(16, 4, 300, 32)
    answers, cached = {}, {}
    for cache in ("hybrid", "none"):
        runner = make_runner(drawn, USUAL, **DRAWN, prefix_cache=cache)
        config = EngineConfig(model=drawn, prefix_cache=cache, exact=cache != "none")
        engine = Engine(config, runner=runner, sampler=Sampler())
        turns = converse(engine, talk, seed=3)
        answers[cache] = [[output.token_ids for output in turn] for turn in turns]
        cached[cache] = sum(output.cached_len for turn in turns for output in turn)
        engine.check()
    record(cached_tokens=cached["hybrid"])
    assert answers["hybrid"] == answers["none"]
    assert cached["hybrid"] > 0 == cached["none"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"][IS_DRY:])
def test_logits_are_those_of_the_cpu(dtype: str, tmp_path: Path, record: Record) -> None:
    """Compared with PyTorch's kernels on one prompt."""
    model = SMALL_DENSE if dtype == "bfloat16" else TINY if IS_DRY else SMALL
    path = write_checkpoint(tmp_path, model)
    tokens = np.random.default_rng(0).integers(0, 256, 40 if IS_DRY else 700).tolist()

    def logits(dtype: str, **options: Any) -> torch.Tensor:
        feed = Feed(make_runner(path, dtype, **options))
        return feed.forward([(feed.place(tokens), 0, len(tokens))])[0].float()

    plain: dict[str, Any] = {"device": "cpu", "kernels": "", "cache_gib": 0.6}
    got, expected = logits(dtype), logits("float32", **plain)

    def error(logits: torch.Tensor) -> float:
        return float((logits - expected).square().mean().sqrt() / expected.std())

    is_exact = dtype == "float32"
    bound = FLOAT32_ERROR if is_exact else MORE_THAN_CPU * error(logits(dtype, **plain))
    divergence = torch.nn.functional.kl_div(
        got.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    same = (got.argmax(-1) == expected.argmax(-1)).float().mean()
    record(relative_error=error(got), bound=bound, kl=float(divergence), same_argmax=float(same))
    assert error(got) < bound
