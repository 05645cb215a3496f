"""vLLM on a CPU in this process, with a tiny Qwen3-Next and a driver of concurrent requests.

Needs the packages of `make vllm`. Weights are random, and wide enough that greedy tokens vary.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM with kernels for CPUs: make vllm", allow_module_level=True)

GRID = 64
"""Chunk of Gated DeltaNet's kernel: bits are equal if a prefill begins at a multiple of it."""
VOCAB = 256
CLOSE = 0.25
"""Largest difference of a logit by rounding: 0.11 was seen, and 0.8 to 4.2 after a wrong copy."""


def write_model(directory: Path) -> Path:
    """Write a Qwen3-Next of four layers, in bfloat16, with a tokenizer of words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(1)
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=64,  # Kernels for CPUs refuse 32.
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
        num_experts=4,
        num_experts_per_tok=4,  # All: no rounding decides between experts.
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
        max_position_embeddings=8192,
    )
    model = transformers.Qwen3NextForCausalLM(config)
    draw = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and "norm" not in name:
            weight.data.normal_(0, 0.08, generator=draw)
        elif name.endswith("A_log"):  # States are remembered for a hundred tokens.
            weight.data.fill_(-5.0)
    model.to(torch.bfloat16).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w0", eos_token="w1", pad_token="w2", unk_token="w2"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


def force_async_scheduling() -> None:
    """Make the CPU platform schedule asynchronously, as GPUs do: it switches that off unasked."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, config: Any) -> None:
        original(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


@dataclass(frozen=True)
class Ask:
    """Request of a load."""

    prompt: tuple[int, ...]
    max_tokens: int = 8
    abort_after: int | None = None
    """Number of its steps after which the client hangs up, or None."""
    extra: dict[str, Any] | None = None
    """``SamplingParams.extra_args``."""


@dataclass(frozen=True)
class Answer:
    """Output of a request."""

    cached_len: int
    tokens: list[int]
    logits: np.ndarray
    """float32[tokens, vocabulary]."""


class Engine:
    """One engine in this process."""

    def __init__(self, model: Path, **options: Any) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        from vllm import LLM

        settings: dict[str, Any] = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 512,
            "dtype": "bfloat16",
            "max_logprobs": -1,
            "logprobs_mode": "raw_logits",
            "disable_log_stats": False,
            "seed": 0,
        }
        self.llm = LLM(**(settings | options))
        self._core = self.llm.llm_engine
        self.scheduler = self._core.engine_core.engine_core.scheduler
        self._num_asks = 0

    def serve(self, asks: Sequence[Ask]) -> list[Answer]:
        """Serve all requests at once. Those that the client aborts have the tokens until then."""
        from vllm import SamplingParams

        names = [f"ask-{self._num_asks + i}" for i in range(len(asks))]
        self._num_asks += len(asks)
        for name, ask in zip(names, asks, strict=True):
            sampling = SamplingParams(
                temperature=0,
                max_tokens=ask.max_tokens,
                ignore_eos=True,
                logprobs=-1,
                detokenize=False,
                extra_args=ask.extra,
            )
            self._core.add_request(name, {"prompt_token_ids": list(ask.prompt)}, sampling)
        leaves = {n: a.abort_after for n, a in zip(names, asks, strict=True) if a.abort_after}
        latest: dict[str, Any] = {}
        tree = getattr(self.scheduler.kv_cache_manager, "tree", None)  # vLLM's own has none.
        while self._core.has_unfinished_requests():
            for output in self._core.step():
                latest[output.request_id] = output
            if tree is not None:
                tree.check()
            for name in [*leaves]:
                leaves[name] -= 1
                if not leaves[name]:
                    del leaves[name]
                    self._core.abort_request([name])
        return [self._answer(latest.get(name)) for name in names]

    def ask(self, prompt: Sequence[int], max_tokens: int = 8) -> Answer:
        """Serve one request alone."""
        return self.serve([Ask(tuple(prompt), max_tokens)])[0]

    def cold(self, prompt: Sequence[int], max_tokens: int = 8) -> Answer:
        """Serve one request alone with an empty cache."""
        self.reset()
        answer = self.ask(prompt, max_tokens)
        assert answer.cached_len == 0
        return answer

    def reset(self) -> None:
        """Empty the cache."""
        assert self.llm.reset_prefix_cache()

    @staticmethod
    def _answer(output: Any) -> Answer:
        if output is None:
            return Answer(0, [], np.empty((0, VOCAB), np.float32))
        end = output.outputs[0]
        rows = [[row[i].logprob for i in range(VOCAB)] for row in end.logprobs]
        logits = np.array(rows, np.float32).reshape(-1, VOCAB)
        return Answer(output.num_cached_tokens or 0, [*end.token_ids], logits)


def assert_same_bits(hit: Answer, cold: Answer) -> None:
    """Check that two answers to one prompt are equal in all bits."""
    assert hit.tokens == cold.tokens
    assert np.array_equal(hit.logits, cold.logits), np.abs(hit.logits - cold.logits).max()


def assert_same_tokens(hit: Answer, cold: Answer) -> None:
    """Check that two answers to one prompt are equal up to a token that rounding can exchange."""
    for i, (mine, theirs) in enumerate(zip(hit.tokens, cold.tokens, strict=False)):
        assert np.abs(hit.logits[i] - cold.logits[i]).max() < CLOSE
        if mine != theirs:
            assert cold.logits[i][theirs] - cold.logits[i][mine] < CLOSE
            return


def words(seed: int) -> Iterator[int]:
    """Yield random tokens of the vocabulary."""
    draw = np.random.default_rng(seed)
    while True:
        yield from draw.integers(3, VOCAB, 256).tolist()


class Served(NamedTuple):
    """One request with its answer."""

    ask: Ask
    answer: Answer
    alone: bool
    """True if no other request was served at that time."""

    @property
    def tokens(self) -> list[int]:
        return [*self.ask.prompt, *self.answer.tokens]


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield groups of ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


@dataclass
class Load:
    """Requests served so far, and a source of random tokens."""

    engine: Engine
    served: list[Served] = field(default_factory=list)
    source: Iterator[int] = field(default_factory=lambda: words(5))

    def take(self, num_tokens: int) -> list[int]:
        return [*islice(self.source, num_tokens)]

    def serve(self, *asks: Ask) -> list[Served]:
        """Serve requests at once."""
        answers = self.engine.serve(asks)
        new = [Served(*pair, len(asks) == 1) for pair in zip(asks, answers, strict=True)]
        self.served += new
        return new

    def chats(self, at_once: int) -> list[list[int]]:
        """Serve six conversations of four turns. Returns their histories."""
        system = self.take(200)
        histories = [[*system, *self.take(60)] for _ in range(6)]
        for turn in range(4):
            for group in batched(histories, at_once):
                asks = [Ask(tuple(h), 8 + len(h) % 13) for h in group]
                for history, one in zip(group, self.serve(*asks), strict=True):
                    history[:] = [*one.tokens, *self.take(40 + 30 * turn)]
        return histories

    def branches_and_edits(self, history: list[int], at_once: int) -> None:
        """Continue a conversation in three ways, change its middle, and continue from there."""
        branches = [Ask((*history, *self.take(50))) for _ in range(3)]
        edited = [*history[:300], *self.take(30), *history[330:]]
        edits = [Ask(tuple(edited)), Ask((*edited, *self.take(70)))]
        for group in batched([*branches, *edits], at_once):
            self.serve(*group)

    def aborts(self, beside: list[int]) -> None:
        """Abort requests in the prompt and in the answer, then ask for their beginnings."""
        longs = [tuple(self.take(1300)) for _ in range(3)]
        ends = (2, 5, 14)
        asks = [Ask(long, 40, abort_after=end) for long, end in zip(longs, ends, strict=True)]
        self.serve(*asks, Ask(tuple(beside)))
        self.serve(*(Ask((*long[:1000], *self.take(40))) for long in longs))

    def crowd(self) -> None:
        """Serve eight answers that all need new blocks, then continue them."""
        prompts = [tuple(self.take(250)) for _ in range(8)]
        answers = self.serve(*(Ask(prompt, 150) for prompt in prompts))
        self.serve(*(Ask((*one.tokens, *self.take(30))) for one in answers))
