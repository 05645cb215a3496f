"""Parts that the bodies of several dialects share, and the chat that each dialect converts to.
Types and the widest ranges are checked here, limits of the engine where the values are used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache, partial
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal, TypedDict

import msgspec
from msgspec import Meta, structs

from engine.errors import Json, JsonObject
from engine.front.chat_prompt import ASK, CALLING, Conversation, PromptCut
from engine.front.server.bodies import (
    MAX_NODES,
    TOO_MANY,
    Body,
    FixedObject,
    checked_tool,
    converted,
    num_nodes,
)
from engine.requests.request import MAX_BIAS, MAX_COUNT, SamplingParams
from engine.text.answers import MAX_NAME
from engine.text.bounded import read_json
from engine.text.grammar import Grammar, GrammarError
from engine.text.sandbox import TemplateError
from engine.text.tokenizer import PROBE, ChatTemplate
from hybridcache.adapters.client_habits import THOUGHT_PARTS, thoughts_of, without_billing
from hybridcache.radix.tokens import require_seconds

MAX_MESSAGES = 4096
"""Maximum number of messages of a chat, or of parts of a message."""
MAX_STOPS, MAX_BIASES = 64, 1024
"""Maximum numbers of stop strings or stop token ids, and of tokens with a bias."""
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
"""Name of a tool. A longer one is not read in an answer."""
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Stops = Annotated[list[Stop], Meta(max_length=MAX_STOPS)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
AnswerLimit = Annotated[int, Meta(ge=1, extra_json_schema={"maximum": MAX_COUNT})]
"""Number of tokens of an answer. Limits above the context are valid: clients send them."""
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=MAX_COUNT)]
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-MAX_BIAS, le=MAX_BIAS)]
NumScores = Annotated[int, Meta(ge=0, le=20)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""Values of ``reasoning_effort`` in OpenAI's API."""
PASSED_ON = {field.name for field in fields(SamplingParams)} - {"max_tokens", "logprobs", "seed"}
"""Fields of ``SamplingParams`` that are those of the body, by the same names."""
MAX_CUTS = 4
"""Number of ``cache_control`` marks of a chat that count. Each takes a render."""
BROKEN = "INVALID_JSON"
"""Name for the arguments of a call that are not a JSON object, as in Anthropic's API."""
IGNORED: dict[str, tuple[object, ...] | None] = dict.fromkeys(
    (
        *("user", "safety_identifier", "service_tier", "prompt_cache_key"),
        *("prompt_cache_retention", "prompt_cache_options"),
    )
)
"""Parameters of OpenAI's API that change no answer: the cache's policies decide on placement and
eviction, and ``/v1/cache/explanations`` compares prompts."""
NEUTRAL: dict[str, tuple[object, ...] | None] = IGNORED | {
    **dict.fromkeys(("store", "verbosity", "spaces_between_special_tokens")),
    "best_of": (1,),
    "priority": (0,),
    "modalities": (["text"],),
}
"""Parameters that are not supported, with the values that have no effect; None stands for any."""


class NamedSchema(msgspec.Struct, kw_only=True):
    """A schema. ``strict`` is ignored: an answer always follows it."""

    schema: JsonObject | bool | None = None


class ResponseFormat(FixedObject, kw_only=True, omit_defaults=True):
    """Form of an answer, with ``json_schema`` in chats, and with its fields in other dialects."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    name: str | None = None
    description: str | None = None
    schema: JsonObject | bool | None = None
    strict: bool | None = None

    def grammar(self) -> Grammar:
        """Return the grammar of a type other than text. Raises GrammarError."""
        if self.type == "json_object":
            return Grammar.of_schema({"type": "object"})
        schema = self.schema if self.json_schema is None else self.json_schema.schema
        if schema is None:
            raise GrammarError("type json_schema requires a 'schema'.")
        return Grammar.of_schema(schema)


class StructuredOutputs(FixedObject, kw_only=True):
    """vLLM's structured outputs. Only one of them may be set."""

    json: JsonObject | bool | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


MAKERS: dict[str, Callable[[Any], Grammar]] = {
    "json": Grammar.of_schema,
    "regex": Grammar.of_regex,
    "choice": Grammar.of_choices,
    "grammar": Grammar.of_text,
}
"""Functions that make the grammar of a field of ``StructuredOutputs``."""


class AgentHint(msgspec.Struct, kw_only=True):
    """vLLM's hints. Others are ignored."""

    session: str | None = None
    cache_ttl_ms: Count | None = None
    release: bool = False
    """True if no request of the session follows."""


class OpenAIBody(Body, kw_only=True):
    """Parameters that all requests of OpenAI's API share."""

    NEUTRAL = IGNORED

    temperature: Temperature | None = None
    top_p: TopP | None = None
    stream: bool = False
    stream_options: JsonObject | None = None
    session_id: str | None = None
    """SGLang's name of ``metadata.session_id``."""
    cache_ttl_ms: Count | None = None
    """SGLang's time to live in milliseconds: a promise to return within it."""
    agent_hint: AgentHint | None = None

    @property
    def hints(self) -> JsonObject:
        """Facts about the session under the names of ``metadata``."""
        given = self.agent_hint or AgentHint()
        ttl_ms = given.cache_ttl_ms if self.cache_ttl_ms is None else self.cache_ttl_ms
        found: JsonObject = {"session_id": self.session_id or given.session}
        found |= {} if ttl_ms is None else {"returns_within_s": ttl_ms / 1000}
        return found | ({"session_end": True} if given.release else {})


class SessionMarks(TypedDict, total=False):
    """Fields of a ``RequestSpec`` that a client sets."""

    ends_session: bool
    returns_within_s: float
    session: str


TTLS_S = {"5m": 300.0, "1h": 3600.0}
"""Values of ``cache_control.ttl``, in seconds."""


class Sampling(OpenAIBody, kw_only=True):
    """Sampling and form of the answer. None selects the engine's default."""

    NEUTRAL = NEUTRAL

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_k: TopK | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=MAX_BIASES)] | None = None
    min_tokens: Count | None = None
    thinking_token_budget: Count | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool = False
    metadata: JsonObject | None = None

    @property
    def session(self) -> SessionMarks:
        """Facts about the session in the hints and in the metadata, which come first and whose
        values are texts in OpenAI's API. Raises ValueError unless the promised time is a number of
        at least 0."""
        metadata = self.hints | (self.metadata or {})
        marks: SessionMarks = {"ends_session": str(metadata.get("session_end")).lower() == "true"}
        marks["session"] = str(metadata.get("session_id") or "")
        if (given := metadata.get("returns_within_s")) is not None:
            name = "metadata.returns_within_s"
            try:
                marks["returns_within_s"] = require_seconds(float(str(given)), name)
            except ValueError:
                said = f"{name} must be a finite number of seconds, at least 0 (got {given!r:.40})."
                raise ValueError(said) from None
        return marks

    def forms(self, format_name: str) -> dict[str, Callable[[], Grammar]]:
        """Return the requested forms: parameter -> function that makes its grammar, and may raise
        GrammarError. ``format_name`` is the dialect's name of ``response_format``."""
        asked, given = self.response_format, self.structured_outputs
        forms: dict[str, Callable[[], Grammar]] = {}
        if asked is not None and asked.type != "text":
            forms[format_name] = asked.grammar
        for name, make in MAKERS.items():
            if (value := getattr(given, name, None)) is not None:
                forms[f"structured_outputs.{name}"] = partial(make, value)
        return forms

    def samplings(
        self, max_tokens: int | None, logprobs: int | None, defaults: Mapping[str, Json]
    ) -> list[SamplingParams]:
        """Return the sampling parameters of the ``n`` choices; ``defaults`` replace missing ones.
        Raises ValueError for a value out of range."""
        given = {name: value for name in PASSED_ON if (value := getattr(self, name)) is not None}
        given = {**defaults, **given, "max_tokens": max_tokens, "logprobs": logprobs}
        if self.top_k in (-1, 0):  # All tokens.
            given["top_k"] = None
        first = SamplingParams(**given)  # Its lists of tokens are checked once.
        if self.seed is None:
            return [first] * self.n
        # The choices must differ, and be reproducible.
        return [first.with_seed(self.seed + at) for at in range(self.n)]


CacheControl = JsonObject
"""Anthropic's mark: later prompts will share the text before it. Its fields are ignored, because
the cache's policies decide on placement and eviction."""


class TextPart(msgspec.Struct, kw_only=True, tag_field="type", tag="text"):
    text: str
    cache_control: CacheControl | None = None


KNOWN = ("role", "content", "tool_calls", "cache_control")
"""Names of a message that have a fixed form."""
Role = Literal["system", "developer", "user", "assistant", "tool"]
"""Roles of OpenAI's API, without the old ``function``, which no template writes."""


class Message(msgspec.Struct, kw_only=True):
    """One message. Unknown names are passed to the template. ``reasoning_content`` is a text."""

    role: Role
    content: str | Annotated[list[TextPart], Meta(max_length=MAX_MESSAGES)] | None = None
    tool_calls: list[JsonObject] | None = None
    """Calls as templates read them: arguments are an object."""
    cache_control: CacheControl | None = None
    extra: JsonObject = {}

    def as_template_input(self, role: Role | None = None, content: str | None = None) -> JsonObject:
        """Return the message for a chat template, with another role and content if given."""
        if content is None:
            content = "".join(part.text for part in parts_of(self.content))
        message: JsonObject = {"role": role or self.role, **self.extra, "content": content}
        if self.tool_calls is not None:
            message["tool_calls"] = self.tool_calls
        return message


def parts_of(content: str | list[TextPart] | None) -> list[TextPart]:
    """Return a content as a list of parts."""
    return [TextPart(text=content)] if isinstance(content, str) else content or []


SYSTEM = "system", "developer"


@lru_cache(maxsize=64)
def _writes(template: ChatTemplate, roles: tuple[str, ...]) -> bool:
    """Return True if a template writes messages with these roles. Takes one render."""
    try:
        chat = [{"role": role, "content": f"{PROBE}{at}"} for at, role in enumerate(roles)]
        text = template.render(chat)
    except TemplateError:
        return False
    return all(f"{PROBE}{at}" in text for at in range(len(roles)))


def _roles(template: ChatTemplate, roles: list[Role]) -> tuple[list[Role], int]:
    """Return the roles of a chat as a template writes them, and the number of system messages at
    the beginning that are one message for it, with one role."""
    if "developer" not in template.source or not _writes(template, ("developer", "user")):
        roles = ["system" if role == "developer" else role for role in roles]
    num_first = next((at for at, role in enumerate(roles) if role not in SYSTEM), len(roles))
    for at in range(num_first, len(roles)):
        places = "system", "user", "assistant", roles[at], "user"
        if roles[at] in SYSTEM and not _writes(template, places):
            roles[at] = "user"
    if num_first > 1 and not _writes(template, (*roles[: min(num_first, 3)], "user")):
        return roles[:1] + roles[num_first:], num_first
    return roles, 1


@lru_cache(maxsize=64)
def _joint(template: ChatTemplate, role: Role) -> str:
    """Return the text between two parts of a message with this role. Takes two renders."""
    before = {"assistant": [ASK], "tool": [ASK, CALLING]}.get(role, [])
    parts = [{"type": "text", "text": f"{PROBE}{number}"} for number in (1, 2)]
    try:
        text = template.render([*before, {"role": role, "content": parts}, ASK])
        found = re.search(f"{PROBE}1(.{{0,16}}?){PROBE}2", text, re.DOTALL)
        said = found[0] if found else ""
        same = template.render([*before, {"role": role, "content": said}, ASK])
        return found[1] if found and same == text else "\n"
    except TemplateError:
        return "\n"


def plain_message(message: JsonObject, place: str) -> JsonObject:
    """Return a message of a chat in the form of ``Message``, with unknown names in ``extra``.

    Thoughts are no parts of its content, custom calls are calls of functions with an ``input``, and
    a refusal is its text if it has no other. Raises ValueError if it has no content or a call has
    no function.
    """
    extra = {name: value for name, value in message.items() if name not in KNOWN}
    found = {name: message[name] for name in KNOWN if name in message} | {"extra": extra}
    if isinstance(content := message.get("content"), list):
        kinds = [one.get("type") if isinstance(one, dict) else None for one in content]
        parts = [*zip(content, kinds, strict=True)]
        if thoughts := [thoughts_of(one) for one, kind in parts if kind in THOUGHT_PARTS]:
            extra.setdefault("reasoning_content", "\n".join(filter(None, thoughts)))
            found["content"] = [one for one, kind in parts if kind not in THOUGHT_PARTS]
    if extra and (said := thoughts_of(extra)):
        extra["reasoning_content"] = said
    if isinstance(refusal := message.get("refusal"), str) and not message.get("content"):
        found["content"] = refusal
    if found.get("content") is None and found.get("role") in (*SYSTEM, "user"):
        raise ValueError(f"'{place}' has no 'content': add its text.")
    if isinstance(calls := message.get("tool_calls"), list):
        places = (f"{place}.tool_calls.{at}" for at in range(len(calls)))
        found["tool_calls"] = [*map(_plain_call, calls, places)]
    return found


def _plain_call(call: Json, place: str) -> Json:
    """Return a call with its arguments as an object. Raises ValueError without a function."""
    if not isinstance(call, dict):
        return call
    if isinstance(custom := call.get("custom"), dict):
        given: JsonObject = {"input": custom.get("input") or ""}
        call = {name: one for name, one in call.items() if name != "custom"}
        call |= {"type": "function", "function": {"name": custom.get("name"), "arguments": given}}
    named = call.get("function", call)
    if not isinstance(named, dict) or not isinstance(named.get("name"), str):
        raise ValueError(f"'{place}' has no function with a name: add 'function.name'.")
    if named is call:
        return call
    arguments = named.get("arguments") or {}  # PHP writes {} as [].
    if isinstance(arguments, str):
        arguments = parsed_arguments(arguments)
    return call | {"function": named | {"arguments": arguments}}


def _without_billing(message: Message) -> bool:
    """Remove the billing header, which changes in each request, from a system message. Returns
    False if nothing is left of it."""
    parts = parts_of(message.content)
    kept = [structs.replace(part, text=without_billing(part.text)) for part in parts]
    if kept != parts:
        message.content = [part for part in kept if part.text.strip()]
    return kept == parts or bool(message.content)


def parsed_arguments(text: str) -> JsonObject:
    """Parse the arguments of a call that a model wrote; invalid JSON is returned under ``BROKEN``.
    Raises ValueError if it is too large."""
    if num_nodes(text.encode()) > MAX_NODES:
        raise ValueError(TOO_MANY)
    try:
        value = read_json(text or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {BROKEN: text}


class Function(msgspec.Struct, kw_only=True):
    name: Name
    parameters: JsonObject | None = None
    """JSON schema of a tool."""
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """Fields of a tool with a fixed form. Others are passed to the template."""

    type: Literal["function"] = "function"
    function: Function


Choice = Literal["none", "auto", "required"]


class NamedTool(Tool, kw_only=True):
    """The only tool that may be called."""

    @classmethod
    def of(cls, name: str) -> NamedTool:
        return cls(function=Function(name=name))


Messages = Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]


class ChatRequest(Sampling, kw_only=True):
    """POST /v1/chat/completions, and the chat that the body of another dialect means."""

    ENTRIES: ClassVar = {
        "messages": plain_message,
        "tools": partial(checked_tool, served=("function",)),
    }

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    """Functions."""
    add_generation_prompt: bool | None = None
    """Append the beginning of an answer; by default unless ``continue_final_message`` is set."""
    continue_final_message: bool = False
    """Continue the last message."""
    chat_template_kwargs: JsonObject | None = None
    """Switches of the template, such as ``enable_thinking``."""
    reasoning_effort: Effort | None = None
    """Variable of the template. ``none`` also disables reasoning, and any other value enables it,
    unless ``chat_template_kwargs`` has ``enable_thinking``."""
    max_tokens: AnswerLimit | None = None
    max_completion_tokens: AnswerLimit | None = None
    logprobs: bool = False
    top_logprobs: NumScores | None = None
    tool_choice: Choice | NamedTool | None = None
    parallel_tool_calls: bool = True
    """False to end the answer after its first call."""

    def __post_init__(self) -> None:
        kept = [one for one in self.messages if one.role not in SYSTEM or _without_billing(one)]
        self.messages = kept or self.messages
        for tool in self.tools or ():
            function = tool.get("function")
            if isinstance(function, dict) and function.get("parameters") == []:
                function["parameters"] = {}  # PHP writes {} as [].
        converted(self.tools or (), list[Tool], "tools")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("'tool_choice' requires 'tools': send them.")
        if (effort := self.reasoning_effort) is not None:
            switches = {"enable_thinking": effort != "none", "reasoning_effort": effort}
            self.chat_template_kwargs = switches | (self.chat_template_kwargs or {})
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' requires 'logprobs': set it to true.")

    def conversation(self, template: ChatTemplate, switches: JsonObject) -> Conversation:
        """Return the chat as ``template`` reads it, with the server's ``switches`` as defaults.

        Developer messages are system messages unless the template has that role. Several system
        messages at the beginning are joined, and later ones become messages of the user, if the
        template does not write them there. They keep their places, because a prompt that changes at
        its beginning is not in the cache. Between the parts of a content is the text that the
        template writes there, or a line break if it does not support parts. The last ``MAX_CUTS``
        marked places before the end count.
        """
        roles, num_joined = _roles(template, [one.role for one in self.messages])
        groups = [self.messages[:num_joined], *([one] for one in self.messages[num_joined:])]
        are_tools_marked = any(tool.get("cache_control") for tool in self.tools or ())
        chat, cuts = list[JsonObject](), [PromptCut(None)] * are_tools_marked
        for role, group in zip(roles, groups, strict=True):
            texts, marks = list[str](), list[bool]()
            for one in [one for one in group if one.content] or group[:1]:
                first, *others = parts_of(one.content or "")
                texts.append(("\n\n" if texts else "") + first.text)
                texts += [_joint(template, role) + part.text for part in others]
                marks += [part.cache_control is not None for part in (first, *others)]
                marks[-1] |= one.cache_control is not None
            content, ends = "".join(texts), [*accumulate(map(len, texts))]
            for at in [at for at, is_marked in enumerate(marks) if is_marked][-MAX_CUTS - 1 :]:
                shared = content[: ends[at]] if at + 1 < len(texts) else None
                cuts.append(PromptCut(len(chat), shared))
            chat.append(group[0].as_template_input(role, content))
        return Conversation(
            chat,
            self.plain_tools if self.tools else None,
            switches | (self.chat_template_kwargs or {}),
            [cut for cut in cuts if cut != PromptCut(len(chat) - 1)][-MAX_CUTS:],
            self.add_generation_prompt is not False and not self.continue_final_message,
            self.continue_final_message,
        )

    @property
    def plain_tools(self) -> list[dict[str, Any]]:
        """Tools without the fields that are meant for the server."""
        return [
            {
                **{name: value for name, value in tool.items() if name != "cache_control"},
                "function": {n: value for n, value in tool["function"].items() if n != "strict"},
            }
            for tool in self.tools or ()
        ]


class CompletionRequest(Sampling, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    """Text, list of texts, list of token ids, or list of such lists."""
    max_tokens: Count = 16
    echo: bool = False
    logprobs: NumScores | None = None
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        if len({*map(type, self.prompt)}) > 1:
            raise ValueError(
                "'prompt' must be a text, a list of texts, a list of token ids or a list of such "
                "lists."
            )
        if not self.max_tokens and not self.echo:
            raise ValueError("'max_tokens' must be at least 1 (got 0); 0 requires 'echo'.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """List of prompts, with one entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [one for one in self.prompt if isinstance(one, int)]
        return [ids] if ids else [one for one in self.prompt if not isinstance(one, int)]
