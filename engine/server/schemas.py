"""Schemas of request bodies.

Types and the widest ranges are checked here. Limits of the engine are checked where the values are
used (SamplingParams, the engine). An unsupported parameter that would change the answer is refused
by name; one that would not (``user``, ``store``) is checked and ignored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from engine.requests.grammar import Grammar, GrammarError
from engine.requests.spec import MAX_BIAS, MAX_BIASES, MAX_COUNT, SamplingParams
from engine.server.api_errors import APIError, of_validation, quoted
from engine.server.settings import MAX_STOPS
from engine.text.chat_prompt import Cut
from engine.text.json_text import read_json

MAX_NAMES = 64
"""Maximum number of names in an object of a fixed form, because every unknown name is an error."""
Entry = TypeVar("Entry")
Listed = Annotated[list[Entry], Field(fail_fast=True)]
"""A list in which the first wrong entry is the only error."""
Name = Annotated[str, Field(min_length=1)]
"""Name of a tool."""


class Strict(BaseModel):
    """Base of all schemas, without unknown names, type conversions and infinities.

    A null is ignored, also for an unknown name, because clients send answers back with all the
    fields that their classes have.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    HOLDS_IDS: ClassVar[bool] = False
    """True if the body may contain a long list of token ids."""

    @model_validator(mode="before")
    @classmethod
    def _is_read(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if len(body) > MAX_NAMES:
            raise ValueError(f"An object may have at most {MAX_NAMES} names (got {len(body)}).")
        return {name: _whole(value) for name, value in without_nulls(body).items()}


def without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """Return ``body`` without the nulls of its top level. Null means the default everywhere in this
    API."""
    return {name: value for name, value in body.items() if value is not None}


def whole_numbers(values: Any) -> Any:
    """Return a list with 3 in place of 3.0, which is an integer in JSON. O(len(values))."""
    if isinstance(values, list) and float in set(map(type, values)):
        return [_whole(value) for value in values]
    return values


def _whole(value: Any) -> Any:
    is_whole = isinstance(value, float) and abs(value) <= 2**53 and value.is_integer()
    return int(value) if is_whole else value


def without_what_asks_for_nothing(body: Any, neutral: Mapping[str, Container[Any]]) -> Any:
    """Return ``body`` without ``neutral`` values. Raises ValueError for another value of a name in
    ``neutral``."""
    if not isinstance(body, dict):
        return body
    for name, values in neutral.items():
        if body.get(name) is not None and body[name] not in values:
            raise ValueError(f"'{name}' is not supported: omit it.")
    return {name: value for name, value in body.items() if name not in neutral}


Schema = dict[str, Any] | bool


class NamedSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None
    """Ignored: an answer always follows the schema."""


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def grammar(self) -> Grammar:
        """Return the grammar of a type other than text. Raises GrammarError."""
        if self.type == "json_object":
            return Grammar.of_object()
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise GrammarError(
                "'response_format' of type json_schema requires 'json_schema.schema'."
            )
        return Grammar.of_schema(self.json_schema.schema_)


class StructuredOutputs(Strict):
    """vLLM's structured outputs without ``structural_tag``. Only one of them may be set."""

    json_: Schema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Listed[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Guided(Strict):
    """Part of a request that determines the form of an answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: Listed[str] | None = None
    guided_grammar: str | None = None
    _format_name: str = PrivateAttr("response_format")
    """Client's name of ``response_format``."""

    @property
    def forms(self) -> dict[str, Callable[[], Grammar]]:
        """Requested forms of the answer: parameter -> function that makes its grammar, in O(its
        length), and may raise GrammarError."""
        asked, newer = self.response_format, self.structured_outputs or StructuredOutputs()
        forms: dict[str, Callable[[], Grammar]] = {}
        if asked is not None and asked.type != "text":
            forms[self._format_name] = asked.grammar
        makers: dict[str, tuple[Callable[[Any], Grammar], Any]] = {
            "guided_json": (Grammar.of_schema, self.guided_json),
            "guided_regex": (Grammar.of_regex, self.guided_regex),
            "guided_choice": (Grammar.of_choices, self.guided_choice),
            "guided_grammar": (Grammar.of_text, self.guided_grammar),
            "structured_outputs.json": (Grammar.of_schema, newer.json_),
            "structured_outputs.regex": (Grammar.of_regex, newer.regex),
            "structured_outputs.choice": (Grammar.of_choices, newer.choice),
            "structured_outputs.grammar": (Grammar.of_text, newer.grammar),
        }
        forms |= {
            name: partial(make, value)
            for name, (make, value) in makers.items()
            if value is not None
        }
        if newer.json_object:
            forms["structured_outputs.json_object"] = Grammar.of_object
        return forms

    @property
    def is_guided(self) -> bool:
        """True if the answer has a grammar."""
        return bool(self.forms)

    @property
    def form_name(self) -> str | None:
        """Name of the parameter that determines the form, or None if there is none or more than
        one."""
        names = list(self.forms)
        return names[0] if len(names) == 1 else None

    def grammar(self) -> Grammar | None:
        """Return the grammar of the answer, or None if it is free. O(its length).

        Raises GrammarError if several forms are requested, or one cannot be used.
        """
        forms = list(self.forms.values())
        if len(forms) > 1:
            raise GrammarError("an answer can have only one form; use one of these parameters.")
        return forms[0]() if forms else None


MAX_ID_CHARS = 128
"""Maximum length of a request id."""
LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
"""Pattern of text without control characters and line breaks."""
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[Listed[TokenId], BeforeValidator(whole_numbers)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[Listed[Text], Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
ALL = (-1, 0)
"""Values of ``top_k`` that clients send for "all tokens"."""


def _by_id(biases: dict[str, float]) -> dict[int, float]:
    """Convert the names of JSON, which are strings, to ids."""
    return {int(name): value for name, value in biases.items()}


def _one_line(request_id: str) -> str:
    """Check a request id, which appears in answers and in the lines of logs."""
    if not re.match(LINE, request_id):
        raise ValueError("'request_id' must not contain control characters: send one line of text.")
    return request_id


class TokenOptions(Guided):
    """Part of a request that restricts tokens and selects reported fields."""

    top_k: int | None = Field(default=None, ge=-1, le=MAX_COUNT)
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias],
            Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}),
            AfterValidator(_by_id),
        ]
        | None
    ) = None
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    thinking_token_budget: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    bad_words: Texts | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    """Ignored: the supported tokenizers insert no spaces."""
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    return_token_ids: bool = False
    return_cached_tokens_details: bool = False
    """Report SGLang's ``sglext``."""
    request_id: (
        Annotated[
            str,
            Field(min_length=1, max_length=MAX_ID_CHARS, json_schema_extra={"pattern": LINE}),
            AfterValidator(_one_line),
        ]
        | None
    ) = None
    """End of the answer's id."""
    priority: Annotated[int, Field(ge=0, le=0)] = 0
    """Only 0 is supported: requests are served in order of arrival."""


def seed_of(seed: int | None, choice: int) -> int | None:
    """Return the seed of one of a request's choices.

    Choices must differ, and be reproducible. The seed is wrapped to 64 bits.
    """
    return None if seed is None else (seed + choice + 2**63) % 2**64 - 2**63


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Report the usage so far with every event."""
    include_obfuscation: bool = False


class Streamed(Strict):
    """Part of a request that selects a streamed answer."""

    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _streams_with_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError(
                "'stream_options' requires a streamed answer: set 'stream' to true, or omit it."
            )
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def repeats_usage(self) -> bool:
        """True if every event has the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class Unused(Strict):
    """Parameters of OpenAI's API that change no answer. Their values are checked."""

    user: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""Values of ``reasoning_effort`` in OpenAI's API."""
Verbosity = Literal["low", "medium", "high"]


class Rendering(Strict):
    """Part of a request that controls the chat template."""

    add_generation_prompt: bool | None = None
    """Append the beginning of an answer. None means True unless ``continue_final_message`` is
    set."""
    continue_final_message: bool = False
    """Continue the last message."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Switches of the template, such as ``enable_thinking``."""
    reasoning_effort: Effort | None = None
    """Variable of the template. ``none`` also disables reasoning, and any other value enables it,
    unless ``chat_template_kwargs`` has ``enable_thinking``."""

    @model_validator(mode="after")
    def _switches_reasoning(self) -> Self:
        effort = self.reasoning_effort
        if effort is not None:
            switches = {"enable_thinking": effort != "none", "reasoning_effort": effort}
            self.chat_template_kwargs = switches | (self.chat_template_kwargs or {})
        return self

    @property
    def begins_answer(self) -> bool:
        """True if the prompt ends with the beginning of an answer."""
        return self.add_generation_prompt is not False and not self.continue_final_message


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "chat_template": (),
}
"""Parameters of OpenAI's API that are not supported, with the values that have no effect."""


TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
IDS = {"type": "array", "minItems": 1, "items": TOKEN_ID}
TEXTS = {"type": "array", "minItems": 1, "items": {"type": "string"}}
PROMPT = {"anyOf": [{"type": "string"}, TEXTS, IDS, {"type": "array", "minItems": 1, "items": IDS}]}
BROKEN = "INVALID_JSON"
"""Name for the arguments of a call that are not a JSON object, as in Anthropic's API."""
MAX_TEMPERATURE = 2
"""Maximum temperature, as in OpenAI's API."""
AnswerLimit = Annotated[
    int, Field(ge=1), WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MAX_COUNT})
]
"""Number of tokens of an answer. ``ServingContext.check_limit`` refuses more than the context
length, with an error that names it."""
PASSED_ON = {field.name for field in fields(SamplingParams)} - {"max_tokens", "logprobs", "seed"}
"""Fields of ``SamplingParams`` that are those of the body, by the same names."""
MAX_CUTS = 4
"""Maximum number of ``cache_control`` marks in a chat, as in Anthropic's API."""


class Sampling(TokenOptions, Streamed, Unused):
    """Part of a request that controls sampling. None selects the engine's default."""

    model: str | None = None
    n: int = Field(default=1, ge=1, le=128)
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    metadata: Any = None
    """Ignored except ``session_end``, which declares that no request of the session follows."""
    store: bool | None = None
    """Ignored: only responses are stored."""
    stop: Text | Texts | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    cache_salt: str | None = None
    """Requests with different salts share no cache entries."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body: Any) -> Any:
        return without_what_asks_for_nothing(body, NEUTRAL)

    def samplings(
        self, max_tokens: int | None, logprobs: int | None, defaults: Mapping[str, Any]
    ) -> list[SamplingParams]:
        """Return the sampling parameters of the ``n`` choices; ``defaults`` replace missing ones.
        Raises APIError 400 for a value out of range."""
        given = {name: value for name in PASSED_ON if (value := getattr(self, name)) is not None}
        given = {**defaults, **given, "max_tokens": max_tokens, "logprobs": logprobs}
        if self.top_k in ALL:
            given["top_k"] = None
        try:
            first = SamplingParams(**given)  # Its lists of tokens are checked once.
            return [first.with_seed(seed_of(self.seed, choice)) for choice in range(self.n)]
        except ValueError as error:
            raise APIError(400, str(error)) from error


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    HOLDS_IDS: ClassVar[bool] = True

    prompt: Annotated[Any, WithJsonSchema(PROMPT)]
    """Text, list of texts, list of token ids, or list of such lists."""
    max_tokens: int = Field(default=16, ge=0, json_schema_extra={"maximum": MAX_COUNT})
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    add_special_tokens: bool = True

    @field_validator("prompt")
    @classmethod
    def _is_a_prompt(cls, prompt: Any) -> Any:
        prompt = whole_numbers(prompt)
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], list):
            prompt = [whole_numbers(part) for part in prompt]
        if isinstance(prompt, str) or (
            isinstance(prompt, list)
            and prompt
            and (
                all(isinstance(part, str) for part in prompt)
                or _are_ids(prompt)
                or all(isinstance(part, list) and _are_ids(part) for part in prompt)
            )
        ):
            return prompt
        raise ValueError(
            "'prompt' must be a text, a list of texts, a list of token ids or a list of such lists."
        )

    @property
    def prompts(self) -> list[str | list[int]]:
        """List of prompts, with one entry per prompt."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


class CacheControl(Strict):
    """Anthropic's mark: later prompts will share the text before it. ``ttl`` and ``scope`` are
    ignored, because the cache's policies decide on placement and eviction."""

    type: Literal["ephemeral"]
    ttl: str | None = None
    scope: str | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ChatMessage(BaseModel):
    """One message. Unknown names such as ``reasoning_content`` are passed to the template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | Listed[TextPart] | None = None
    tool_calls: Listed[dict[str, Any]] | None = None
    cache_control: CacheControl | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _only_text(cls, content: Any) -> Any:
        if isinstance(content, list):
            for part in content:
                if isinstance(part, dict) and part.get("type", "text") != "text":
                    kind = quoted(str(part["type"]))
                    raise ValueError(f"This model supports text only: remove the {kind} part.")
        return content

    def as_template_input(self) -> dict[str, Any]:
        """Return the message for a chat template: content as one string, tool arguments as an
        object."""
        extra = self.model_extra or {}
        message: dict[str, Any] = {"role": self.role}
        message |= without_nulls(extra)
        if "reasoning" in message:
            message.setdefault("reasoning_content", message["reasoning"])
        content = self.content
        message["content"] = _text(content) if isinstance(content, list) else content or ""
        if self.tool_calls is not None:
            message["tool_calls"] = [_call(call) for call in self.tool_calls]
        return message

    def marks(self) -> Iterator[int | None]:
        """Yield the number of its parts before each mark, or None for a mark at its end."""
        parts = self.content if isinstance(self.content, list) else []
        for end, part in enumerate(parts[:-1], 1):
            if part.cache_control is not None:
                yield end
        if self.cache_control is not None or (parts and parts[-1].cache_control is not None):
            yield None

    def cut(self, index: int, end: int | None) -> Cut:
        """Return the cut after the first ``end`` parts of this message, which has the given
        ``index``."""
        if end is None or not isinstance(self.content, list):
            return Cut(index)
        return Cut(index, _text(self.content[:end]))


def _text(parts: Sequence[TextPart]) -> str:
    return "\n".join(part.text for part in parts)


def cuts_of(
    messages: Sequence[ChatMessage] | None, tools: Sequence[Mapping[str, Any]] | None
) -> list[Cut]:
    """Return the marked places except the end of the chat, which is known anyway. Raises ValueError
    if there are too many."""
    chat = messages or ()
    marks = [(index, end) for index, message in enumerate(chat) for end in message.marks()]
    has_tools = any(tool.get("cache_control") for tool in tools or ())
    if (number := len(marks) + has_tools) > MAX_CUTS:
        raise ValueError(
            f"'cache_control' marks {number} places of this chat, and at most {MAX_CUTS} are "
            "allowed: remove some."
        )
    last = len(chat) - 1, None
    cuts = [chat[index].cut(index, end) for index, end in marks if (index, end) != last]
    return [Cut(None), *cuts] if has_tools else cuts


WITHOUT_CONTENT = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "refusal",
    "audio",
)
"""Fields with which a message of the assistant may have no content."""


def _have_content(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Return ``messages``. Raises ValueError if one says nothing. O(messages)."""
    for number, message in enumerate(messages):
        if message.content is not None:
            continue
        given = {"tool_calls": message.tool_calls, **(message.model_extra or {})}
        if message.role == "assistant":
            # Reasoning may be empty, because clients may drop its text.
            if any(given.get(name) not in (None, []) for name in WITHOUT_CONTENT):
                continue
            raise ValueError(
                f"'messages.{number}' has neither 'content' nor 'tool_calls': add one of them."
            )
        raise ValueError(f"'messages.{number}' has no 'content': add its text.")
    return messages


def _answers_calls(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Return ``messages``. Raises ValueError if a tool's result belongs to no call before it.
    O(calls)."""
    called: set[str | None] = set()
    for number, message in enumerate(messages):
        called.update(_id_of(call.get("id")) for call in message.tool_calls or ())
        if message.role != "tool":
            continue
        if not called:
            raise ValueError(
                f"'messages.{number}' is a tool's result, but no message before it calls a tool: "
                "send the assistant's message with its calls, too."
            )
        answered = _id_of((message.model_extra or {}).get("tool_call_id"))
        if answered is not None and answered not in called and None not in called:
            raise ValueError(
                f"'messages.{number}' is the result of the call {quoted(answered)}, which no "
                "message before it makes: send the id of a call."
            )
    return messages


def _id_of(value: object) -> str | None:
    return None if value is None else str(value)


Chat = Annotated[Listed[ChatMessage], AfterValidator(_have_content), AfterValidator(_answers_calls)]
"""List of messages with content, in which each tool's result follows its call; others are refused,
as by OpenAI. A result or a call may have no id."""


def _call(call: dict[str, Any]) -> dict[str, Any]:
    call = _with_plain_function(call)
    function = call.get("function")
    if isinstance(function, dict) and isinstance(text := function.get("arguments"), str):
        return call | {"function": function | {"arguments": parsed_arguments(text)}}
    return call


def _with_plain_function(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a call or a tool, and its function, without nulls. Deeper nulls stay, because they may
    be arguments or part of a schema."""
    entry = without_nulls(entry)
    function = entry.get("function")
    return entry | {"function": without_nulls(function)} if isinstance(function, dict) else entry


def parsed_arguments(text: str) -> dict[str, Any]:
    """Parse the arguments of a call that a model wrote. Invalid JSON, from an answer that was cut
    off, is returned under ``BROKEN``."""
    try:
        value = read_json(text or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {BROKEN: text}


def _is_tool(tool: dict[str, Any]) -> dict[str, Any]:
    tool = _with_plain_function(tool)
    if (kind := tool.get("type", "function")) != "function":
        raise ValueError(f"Tools of type {quoted(str(kind))} are not supported: use functions.")
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise ValueError("A tool must have a 'function' with a 'name'.")
    if not isinstance(function.get("parameters") or {}, dict):
        raise ValueError("The 'parameters' of a tool must be a JSON schema.")
    return tool


def _are_distinct(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``tools``. Raises ValueError if two have one name: a call could mean either."""
    names = Counter(tool["function"]["name"] for tool in tools)
    if twice := [name for name, number in names.items() if number > 1]:
        raise ValueError(f"Two tools have the name {quoted(twice[0])}: names must be unique.")
    return tools


Tools = Annotated[
    Listed[Annotated[dict[str, Any], AfterValidator(_is_tool)]], AfterValidator(_are_distinct)
]
"""Functions in the form in which the template reads them."""


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


def _is_choice(choice: Any) -> Any:
    if choice not in ("none", "auto", "required") and not isinstance(choice, dict):
        raise ValueError(
            "'tool_choice' must be 'none', 'auto', 'required', or an object that names a function."
        )
    return choice


ToolChoice = Annotated[NamedTool | Literal["none", "auto", "required"], BeforeValidator(_is_choice)]


def says_session_end(metadata: object) -> bool:
    """Return True if ``metadata`` has ``session_end``, as a boolean or as text.

    >>> says_session_end({"session_end": "true"}), says_session_end({"session_end": "0"})
    (True, False)
    """
    value = metadata.get("session_end") if isinstance(metadata, dict) else None
    return value is True or (isinstance(value, str) and value.lower() in ("true", "1", "yes"))


class CacheOptions(Strict):
    """OpenAI's ``prompt_cache_options``. ``mode`` and ``ttl`` are ignored, because the cache's
    policies decide on placement and eviction."""

    mode: Literal["implicit"] | None = None
    ttl: str | None = None
    comparison_response_id: str | None = None
    """Id of an earlier answer; the response explains its cache misses by comparison with that
    answer."""
    session_end: bool = False
    """True if no request of this session follows. Not part of OpenAI's API: a hint for admission
    and eviction."""


class Diagnostics(Strict):
    """Anthropic's ``diagnostics``."""

    previous_message_id: str | None = None


class ChatRequest(Sampling, Rendering):
    """POST /v1/chat/completions."""

    messages: Chat = Field(min_length=1)
    max_tokens: AnswerLimit | None = None
    max_completion_tokens: AnswerLimit | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    verbosity: Verbosity | None = None
    """Ignored: local models have no such switch."""
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    """False to end the answer after its first call."""
    prompt_cache_options: CacheOptions | None = None
    diagnostics: Diagnostics | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any], format_name: str) -> ChatRequest:
        """Return another dialect's ``fields`` as a chat request, without those that are None.

        Errors in the answer's format use the dialect's ``format_name``. Raises APIError 400 for
        unsupported fields.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            chat = cls.model_validate(given)
        except ValidationError as error:
            raise of_validation(error, given) from None
        chat._format_name = format_name
        return chat

    @property
    def limit(self) -> int | None:
        """Maximum number of tokens of an answer, by either name, or None if only the context limits
        it."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def compared_with(self) -> str | None:
        """Id of the earlier answer to compare this one with."""
        options, asked = self.prompt_cache_options, self.diagnostics
        if options is not None and options.comparison_response_id is not None:
            return options.comparison_response_id
        return None if asked is None else asked.previous_message_id

    @property
    def ends_session(self) -> bool:
        """True if the client declared that no request of this session follows."""
        options = self.prompt_cache_options
        return says_session_end(self.metadata) or (options is not None and options.session_end)

    @property
    def demands_call(self) -> bool:
        """True if the answer must be a call."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def has_strict_calls(self) -> bool:
        """True if the answer may be a call of a tool with a schema that it must follow."""
        if self.demands_call or self.tool_choice == "none" or super().is_guided:
            return False
        return any(tool["function"].get("strict") is True for tool in self.tools or ())

    @property
    def is_guided(self) -> bool:
        return self.demands_call or self.has_strict_calls or super().is_guided

    @property
    def form_name(self) -> str | None:
        return "tools" if self.demands_call or self.has_strict_calls else super().form_name

    @property
    def has_form(self) -> bool:
        """True if a form other than calls is requested."""
        return super().is_guided

    @model_validator(mode="after")
    def _says_one_thing(self) -> ChatRequest:
        if self.max_tokens not in (None, self.limit):
            raise ValueError(
                f"'max_tokens' {self.max_tokens} and 'max_completion_tokens' {self.limit} are "
                "different limits for the same answer: send one of them."
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' requires 'logprobs': set it to true.")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "'continue_final_message' continues the last message: omit "
                "'add_generation_prompt', which begins another message."
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError(
                "'continue_final_message' continues an answer: the last message must be the "
                "assistant's."
            )
        return self


class TokenizeRequest(Rendering):
    """POST /tokenize: a text, or a chat as /v1/chat/completions would render it."""

    model: str | None = None
    prompt: str | None = None
    messages: Chat | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("Send either 'prompt' or 'messages'.")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    HOLDS_IDS: ClassVar[bool] = True

    model: str | None = None
    tokens: TokenIds


def described(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of a body of this kind."""
    refs = f"#/components/schemas/{kind.__name__}.{{model}}"
    content = {"application/json": {"schema": kind.model_json_schema(ref_template=refs)}}
    return {"requestBody": {"required": True, "content": content}}
