"""The check at the start of an engine that hits equal cold runs on this machine.

One layer of each kind computes a prompt in one step, from a state at position 64 in a batch with
another prompt, and token by token after it. Every row must have equal bits. The digest of all rows
is part of the identity of a store: it changes with anything that changes bits, for example another
instruction set, version of a library, or number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from engine.interfaces import Exactness
from engine.runner.loaded_model import LoadedModel
from engine.runner.loading import DTYPES
from engine.runner.memory_plan import MemoryPlan, kv_row_bytes, state_slot_bytes
from engine.runner.model_runner import ModelRunner
from engine.schedule.batch import Batch, Segment

LENGTH, RESUMED_AT, SHORT_LENGTH, OTHER_LENGTH = 130, 64, 81, 40
"""Tokens of the prompt, the position of its checkpoint, tokens of a prompt with the same beginning,
and tokens of another one."""
HEAD_ROWS = (1, 3, 17)
NUM_REQUESTS = 5


@torch.inference_mode()
def check_exactness(loaded: LoadedModel) -> Exactness:
    """Compute hits and cold runs with one layer of each kind, and compare all bits.

    Triton kernels are not checked: they take seconds to compile, or to interpret on a CPU.
    """
    if not loaded.device.is_cpu or "fused" in loaded.kernels.words().values():
        return Exactness()
    digest, different = hashlib.blake2b(digest_size=16), []
    for name, cold, others in _Runs(loaded.excerpt(NUM_REQUESTS)).compare():
        digest.update(cold.contiguous().view(torch.uint8).numpy().tobytes())
        if not torch.equal(cold, others) and name not in different:
            different.append(name)
    saved = loaded.checkpoints
    is_rounded = saved is not None and DTYPES.get(saved.dtype) is not loaded.state_dtype
    rounded_to = saved.spec if saved is not None and is_rounded else ""
    return Exactness(digest.hexdigest(), tuple(different), rounded_to)


class _Runs:
    """Steps of an excerpt of a model, on memory that only they use."""

    def __init__(self, excerpt: LoadedModel) -> None:
        row = kv_row_bytes(excerpt.sizes, excerpt.dtype)
        state = state_slot_bytes(excerpt.sizes, excerpt.dtype, excerpt.state_dtype)
        num_slots = NUM_REQUESTS if state else 0
        plan = MemoryPlan("pools", NUM_REQUESTS * LENGTH, num_slots, row, state, 1)
        self._runner = ModelRunner(excerpt, plan, max_model_len=LENGTH)
        self._is_stateful = state > 0
        ids = np.arange(LENGTH + OTHER_LENGTH) * 7919 % excerpt.config.vocab_size
        self._prompt, self._other = np.split(ids.astype(np.int32), [LENGTH])
        rows = np.arange(NUM_REQUESTS * LENGTH, dtype=np.int32).reshape(-1, LENGTH)
        rows[[1, 4], :RESUMED_AT] = rows[0, :RESUMED_AT]
        self._runner.table.write([(request, 0, own) for request, own in enumerate(rows)])

    def compare(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yield names of results, the rows of a cold run, and rows that must be equal to them.

        Requests 0 and 3 run alone. Requests 1 and 4 continue from the checkpoint of 0: 1 in steps
        with 2, and 4, which ends earlier, alone.
        """
        exports = ((RESUMED_AT, 1),) if self._is_stateful else ()
        cold = self._step(self._prefill(0, self._prompt, 0, exports))
        for states in self._runner.tensors.states:
            states[:, 4] = states[:, 1]
        short = self._step(self._prefill(4, self._prompt[RESUMED_AT:SHORT_LENGTH], RESUMED_AT))
        middle, end = LENGTH - 2 - RESUMED_AT, len(self._other) - 1
        first = self._step(
            self._prefill(1, self._prompt[RESUMED_AT:-2], RESUMED_AT),
            self._prefill(2, self._other[:end], 0),
        )
        second = self._step(self._decode(2, end), self._prefill(1, self._prompt[-2:], LENGTH - 2))
        alone = self._step(self._prefill(3, self._other[:end], 0))
        token = self._step(self._decode(3, end))
        yield "hits", cold[RESUMED_AT:], torch.cat([first[:middle], second[1:]])
        yield "hits", cold[RESUMED_AT:SHORT_LENGTH], short
        yield "batches", torch.cat([alone, token]), torch.cat([first[middle:], second[:1]])
        for states in self._runner.tensors.states:
            yield "states", states[:, 0], states[:, 1]
            yield "states", states[:, 3], states[:, 2]
        logits = self._logits(cold[: HEAD_ROWS[-1]])
        for count in HEAD_ROWS:
            yield "logits", logits[:count], self._logits(cold[:count])

    def _prefill(
        self,
        request: int,
        tokens: npt.NDArray[np.int32],
        start: int,
        exports: tuple[tuple[int, int], ...] = (),
    ) -> Segment:
        return Segment(request, self._slot(request), tokens, start, False, exports)

    def _decode(self, request: int, start: int) -> Segment:
        return Segment(request, self._slot(request), self._other[start:], start, True)

    def _slot(self, request: int) -> int | None:
        return request if self._is_stateful else None

    def _step(self, *segments: Segment) -> torch.Tensor:
        """Return the hidden states of all tokens."""
        token_ids, step = self._runner.step_inputs.of(Batch(segments))
        hidden = self._runner.model.forward(token_ids, step, self._runner.tensors.pools)
        return hidden[: step.num_tokens]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._runner.model.head(hidden)
