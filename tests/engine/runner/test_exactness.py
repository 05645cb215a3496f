"""On the CPU, logits after a hit equal those of a cold run bit for bit, in any batch and chunks."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Engine, EngineConfig, SamplingParams
from engine.engine import load_runner
from engine.plugins.disaggregation.wire import identity
from engine.plugins.tiers.records import StoreError
from engine.runner.backends import override_all
from engine.schedule.scheduler import Batch
from kernels.attention import reference as attention
from kernels.conv1d import reference as conv1d
from kernels.gdn import reference as gdn
from kernels.linear import reference as linear
from kernels.linear.grouped import Grouped
from kernels.linear.native import has_groups
from tests.engine.small_models import load, random_tokens
from tests.kernels.records import taking

PROMPT_LENS = st.integers(1, 210)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cold_run(driver, tokens, grid=64):
    """Return the logits of all positions, a checkpoint slot per grid position, and the KV rows."""
    sequence, write = driver.begin(tokens)
    slots = {}
    if sequence.slot is not None:
        slots = {p: driver.slot() for p in range(grid, len(tokens) + 1, grid)}
    segment = driver.prefill_segment(
        sequence, len(tokens), all_logits=True, exports=tuple(slots.items())
    )
    logits = driver.runner.forward(Batch((segment,), (), (write,)))
    return logits, slots, write[2]


def run_pieces(driver, starts, restores, writes, random, grid=64):
    """Prefill all sequences in random chunks, mixed with decodes of the finished ones.

    Returns the logits by the id of the sequence.
    """
    logits = {id(sequence): [] for sequence in starts}
    finished = []
    waiting = list(starts)
    while waiting:
        decoding = [s for s in finished if random.random() < 0.6 and len(s.tokens) < 400]
        active = [s for s in waiting if random.random() < 0.7] or waiting[:1]
        segments = [driver.decode_segment(s, int(random.integers(199))) for s in decoding]
        segments += [
            driver.prefill_segment(s, grid * int(random.integers(1, 5)), all_logits=True)
            for s in active
        ]
        rows = driver.runner.forward(Batch(tuple(segments), restores, writes)).split(
            [1] * len(decoding) + [len(segment.token_ids) for segment in segments[len(decoding) :]]
        )
        restores = writes = ()
        for sequence, part in zip(active, rows[len(decoding) :], strict=True):
            logits[id(sequence)].append(part)
        done = [s for s in waiting if s.computed_len == len(s.tokens)]
        finished += done
        waiting = [s for s in waiting if s not in done]
    return {key: torch.cat(parts) for key, parts in logits.items()}


@settings(max_examples=3, deadline=None)
@given(
    lens=st.lists(PROMPT_LENS, min_size=1, max_size=3),
    seed=st.integers(0, 2**32 - 1),
    scattered=st.booleans(),
    num_threads=st.sampled_from([1, 2]),
)
def test_hits_are_exact_in_any_batch(model, formats, drivers, lens, seed, scattered, num_threads):
    driver = drivers(model, *formats)
    driver.scatter_seed = seed if scattered else None
    driver.reset()
    prompts = [random_tokens(length, seed + i) for i, length in enumerate(lens)]
    with threads(num_threads):
        assert_hits_are_exact(driver, prompts, np.random.default_rng(seed), 64)


def assert_hits_are_exact(driver, prompts, random, grid):
    """Check that all prompts, resumed from random checkpoints, give the logits of cold runs."""
    colds = [cold_run(driver, prompt, grid) for prompt in prompts]
    sequences, writes, restores, hits = [], [], [], []
    for prompt, (_, slots, rows) in zip(prompts, colds, strict=True):
        at = int(random.integers(0, (len(prompt) - 1) // grid + 1)) * grid
        sequence, write = driver.begin(prompt, prefix=rows[:at], room=80)
        sequences.append(sequence)
        writes.append(write)
        hits.append(at)
        if at and sequence.slot is not None:
            restores.append((slots[at], sequence.slot))
    warm = run_pieces(driver, sequences, tuple(restores), tuple(writes), random, grid)
    for sequence, at, (logits, _, _) in zip(sequences, hits, colds, strict=True):
        assert torch.equal(warm[id(sequence)], logits[at:])


@settings(max_examples=2, deadline=None)
@given(count=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_decode_does_not_depend_on_the_batch(model, formats, drivers, count, seed):
    """Sequences get the same tokens and logits in one batch and separately."""
    driver = drivers(model, *formats)
    random = np.random.default_rng(seed)
    prompts = [random_tokens(int(random.integers(1, 90)), seed + i) for i in range(count)]
    sequences, logits = driver.start(prompts)
    batched = [logits]
    for _ in range(3):
        batched.append(driver.decode(sequences, batched[-1].argmax(-1).tolist()))
    driver.reset()
    for rank, prompt in enumerate(prompts):
        sequence, logits = driver.start([prompt])
        for step in batched:
            assert torch.equal(logits[0], step[rank])
            logits = driver.decode(sequence, [int(logits.argmax())])


def test_only_preempted_answers_differ_and_none_with_exact():
    """The beginning of docs/concepts/exactness.md makes this exception."""
    prompts = [random_tokens(length, length, 256) for length in (150, 200, 97, 230, 180, 120)]
    greedy = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True, logprobs=3)

    def start(**settings):
        return Engine(EngineConfig(device="cpu", dtype="float32", max_model_len=512, **settings))

    def answers(engine, prompts):
        outputs = engine.generate(prompts, greedy)
        return outputs, [(output.token_ids, output.logprobs) for output in outputs]

    alone = start(cache_gib=0.01, prefix_cache="none")
    cold = [answers(alone, [prompt])[1][0] for prompt in prompts]
    for exact in (True, False):
        engine = start(cache_gib=0.0015, max_running=6, exact=exact)
        outputs, found = answers(engine, prompts)
        preempted = [output.num_preemptions > 0 for output in outputs]
        assert any(preempted)
        for was_preempted, own, expected in zip(preempted, found, cold, strict=True):
            assert own == expected or (was_preempted and not exact)


class TestCheckAtTheStart:
    """The engine compares hits with cold runs when it starts, and says whether they are equal."""

    def test_it_holds_in_all_families(self, model, drivers):
        for dtype in ("float32", "bfloat16"):
            exactness = drivers(model, dtype).runner.exactness
            assert exactness.digest and exactness.different == ()
            assert exactness.fingerprint.startswith("exact-")

    @pytest.mark.parametrize(
        "kernels", ["", override_all("reference")], ids=["default", "reference"]
    )
    def test_equal_engines_have_equal_digests(self, kernels):
        digests = set()
        for num_threads in (1, 2, 1):
            with threads(num_threads):
                digests.add(load_small(kernels=kernels).exactness.digest)
        assert len(digests) == 1
        assert load_small(kernels=kernels, dtype="float32").exactness.digest not in digests

    @pytest.mark.full
    @pytest.mark.parametrize("kernels", ["", override_all("reference")], ids=["default", "plain"])
    @pytest.mark.parametrize("quantization", [None, "int8", "fp8", "int4", "int4-128"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_it_holds_in_all_formats_with_any_threads(
        self, model, dtype, quantization, kernels, oracles
    ):
        if "int4" in (quantization or "") and not (kernels == "" and has_groups(Grouped(4, 32))):
            pytest.skip("four bits need native products")
        digests = set()
        for num_threads in (1, 2):
            with threads(num_threads):
                runner = load(
                    oracles(model).path, dtype=dtype, quantization=quantization, kernels=kernels
                )
            assert runner.exactness.different == ()
            digests.add(runner.exactness.digest)
        assert len(digests) == 1

    def test_products_that_depend_on_the_batch_are_noticed(self, monkeypatch):
        """As with a library that has another kernel for more than 96 rows."""
        settings = {
            "kernels": override_all("reference"),
            "dtype": "float32",
        }  # bfloat16 may round it away.
        expected = load_small(**settings).exactness
        break_linear(monkeypatch, lambda weight, rows: rows > 96)
        found = load_small(**settings)
        assert {"hits", "batches"} <= set(found.exactness.different)
        assert found.exactness.digest != expected.digest
        assert found.exactness.fingerprint.startswith("inexact-")
        assert found.exactness.sentence.startswith("NOT exact")

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8:head"])
    def test_rounded_checkpoints_are_not_called_exact(self, dtype):
        found = load_small(checkpoint_dtype=dtype).exactness
        assert found.different == () and found.fingerprint.startswith("inexact-")
        assert found.sentence.startswith(f"NOT exact: checkpoints are rounded to {dtype}")
        unchanged = load_small(checkpoint_dtype="bfloat16", state_dtype="bfloat16").exactness
        assert unchanged.fingerprint.startswith("exact-")

    def test_single_rows_of_the_head_are_compared(self, monkeypatch):
        vocab_size = load_small().vocab_size
        break_linear(
            monkeypatch, lambda weight, rows: len(weight) == vocab_size and rows <= linear.ROWS
        )
        found = load_small(kernels=override_all("reference"), dtype="float32")
        assert found.exactness.different == ("logits",)

    @pytest.mark.parametrize(
        "module, name, argument",
        [(attention, "prefill_attention", 0), (gdn, "chunk_gdn", 2), (conv1d, "prefill_conv1d", 0)],
    )
    def test_kernels_that_depend_on_the_number_of_sequences_are_noticed(
        self, monkeypatch, module, name, argument
    ):
        real = taking(getattr(module, name))

        def broken(*arguments, packed, **options):
            if hasattr(arguments[0], "_fields"):
                [arguments] = arguments
            if len(packed.lengths) > 1:
                changed = arguments[argument] * 1.0001
                arguments = (*arguments[:argument], changed, *arguments[argument + 1 :])
            return real(*arguments, packed=packed, **options)

        monkeypatch.setattr(module, name, broken)
        found = load_small(kernels=override_all("reference"), dtype="float32").exactness.different
        assert {"hits", "batches"} <= set(found)

    def test_other_bits_are_another_identity(self, monkeypatch, tmp_path):
        """A store, a restart and a transfer refuse bits of a library that no list of versions and
        instructions names."""
        settings = {"kernels": override_all("reference"), "state_dir": str(tmp_path / "state")}
        own = load_small(kernels=override_all("reference"))
        words = identity(own)
        Engine(small_config(**settings)).close()
        Engine(small_config(**settings)).close()
        break_linear(monkeypatch, lambda weight, rows: True)
        other = identity(load_small(kernels=override_all("reference")))
        assert {name for name in words if words[name] != other[name]} == {"computed bits"}
        with pytest.raises(StoreError, match="differs in computed bits: configure"):
            Engine(small_config(**settings))


def small_config(**settings):
    return EngineConfig(device="cpu", cache_gib=0.05, max_model_len=512, **settings)


def load_small(**settings):
    return load_runner(small_config(**settings))


def break_linear(monkeypatch, is_broken):
    """Sum products of some weights and numbers of rows in another order: last bits differ."""
    real = linear.prepare

    def prepare(weight, bias=None):
        product = real(weight, bias)
        order = torch.arange(weight.shape[1] - 1, -1, -1)
        reversed_product = real(weight[:, order].contiguous(), bias)

        def multiply(x):
            return reversed_product(x[:, order]) if is_broken(weight, len(x)) else product(x)

        return multiply

    monkeypatch.setattr(linear, "prepare", prepare)
