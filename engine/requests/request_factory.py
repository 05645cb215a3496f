"""Validation of request specifications, and construction of requests."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import Settings
from engine.errors import ContextOverflow
from engine.plugins import grammar_compiler
from engine.requests.logit_rules import (
    AllowedTokens,
    BansAndBiases,
    GrammarCompiler,
    LogitRule,
    Penalties,
    ReasoningBudget,
)
from engine.requests.request import Request
from engine.requests.spec import Prompt, RequestSpec, SamplingParams
from engine.text.outputs import TextStream
from engine.text.tokenizer import EncodeOptions, IdTokenizer
from hybridcache.tokens import Tokens, require_namespace

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

MAX_LOGPROBS = 50
NO_PLUGINS = Settings()
AS_WORD = EncodeOptions(add_special_tokens=False)


class Intake:
    """Makes requests for one engine. Safe to call from any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        sampling_defaults: Mapping[str, Any],
        seed: int,
        clock: Callable[[], float],
        plugins: Settings = NO_PLUGINS,
    ) -> None:
        """Prepare the factory. Without a ``tokenizer``, prompts are token ids and answers have no
        text. ``plugins`` has the settings of plugins."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._default_sampling = SamplingParams(**sampling_defaults)
        self._seed = seed
        self._clock = clock
        self._arrivals = itertools.count()
        self._plugins = plugins
        self.grammar_news = threading.Event()
        """Set whenever a grammar that was not ready has become ready."""
        self._lock = threading.Lock()
        self._grammars: GrammarCompiler | None = None

    @property
    def grammars(self) -> GrammarCompiler:
        """Compiler of grammars, loaded on first use."""
        with self._lock:
            if self._grammars is None:
                self._grammars = grammar_compiler(
                    self._plugins, self._tokenizer, self._vocab_size, self.grammar_news
                )
            return self._grammars

    def prepare(self, spec: RequestSpec) -> Request:
        """Make a request from ``spec``; see ``Engine.submit``. Raises ValueError for an invalid
        one. O(length of the prompt)."""
        spec, max_len = self._checked(spec)
        sampling = spec.sampling or self._default_sampling
        end_token_ids = self._end_token_ids(sampling)
        arrival = next(self._arrivals)
        return Request(
            spec,
            arrival=arrival,
            arrival_s=self._clock(),
            max_len=max_len,
            seed=sampling.seed if sampling.seed is not None else self._seed + arrival,
            end_token_ids=end_token_ids,
            text_stream=self._text_stream(sampling),
            rules=[
                *([] if spec.grammar is None else [self.grammars.rule(spec.grammar)]),
                *self._rules(sampling, end_token_ids, np.asarray(spec.prompt)),
            ],
        )

    def check(self, spec: RequestSpec) -> RequestSpec:
        """Return ``spec`` with token ids for its prompt and with complete sampling parameters.

        Raises ValueError as ``prepare`` does, except for errors in the grammar. O(length of the
        prompt).
        """
        spec, _ = self._checked(spec)
        sampling = spec.sampling or self._default_sampling
        self._text_stream(sampling)
        self._rules(sampling, self._end_token_ids(sampling), np.asarray(spec.prompt))
        return spec

    def _checked(self, spec: RequestSpec) -> tuple[RequestSpec, int]:
        """Return (the checked spec, maximum length of prompt and answer together)."""
        tokens = self._tokens(spec.prompt)
        sampling, num_scores = spec.sampling or self._default_sampling, spec.prompt_logprobs
        if num_scores is not None and num_scores not in range(MAX_LOGPROBS + 1):
            raise ValueError(
                f"prompt_logprobs must be between 0 and {MAX_LOGPROBS} (got {num_scores})."
            )
        require_namespace(spec.namespace)
        max_len = self._max_len(len(tokens), sampling, num_scores)
        if spec.grammar is not None and sampling.allowed_token_ids is not None:
            raise ValueError(
                "a grammar and allowed_token_ids cannot be combined: remove one of them."
            )
        settled = replace(
            spec,
            prompt=tokens,
            sampling=sampling,
            boundaries=tuple(sorted(b for b in spec.boundaries if 0 < b <= len(tokens))),
        )
        return settled, max_len

    def _tokens(self, prompt: Prompt) -> Tokens:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("the engine has no tokenizer: pass the prompt as token ids.")
            prompt = self._tokenizer.encode(prompt)
        if isinstance(prompt, Sequence) and len(prompt) > self._max_model_len:
            raise ContextOverflow(len(prompt), 1, self._max_model_len)
        try:
            tokens = np.asarray(prompt)
        except ValueError:
            tokens = np.empty((0, 0))
        if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
            if all(type(token) is int for token in prompt):  # some do not fit into 64 bits
                raise ValueError(self._not_ids(prompt))
            raise ValueError("a prompt is a string or a flat list of token ids.")
        if not len(tokens):
            raise ValueError("the prompt is empty; pass at least one token.")
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise ValueError(self._not_ids(tokens))
        return tokens.astype(np.int32, copy=False)

    def _not_ids(self, tokens: Iterable[int]) -> str:
        wrong = next(token for token in tokens if not 0 <= token < self._vocab_size)
        return f"token ids must be from 0 to {self._vocab_size - 1} (got {wrong})."

    def _max_len(
        self, prompt_len: int, sampling: SamplingParams, prompt_logprobs: int | None
    ) -> int:
        limit = self._max_model_len
        if sampling.max_tokens == 0 and prompt_logprobs is None:
            raise ValueError("max_tokens must be at least 1; 0 requires prompt_logprobs.")
        max_tokens = 1 if sampling.max_tokens is None else sampling.max_tokens
        if prompt_len + max_tokens > limit:
            raise ContextOverflow(prompt_len, max_tokens, limit)
        return limit if sampling.max_tokens is None else prompt_len + max_tokens

    def _end_token_ids(self, sampling: SamplingParams) -> frozenset[int]:
        own = frozenset(sampling.stop_token_ids)
        if self._tokenizer is None or sampling.ignore_eos:
            return own
        return own | self._tokenizer.eos_token_ids

    def _rules(
        self, sampling: SamplingParams, end_token_ids: frozenset[int], prompt: Tokens
    ) -> list[LogitRule]:
        """Build the rules of a request. Raises ValueError for token ids outside the vocabulary."""
        allowed, biased = sampling.allowed_token_ids, [token for token, _ in sampling.logit_bias]
        for name, tokens in (("allowed_token_ids", allowed or ()), ("logit_bias", biased)):
            if tokens and max(tokens) >= self._vocab_size:
                raise ValueError(
                    f"{name} must contain token ids from 0 to {self._vocab_size - 1} "
                    f"(got {max(tokens)})."
                )
        rules: list[LogitRule] = []
        if allowed is not None:
            rules.append(AllowedTokens(allowed, self._vocab_size))
        if sampling.thinking_token_budget is not None:
            rules.append(self._reasoning_budget(sampling.thinking_token_budget, prompt))
        bad_words = self._bad_words(sampling.bad_words)
        if sampling.logit_bias or sampling.min_tokens or bad_words:
            ends = tuple(token for token in sorted(end_token_ids) if token < self._vocab_size)
            rules.append(BansAndBiases(sampling.logit_bias, ends, sampling.min_tokens, bad_words))
        if sampling.has_penalties:
            repetition, presence = sampling.repetition_penalty, sampling.presence_penalty
            rules.append(Penalties(prompt, repetition, presence, sampling.frequency_penalty))
        return rules

    def _reasoning_budget(self, budget: int, prompt: Tokens) -> ReasoningBudget:
        if self._tokenizer is None or isinstance(self._tokenizer, IdTokenizer):
            raise ValueError("thinking_token_budget requires a tokenizer, and the engine has none.")
        return ReasoningBudget(self._tokenizer, self._vocab_size, prompt, budget)

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the token runs of ``words``: each as at the start of a text, and after a space if
        that gives the same number of tokens with another first one (vLLM's rule)."""
        if words and self._tokenizer is None:
            raise ValueError("bad_words requires a tokenizer, and the engine has none.")
        runs: list[tuple[int, ...]] = []
        for word in words:
            assert self._tokenizer is not None
            plain, spaced = (
                tuple(self._tokenizer.encode(space + word.lstrip(), AS_WORD)) for space in ("", " ")
            )
            runs.append(plain)
            if len(spaced) == len(plain) and spaced[:1] != plain[:1]:
                runs.append(spaced)
        return tuple(run for run in runs if run)

    def _text_stream(self, sampling: SamplingParams) -> TextStream | None:
        if self._tokenizer is None:
            if sampling.stop:
                raise ValueError("stop strings require a tokenizer, and the engine has none.")
            return None
        decoder = self._tokenizer.stream_decoder(sampling.skip_special_tokens)
        return TextStream(decoder, sampling.stop, sampling.include_stop_str_in_output)
