"""How a request wants its tokens chosen, and when it wants to stop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real

from msgspec import Struct

from engine.requests.logit_rules import Additions, Mask
from engine.requests.token_counts import TokenCounts

GREEDY_BELOW = 1e-5
"""Temperatures below it divide logits out of float32's range: they mean the most likely token."""
MAX_STOPS = 64
"""Stop strings, stop token ids or bad words that one request may bring."""
MAX_BIASES = 1024
"""Tokens whose logits one request may change."""
MAX_BIAS = 100.0
MAX_COUNT = 2**31 - 1
"""Largest number of tokens that a request may name."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping rules of one request. A bad value is a ValueError of one sentence."""

    temperature: float = 1.0
    """0, or next to it: always the most likely token."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities sum to this, of what ``top_k`` keeps."""
    top_k: int | None = None
    """Keep this many of the most likely tokens; None: all."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the most likely one. Like transformers, and
    unlike vLLM, after ``top_p``: what it drops counts towards the sum."""
    max_tokens: int | None = 16
    """Most tokens to generate; None: as many as the context holds; 0: only with prompt logprobs."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer, themselves left out of it; one may be given as a plain
    string."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, beside the tokenizer's own."""
    ignore_eos: bool = False
    """Generate on through the tokenizer's end tokens."""
    seed: int | None = None
    """With a seed the same request gives the same tokens, whatever else runs."""
    logprobs: int | None = None
    """Report each token's log-probability with this many alternatives; None: report none."""
    repetition_penalty: float = 1.0
    """Divides (positive) or multiplies (negative) the logits of tokens in prompt and answer."""
    presence_penalty: float = 0.0
    """Taken once from the logit of every token in the answer."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token for every time it is in the answer."""
    min_tokens: int = 0
    """Nothing but ``max_tokens`` ends an answer that is shorter; a grammar does."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit, from -100 to 100); may be given as a dict."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens that an answer may have; None: all."""
    bad_words: tuple[str, ...] = ()
    """Texts whose tokens never stand in the answer in this order."""
    thinking_token_budget: int | None = None
    """Reasoning between <think> and </think> is ended after so many tokens; None: the model ends
    it."""
    skip_special_tokens: bool = True
    """Leave tokens such as the one that ends a turn out of the text."""
    include_stop_str_in_output: bool = False
    """End the text behind the stop string, not before it."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        for name in ("stop", "stop_token_ids", "bad_words"):
            given = getattr(self, name)
            if not isinstance(given, Iterable):
                raise ValueError(f"{name} must be a list, not {given!r}.")
            object.__setattr__(self, name, tuple(given))
            if len(getattr(self, name)) > MAX_STOPS:
                raise ValueError(
                    f"{name} may hold at most {MAX_STOPS}: each is looked for at every token."
                )
        self._check_numbers()
        for name in ("stop", "bad_words"):
            if any(not isinstance(text, str) or not text for text in getattr(self, name)):
                raise ValueError(f"{name} must hold non-empty strings.")
        _check_ids("stop_token_ids", self.stop_token_ids)
        self._check_tokens()

    @property
    def is_greedy(self) -> bool:
        """Nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def needs_history(self) -> bool:
        """A penalty looks at every token before, or bad words at the last."""
        return self.has_penalties or bool(self.bad_words)

    def _check_tokens(self) -> None:
        """What names tokens."""
        allowed = self.allowed_token_ids
        if allowed is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(allowed))
            _check_ids("allowed_token_ids", tuple(allowed))
            if not tuple(allowed):
                raise ValueError("allowed_token_ids must name at least one token, or be left out.")
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(f"logit_bias may name at most {MAX_BIASES} tokens.")
        _check_ids("logit_bias", tuple(token for token, _ in self.logit_bias))
        for token, value in self.logit_bias:
            _check_range(f"logit_bias of token {token}", value, -MAX_BIAS, MAX_BIAS)
        if self.max_tokens is not None and self.min_tokens > max(self.max_tokens, 0):
            raise ValueError("min_tokens must not be above max_tokens.")

    def _check_numbers(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_below=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_below=True)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_int("top_k", self.top_k, 1, MAX_COUNT)
        _check_int("max_tokens", self.max_tokens, 0, MAX_COUNT)
        _check_int("min_tokens", self.min_tokens, 0, MAX_COUNT)
        _check_int("thinking_token_budget", self.thinking_token_budget, 0, MAX_COUNT)
        _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        _check_int("logprobs", self.logprobs, 0, 50)


class SamplingInput(Struct, frozen=True):
    """What the sampler must know of the request behind one row of logits."""

    params: SamplingParams
    seed: int
    """The request's own where it brought one."""
    counts: TokenCounts | None
    """Of all tokens before, where ``params.has_penalties``; else None."""
    draw: int
    """Number of the draw: how many tokens were generated before."""
    mask: Mask | None = None
    """The tokens that may be drawn; None: all."""
    added: Additions | None = None
    """To logits, before the penalties."""


def _check_ids(name: str, tokens: Iterable[object]) -> None:
    if any(not _is_int(token) or int(token) < 0 for token in tokens):  # type: ignore[call-overload]
        raise ValueError(f"{name} must hold token ids of 0 or more.")


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_range(
    name: str, value: float, low: float, high: float, open_below: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}.")
    if not low <= value <= high or (open_below and value == low):
        raise ValueError(
            f"{name} must be {'above' if open_below else 'at least'} {low:g} and at most {high:g}, "
            f"not {value!r}."
        )


def _check_int(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if not _is_int(value):
        raise ValueError(f"{name} must be an integer, not {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value}.")
