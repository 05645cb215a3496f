"""Native kernels in the engine: exact hits and batches, with and without recording, and close to
the references. They are optional."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import engine_config
from engine.runner import backends
from engine.runner.build import load_runner
from engine.runner.model_runner import ModelRunner
from engine.schedule.batch import Batch, Segment
from engine.weights.model_config import ModelError
from kernels.native import kernel_choices, shared_library

COMPILED = pytest.mark.skipif(shared_library() is None, reason="no C++ compiler")
IS_RECORDED = kernel_choices()["linear_float32"] != "reference"
"""True if decode steps are recorded. Products need AVX-512 to be native."""
FORMATS = pytest.mark.parametrize(
    "dtype, quantization",
    [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "fp8")],
)


def make_runner(dtype: str = "float32", **options) -> ModelRunner:
    return load_runner(
        engine_config(
            device="cpu", dtype=dtype, cache_gib=0.1, max_model_len=512, max_running=8, **options
        )
    )


def decode_logits(driver_class, runner, prompts, num_steps) -> list[list[torch.Tensor]]:
    """Return the logits of each step in which all prompts decode together."""
    driver, sequences = prefill(driver_class, runner, prompts)
    return [
        list(runner.forward(Batch(tuple(driver.decode_segment(s, step) for s in sequences))))
        for step in range(num_steps)
    ]


@pytest.mark.full("float32-None", "bfloat16-int8")
@COMPILED
@FORMATS
def test_batches_and_recording_change_no_bit(
    driver_class, random_tokens, dtype, quantization
) -> None:
    runner = make_runner(dtype, quantization=quantization)
    assert (runner.graphs[0] is not None) == IS_RECORDED
    prompts = [random_tokens(length, length) for length in (100, 64, 7)]
    batched = decode_logits(driver_class, runner, prompts, 3)
    runner.use_graphs("off")
    assert runner.graphs == (None, None)
    for rank, prompt in enumerate(prompts):
        single = decode_logits(driver_class, runner, [prompt], 3)
        for step, [logits] in enumerate(single):
            assert torch.equal(logits, batched[step][rank])


@pytest.mark.full("float32-None", "bfloat16-int8")
@COMPILED
@FORMATS
def test_recorded_verification_equals_single_steps(
    driver_class, random_tokens, dtype, quantization
) -> None:
    runner = make_runner(dtype, quantization=quantization, draft="tree:8")
    check_verification_equals_single_steps(driver_class, random_tokens, runner)


def check_verification_equals_single_steps(driver_class, random_tokens, runner) -> None:
    """Check sequences with and without drafts, which fill a graph or less.

    A graph is also used for other lengths than those of its recording.
    """
    assert (runner.verify_graphs is not None) == IS_RECORDED
    vocab_size = runner.vocab_size
    prompts = [random_tokens(length, length, vocab_size) for length in (100, 64, 7)]
    answers = [random_tokens(20, length, vocab_size) for length in range(3)]
    runner.use_graphs("off")
    assert runner.verify_graphs is None
    driver, sequences = prefill(driver_class, runner, prompts)
    logits, states = [], []
    for tokens in zip(*answers, strict=True):
        segments = map(driver.decode_segment, sequences, tokens)
        logits.append(runner.forward(Batch(tuple(segments))))
        states.append([states_of(runner, sequence) for sequence in sequences])
    runner.use_graphs("auto")
    _, sequences = prefill(driver_class, runner, prompts)
    num_done = [0, 0, 0]
    # (tokens, taken) of each sequence.
    for step in ([(1, 1), (4, 4), (8, 3)], [(1, 1), (8, 8), (4, 1)], [(2, 1), (1, 1), (9, 9)]):
        order = sorted(range(3), key=lambda b: step[b][0] > 1)
        segments = []
        for b in order:
            tokens = np.array(answers[b][num_done[b] :][: step[b][0]], np.int32)
            sequence, drafts = sequences[b], len(tokens) - 1
            segments.append(
                Segment(
                    sequence.row,
                    sequence.slot,
                    tokens,
                    len(prompts[b]) + num_done[b],
                    True,
                    logits="all" if drafts else "last",
                    num_drafts=drafts,
                )
            )
        rows = list(runner.forward(Batch(tuple(segments))))
        for b in order:
            for t in range(step[b][0]):
                assert torch.equal(rows.pop(0), logits[num_done[b] + t][b])
        runner.commit(Batch(tuple(segments)), [step[b][1] for b in order if step[b][0] > 1])
        for b in range(3):
            num_done[b] += step[b][1]
            found = states_of(runner, sequences[b])
            assert all(map(torch.equal, found, states[num_done[b] - 1][b]))


def prefill(driver_class, runner, prompts):
    driver = driver_class(runner, scatter_seed=3)
    started = [driver.begin(prompt) for prompt in prompts]
    sequences = [sequence for sequence, _ in started]
    segments = [driver.prefill_segment(s, len(s.tokens)) for s in sequences]
    runner.forward(Batch(tuple(segments), (), tuple(write for _, write in started)))
    return driver, sequences


def states_of(runner, sequence) -> list[torch.Tensor]:
    slot = runner.running.at(sequence.slot)
    return [pool[:, slot].clone() for pool in runner.tensors.states]


@COMPILED
@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_logits_are_close_to_the_references(driver_class, random_tokens, dtype, error) -> None:
    prompts = [random_tokens(90, 1), random_tokens(20, 2)]
    native, plain = (
        torch.stack([torch.stack(step) for step in decode_logits(driver_class, runner, prompts, 2)])
        for runner in (make_runner(dtype), make_runner(dtype, kernels=backends.all_plain()))
    )
    assert (native - plain).abs().max() < error * plain.float().std()


def test_engine_works_without_a_compiler(monkeypatch, driver_class, random_tokens) -> None:
    monkeypatch.setattr(backends.native, "shared_library", lambda: None)
    runner = make_runner()
    assert set(runner.kernels.words().values()) == {"reference"}
    [[logits]] = decode_logits(driver_class, runner, [random_tokens(10, 1)], 1)
    assert logits.isfinite().all()
    with pytest.raises(ModelError, match="kernel gdn cannot be loaded as native: no working C"):
        make_runner(kernels="gdn=native")
