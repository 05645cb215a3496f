"""Specification of one request: the prompt, and how tokens are drawn and generation stops. Built by
the server, the command line or user code."""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct, structs

from engine.config import ABOVE_0, EngineConfig, Limits, check_fields, setting
from engine.requests.grammar import Grammar
from engine.requests.logit_rules import FREE, Ruling

RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Settings of ``generation_config.json`` that become defaults of requests."""
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
BIAS = Limits(f"a finite number from -{MAX_BIAS:g} to {MAX_BIAS:g}", -MAX_BIAS, MAX_BIAS)
PENALTY = Limits("a finite number from -2 to 2", -2, 2)
COUNT = Limits(f"an integer from 0 to {MAX_COUNT}", 0, MAX_COUNT, is_whole=True)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping rules of one request. Raises ValueError for an invalid value."""

    temperature: float = setting(
        1.0,
        "softmax temperature; at 0 or nearly 0, every token is the most likely one",
        limits=Limits("a finite number from 0 to 100", 0, 100),
    )
    top_p: float = setting(
        1.0,
        "keep the most likely tokens with this total probability, out of those that --top-k keeps",
        limits=Limits("a finite number above 0 and at most 1", ABOVE_0, 1),
    )
    top_k: int | None = setting(
        None,
        "number of most likely tokens to keep; by default all are kept",
        limits=Limits(f"an integer from 1 to {MAX_COUNT}", 1, MAX_COUNT, is_whole=True),
    )
    min_p: float = setting(
        0.0,
        "keep tokens at least this likely, relative to the most likely one. Applied after "
        "--top-p as in transformers, and unlike vLLM: tokens that it drops count towards "
        "the sum of --top-p",
        limits=Limits("a finite number from 0 to 1", 0, 1),
    )
    max_tokens: int | None = setting(
        16,
        "maximum number of tokens to generate. In Python, None is as many as fit into the "
        "context, and 0 requires prompt_logprobs",
        limits=COUNT,
    )
    stop: tuple[str, ...] = setting(
        (),
        "strings that end the answer and are not part of it. A single string may be "
        "passed directly",
    )
    stop_token_ids: tuple[int, ...] = setting(
        (), "tokens that end the answer, in addition to those of the tokenizer"
    )
    ignore_eos: bool = setting(False, "continue after the tokenizer's end tokens")
    seed: int | None = setting(
        None,
        "seed with which the same request gives the same tokens, independent of other requests",
        limits=Limits("an integer from -2**63 to 2**63 - 1", -(2**63), 2**63 - 1, is_whole=True),
    )
    logprobs: int | None = setting(
        None,
        "number of alternatives to report with each token's log-probability; by default "
        "none are reported",
        limits=Limits("an integer from 0 to 50", 0, 50, is_whole=True),
    )
    repetition_penalty: float = setting(
        1.0,
        "divides (positive) or multiplies (negative) the logits of tokens in prompt and answer",
        limits=Limits("a finite number above 0 and at most 100", ABOVE_0, 100),
    )
    presence_penalty: float = setting(
        0.0, "subtracted once from the logit of every token in the answer", limits=PENALTY
    )
    frequency_penalty: float = setting(
        0.0,
        "subtracted from the logit of a token for each occurrence in the answer",
        limits=PENALTY,
    )
    min_tokens: int = setting(
        0, "below this length only --max-tokens or a grammar ends the answer", limits=COUNT
    )
    logit_bias: tuple[tuple[int, float], ...] = setting(
        (), "(token id, number from -100 to 100 that is added to its logit). A dict may be passed"
    )
    allowed_token_ids: tuple[int, ...] | None = setting(
        None, "the only tokens allowed in the answer; by default all are allowed"
    )
    bad_words: tuple[str, ...] = setting(
        (), "texts that must not occur in the answer, compared by tokens"
    )
    thinking_token_budget: int | None = setting(
        None,
        "maximum number of tokens between <think> and </think>; by default the model ends "
        "its reasoning",
        limits=COUNT,
    )
    skip_special_tokens: bool = setting(
        True, "omit special tokens, such as the end of a turn, from the text"
    )
    include_stop_str_in_output: bool = setting(False, "include the stop string in the text")

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
        check_fields(self)
        for name in ("stop", "bad_words"):
            if any(not isinstance(text, str) or not text for text in getattr(self, name)):
                raise ValueError(f"{name} must contain only non-empty strings.")
        _check_ids("stop_token_ids", self.stop_token_ids)
        allowed = self.allowed_token_ids
        if allowed is not None:
            object.__setattr__(self, "allowed_token_ids", allowed := tuple(allowed))
            _check_ids("allowed_token_ids", allowed)
            if not allowed:
                raise ValueError(
                    "allowed_token_ids must contain at least one token, or be omitted."
                )
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(f"logit_bias may have at most {MAX_BIASES} tokens.")
        _check_ids("logit_bias", dict(self.logit_bias))
        for token, value in self.logit_bias:
            BIAS.check(f"logit_bias of token {token}", value)
        if self.max_tokens is not None and self.min_tokens > max(self.max_tokens, 0):
            raise ValueError("min_tokens must not be above max_tokens.")

    @property
    def is_greedy(self) -> bool:
        """True if every token is the most likely one."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """True if a penalty makes sampling depend on earlier tokens."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def with_seed(self, seed: int | None) -> SamplingParams:
        """Return the same parameters with another seed; lists of tokens are not checked again."""
        changed = copy(self)
        object.__setattr__(changed, "seed", seed)
        check_fields(changed)
        return changed


def sampling_defaults(config: EngineConfig) -> dict[str, float]:
    """Return the fields of ``SamplingParams`` that the model's ``generation_config.json`` sets; {}
    without the file.

    Raises ValueError for a value out of range. ``do_sample`` is ignored, as in vLLM: requests set
    temperature 0 for greedy decoding.
    """
    if config.model is None or config.sampling_defaults == "none":
        return {}
    path = Path(config.model) / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = {name: named[name] for name in RECOMMENDED if named.get(name) is not None}
    if found.get("top_k") == 0:
        del found["top_k"]  #  0 means "all tokens", which is the default
    try:
        SamplingParams(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error} Correct it, or use --sampling-defaults none.") from None
    return found


class SamplingInput(Struct, frozen=True):
    """Facts that the sampler needs about the request behind one row of logits."""

    params: SamplingParams
    seed: int
    """Seed of the request, or one chosen by the engine."""
    draw: int
    """Number of the draw: the number of tokens generated before."""
    ruling: Ruling = FREE
    """Result of the request's rules."""


def _check_ids(name: str, tokens: Collection[Any]) -> None:
    kinds = set(map(type, tokens))  # There may be a token per entry of the vocabulary.
    if any(not issubclass(kind, Integral) or issubclass(kind, bool) for kind in kinds) or (
        tokens and min(tokens) < 0
    ):
        raise ValueError(f"{name} must contain only token ids of 0 or more.")


Prompt = str | Sequence[int] | np.ndarray
if TYPE_CHECKING:
    WirePrompt = Prompt
    Namespace = Hashable
else:
    WirePrompt = Namespace = Any  # For msgspec: an array arrives as bytes.


class RequestSpec(Struct, frozen=True, array_like=True, tag=True, eq=False):
    """One prompt and the parameters of its answer, from the body of an HTTP request to the
    scheduler. It is also the message to another process."""

    prompt: WirePrompt
    """A text, or token ids: a list or int[n]. Bytes are int32[n] in the machine's byte order."""
    sampling: SamplingParams | None = None
    """Sampling parameters, or None for the model's recommendation."""
    namespace: Namespace = None
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
    answer_starts_text: bool = False
    """True if the answer is a separate text, as in a chat. Otherwise it continues the prompt, and
    its first token is decoded after those of the prompt."""
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
    choice_of: str | None = None
    """Id of the first request, if this is another choice of the same answer. Admission policies
    count both as one session."""
    grammar: Grammar | None = None
    """Grammar of the answer, or None if the answer is free."""
    arrival_s: float | None = None
    """Time of submission by ``time.perf_counter``, which is the same clock in all processes of a
    machine; None for the time at which the engine gets it."""

    def __post_init__(self) -> None:
        if isinstance(self.prompt, bytes):
            structs.force_setattr(self, "prompt", np.frombuffer(self.prompt, np.int32))

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
