"""What clients may send. Types and the widest ranges are checked here, what the engine can do where
the values are used (SamplingParams, the engine).

A parameter that would change the answer and is not served is refused by name; one that would not
(``user``, ``store``) is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from engine import Grammar, SamplingParams
from engine.plugins.guided.call_grammars import Form, grammar_of_calls, grammar_of_strict_calls
from engine.requests.sampling_params import MAX_COUNT
from engine.server.config import MAX_STOPS
from engine.server.errors import APIError, quoted
from engine.server.rendering import Rendering
from engine.server.stream_options import Streamed
from engine.server.strict import (
    Listed,
    Name,
    Strict,
    whole_numbers,
    without_nulls,
    without_what_asks_for_nothing,
)
from engine.server.token_options import Text, Texts, TokenIds, TokenOptions, seed_of
from engine.text.json_text import read_json
from engine.text.templates import Cut

IGNORED = frozenset(
    {
        "user",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "verbosity",
    }
)
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
"""Parameters of OpenAI's that are not served, with the values that ask for nothing."""


TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
IDS = {"type": "array", "minItems": 1, "items": TOKEN_ID}
TEXTS = {"type": "array", "minItems": 1, "items": {"type": "string"}}
PROMPT = {"anyOf": [{"type": "string"}, TEXTS, IDS, {"type": "array", "minItems": 1, "items": IDS}]}
BROKEN = "INVALID_JSON"
"""Where the arguments of a call stand that are no JSON object: Anthropic's own word for it."""
MAX_TEMPERATURE = 2
"""As of OpenAI's."""
AnswerLimit = Annotated[
    int, Field(ge=1), WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MAX_COUNT})
]
"""Tokens of an answer. ``ServingContext.check_limit`` refuses more than the context holds, in words
that name that length."""
MAX_CUTS = 4
"""Places of a chat that ``cache_control`` may mark, as at Anthropic."""


class Sampling(TokenOptions, Streamed):
    """The part of a request that says how tokens are chosen; None: the engine's default."""

    model: str | None = None
    n: int = Field(default=1, ge=1, le=128)
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    metadata: Any = None
    """Changes no answer; ``session_end`` in it says that no request of the session follows."""
    stop: Text | Texts | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    cache_salt: str | None = None
    """Requests with different salts share nothing of the cache."""

    GIVEN: ClassVar[tuple[str, ...]] = (
        "temperature",
        "top_p",
        "min_p",
        "ignore_eos",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body: Any) -> Any:
        return without_what_asks_for_nothing(body, IGNORED, NEUTRAL)

    def samplings(
        self, max_tokens: int | None, logprobs: int | None, defaults: Mapping[str, Any]
    ) -> list[SamplingParams]:
        """How each of the ``n`` choices is sampled; by ``defaults`` where the body says nothing.
        APIError 400: a value out of range."""
        given = dict(defaults)
        given |= {name: value for name in self.GIVEN if (value := getattr(self, name)) is not None}
        given |= self.options()
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            return [
                SamplingParams(
                    max_tokens=max_tokens,
                    stop=stop,
                    stop_token_ids=tuple(self.stop_token_ids or ()),
                    seed=seed_of(self.seed, choice),
                    logprobs=logprobs,
                    **given,
                )
                for choice in range(self.n)
            ]
        except ValueError as error:
            raise APIError(400, str(error)) from error


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    HOLDS_IDS: ClassVar[bool] = True

    prompt: Annotated[Any, WithJsonSchema(PROMPT)]
    """A text, a list of texts, a list of token ids, or a list of such lists."""
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
        """One entry a prompt, whatever form it came in."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


class CacheControl(Strict):
    """Anthropic's: later prompts will share what lies before. Where a state is kept, and how long,
    is the cache's to decide: ``ttl`` changes nothing."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ChatMessage(BaseModel):
    """One message. Names a template may know (reasoning_content) pass through."""

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
                    raise ValueError(f"This model reads text only: drop the {kind} part.")
        return content

    def as_template_input(self) -> dict[str, Any]:
        """As chat templates expect it: content as one string, tool arguments as an object."""
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
        """After how many of its parts it says that later chats will share it; None: after all."""
        parts = self.content if isinstance(self.content, list) else []
        for end, part in enumerate(parts[:-1], 1):
            if part.cache_control is not None:
                yield end
        if self.cache_control is not None or (parts and parts[-1].cache_control is not None):
            yield None

    def cut(self, index: int, end: int | None) -> Cut:
        """The place after its first ``end`` parts, of the message with this ``index``."""
        if end is None or not isinstance(self.content, list):
            return Cut(index)
        return Cut(index, _text(self.content[:end]))


def _text(parts: Sequence[TextPart]) -> str:
    return "\n".join(part.text for part in parts)


def cuts_of(
    messages: Sequence[ChatMessage] | None, tools: Sequence[Mapping[str, Any]] | None
) -> list[Cut]:
    """The places that ``cache_control`` marks, the end of the chat apart: it is known. ValueError:
    more than there may be."""
    chat = messages or ()
    marks = [(index, end) for index, message in enumerate(chat) for end in message.marks()]
    has_tools = any(tool.get("cache_control") for tool in tools or ())
    if (number := len(marks) + has_tools) > MAX_CUTS:
        raise ValueError(
            f"'cache_control' stands in {number} places of this chat, more than {MAX_CUTS}: "
            "mark fewer."
        )
    last = len(chat) - 1, None
    cuts = [chat[index].cut(index, end) for index, end in marks if (index, end) != last]
    return [Cut(None), *cuts] if has_tools else cuts


def _call(call: dict[str, Any]) -> dict[str, Any]:
    call = _with_plain_function(call)
    function = call.get("function")
    if isinstance(function, dict) and isinstance(text := function.get("arguments"), str):
        return call | {"function": function | {"arguments": parsed_arguments(text)}}
    return call


def _with_plain_function(entry: dict[str, Any]) -> dict[str, Any]:
    """A call or a tool, and its function, without nulls; not what lies deeper, where a null may be
    an argument, or a schema's."""
    entry = without_nulls(entry)
    function = entry.get("function")
    return entry | {"function": without_nulls(function)} if isinstance(function, dict) else entry


def parsed_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call that a model wrote, whether or not they are JSON: an answer may have
    been cut in them, and the conversation goes on."""
    try:
        value = read_json(text or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {BROKEN: text}


def _is_tool(tool: dict[str, Any]) -> dict[str, Any]:
    tool = _with_plain_function(tool)
    if (kind := tool.get("type", "function")) != "function":
        raise ValueError(f"Tools of the type {quoted(str(kind))} are not served: offer functions.")
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise ValueError("A tool must have a 'function' with a 'name'.")
    if not isinstance(function.get("parameters") or {}, dict):
        raise ValueError("The 'parameters' of a tool must be a JSON schema.")
    return tool


Tools = Listed[Annotated[dict[str, Any], AfterValidator(_is_tool)]]
"""Functions, as they reach the template."""


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
    """Return whether ``metadata`` has ``session_end``, as a truth value or as text.

    >>> says_session_end({"session_end": "true"}), says_session_end({"session_end": "0"})
    (True, False)
    """
    value = metadata.get("session_end") if isinstance(metadata, dict) else None
    return value is True or (isinstance(value, str) and value.lower() in ("true", "1", "yes"))


class CacheOptions(Strict):
    """OpenAI's ``prompt_cache_options``. What is kept here, and how long, is the cache's own to
    decide: ``mode`` and ``ttl`` change nothing."""

    mode: Literal["implicit"] | None = None
    ttl: str | None = None
    comparison_response_id: str | None = None
    """Say in the answer why it missed the cache, beside this earlier one."""
    session_end: bool = False
    """No request of this session follows. Not OpenAI's: a hint for admission and eviction."""


class Diagnostics(Strict):
    """Anthropic's ``diagnostics``."""

    previous_message_id: str | None = None


class ChatRequest(Sampling, Rendering):
    """POST /v1/chat/completions."""

    messages: Listed[ChatMessage] = Field(min_length=1)
    max_tokens: AnswerLimit | None = None
    max_completion_tokens: AnswerLimit | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    """False: the answer ends behind its first call."""
    prompt_cache_options: CacheOptions | None = None
    diagnostics: Diagnostics | None = None

    @property
    def limit(self) -> int | None:
        """Of an answer's tokens, by either of its two names; None: what the context holds."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def compared_with(self) -> str | None:
        """The earlier answer that this one is to be compared with."""
        options, asked = self.prompt_cache_options, self.diagnostics
        if options is not None and options.comparison_response_id is not None:
            return options.comparison_response_id
        return None if asked is None else asked.previous_message_id

    @property
    def ends_session(self) -> bool:
        """True if no request of this session follows, as the client says."""
        options = self.prompt_cache_options
        return says_session_end(self.metadata) or (options is not None and options.session_end)

    @property
    def demands_call(self) -> bool:
        """The answer must be a call."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def has_strict_calls(self) -> bool:
        """The answer may be a call of a tool whose schema it must follow."""
        if self.demands_call or self.tool_choice == "none" or super().is_guided:
            return False
        return any(tool["function"].get("strict") is True for tool in self.tools or ())

    @property
    def is_guided(self) -> bool:
        return self.demands_call or self.has_strict_calls or super().is_guided

    @property
    def form_name(self) -> str | None:
        return "tools" if self.demands_call or self.has_strict_calls else super().form_name

    def call_grammar(self, form: Form, may_think: bool) -> Grammar | None:
        """Return the grammar of the calls that the answer must have, or may have if some are
        strict; None if it is neither. ``form`` is the model's, and ``may_think`` says whether it
        may begin with reasoning. ValueError: a tool's schema cannot be served, or another form is
        asked for, too."""
        if self.has_strict_calls:
            return grammar_of_strict_calls(self.tools or (), form, may_think=may_think)
        if not self.demands_call:
            return None
        if super().is_guided:
            raise ValueError("'tool_choice' demands a call, which has its form: ask for no other.")
        choice = self.tool_choice
        name = choice.function.name if isinstance(choice, NamedTool) else "required"
        return grammar_of_calls(self.tools or (), name, form, in_parallel=self.parallel_tool_calls)

    @model_validator(mode="after")
    def _says_one_thing(self) -> ChatRequest:
        if self.max_tokens not in (None, self.limit):
            raise ValueError(
                f"'max_tokens' {self.max_tokens} and 'max_completion_tokens' {self.limit} are two "
                "limits of one answer: send one of them."
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': set it to true.")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "'continue_final_message' goes on in the last message: leave out "
                "'add_generation_prompt', which begins another."
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError(
                "'continue_final_message' goes on in an answer: the last message must be the "
                "assistant's."
            )
        return self


class TokenizeRequest(Rendering):
    """POST /tokenize: a text, or a chat as /v1/chat/completions would render it."""

    model: str | None = None
    prompt: str | None = None
    messages: Listed[ChatMessage] | None = None
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
    """What /docs says of a body of this kind."""
    refs = f"#/components/schemas/{kind.__name__}.{{model}}"
    content = {"application/json": {"schema": kind.model_json_schema(ref_template=refs)}}
    return {"requestBody": {"required": True, "content": content}}
