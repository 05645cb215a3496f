"""Verification of drafts: one step with several tokens of a sequence gives the bits of single
steps, and states advance by the accepted tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.schedule.scheduler import Batch, Segment
from tests.engine.numerics.conftest import Driver, load, random_tokens

ANSWER = 14
LENGTHS = (58, 5)


def make_driver(path: Path, dtype: str = "float32", state_dtype: str = "float32") -> Driver:
    memory = {"draft": "tree:4", "max_running": 16, "cache_gib": 0.1}
    return Driver(load(path, dtype=dtype, state_dtype=state_dtype, **memory))


def verify_segment(sequence, answer, num_done, right, wrong, exports=()):
    """Return a segment with a known token, ``right`` correct drafts and ``wrong`` ones."""
    drafts = answer[num_done + 1 : num_done + 1 + right]
    drafts += [(token + 1) % 199 for token in (answer + [0] * 9)[num_done + 1 + right :]][:wrong]
    tokens = torch.tensor([answer[num_done], *drafts], dtype=torch.int32).numpy()
    start = len(sequence.tokens) + num_done
    return Segment(
        sequence.row,
        sequence.slot,
        tokens,
        start,
        True,
        exports,
        len(tokens),
        num_drafts=len(drafts),
    )


def test_verification_equals_single_steps(model, formats, oracles) -> None:
    """The batch also has a decode and a prefill. Some, all or none of the drafts are right, and a
    checkpoint is saved in the middle of a draft."""
    driver = make_driver(oracles(model).path, *formats)
    runner = driver.runner
    prompts = [random_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
    answers = [random_tokens(ANSWER, seed + 7) for seed in range(len(prompts))]
    sequences, _ = driver.start(prompts, ANSWER + 8)
    logits, states = [[] for _ in prompts], [[] for _ in prompts]
    for t in range(ANSWER):
        rows = driver.decode(sequences, [answer[t] for answer in answers])
        for b, sequence in enumerate(sequences):
            logits[b].append(rows[b].clone())
            states[b].append([] if sequence.slot is None else driver.states(sequence.slot))
    sequences = driver.start(prompts, ANSWER + 8)[0]
    single = driver.start(prompts[1:], ANSWER + 8)[0][0]
    saved = driver.slot()
    num_done = [0, 0]
    # (right, wrong) drafts of both; the first crosses position 64 in its second step.
    for step, drafted in enumerate([((1, 2), (4, 0)), ((4, 0), (0, 3)), ((0, 1), (2, 2))]):
        exports = ((64, saved),) if step == 1 and saved is not None else ()
        segments = [driver.decode_segment(single, answers[1][step])]
        for b, (right, wrong) in enumerate(drafted):
            segment_exports = exports if b == 0 else ()
            segments.append(
                verify_segment(sequences[b], answers[b], num_done[b], right, wrong, segment_exports)
            )
        late, write = driver.begin(random_tokens(5 + step, 90))
        segments.append(driver.prefill_segment(late, 100))
        batch = Batch(tuple(segments), (), (write,))
        rows = runner.forward(batch)
        assert torch.equal(rows[0], logits[1][step])
        num_accepted, first = [], 1
        for b, (right, wrong) in enumerate(drafted):
            for t in range(right + 1):
                assert torch.equal(rows[first + t], logits[b][num_done[b] + t])
            first += 1 + right + wrong
            num_accepted.append(right + 1)
            num_done[b] += right + 1
        runner.commit(batch, num_accepted)
        for b, sequence in enumerate(sequences):
            if sequence.slot is not None:
                expected = states[b][num_done[b] - 1]
                assert all(map(torch.equal, driver.states(sequence.slot), expected))
    if saved is not None:
        assert num_done[0] > 64 - LENGTHS[0]
        expected = states[0][64 - LENGTHS[0] - 1]
        assert all(map(torch.equal, driver.states(saved), expected))


def test_state_after_rejected_tokens_is_not_saved(oracles) -> None:
    """A request without an accepted token keeps its state, in an arena, too."""
    driver = make_driver(oracles("qwen3_next").path)
    runner = driver.runner
    prompts = [random_tokens(62, 0), random_tokens(9, 1)]
    sequences = driver.start(prompts, ANSWER + 8)[0]
    saved = driver.slot()
    before = [driver.states(slot) for slot in (saved, sequences[1].slot)]
    answers = [random_tokens(ANSWER, seed) for seed in (3, 4)]
    batch = Batch(
        (
            verify_segment(sequences[0], answers[0], 0, 4, 0, ((64, saved),)),
            verify_segment(sequences[1], answers[1], 0, 2, 0),
        )
    )
    runner.forward(batch)
    steps = [driver.states(slot) for slot in runner.drafts.running.step_slots[0]]
    runner.commit(batch, (1, 0))
    after = [driver.states(slot) for slot in (saved, sequences[1].slot)]
    for old, new in zip(before, after, strict=True):
        assert all(map(torch.equal, old, new))
    assert all(map(torch.equal, driver.states(sequences[0].slot), steps[0]))
    next_segment = verify_segment(sequences[0], answers[0], 1, 3, 0, ((64, saved),))
    runner.forward(Batch((next_segment,)))
    runner.commit(Batch((next_segment,)), (1,))
    assert all(map(torch.equal, driver.states(saved), steps[1]))
