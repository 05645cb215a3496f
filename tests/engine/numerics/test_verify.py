"""Several tokens of a sequence in one step: the bits of as many single steps, whatever was drafted,
and states that move on by what was taken."""

from __future__ import annotations

import pytest
import torch

from engine import engine_config
from engine.config import EngineConfig
from engine.plugins.disaggregation.prefix_buffer import PrefixBuffer
from engine.runner.graphs import rehearsals
from engine.runner.memory import state_slot_bytes
from engine.runner.model_runner import ModelRunner
from engine.schedule.batch import Batch, Segment

ANSWER = 14
LENGTHS = (58, 5)


@pytest.fixture(scope="module")
def make_driver(oracles, driver_class):
    made = {}

    def make(model, dtype="float32", state_dtype="float32", memory="pools"):
        key = model, dtype, state_dtype, memory
        if key not in made:
            sizes = {"cache_gib": 0.1} if memory == "arena" else {"kv_gib": 0.05, "state_gib": 0.05}
            config = engine_config(
                model=str(oracles(model).path),
                device="cpu",
                dtype=dtype,
                state_dtype=state_dtype,
                draft="tree:4",
                max_running=16,
                **sizes,
            )
            made[key] = driver_class(ModelRunner(config))
        made[key].reset()
        return made[key]

    return make


def states_of(runner, slot):
    """Every byte of a state."""
    return [pool[:, runner.running.at(slot)].clone() for pool in runner.tensors.states]


def prefilled(driver, prompts):
    """The prompts' sequences, computed."""
    begun = [driver.begin(prompt, room=ANSWER + 8) for prompt in prompts]
    segments = [driver.prefill_segment(sequence, 1000) for sequence, _ in begun]
    driver.runner.forward(Batch(tuple(segments), (), tuple(write for _, write in begun)))
    return [sequence for sequence, _ in begun]


def one_by_one(driver, prompts, answers):
    """Logits of every token of the answers, and the state after each."""
    sequences = prefilled(driver, prompts)
    logits, states = [[] for _ in prompts], [[] for _ in prompts]
    for t in range(ANSWER):
        segments = [
            driver.decode_segment(sequence, answer[t])
            for sequence, answer in zip(sequences, answers, strict=True)
        ]
        rows = driver.runner.forward(Batch(tuple(segments)))
        for b, sequence in enumerate(sequences):
            logits[b].append(rows[b].clone())
            states[b].append(
                [] if sequence.slot is None else states_of(driver.runner, sequence.slot)
            )
    return logits, states


def verified(sequence, answer, done, right, wrong, exports=()):
    """A sure token, ``right`` drafts that the answer has and ``wrong`` that it has not."""
    drafts = answer[done + 1 : done + 1 + right]
    drafts += [(token + 1) % 199 for token in (answer + [0] * 9)[done + 1 + right :]][:wrong]
    tokens = torch.tensor([answer[done], *drafts], dtype=torch.int32).numpy()
    start = len(sequence.tokens) + done
    return Segment(
        sequence.row, sequence.slot, tokens, start, True, exports, "all", num_drafts=len(drafts)
    )


def test_verifying_gives_the_bits_of_single_steps(
    model, formats, make_driver, random_tokens
) -> None:
    """Beside a sequence that decodes and one that prefills, with drafts of which some, all or none
    are right; a state in the middle of a run is saved too."""
    driver = make_driver(model, *formats)
    runner = driver.runner
    prompts = [random_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
    answers = [random_tokens(ANSWER, seed + 7) for seed in range(len(prompts))]
    logits, states = one_by_one(driver, prompts, answers)
    sequences = prefilled(driver, prompts)
    single = prefilled(driver, prompts[1:])[0]
    saved = driver.slot()
    done = [0, 0]
    # (right, wrong) drafts of both; the first crosses position 64 in its second step
    for step, drafted in enumerate([((1, 2), (4, 0)), ((4, 0), (0, 3)), ((0, 1), (2, 2))]):
        exports = ((64, saved),) if step == 1 and saved is not None else ()
        segments = [driver.decode_segment(single, answers[1][step])]
        for b, (right, wrong) in enumerate(drafted):
            own = exports if b == 0 else ()
            segments.append(verified(sequences[b], answers[b], done[b], right, wrong, own))
        late, write = driver.begin(random_tokens(5 + step, 90))
        segments.append(driver.prefill_segment(late, 100))
        batch = Batch(tuple(segments), (), (write,))
        rows = runner.forward(batch)
        assert torch.equal(rows[0], logits[1][step])
        taken, first = [], 1
        for b, (right, wrong) in enumerate(drafted):
            for t in range(right + 1):
                assert torch.equal(rows[first + t], logits[b][done[b] + t])
            first += 1 + right + wrong
            taken.append(right + 1)
            done[b] += right + 1
        runner.commit(batch, taken)
        for b, sequence in enumerate(sequences):
            if sequence.slot is not None:
                expected = states[b][done[b] - 1]
                assert all(map(torch.equal, states_of(runner, sequence.slot), expected))
    if saved is not None:
        assert done[0] > 64 - LENGTHS[0]
        expected = states[0][64 - LENGTHS[0] - 1]
        assert all(map(torch.equal, states_of(runner, saved), expected))


def test_a_state_past_what_was_taken_is_not_saved(make_driver, random_tokens) -> None:
    """And a request that takes nothing leaves its slot as it was; in an arena, too."""
    driver = make_driver("qwen3_next", memory="arena")
    runner = driver.runner
    prompts = [random_tokens(62, 0), random_tokens(9, 1)]
    sequences = prefilled(driver, prompts)
    saved = driver.slot()
    before = [states_of(runner, slot) for slot in (saved, sequences[1].slot)]
    answers = [random_tokens(ANSWER, seed) for seed in (3, 4)]
    batch = Batch(
        (
            verified(sequences[0], answers[0], 0, 4, 0, ((64, saved),)),
            verified(sequences[1], answers[1], 0, 2, 0),
        )
    )
    runner.forward(batch)
    steps = [states_of(runner, slot) for slot in runner.running.step_slots[0]]
    runner.commit(batch, (1, 0))
    after = [states_of(runner, slot) for slot in (saved, sequences[1].slot)]
    for old, new in zip(before, after, strict=True):
        assert all(map(torch.equal, old, new))
    assert all(map(torch.equal, states_of(runner, sequences[0].slot), steps[0]))
    again = verified(sequences[0], answers[0], 1, 3, 0, ((64, saved),))
    runner.forward(Batch((again,)))
    runner.commit(Batch((again,)), (1,))
    assert all(map(torch.equal, states_of(runner, saved), steps[1]))


def test_who_asks_for_a_state_by_its_slot_gets_the_newest(make_driver, random_tokens) -> None:
    """After a commit it lies elsewhere: until somebody reads it who is not verified next, or what
    is read or written goes by slots and rows."""
    driver = make_driver("qwen3_next", memory="arena")
    runner = driver.runner
    prompts, answer = [random_tokens(62, 0)], random_tokens(ANSWER, 3)
    _, (states,) = one_by_one(driver, prompts, [answer])
    sequence, other = prefilled(driver, prompts * 2)
    done = 0

    def verify(restores=()):
        nonlocal done
        batch = Batch((verified(sequence, answer, done, 1, 2),), restores)
        runner.forward(batch)
        runner.commit(batch, (2,))
        done += 2
        return runner.running.at(sequence.slot) != sequence.slot

    def is_newest(slot):
        return all(map(torch.equal, states_of(runner, slot), states[done - 1]))

    def is_home():
        return runner.running.at(sequence.slot) == sequence.slot and is_newest(sequence.slot)

    assert verify() and is_newest(sequence.slot)
    assert verify() and is_newest(sequence.slot), "from where the one before it left the state"
    runner.forward(Batch((driver.decode_segment(other, 7),)))
    assert is_home(), "another step"
    assert verify()
    buffer = PrefixBuffer.of(runner)
    buffer.write_state(other.slot, buffer.read_state(sequence.slot).wait())
    assert is_home() and is_newest(other.slot)
    assert verify()
    done -= 2
    assert verify(((other.slot, sequence.slot),)), "from a checkpoint, not from where it was"
    assert is_newest(sequence.slot)
    assert verify()
    runner.forward(Batch((verified(sequence, answer, done, 1, 2),)))
    runner.forward(Batch((driver.decode_segment(other, 7),)))
    assert runner.running.at(sequence.slot) == sequence.slot, "a step that broke off"
    runner.running.check()


def test_step_states_lie_beside_the_plan(make_driver) -> None:
    for memory in ("pools", "arena"):
        runner = make_driver("qwen3_5", memory=memory).runner
        assert runner.num_step_states == len(runner.tensors.step_slots) == 4 * 5
        slots = {*range(runner.memory.num_slots), runner.tensors.padding_slot}
        assert not slots & set(runner.tensors.step_slots)
        one = state_slot_bytes(runner.config.sizes, runner.dtype, runner.state_dtype)
        assert runner.step_state_bytes == 20 * one
    attention = make_driver("qwen3").runner
    assert attention.step_state_bytes == 0 and not len(attention.tensors.step_slots)


def test_a_warm_up_rehearses_verification(make_driver) -> None:
    """On padding, with tokens for all that may be verified; nobody's state is touched."""
    runner = make_driver("qwen3_next").runner
    before = states_of(runner, 0)
    verified = [b for b in rehearsals(runner) if any(s.num_drafts for s in b.segments)]
    assert sorted(len(batch.segments) for batch in verified) == [1, 2, 3, 4]
    for batch in verified:
        assert runner.forward(batch).shape == (2 * len(batch.segments), runner.vocab_size)
    assert all(map(torch.equal, states_of(runner, 0), before))
    plain = EngineConfig(device="cpu", kv_gib=0.05, state_gib=0.05)
    assert not any(s.num_drafts for b in rehearsals(ModelRunner(plain)) for s in b.segments)
