"""Verification of drafts: one step with several tokens of a sequence gives the bits of single
steps, and states advance by the accepted tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.runner.predictor import Newest
from engine.schedule.scheduler import Batch, Segment
from tests.engine.device_models import write_geometry
from tests.engine.runner.test_graphs import MODELS, Recorder
from tests.engine.small_models import Driver, load, random_tokens
from tests.selection import num_examples

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


def require_recordable(driver: Driver) -> None:
    """Skip a test of recorded steps if a kernel reads lengths on the host, as references do."""
    if "reference" in driver.runner.kernels.words().values():
        pytest.skip(f"kernels read lengths on the host: {driver.runner.kernels.words()}")


def test_recorded_passes_of_the_head_draft_the_same_tokens(tmp_path) -> None:
    """Of three requests in a recording for four, with keys that outgrow one bound and then all.
    Requests that fill it write to the padding row."""
    path, recorder = write_geometry(tmp_path, MODELS["states"]), Recorder()
    options = {"load_format": "dummy", "draft": "mtp:4", "max_running": 4, "max_model_len": 100}
    driver = Driver(load(path, **options, cache_gib=0.03))
    require_recordable(driver)
    runner, lengths = driver.runner, (14, 5, 60)
    sequences, _ = driver.start([random_tokens(length, length) for length in lengths], 20)
    newest = [Newest(one.row, one.slot, 7, one.computed_len) for one in sequences]
    runner.use_graphs("off")
    rows, pools = runner.tensors.padding_row, runner.tensors.pools[-1][:2]
    expected, kept = runner.drafts.guess(newest, [4, 1, 3]), [pool[:rows].clone() for pool in pools]
    runner.drafts.predictor.record(recorder, [1, 4], [16, 62])
    for _ in range(2):
        found = runner.drafts.guess(newest, [4, 1, 3])
        assert all(map(np.array_equal, found, expected))
        [alone] = runner.drafts.guess(newest[:1], [4])
        assert np.array_equal(alone, expected[0])
    assert recorder.num_recorded == 3 and set(runner.drafts.predictor.buckets) == {
        (4, 62), (4, 16), (1, 62), (1, 16)
    }  # fmt: skip
    assert all(map(torch.equal, kept, (pool[:rows] for pool in pools)))


def test_random_verifications_in_graphs_equal_single_steps(tmp_path) -> None:
    """500 steps of random sequences, drafts and acceptances, of slots without a sequence's state
    that contain NaN; the drafts of the multi-token head are compared, too."""
    num_steps, recorder = num_examples(500), Recorder()
    path, draw = write_geometry(tmp_path, MODELS["states"]), np.random.default_rng(3)
    options = {"load_format": "dummy", "draft": "mtp:4", "max_running": 4, "max_model_len": 1100}
    driver = Driver(load(path, **options, cache_gib=0.03))
    require_recordable(driver)
    runner, verified, states = driver.runner, 0, {}
    runner.graphs = runner._decode_graphs(recorder, is_native=True)
    prompts = [random_tokens(length, length) for length in (5, 2, 9, 3)]
    answers = [random_tokens(1100, seed) for seed in range(4)]
    sequences, _ = driver.start(prompts, 1090)
    done, logits = [0] * 4, [[] for _ in prompts]

    def kept(b, count):
        """Return the states of a sequence, and the next drafts."""
        own = sequences[b]
        newest = Newest(own.row, own.slot, answers[b][count], len(prompts[b]) + count)
        return driver.states(own.slot), runner.drafts.guess([newest], [2])[0].tolist()

    for step in range(num_steps):
        driver.spoil()
        drafted = {b: draw.integers(0, 3, 2) for b in range(4) if draw.random() < 0.8}
        chosen = sorted(drafted, key=lambda b: drafted[b].any())  # Those without drafts are first.
        if not chosen:
            continue
        segments = [verify_segment(sequences[b], answers[b], done[b], *drafted[b]) for b in chosen]
        batch = Batch(tuple(segments))
        rows = runner.forward(batch).split([len(segment.token_ids) for segment in segments])
        runner.commit(batch, [1 + drafted[b][0] for b in chosen if drafted[b].any()])
        runner.drafts.running.check()
        verified += any(drafted[b].any() for b in chosen)
        for b, own in zip(chosen, rows, strict=True):
            logits[b] += own[: 1 + drafted[b][0]]
            done[b] += 1 + drafted[b][0]
            if step % 25 == 0:
                states[b, done[b]] = kept(b, done[b])
    assert verified > 0.9 * num_steps and recorder.num_recorded > 10
    driver.reset()
    sequences, _ = driver.start(prompts, 1090)
    for place in range(max(done)):
        live = [b for b in range(4) if place < done[b]]
        rows = driver.decode([sequences[b] for b in live], [answers[b][place] for b in live])
        for b, row in zip(live, rows, strict=True):
            assert torch.equal(row, logits[b][place])
            if (b, place + 1) in states:
                (found, drafts), (expected, single) = states[b, place + 1], kept(b, place + 1)
                assert all(map(torch.equal, found, expected)) and drafts == single
