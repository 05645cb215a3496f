"""Builds a model runner: the weights, then the memory from a plan. Checks that hits equal cold runs
on this machine, and captures graphs and compiles kernels before the first request."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.config import MAX_SCORED, TILE, EngineConfig
from engine.messages import Exactness
from engine.requests.logit_rules import FREE
from engine.requests.request import SamplingInput, SamplingParams
from engine.runner.device import Device
from engine.runner.loading import DTYPES, LoadedModel
from engine.runner.memory import MemoryPlan, check_sizes
from engine.runner.model_runner import ModelRunner, WarmUp
from engine.runner.sampler import Sampler
from engine.schedule.scheduler import Batch, Segment
from engine.weights.model_config import ModelError
from engine.weights.ranks import ALONE, Rank
from hybridcache.geometry.units import GIB, counted


def load_runner(
    config: EngineConfig, rank: Rank = ALONE, kind: type[ModelRunner] = ModelRunner
) -> ModelRunner:
    """Load the model that ``config`` names, and allocate its memory. Raises ModelError."""
    device = Device.resolve(config.device)
    check_sizes(config, device)  # Before anything slow.
    try:
        loaded = LoadedModel.load(config, rank)
        config = loaded.settings
        check_sizes(config, loaded.device)
        warms_up = config.warm_up and not loaded.device.is_cpu
        # Triton's kernels take seconds to compile, and to interpret on a CPU. What the check leaves
        # allocated counts as used memory below.
        is_checked = warms_up or "fused" not in loaded.kernels.words().values()
        exactness = check_exactness(loaded) if is_checked else Exactness()
        reserved_bytes = measure(loaded) if warms_up else loaded.outer_state_bytes
        plan = loaded.plan(page_size=config.page_size).fit(
            loaded.device, config.cache_bytes, reserved_bytes, rank
        )
        runner = kind(loaded, plan, _max_model_len(loaded, plan))
        runner.exactness = exactness
        if warms_up:
            runner.warmed = warm_up(runner)
        return runner
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{device.torch_device} has too little memory for weights, graphs and the largest "
            "step: lower --cache-gib or --token-budget N, or use --graphs off, "
            "--quantization or --tp."
        ) from None


def _max_model_len(loaded: LoadedModel, plan: MemoryPlan) -> int:
    """Return the context length. Raises ModelError if it does not fit, or if no position of the
    grid is inside it."""
    asked, longest = loaded.settings.max_model_len, plan.max_request_len
    context, grid = asked or min(loaded.config.max_len, longest), loaded.settings.grid
    if grid >= context and grid > TILE:
        raise ModelError(
            f"grid {grid} must be less than the context of {counted(context, 'token')}: otherwise "
            "no prompt is ever reused."
        )
    if asked is None:
        return context
    if asked > longest:
        need = (asked + plan.num_kv_tokens - longest) * plan.row_bytes / GIB
        raise ModelError(
            f"one request of max_model_len {asked} needs {need:.3g} GiB for KV and states; "
            f"there is room for {counted(longest, 'token')}: lower it, or raise --cache-gib."
        )
    return asked


LENGTH, RESUMED_AT, SHORT_LENGTH, OTHER_LENGTH = 130, 64, 81, 40
"""Tokens of the prompt, the position of its checkpoint, tokens of a prompt with the same beginning,
and tokens of another one."""
HEAD_ROWS = (1, 3, 17)
NUM_REQUESTS = 5


@torch.inference_mode()
def check_exactness(loaded: LoadedModel) -> Exactness:
    """Compute hits and cold runs with one layer of each kind, and compare all bits.

    The digest of all rows is part of the identity of a store: it changes with anything that changes
    bits, for example another instruction set or version of a library.
    """
    loaded.device.make_current()
    digest, different = hashlib.blake2b(digest_size=16), []
    for name, cold, others in _results(loaded.excerpt(NUM_REQUESTS)):
        digest.update(cold.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        if not torch.equal(cold, others) and name not in different:
            different.append(name)
    saved = loaded.checkpoints
    is_rounded = saved is not None and DTYPES.get(saved.dtype) is not loaded.state_dtype
    rounded_to = saved.spec if saved is not None and is_rounded else ""
    return Exactness(digest.hexdigest(), tuple(different), rounded_to)


def _results(excerpt: LoadedModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield names of results, the rows of a cold run, and rows that must be equal to them.

    Requests 0 and 3 run alone. Requests 1 and 4 continue from the checkpoint of 0: 1 in steps with
    2, and 4, which ends earlier, alone.
    """
    plan = excerpt.plan(NUM_REQUESTS * LENGTH, NUM_REQUESTS)
    runner = ModelRunner(excerpt, plan, max_model_len=LENGTH)
    ids = np.arange(LENGTH + OTHER_LENGTH) * 7919 % excerpt.config.vocab_size
    prompt, other = np.split(ids.astype(np.int32), [LENGTH])
    rows = np.arange(NUM_REQUESTS * LENGTH, dtype=np.int32).reshape(-1, LENGTH)
    rows += NUM_REQUESTS * plan.slab_rows  # after the states
    rows[[1, 4], :RESUMED_AT] = rows[0, :RESUMED_AT]
    runner.table.write([(request, 0, own) for request, own in enumerate(rows)])

    def part(
        request: int, tokens: npt.NDArray[np.int32], start: int, is_decode: bool = False
    ) -> Segment:
        slot = request if plan.is_stateful else None
        exports = ((RESUMED_AT, 1),) if request == 0 and plan.is_stateful else ()
        return Segment(request, slot, tokens, start, is_decode, exports)

    def step(*segments: Segment) -> torch.Tensor:
        """Return the hidden states of all tokens."""
        token_ids, inputs = runner.step_inputs.of(Batch(segments))
        return runner.model.forward(token_ids, inputs, runner.tensors.pools)[: inputs.num_tokens]

    cold = step(part(0, prompt, 0))
    for states in runner.tensors.states:
        states[:, 4] = states[:, 1]
    short = step(part(4, prompt[RESUMED_AT:SHORT_LENGTH], RESUMED_AT))
    middle, end = LENGTH - 2 - RESUMED_AT, len(other) - 1
    first = step(part(1, prompt[RESUMED_AT:-2], RESUMED_AT), part(2, other[:end], 0))
    second = step(part(2, other[end:], end, True), part(1, prompt[-2:], LENGTH - 2))
    alone = step(part(3, other[:end], 0))
    token = step(part(3, other[end:], end, True))
    yield "hits", cold[RESUMED_AT:], torch.cat([first[:middle], second[1:]])
    yield "hits", cold[RESUMED_AT:SHORT_LENGTH], short
    yield "batches", torch.cat([alone, token]), torch.cat([first[middle:], second[:1]])
    for states in runner.tensors.states:
        yield "states", states[:, 0], states[:, 1]
        yield "states", states[:, 3], states[:, 2]
    logits = runner.model.head(cold[: HEAD_ROWS[-1]])
    for count in HEAD_ROWS:
        yield "logits", logits[:count], runner.model.head(cold[:count])


@torch.inference_mode()
def warm_up(runner: ModelRunner) -> WarmUp:
    """Capture every graph that ``runner`` may replay, and compile all other kernels.

    The launch parameters of a kernel change with the number of tokens, at powers of two. So one
    step in every octave of lengths is rehearsed, on padding: no request's memory is written.
    """
    began, free_bytes = time.perf_counter(), runner.device.unused_bytes()
    graphs = [capture for kind in captures(runner) for capture in kind]
    steps: list[Callable[[], object]] = [
        partial(runner.forward, batch) for batch in rehearsals(runner)
    ]
    if runner.drafts is not None:
        steps += runner.drafts.rehearsals()
    from tqdm import tqdm  # Here, because a start without warm-up does not need it.

    for work in tqdm([*graphs, *steps], desc="warm-up", leave=False, disable=None):
        work()
    runner.device.synchronize()
    return WarmUp(
        num_graphs=len(graphs),
        num_steps=len(steps),
        num_bytes=max(0, free_bytes - runner.device.free_bytes()),
        seconds=time.perf_counter() - began,
    )


@torch.inference_mode()
def measure(loaded: LoadedModel) -> int:
    """Measure the bytes to keep free for tables, graphs and the largest step, on the smallest
    memory.

    The first graph of each kind takes the memory that all share; the second is used to estimate
    each further one. Memory that was cached during loading must not count as used before, but the
    memory that the step leaves cached is needed by it.
    """
    device, num_bytes = loaded.device, 0
    free_bytes = device.unused_bytes()
    longest = loaded.settings.max_model_len or loaded.config.max_len
    runner = ModelRunner(loaded, loaded.plan(), longest)
    before = device.unused_bytes()
    for kind in captures(runner):
        for capture in kind[:1]:
            capture()
        shared = device.unused_bytes()
        for capture in kind[1:2]:
            capture()
        num_bytes += (shared - device.unused_bytes()) * max(0, len(kind) - 2)
    logits = runner.forward(next(rehearsals(runner)))[: loaded.settings.max_running]
    requests = [SamplingInput(SamplingParams(top_p=0.5), 0, 0, FREE)] * len(logits)
    Sampler().launch(logits, requests, range(len(requests)))
    for work in () if runner.drafts is None else runner.drafts.rehearsals():
        work()
    device.synchronize()
    return num_bytes + max(0, free_bytes - before) + max(0, before - device.free_bytes())


def captures(runner: ModelRunner) -> list[list[Callable[[], None]]]:
    """Return functions that capture each graph of each kind, largest first."""
    kinds: list[Any] = [kind for kind in runner.graphs if kind is not None]
    return [[partial(kind.capture, bucket) for bucket in kind.buckets] for kind in kinds]


def rehearsals(runner: ModelRunner) -> Iterator[Batch]:
    """Yield steps of every kind, largest first."""
    row = runner.table.padding_row
    slot, saved = runner.tensors.padding_slot, runner.tensors.padding_checkpoint
    longest, settings = runner.max_model_len, runner.loaded.settings

    def prompts(length: int) -> Iterator[Segment]:
        num_scored = min(length, MAX_SCORED)
        for first, end in ((0, num_scored), (num_scored, length)):
            for start in range(first, end, longest):
                tokens = np.zeros(min(longest, end - start), np.int32)
                last = len(tokens) // TILE * TILE
                exports = ((last, saved),) if last and saved is not None else ()
                yield Segment(row, slot, tokens, 0, False, exports, 1 if first else len(tokens))

    exports = () if saved is None else ((longest, saved),)
    decode = Segment(row, slot, np.zeros(1, np.int32), longest - 1, True, exports)
    two = np.zeros(2, np.int32)
    verified = Segment(row, slot, two, longest - 2, True, num_logits=2, num_drafts=1)
    most, others = settings.most_step_tokens, settings.max_running - 1
    yield Batch((*[decode] * others, *prompts(most - others)))
    for length in (most, *(2**power for power in reversed(range((most - 1).bit_length())))):
        yield Batch((*prompts(length),))
    for count in (4, 3, 2, 1):
        if count <= settings.max_running:
            copies = () if slot is None or saved is None else ((saved, slot),) * count
            yield Batch((*[decode] * count, *prompts(1)), restores=copies)
            yield Batch((decode,) * count)
            if 2 * count <= min(settings.num_step_states, 2 * (longest - 1)):
                yield Batch((verified,) * count)
