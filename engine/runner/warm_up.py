"""Compiles kernels and captures graphs before the first request: Triton compiles, graphs are
captured.

A kernel is launched in other shapes for few tokens than for many, and what it chooses by changes
at powers of two: one rehearsed step in every octave of lengths, and a served step finds its kernels
whatever its length is. All steps are computed on padding: they read and write no request's memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from tqdm import tqdm

from engine.config import MAX_SCORED, TILE
from engine.schedule.batch import Batch, Segment
from engine.schedule.drafter import Newest
from hybridcache.geometry.units import counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from engine.runner.device import Device
    from engine.runner.graphs import DecodeGraphs, PrefillGraphs
    from engine.runner.memory import Memory, RequestTable
    from engine.runner.verify_graphs import VerifyGraphs


class WarmableRunner(Protocol):
    """Part of ``ModelRunner`` that a warm-up uses; see there."""

    device: Device
    tensors: Memory
    table: RequestTable
    graphs: tuple[DecodeGraphs | None, PrefillGraphs | None]
    verify_graphs: VerifyGraphs | None
    max_model_len: int
    max_running_rows: int
    most_step_tokens: int
    num_guesses: int
    num_step_states: int

    def forward(self, batch: Batch, drawn: Any = None) -> Any: ...
    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What was made, and what it took."""

    num_steps: int
    num_decode_graphs: int
    num_verify_graphs: int
    """Of steps in which some have drafts."""
    num_prefill_graphs: int
    """A bucket of prefills counts once; it has a graph per layer and one more."""
    num_bytes: int
    """Of device memory, for good."""
    seconds: float

    def describe(self) -> str:
        """
        >>> WarmUp(31, 25, 0, 8, 2**29, 41.5).describe()
        '25 decode graphs, 8 prefill graphs and 31 steps in 41.50 s, 512.0 MiB'
        """
        parts = [
            counted(self.num_decode_graphs, "decode graph"),
            counted(self.num_prefill_graphs, "prefill graph"),
        ]
        if self.num_verify_graphs:
            parts.insert(1, counted(self.num_verify_graphs, "verify graph"))
        steps = counted(self.num_steps, "step")
        taken = f"{format_seconds(self.seconds)}, {format_bytes(self.num_bytes)}"
        return f"{', '.join(parts)} and {steps} in {taken}"


@torch.inference_mode()
def warm_up(runner: WarmableRunner) -> WarmUp:
    """Capture every graph that ``runner`` may ever replay, the largest first, and compile what runs
    beside them."""
    began, free_bytes = time.perf_counter(), runner.device.unused_bytes()
    decodes, verifies, prefills = captures(runner)
    steps: list[Callable[[], object]] = [
        partial(runner.forward, batch) for batch in rehearsals(runner)
    ]
    steps += [partial(runner.guess, newest, [1] * len(newest)) for newest in guesses(runner)]
    works = [*decodes, *verifies, *prefills, *steps]
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
def measure(runner: WarmableRunner) -> int:
    """Bytes that graphs and the largest step take beside what is there already. The first graph of
    each kind takes what all share; the second is taken for what each of the others adds.

    Before each reading but the last torch hands back what it keeps: what loading left would else be
    counted as taken, until a capture hands it back and the graphs seem to take nothing. What the
    step leaves is what it needs, and counts."""
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


def captures(runner: WarmableRunner) -> tuple[list[Callable[[], None]], ...]:
    """What captures each decode graph, each verify graph, and each bucket of prefill graphs, the
    largest of each kind first."""
    (decodes, prefills), verifies = runner.graphs, runner.verify_graphs
    return (
        [partial(decodes.capture, bucket) for bucket in decodes.buckets] if decodes else [],
        [partial(verifies.capture, bucket) for bucket in verifies.buckets] if verifies else [],
        [partial(prefills.capture, size) for size in prefills.buckets] if prefills else [],
    )


def lengths(most: int) -> list[int]:
    """From ``most`` down to 1: it and the powers of two below."""
    return [most, *(2**power for power in reversed(range((most - 1).bit_length())))]


def guesses(runner: WarmableRunner) -> list[list[Newest]]:
    """What a multi-token head is asked for, if there is one."""
    slot = runner.tensors.padding_slot
    if not runner.num_guesses or slot is None:
        return []
    newest = Newest(runner.table.padding_row, slot, 0, runner.max_model_len - 1)
    return [[newest] * count for count in (4, 3, 2, 1) if count <= runner.max_running_rows]


def rehearsals(runner: WarmableRunner) -> Iterator[Batch]:
    """Steps of every kind, the largest first."""
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
