"""The warm-up before the first request: captures graphs and compiles kernels, and measures their
memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import numpy as np
import torch

from engine.config import MAX_SCORED, TILE
from engine.runner.graphs import WarmUp
from engine.runner.model_runner import ModelRunner
from engine.schedule.batch import Batch, Newest, Segment


@torch.inference_mode()
def warm_up(runner: ModelRunner) -> WarmUp:
    """Capture every graph that ``runner`` may replay, largest first, and compile all other
    kernels.

    The launch parameters of a kernel change with the number of tokens, at powers of two. So one
    step in every octave of lengths is rehearsed, and a later step of any length finds its kernels
    compiled. All steps are computed on padding: they read and write no request's memory.
    """
    began, free_bytes = time.perf_counter(), runner.device.unused_bytes()
    decodes, verifies, prefills = captures(runner)
    steps: list[Callable[[], object]] = [
        partial(runner.forward, batch) for batch in rehearsals(runner)
    ]
    steps += [partial(runner.guess, newest, [1] * len(newest)) for newest in guesses(runner)]
    works = [*decodes, *verifies, *prefills, *steps]
    from tqdm import tqdm  # Here, because a start without warm-up does not need it.

    for work in tqdm(works, desc="warm-up", leave=False, disable=None):
        work()
    runner.device.synchronize()
    return WarmUp(
        num_steps=len(steps),
        num_decode_graphs=len(decodes),
        num_verify_graphs=len(verifies),
        num_prefill_graphs=len(prefills),
        num_bytes=max(0, free_bytes - runner.device.free_bytes()),
        seconds=time.perf_counter() - began,
    )


@torch.inference_mode()
def measure(runner: ModelRunner) -> int:
    """Measure the additional bytes that graphs and the largest step take.

    The first graph of each kind takes the memory that all share; the second is used to estimate
    each further one. Before each reading except the last, torch releases its cached memory.
    Otherwise memory cached during loading would count as used until a capture releases it, and
    graphs would seem to take nothing. The memory that the step leaves cached is needed by it, and
    counts.
    """
    device = runner.device
    before, num_bytes = device.unused_bytes(), 0
    for kind in captures(runner):
        for capture in kind[:1]:
            capture()
        shared = device.unused_bytes()
        for capture in kind[1:2]:
            capture()
        num_bytes += (shared - device.unused_bytes()) * max(0, len(kind) - 2)
    runner.forward(next(rehearsals(runner)))
    for newest in guesses(runner):
        runner.guess(newest, [1] * len(newest))
    device.synchronize()
    return num_bytes + max(0, before - device.free_bytes())


def captures(runner: ModelRunner) -> tuple[list[Callable[[], None]], ...]:
    """Return functions that capture each decode graph, each verify graph, and each bucket of
    prefill graphs, largest of each kind first."""
    (decodes, prefills), verifies = runner.graphs, runner.verify_graphs
    return (
        [partial(decodes.capture, bucket) for bucket in decodes.buckets] if decodes else [],
        [partial(verifies.capture, bucket) for bucket in verifies.buckets] if verifies else [],
        [partial(prefills.capture, size) for size in prefills.buckets] if prefills else [],
    )


def lengths(most: int) -> list[int]:
    """Return ``most`` and the smaller powers of two, down to 1."""
    return [most, *(2**power for power in reversed(range((most - 1).bit_length())))]


def guesses(runner: ModelRunner) -> list[list[Newest]]:
    """Return the inputs for rehearsing a multi-token head, if there is one."""
    slot = runner.tensors.padding_slot
    if not runner.num_guesses or slot is None:
        return []
    newest = Newest(runner.table.padding_row, slot, 0, runner.max_model_len - 1)
    return [[newest] * count for count in (4, 3, 2, 1) if count <= runner.max_running_rows]


def rehearsals(runner: ModelRunner) -> Iterator[Batch]:
    """Yield steps of every kind, largest first."""
    row = runner.table.padding_row
    slot, saved = runner.tensors.padding_slot, runner.tensors.padding_checkpoint
    longest = runner.max_model_len

    def prefill(length: int, logits: Literal["all", "last"]) -> Segment:
        last = length // TILE * TILE
        exports = ((last, saved),) if last and saved is not None else ()
        return Segment(row, slot, np.zeros(length, np.int32), 0, False, exports, logits)

    def prefills(length: int, logits: Literal["all", "last"]) -> Iterator[Segment]:
        for start in range(0, length, longest):
            yield prefill(min(longest, length - start), logits)

    def decode() -> Segment:
        exports = () if saved is None else ((longest, saved),)
        return Segment(row, slot, np.zeros(1, np.int32), longest - 1, True, exports)

    def verified(num_drafts: int) -> Segment:
        tokens, start = np.zeros(1 + num_drafts, np.int32), longest - 1 - num_drafts
        return Segment(row, slot, tokens, start, True, logits="all", num_drafts=num_drafts)

    for length in lengths(runner.most_step_tokens):
        num_scored = min(length, MAX_SCORED)
        yield Batch((*prefills(num_scored, "all"), *prefills(length - num_scored, "last")))
    for count in (4, 3, 2, 1):
        if count <= runner.max_running_rows:
            copies = () if slot is None or saved is None else ((saved, slot),) * count
            yield Batch((*[decode()] * count, prefill(1, "all")), restores=copies)
            yield Batch((decode(),) * count)
            if 2 * count <= min(runner.num_step_states, 2 * (longest - 1)):
                yield Batch((verified(1),) * count)
