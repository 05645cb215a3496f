"""Requests: their specification (the prompt, and how tokens are drawn and generation stops), its
validation, and the state of a request in the engine."""

from __future__ import annotations

import itertools
import time
from bisect import bisect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NewType, TypedDict

import numpy as np
import numpy.typing as npt
from msgspec import Struct, structs

from engine.config import ABOVE_0, ConfigError, EngineConfig, Limits, check_fields
from engine.errors import ContextOverflow, InvalidRequest, RequestError, StepFailed
from engine.requests.logit_rules import (
    FREE,
    BansAndBiases,
    LogitRule,
    Penalties,
    ReasoningBudget,
    Ruling,
    opens_reasoning,
    ruled,
)
from engine.text.answers import (
    NO_TOKEN,
    Answer,
    DraftCounts,
    FinishReason,
    Phase,
    RequestOutput,
    SampledToken,
    TextStream,
    Timings,
    Transferred,
)
from engine.text.gguf_tokenizer import read_generation_config
from engine.text.grammar import Grammar, GrammarError
from engine.text.tokenizer import CLOSE, IdTokenizer, StreamDecoder, Tokenizer
from hybridcache.radix.protocol import NO_BOUNDARIES, PromptBoundaries, require_boundaries
from hybridcache.radix.tokens import PLAIN, Tokens, require_namespace
from hybridcache.scheduling.request import ScheduledRequest

RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Settings of ``generation_config.json`` that become defaults of requests."""
GREEDY_BELOW = 1e-5
"""Temperatures below it would make logits overflow float32: the most likely token is selected."""
SCORES = Limits("an integer from 0 to 50", 0, 50, is_whole=True)
"""Number of alternatives to report with a token."""
MAX_BIAS = 100.0
MAX_COUNT = 2**31 - 1
"""Largest value of a field that counts tokens."""
BIAS = Limits(f"a finite number from -{MAX_BIAS:g} to {MAX_BIAS:g}", -MAX_BIAS, MAX_BIAS)
PENALTY = Limits("a finite number from -2 to 2", -2, 2)
COUNT = Limits(f"an integer from 0 to {MAX_COUNT}", 0, MAX_COUNT, is_whole=True)
TOP_K = Limits(f"an integer from 1 to {MAX_COUNT}", 1, MAX_COUNT, is_whole=True)
FACTOR = Limits("a finite number above 0 and at most 100", ABOVE_0, 100)
SEED = Limits("an integer from -2**63 to 2**63 - 1", -(2**63), 2**63 - 1, is_whole=True)
TOKEN_IDS = Limits("token ids of 0 or more", 0, is_whole=True)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping rules of one request. Raises ValueError for an invalid value."""

    temperature: Annotated[float, Limits("a finite number from 0 to 100", 0, 100)] = 1.0
    """Softmax temperature; at 0 or nearly 0, every token is the most likely one."""
    top_p: Annotated[float, Limits("a finite number above 0 and at most 1", ABOVE_0, 1)] = 1.0
    """Keep the most likely tokens with this total probability, out of those that --top-k keeps."""
    top_k: Annotated[int | None, TOP_K] = None
    """Number of most likely tokens to keep; by default all are kept."""
    min_p: Annotated[float, Limits("a finite number from 0 to 1", 0, 1)] = 0.0
    """Keep tokens at least this likely, relative to the most likely one. Applied after --top-p as
    in transformers, and unlike vLLM: tokens that it drops count towards the sum of --top-p."""
    max_tokens: Annotated[int | None, COUNT] = 16
    """Maximum number of tokens to generate. In Python, None is as many as fit into the context, and
    0 requires prompt_logprobs."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer, after its reasoning, and are not part of it. A single string may
    be passed directly."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer after its reasoning, in addition to those of the tokenizer."""
    ignore_eos: bool = False
    """Continue after the tokenizer's end tokens."""
    seed: Annotated[int | None, SEED] = None
    """Seed with which the same request gives the same tokens, independent of other requests."""
    logprobs: Annotated[int | None, SCORES] = None
    """Number of alternatives to report with each token's log-probability; by default none are
    reported."""
    repetition_penalty: Annotated[float, FACTOR] = 1.0
    """Divides (positive) or multiplies (negative) the logits of tokens in prompt and answer."""
    presence_penalty: Annotated[float, PENALTY] = 0.0
    """Subtracted once from the logit of every token in the answer."""
    frequency_penalty: Annotated[float, PENALTY] = 0.0
    """Subtracted from the logit of a token for each occurrence in the answer."""
    min_tokens: Annotated[int, COUNT] = 0
    """Below this length only --max-tokens or a grammar ends the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number from -100 to 100 that is added to its logit). A dict may be passed."""
    thinking_token_budget: Annotated[int | None, COUNT] = None
    """Maximum number of tokens between <think> and </think>; by default the model ends its
    reasoning."""
    skip_special_tokens: bool = True
    """Omit special tokens, such as the end of a turn, from the text."""
    include_stop_str_in_output: bool = False
    """Include the stop string in the text."""

    def __post_init__(self) -> None:
        stop, bias = self.stop, self.logit_bias
        lists: dict[str, object] = {
            "stop": (stop,) if isinstance(stop, str) else stop,
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": bias.items() if isinstance(bias, Mapping) else bias,
        }
        for name, given in lists.items():
            if not isinstance(given, Iterable):
                raise ValueError(f"{name} must be a list (got {given!r}).")
            object.__setattr__(self, name, tuple(given))
        check_fields(self)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError("stop must contain only non-empty strings.")
        for token in self.stop_token_ids:
            TOKEN_IDS.check("stop_token_ids", token)
        for token, value in self.logit_bias:
            TOKEN_IDS.check("logit_bias keys", token)
            BIAS.check(f"logit_bias of token {token}", value)
        if self.max_tokens is not None and self.min_tokens > max(self.max_tokens, 0):
            raise ValueError("min_tokens must not be above max_tokens.")

    @property
    def is_greedy(self) -> bool:
        """True if every token is the most likely one."""
        return self.temperature < GREEDY_BELOW

    def with_seed(self, seed: int) -> SamplingParams:
        """Return the same parameters with another seed, wrapped to 64 bits. Nothing is checked
        again."""
        changed = copy(self)
        object.__setattr__(changed, "seed", (seed + 2**63) % 2**64 - 2**63)
        return changed


def sampling_defaults(config: EngineConfig) -> dict[str, Any]:
    """Return the fields of ``SamplingParams`` that the model's ``generation_config.json`` sets.
    ``do_sample`` is ignored, as in vLLM: requests set temperature 0 for greedy decoding. Raises
    ConfigError for a value that is not allowed."""
    if config.model is None or config.sampling_defaults == "none":
        return {}
    path, named = read_generation_config(Path(config.model))
    found = {name: named[name] for name in RECOMMENDED if named.get(name) is not None}
    top_k = found.get("top_k")
    if isinstance(top_k, float) and top_k.is_integer():
        found["top_k"] = int(top_k)
    if found.get("top_k") in (-1, 0):
        del found["top_k"]  # All tokens, which is the default.
    try:
        SamplingParams(**found)
    except ValueError as error:
        raise ConfigError(
            f"{path}: {error} Correct or remove the file. In Python, "
            "EngineConfig(sampling_defaults='none') ignores it."
        ) from None
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


Prompt = str | Sequence[int] | np.ndarray
if TYPE_CHECKING:
    WirePrompt = Prompt
    Namespace = Hashable
else:
    # For msgspec: a request is sent with token ids.
    WirePrompt, Namespace = NewType("WirePrompt", np.ndarray), Any


class RequestSpec(Struct, frozen=True, array_like=True, tag=True, eq=False):
    """One prompt and the parameters of its answer. It is also the message to another process."""

    prompt: WirePrompt
    """A text, or token ids: a list or int[n]."""
    sampling: SamplingParams | None = None
    """Sampling parameters, or None for the model's recommendation."""
    namespace: Namespace = None
    """Requests of different namespaces share no cache entries. None, a str, bytes, an int, or a
    tuple of these."""
    boundaries: PromptBoundaries = NO_BOUNDARIES
    """Positions at which later prompts are known to continue, and whether they contain the answer.
    They ascend from 0 on; those past the prompt are ignored."""
    ends_session: bool = False
    """True if the client declared that no request of this session follows."""
    returns_within_s: float | None = None
    """Promise of the client to send the next turn within this time after the answer, or None."""
    session: str = ""
    """Client's name of the session, unique in its namespace; "" if that is not known."""
    answer_starts_text: bool = False
    """True if the answer is a separate text, as in a chat, and does not continue the prompt."""
    call_marks: Sequence[str] = ()
    """Texts with which a tool call begins in the answer, for the stop reason."""
    save_at: Sequence[int] = ()
    """Positions at which the state is saved for any placement policy, floored to the grid."""
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
    is_thinking: bool = False
    """True if the prompt ends inside reasoning, even if its last tokens do not show it."""
    arrival_s: float | None = None
    """Time of submission by ``time.perf_counter``, which is the same clock in all processes of a
    machine; None for the time at which the engine gets it."""

    @classmethod
    def of(
        cls, prompt: Prompt | RequestSpec, sampling: SamplingParams | None, options: dict[str, Any]
    ) -> RequestSpec:
        """Return ``prompt`` if it is a complete spec, else a spec of these fields. Raises TypeError
        for an unknown option, or for options next to a complete spec."""
        if not isinstance(prompt, RequestSpec):
            return cls(prompt, sampling, **options)
        if sampling is not None or options:
            raise TypeError("a RequestSpec is complete: set its fields, and pass no other options.")
        return prompt


class Marks(TypedDict, total=False):
    """Fields of a ``RequestSpec`` that an endpoint sets for all choices of an answer."""

    boundaries: PromptBoundaries
    answer_starts_text: bool
    call_marks: Sequence[str]
    prompt_logprobs: int | None
    is_thinking: bool


class Request(ScheduledRequest):
    """Scheduled request with its sampling parameters, text and times."""

    def __init__(self, spec: RequestSpec, intake: Intake) -> None:
        """Start a request from a valid ``spec``. Raises GrammarError. O(length of the prompt)."""
        arrival = next(intake.arrivals)
        sampling = spec.sampling or intake.default_sampling
        prompt = np.asarray(spec.prompt, np.int32)
        longest = intake.max_model_len
        super().__init__(
            spec,
            prompt,
            arrival=arrival,
            arrival_s=intake.clock() if spec.arrival_s is None else spec.arrival_s,
            max_len=longest if sampling.max_tokens is None else len(prompt) + sampling.max_tokens,
        )
        self.spec: RequestSpec
        self.params = sampling
        self.seed = int(intake.config.seed + arrival if sampling.seed is None else sampling.seed)
        self.drawn_row = 0
        """Row of this request among the tokens drawn by the newest step."""
        self.drafts: DraftCounts | None = None
        ends: frozenset[int] = frozenset()
        """End tokens that also count in reasoning."""
        self.text_stream: TextStream | None = None
        if (tokenizer := intake.tokenizer) is not None:
            if not sampling.ignore_eos:
                ends = tokenizer.eos_token_ids
            skips = sampling.skip_special_tokens
            decoder = StreamDecoder(tokenizer, skips, spec.answer_starts_text)
            phase: Phase = "text"
            template, stops = tokenizer.chat_template, sampling.stop or sampling.stop_token_ids
            if stops and template is not None and template.thinks:
                is_open = spec.is_thinking or opens_reasoning(tokenizer, prompt)
                phase = "reasoning" if is_open else "beginning"
            keeps_stop = sampling.include_stop_str_in_output
            self.text_stream = TextStream(decoder, sampling.stop, keeps_stop, phase)
        self.end_token_ids = ends | {*sampling.stop_token_ids}
        self._stop_token_ids = self.end_token_ids - ends
        """Tokens that end the answer only after its reasoning."""
        self._met_stop_string = False
        """True if the answer ended with a stop string."""
        self._intake = intake
        self.make_rules()
        self.answer: Answer | None = None
        """The answer as its reader has it, if that is a caller in this thread, else None."""
        self.mailbox: list[RequestOutput] | None = None
        """Place of the outputs for a caller that reads only those of its own requests, or None."""
        self.text: list[str] = []
        """Pieces of the text so far."""
        self._logprobs: list[SampledToken] = []
        """Log-probabilities that no output contains yet."""
        self.scores: list[SampledToken] = []
        """Log-probabilities of prompt tokens 1, 2, ..."""
        self.transferred: Transferred | None = None
        self.finish_reason: FinishReason | None = None
        self.error: RequestError | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self.output_is_taken = True
        """False from the first ``report`` of an output until its reader has it."""
        self._output: RequestOutput | None = None
        """Newest output of ``report``."""
        self._num_pieces = 0
        """Pieces of the text that outputs contain."""

    def make_rules(self) -> None:
        """Make the rules of the answer, in the order in which they apply. They follow it from its
        beginning. Raises GrammarError."""
        self._fault: tuple[int, GrammarError] | None = None
        """(draw, error) of the first draw that a grammar could not be followed to."""
        params, intake, prompt = self.params, self._intake, self.buffer[: self.prompt_len]
        vocab_size, rules = intake.vocab_size, list[LogitRule]()
        if self.spec.grammar is not None:
            rules.append(intake.grammar_rule(self.spec.grammar, self.namespace))
        if params.thinking_token_budget is not None and intake.tokenizer is not None:
            budget = params.thinking_token_budget
            is_open = self.spec.is_thinking
            rules.append(ReasoningBudget(intake.tokenizer, vocab_size, prompt, budget, is_open))
        if params.logit_bias or params.min_tokens:
            ends = [token for token in sorted(self.end_token_ids) if token < vocab_size]
            rules.append(BansAndBiases(params.logit_bias, ends, params.min_tokens, vocab_size))
        costs = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        if costs != (1, 0, 0):
            rules.append(Penalties(prompt, *costs))
        self._rules: tuple[LogitRule, ...] = tuple(rules)

    @property
    def output(self) -> npt.NDArray[np.int32]:
        """The answer so far, as a view."""
        return self.buffer[self.prompt_len : self.num_tokens]

    @property
    def wants_scores(self) -> bool:
        """True if prompt log-probabilities are requested and not complete, so every prompt position
        must be computed."""
        return self.spec.prompt_logprobs is not None and len(self.scores) < self.prompt_len - 1

    @property
    def stop_reason(self) -> str:
        """See ``ScheduledRequest``. An answer in which a tool call begins after its reasoning, or
        in reasoning without an answer, is "tool_use", even if the call cannot be made. O(text)."""
        if self.spec.ends_session:
            return super().stop_reason
        if self.finish_reason != "stop":
            return "length" if self.finish_reason == "length" else ""
        if self.spec.call_marks:
            before, _, answer = "".join(self.text).rpartition(CLOSE)
            answer = answer if answer.strip() else before
            if any(mark in answer for mark in self.spec.call_marks):
                return "tool_use"
        return "stop_sequence" if self._met_stop_string else "end_turn"

    def possible(self, drafts: Tokens) -> Tokens:
        """Return the beginning of ``drafts`` that may follow the answer so far."""
        for rule in self._rules:
            if len(drafts):
                drafts = rule.possible(self.output, drafts)
        return drafts

    def sampling_inputs(
        self, drafts: Tokens, drawn: Callable[[], int] | None = None
    ) -> list[SamplingInput]:
        """Return the sampling inputs for the token that was scheduled last, and for one after each
        of ``drafts``.

        ``drawn`` waits for the previous token if it has not reached the host; it is called if there
        are rules. If a grammar cannot be followed, ``accept`` of that draw's token raises.
        """
        draw = self.known_len - 1 - self.prompt_len
        if not self._rules and not len(drafts):
            return [SamplingInput(self.params, self.seed, draw, FREE)]
        rulings: Sequence[Ruling] = [FREE] * (1 + len(drafts))
        if self._rules:
            answer, token = self.output, None
            if drawn is not None:
                token = drawn()
                answer = np.append(answer, np.int32(token))
            # With NO_TOKEN, the request ends when this step is committed.
            if token != NO_TOKEN:
                rulings = ruled(self._rules, answer, drafts)
            faults = ((place, one.fault) for place, one in enumerate(rulings, draw) if one.fault)
            if self._fault is None or self._fault[0] >= draw:
                self._fault = next(faults, None)
        return [
            SamplingInput(self.params, self.seed, place, ruling)
            for place, ruling in enumerate(rulings, draw)
        ]

    def accept(self, run: Sequence[SampledToken], now_s: float, has_logits: bool = True) -> None:
        """Append the next tokens, up to one that ends the answer, which sets ``finish_reason``.

        Raises GrammarError if a grammar could not be followed to one of them. Without
        ``has_logits``, the logits were NaN or infinite: raises FloatingPointError unless a token
        before ``NO_TOKEN`` ends the answer.
        """
        for sampled in run:
            token_id = sampled.token_id
            if token_id == NO_TOKEN:
                break
            if self._fault is not None and self.num_tokens - self.prompt_len >= self._fault[0]:
                raise self._fault[1]
            self.append(token_id)
            if self.params.logprobs is not None:
                self._logprobs.append(sampled)
            if self.first_token_s is None:
                self.first_token_s = now_s
            stream, is_end = self.text_stream, token_id in self.end_token_ids
            if stream is not None and not (is_end and self._ends(token_id, stream)):
                may_stop = self.num_tokens - self.prompt_len >= self.params.min_tokens
                was_known = stream.phase != "beginning"
                text, self._met_stop_string = stream.push(token_id, may_stop)
                # The token may end the reasoning, or show that the answer has none.
                is_end = is_end and self._ends(token_id, stream)
                if was_known or not is_end:
                    self.text += [text] if text else []
            if self._met_stop_string:
                self.finish("stop", now_s, flush=False)
            elif is_end or (self._rules and any(r.is_done(self.output) for r in self._rules)):
                self.finish("stop", now_s)
            elif self.num_tokens >= self.max_len:
                self.finish("length", now_s)
            if self.finish_reason is not None:
                return
        if not has_logits:
            place = self.num_tokens - self.prompt_len + 1
            where = f"token {place} of the answer" if run else "the prompt"
            raise FloatingPointError(
                f"the model's logits for {where} are NaN or infinite, so no token was drawn: check "
                "the weights and the number format (--dtype)."
            )

    def _ends(self, token_id: int, stream: TextStream) -> bool:
        """Return True if one of ``end_token_ids`` ends the answer at this place of its text."""
        is_thinking = stream.phase in ("beginning", "reasoning")
        return not (is_thinking and token_id in self._stop_token_ids)

    def fail(self, error: BaseException, now_s: float) -> None:
        """End the request with an error that affects only this request."""
        if isinstance(error, GrammarError):
            self.error = InvalidRequest(str(error))
        else:
            self.error = StepFailed(f"{type(error).__name__}: {error}")
        self.finish("error", now_s, flush=False)

    def finish(self, reason: FinishReason, now_s: float, flush: bool = True) -> None:
        """End the request, and drop everything that only the next token needs."""
        if flush and self.text_stream is not None:
            text, stopped = self.text_stream.flush()
            self.text += [text] if text else []
            self._met_stop_string = stopped
            reason = "stop" if stopped else reason
        self.finish_reason, self.finished_s = reason, now_s
        self._rules, self.text_stream = (), None

    def report(self) -> RequestOutput | None:
        """Return the output with the tokens since the last one, or that one if it is not taken, or
        None if nothing is new. A report can be repeated after an exception at any place. O(new
        tokens), amortised."""
        last = self._output
        if last is not None and not self.output_is_taken:
            return last
        first, num_chars = (0, 0) if last is None else (last.num_tokens, last.num_chars)
        num_tokens, num_pieces = self.num_tokens - self.prompt_len, len(self.text)
        if last and (num_tokens, self.finish_reason) == (first, last.finish_reason):
            return None
        if num_tokens == first + 1:  # The usual case, in a tenth of the time.
            token_ids: tuple[int, ...] = (self.buffer.item(self.num_tokens - 1),)
        else:
            token_ids = tuple(self.buffer[self.prompt_len + first : self.num_tokens].tolist())
        new_text = "".join(self.text[self._num_pieces :])
        scores = None
        if first == 0 and self.spec.prompt_logprobs is not None:
            scores = (None, *self.scores)
        output = RequestOutput(
            self.request_id,
            token_ids,
            new_text,
            tuple(self._logprobs),
            scores,
            num_tokens,
            num_chars + len(new_text),
            self.num_preemptions,
        )
        is_changed = last is None or last.num_preemptions != self.num_preemptions
        if is_changed or self.finish_reason is not None:
            times = self.scheduled_s, self.first_token_s, self.finished_s
            output = structs.replace(
                output,
                cached_len=self.cached_len,
                losses=self.losses,
                finish_reason=self.finish_reason,
                failure=None if self.error is None else self.error.to_wire(),
                timings=Timings(*(None if s is None else s - self.arrival_s for s in times)),
                drafts=None if self.drafts is None else self.drafts.copy(),
                transferred=self.transferred,
            )
        if self.answer is not None:
            output = self.answer.add(output)
        now = output, False, num_pieces, list[SampledToken]()
        # One line, so that no exception can come between them.
        self._output, self.output_is_taken, self._num_pieces, self._logprobs = now
        return output


class Intake:
    """Validation and common facts of the requests of one engine. Safe to call from any thread."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        clock: Callable[[], float] = time.perf_counter,
        grammar_rule: Callable[[Grammar, Hashable], LogitRule] = lambda *_: LogitRule(),
    ) -> None:
        """Without a ``tokenizer``, prompts are token ids and answers have no text. ``grammar_rule``
        compiles a grammar and makes the rule of an answer; without it, requests are only validated.
        """
        self.config, self.tokenizer = config, tokenizer
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self._ids = f"token ids from 0 to {vocab_size - 1}"
        self.sampling_defaults = sampling_defaults(config)
        """Defaults of ``SamplingParams`` that the model recommends."""
        self.default_sampling = SamplingParams(**self.sampling_defaults)
        self.clock, self.grammar_rule = clock, grammar_rule
        self.arrivals, self._names = itertools.count(), itertools.count()

    def validate(self, spec: RequestSpec, arrival_s: float | None = None) -> RequestSpec:
        """Return ``spec`` with token ids for its prompt, complete sampling parameters, an id and
        its ``arrival_s``. O(length of the prompt). Raises ValueError for a request that cannot be
        served, except for errors in its grammar."""
        prompt, sampling = spec.prompt, spec.sampling or self.default_sampling
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompt must be token ids, because the engine has no tokenizer.")
            prompt = self.tokenizer.encode(prompt)
        if isinstance(prompt, Sequence) and len(prompt) > self.max_model_len:
            raise ContextOverflow(len(prompt), 1, self.max_model_len)
        try:
            tokens = np.asarray(prompt)
        except ValueError:
            tokens = np.empty((0, 0))
        if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
            raise ValueError(f"prompt must be a text or a flat list of {self._ids}.")
        self.check(tokens, sampling, spec.prompt_logprobs)
        if type(spec.namespace) not in PLAIN:
            require_namespace(spec.namespace)
        if (boundaries := spec.boundaries) is not NO_BOUNDARIES:
            require_boundaries(boundaries)
            positions = boundaries.positions
            positions = positions[bisect(positions, 0) : bisect(positions, len(tokens))]
            boundaries = boundaries._replace(positions=tuple(map(int, positions)))
        return structs.replace(
            spec,
            prompt=np.ascontiguousarray(tokens, np.int32),
            sampling=sampling,
            boundaries=boundaries,
            request_id=spec.request_id or f"request-{next(self._names)}",
            arrival_s=spec.arrival_s if arrival_s is None else arrival_s,
        )

    def check(
        self, tokens: npt.NDArray[np.integer], sampling: SamplingParams, num_scores: int | None
    ) -> None:
        """Raise ValueError for a prompt and parameters that cannot be served. ``num_scores``: the
        spec's ``prompt_logprobs``. O(length of the prompt)."""
        if not len(tokens):
            raise ValueError("prompt must have at least one token (got none).")
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= self.vocab_size:
            wrong = least if least < 0 else most
            raise ValueError(f"prompt must contain {self._ids} (got {wrong}).")
        if num_scores is not None:
            SCORES.check("prompt_logprobs", num_scores)
        if sampling.max_tokens == 0 and num_scores is None:
            raise ValueError("max_tokens must be at least 1 (got 0).")
        max_tokens = 1 if sampling.max_tokens is None else sampling.max_tokens
        if len(tokens) + max_tokens > self.max_model_len:
            raise ContextOverflow(len(tokens), max_tokens, self.max_model_len)
        named = {"stop_token_ids": sampling.stop_token_ids, "logit_bias": dict(sampling.logit_bias)}
        for name, given in named.items():
            if given and max(given) >= self.vocab_size:
                raise ValueError(f"{name} must contain {self._ids} (got {max(given)}).")
        has_text = self.tokenizer is not None and not isinstance(self.tokenizer, IdTokenizer)
        if sampling.thinking_token_budget is not None and not has_text:
            raise ValueError("thinking_token_budget requires a tokenizer, and the engine has none.")
        if self.tokenizer is None and sampling.stop:
            raise ValueError("stop requires a tokenizer, and the engine has none.")
