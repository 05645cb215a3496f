"""Specification of one request: the prompt, and how tokens are drawn and generation stops. Built by
the server, the command line or user code."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from msgspec import Struct

from engine.requests.grammar import Grammar
from engine.requests.logit_rules import FREE, Ruling

GREEDY_BELOW = 1e-5
"""Temperatures below it would make logits overflow float32, so they select the most likely
token."""
MAX_STOPS = 64
"""Maximum number of stop strings, stop token ids or bad words of one request."""
MAX_BIASES = 1024
"""Maximum number of tokens with a bias in one request."""
MAX_BIAS = 100.0
MAX_COUNT = 2**31 - 1
"""Largest value of a field that counts tokens."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping rules of one request. Raises ValueError for an invalid value."""

    temperature: float = 1.0
    """Softmax temperature. At 0 or nearly 0, every token is the most likely one."""
    top_p: float = 1.0
    """Keep the most likely tokens with this total probability, out of those that ``top_k``
    keeps."""
    top_k: int | None = None
    """Number of most likely tokens to keep. By default all are kept."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the most likely one. Applied after ``top_p`` as
    in transformers, and unlike vLLM: tokens that it drops count towards the sum of ``top_p``."""
    max_tokens: int | None = 16
    """Maximum number of tokens to generate; if not set, as many as fit into the context. 0 requires
    prompt log-probabilities."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it. A single string may be passed
    directly."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, in addition to those of the tokenizer."""
    ignore_eos: bool = False
    """Continue after the tokenizer's end tokens."""
    seed: int | None = None
    """Seed with which the same request gives the same tokens, independent of other requests."""
    logprobs: int | None = None
    """Number of alternatives to report with each token's log-probability. By default none are
    reported."""
    repetition_penalty: float = 1.0
    """Divides (positive) or multiplies (negative) the logits of tokens in prompt and answer."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token for each occurrence in the answer."""
    min_tokens: int = 0
    """Below this length only ``max_tokens`` or a grammar ends the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number from -100 to 100 that is added to its logit). A dict may be passed."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens allowed in the answer. By default all are allowed."""
    bad_words: tuple[str, ...] = ()
    """Texts that must not occur in the answer, compared by tokens."""
    thinking_token_budget: int | None = None
    """Maximum number of tokens between <think> and </think>. By default the model ends its
    reasoning."""
    skip_special_tokens: bool = True
    """Omit special tokens, such as the end of a turn, from the text."""
    include_stop_str_in_output: bool = False
    """Include the stop string in the text."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        for name in ("stop", "stop_token_ids", "bad_words"):
            given = getattr(self, name)
            if not isinstance(given, Iterable):
                raise ValueError(f"{name} must be a list (got {given!r}).")
            object.__setattr__(self, name, tuple(given))
            if len(getattr(self, name)) > MAX_STOPS:
                raise ValueError(
                    f"{name} may have at most {MAX_STOPS} entries, because each is checked at "
                    "every token."
                )
        self._check_numbers()
        for name in ("stop", "bad_words"):
            if any(not isinstance(text, str) or not text for text in getattr(self, name)):
                raise ValueError(f"{name} must contain only non-empty strings.")
        _check_ids("stop_token_ids", self.stop_token_ids)
        self._check_tokens()

    @property
    def is_greedy(self) -> bool:
        """True if every token is the most likely one."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """True if a penalty makes sampling depend on earlier tokens."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def _check_tokens(self) -> None:
        """Check the fields that contain token ids."""
        allowed = self.allowed_token_ids
        if allowed is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(allowed))
            _check_ids("allowed_token_ids", tuple(allowed))
            if not tuple(allowed):
                raise ValueError(
                    "allowed_token_ids must contain at least one token, or be omitted."
                )
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(f"logit_bias may have at most {MAX_BIASES} tokens.")
        _check_ids("logit_bias", dict(self.logit_bias))
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
    """Facts that the sampler needs about the request behind one row of logits."""

    params: SamplingParams
    seed: int
    """Seed of the request, or one chosen by the engine."""
    draw: int
    """Number of the draw: the number of tokens generated before."""
    ruling: Ruling = FREE
    """Result of the request's rules."""


def _check_ids(name: str, tokens: Iterable[object]) -> None:
    if any(not _is_int(token) or int(token) < 0 for token in tokens):  # type: ignore[call-overload]
        raise ValueError(f"{name} must contain only token ids of 0 or more.")


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_range(
    name: str, value: float, low: float, high: float, open_below: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number (got {value!r}).")
    if not low <= value <= high or (open_below and value == low):
        raise ValueError(
            f"{name} must be {'above' if open_below else 'at least'} {low:g} and at most {high:g} "
            f"(got {value!r})."
        )


def _check_int(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if not _is_int(value):
        raise ValueError(f"{name} must be an integer (got {value!r}).")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high} (got {value}).")


Prompt = str | Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class RequestSpec:
    """One prompt and the parameters of its answer."""

    prompt: Prompt
    """A text, or token ids: a list or int[n]."""
    sampling: SamplingParams | None = None
    """Sampling parameters, or None for the model's recommendation."""
    namespace: Hashable = None
    """Requests of different namespaces share no cache entries. None, a str, bytes, an int, or a
    tuple of these."""
    boundaries: Sequence[int] = ()
    """Positions at which later prompts are known to continue; positions outside the prompt are
    ignored."""
    answer_survives: bool = True
    """False if later prompts are known to differ from this one before its end. No state is saved
    past that point."""
    ends_session: bool = False
    """True if the client declared that no request of this session follows."""
    call_marks: Sequence[str] = ()
    """Texts with which a tool call begins in the answer, for the stop reason. Empty if the request
    offers no tools."""
    save_at: Sequence[int] = ()
    """Positions of the prompt at which its state is saved for any placement policy, floored to the
    grid."""
    prompt_logprobs: int | None = None
    """Number of alternatives to report with the prompt's log-probabilities, which are computed
    without the cache; None to report none."""
    request_id: str | None = None
    """Id of the request, or None to generate one."""
    grammar: Grammar | None = None
    """Grammar of the answer, or None if the answer is free."""

    @classmethod
    def of(
        cls, prompt: Prompt | RequestSpec, sampling: SamplingParams | None, options: dict[str, Any]
    ) -> RequestSpec:
        """Return ``prompt`` if it is a complete spec, else a spec of these fields.

        Raises TypeError for an unknown option, or for options next to a complete spec.
        """
        if not isinstance(prompt, RequestSpec):
            return cls(prompt, sampling, **options)
        if sampling is not None or options:
            raise TypeError("a RequestSpec is complete: set its fields, and pass no other options.")
        return prompt
