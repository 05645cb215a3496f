"""Small random checkpoints of each family, written by transformers, and a driver of ModelRunner."""

from __future__ import annotations

import gc
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.engine import load_runner
from engine.runner.model_runner import ModelRunner
from engine.schedule.scheduler import Batch, Segment
from tests.engine import families

FAMILIES = families.find()


@torch.random.fork_rng()
def make_oracle(family: str) -> Any:
    """Return a random transformers model, with norms and biases off their neutral values."""
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in FAMILIES[family].classes)
    torch.manual_seed(7)
    model = model_class(config_class(**FAMILIES[family].config, dtype="float32")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("bias", ".D")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "A_log" not in name:
                parameter.mul_(2.0)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):  # Router biases are zero before training.
                buffer.add_(torch.randn_like(buffer) * 0.2)
    return model


def save_oracle(family: str, path: Path) -> Any:
    """Write the checkpoint of ``make_oracle`` into the folder ``path``, and return the model."""
    model = make_oracle(family)
    model.save_pretrained(path)
    official = FAMILIES[family].official
    if official is not None:
        file = path / "model.safetensors"
        save_file(official(load_file(file)), file)
    return model


@dataclass
class Oracle:
    """Model of transformers and the path of its checkpoint."""

    model: Any
    path: Path

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        return self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    models: dict[str, Oracle] = {}

    def get(family: str) -> Oracle:
        if family not in models:
            path = tmp_path_factory.mktemp(family)
            models[family] = Oracle(save_oracle(family, path), path)
        return models[family]

    return get


@pytest.fixture
def checkpoint(
    oracles: Callable[[str], Oracle], tmp_path: Path
) -> Callable[[str], tuple[Path, dict[str, torch.Tensor]]]:
    """Return a function that copies a small checkpoint, which the test may rewrite."""

    def copy(model: str) -> tuple[Path, dict[str, torch.Tensor]]:
        path = tmp_path / model
        shutil.copytree(oracles(model).path, path)
        return path, load_file(path / "model.safetensors")

    return copy


def load(path: Path, **options: Any) -> ModelRunner:
    config = {"device": "cpu", "dtype": "float32", "cache_gib": 0.02}
    return load_runner(EngineConfig(model=str(path), **(config | options)))


@dataclass
class DrivenSequence:
    """State of one sequence of a driver."""

    row: int
    slot: int | None
    tokens: list[int]
    computed_len: int = 0


NUM_SLOTS = 100
"""Largest number of slots that a driver allocates."""


@dataclass
class Driver:
    """Builder of batches for a runner, with counters in place of allocators.

    ``scatter_seed`` shuffles the KV indices. In an arena, the first slabs are slots and the rest is
    rows.
    """

    runner: ModelRunner
    scatter_seed: int | None = None
    next_row: int = 0
    next_slot: int = 0
    next_kv: int = 0
    order: npt.NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.next_row = self.next_slot = self.next_kv = 0
        memory = self.runner.memory
        self.order = np.arange(NUM_SLOTS * memory.slab_rows, memory.num_kv_tokens, dtype=np.int32)
        if self.scatter_seed is not None:
            np.random.default_rng(self.scatter_seed).shuffle(self.order)

    def slot(self) -> int | None:
        if self.runner.tensors.padding_slot is None:
            return None
        self.next_slot += 1
        assert self.next_slot <= min(self.runner.memory.num_slots, NUM_SLOTS)
        return self.next_slot - 1

    def kv(self, count: int) -> npt.NDArray[np.int32]:
        self.next_kv += count
        assert self.next_kv <= len(self.order)
        return self.order[self.next_kv - count : self.next_kv]

    def begin(
        self, tokens: Sequence[int], prefix: npt.NDArray[np.int32] | None = None, room: int = 64
    ) -> tuple[DrivenSequence, tuple[int, int, npt.NDArray[np.int32]]]:
        """Return a sequence and the write of its rows, with KV for its tokens and ``room`` more.

        ``prefix`` has the rows of a cached prefix.
        """
        sequence = DrivenSequence(self.next_row, self.slot(), list(tokens))
        self.next_row += 1
        shared = prefix if prefix is not None else np.empty(0, dtype=np.int32)
        sequence.computed_len = len(shared)
        indices = np.concatenate([shared, self.kv(len(tokens) + room - len(shared))])
        return sequence, (sequence.row, 0, indices)

    def prefill_segment(
        self, sequence: DrivenSequence, length: int, *, all_logits: bool = False, **options: Any
    ) -> Segment:
        start = sequence.computed_len
        end = min(start + length, len(sequence.tokens))
        sequence.computed_len = end
        tokens = np.array(sequence.tokens[start:end], dtype=np.int32)
        num_logits = len(tokens) if all_logits else 1
        return Segment(
            sequence.row, sequence.slot, tokens, start, False, num_logits=num_logits, **options
        )

    def decode_segment(self, sequence: DrivenSequence, token: int, **options: Any) -> Segment:
        start = len(sequence.tokens)
        sequence.tokens.append(token)
        sequence.computed_len = start + 1
        return Segment(
            sequence.row, sequence.slot, np.array([token], np.int32), start, True, **options
        )

    def start(
        self, prompts: Sequence[Sequence[int]], room: int = 64
    ) -> tuple[list[DrivenSequence], torch.Tensor]:
        """Compute prompts in one step. Return their sequences and logits."""
        begun = [self.begin(prompt, room=room) for prompt in prompts]
        sequences = [sequence for sequence, _ in begun]
        segments = [self.prefill_segment(s, len(s.tokens)) for s in sequences]
        writes = tuple(write for _, write in begun)
        return sequences, self.runner.forward(Batch(tuple(segments), (), writes))

    def decode(self, sequences: Sequence[DrivenSequence], tokens: Sequence[int]) -> torch.Tensor:
        """Return the logits of one step with the next token of each sequence."""
        segments = map(self.decode_segment, sequences, tokens)
        return self.runner.forward(Batch(tuple(segments)))

    def states(self, slot: int) -> list[torch.Tensor]:
        """Return a copy of the newest state of ``slot`` in each pool."""
        drafts = self.runner.drafts
        place = slot if drafts is None else drafts.running.at(slot)
        return [pool[:, place].clone() for pool in self.runner.tensors.states]

    def spoil(self) -> None:
        """Fill the slots of a driver with drafts that have no sequence's state with NaN."""
        running = self.runner.drafts.running
        unused = [*running._free, *running._displaced]
        for pool in self.runner.tensors.states:
            pool[:, unused] = 255 if pool.dtype == torch.uint8 else torch.nan

    def verify(
        self, prompts: Sequence[Sequence[int]], steps: Sequence[Sequence[tuple[int, int]]]
    ) -> list[Any]:
        """Return the logits and the committed states of each step.

        ``steps`` has (tokens, accepted) of each sequence, by step. The last entry of the result has
        keys and values of the last layer, or those of a prediction head.
        """
        runner, (sequences, _) = self.runner, self.start(prompts)
        ends, found = [len(prompt) for prompt in prompts], list[Any]()
        for rank, step in enumerate(steps):
            order = sorted(range(len(step)), key=lambda b: step[b][0] > 1)
            verified = [b for b in order if step[b][0]]
            segments = []
            for b in verified:
                tokens = (np.arange(step[b][0], dtype=np.int32) * 7 + 31 * b + rank) % 199
                row, slot, drafts = sequences[b].row, sequences[b].slot, len(tokens) - 1
                num_logits = len(tokens)
                segments.append(
                    Segment(row, slot, tokens, ends[b], True, (), num_logits, num_drafts=drafts)
                )
            batch = Batch(tuple(segments))
            self.spoil()
            rows = runner.forward(batch)
            runner.commit(batch, [step[b][1] for b in verified if step[b][0] > 1])
            for b in verified:
                ends[b] += step[b][1]
            found.append((rows, [state for s in sequences for state in self.states(s.slot)]))
        spans = zip(sequences, ends, strict=True)
        kept = np.concatenate([runner.table.host[s.row, 1:end] for s, end in spans])
        keys, *values = (pool[kept] for pool in runner.tensors.pools[-1][:2])
        return [*found, (keys, values)]

    def cold(self, tokens: Sequence[int], **options: Any) -> torch.Tensor:
        """Return the logits of one prompt, computed in one step."""
        sequence, write = self.begin(tokens)
        segment = self.prefill_segment(sequence, len(tokens), **options)
        return self.runner.forward(Batch((segment,), (), (write,)))

    def cold_and_mixed(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all logits of a cold prompt, and those of a mixed batch.

        The batch has the next token of the first sequence, and the prompt's tail after a hit at 64.
        """
        sequence, write = self.begin(tokens)
        slot = self.slot()
        exports = () if slot is None else ((64, slot),)
        segment = self.prefill_segment(sequence, len(tokens), all_logits=True, exports=exports)
        cold = self.runner.forward(Batch((segment,), (), (write,)))
        resumed, write = self.begin(tokens, prefix=write[2][:64])
        segments = (
            self.decode_segment(sequence, 7),
            self.prefill_segment(resumed, len(tokens), all_logits=True),
        )
        restores = () if slot is None else ((slot, resumed.slot),)
        return cold, self.runner.forward(Batch(segments, restores, (write,)))


VERIFIED = ((3, 5, 8, 1), (7, 4), (9, 2, 6), (1, 1, 2), (5,))
"""Prompts of ``Driver.verify``."""
STEPS = (
    ((1, 1), (1, 1), (3, 2)),
    ((5, 3), (1, 1), (2, 1)),
    ((5, 5), (4, 1), (5, 2), (2, 2), (1, 1)),
    ((0, 0), (1, 1)),
    ((2, 1),),
    ((1, 1), (5, 4), (2, 2)),
)
"""Steps of ``Driver.verify``.

The first two steps have at most 8 tokens but different lengths. In a graph, the third has 15 tokens
of padding.
"""


def assert_equal_results(expected: list[Any], found: list[Any]) -> None:
    """Compare two results of ``Driver.verify``."""
    for (logits, states), (found_logits, found_states) in zip(expected, found, strict=True):
        assert torch.equal(logits, found_logits)
        assert all(map(torch.equal, states, found_states))


@pytest.fixture(scope="session")
def drivers(oracles: Callable[[str], Oracle]) -> Callable[..., Driver]:
    by_key: dict[tuple[str, str, str, int], Driver] = {}

    def get(
        family: str, dtype: str = "float32", state_dtype: str = "float32", grid: int = 64
    ) -> Driver:
        key = family, dtype, state_dtype, grid
        if key not in by_key:
            model = None if family == "builtin" else str(oracles(family).path)
            config = EngineConfig(
                model=model,
                device="cpu",
                dtype=dtype,
                state_dtype=state_dtype,
                grid=grid,
                cache_gib=0.1,
                max_running=40,
            )
            by_key[key] = Driver(load_runner(config))
            gc.collect()
        driver = by_key[key]
        driver.scatter_seed = None
        driver.reset()
        return driver

    return get


def random_tokens(
    count: int, seed: int, vocab_size: int = families.SMALL["vocab_size"]
) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


FORMATS = (("float32",), ("bfloat16", "bfloat16"), ("bfloat16",), ("float32", "bfloat16"))
"""Dtype of the model, and dtype of its states if not float32."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize ``family`` with all families and variants, and ``model`` with one per family.

    ``formats`` are all formats for one model and the first two for the others. Names that a test
    parametrizes itself are its own.
    """
    own = " ".join(str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
    wanted = {*metafunc.fixturenames} - {*re.findall(r"\w+", own)}
    models = [name for name, family in FAMILIES.items() if not family.is_variant]
    if "family" in wanted:
        metafunc.parametrize("family", FAMILIES)
    if "formats" in wanted:
        pairs = [
            (model, formats)
            for model in models
            for formats in (FORMATS if model == "qwen3_next" else FORMATS[:2])
        ]
        metafunc.parametrize(("model", "formats"), pairs, ids=["-".join((m, *f)) for m, f in pairs])
    elif "model" in wanted:
        metafunc.parametrize("model", models)
