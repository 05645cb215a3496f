"""Conversion of chats to prompts: the text of the template, the tokens that were sampled for
earlier answers, and the positions at which the next prompt will differ.

A chat template does not only append: it drops the end of the generation header and the reasoning of
earlier turns. The next prompt of a chat with reasoning thus differs a few tokens before the end of
this one. A checkpoint at the exact end would never be used again. The position is found with the
template: the history is rendered as in the next turn, and the common prefix is taken.

When a client sends an answer back, the template writes it again and the tokenizer encodes it again.
Its JSON may be spaced differently and its words split differently, so the prompt would differ from
the cached one where the answer begins. If the sampled tokens are known, they are used instead
(``Replay``), and all text around them stays as the template writes it. A turn is replaced only if

- the chat before it, its text and its calls are the same as when it was sampled;
- the template writes the message exactly once, in a separate turn (from the last control token
  before it to the next end token);
- nothing else in the prompt depends on a character that is added to the message;
- the turn begins with the end of the prompt that it was sampled for (``header``), and contains its
  reasoning if there was any. Templates that drop either from history are followed, unless
  ``keeps_thinking`` is set.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from array import array
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

from engine.requests.request import RequestSpec
from engine.text.bounded_memory import BoundedMemory
from engine.text.outputs import RequestOutput
from engine.text.tokenizer import (
    CLOSE,
    OPEN,
    PROBE,
    IdTokenizer,
    Message,
    TemplateError,
    Tokenizer,
    any_of,
    as_tokens,
)
from hybridcache.policies.protocol import chat_boundaries
from hybridcache.tokens import Tokens, common_prefix_len

MARK_CODES = range(0xE001, 0xF900)
"""Characters that may be inserted into a control token that is text. Private use, as the probe."""


KEEPS_THINKING = "preserve_thinking"
"""Template variable of newer templates; emulated for templates that do not support it."""
ENTRY_BYTES = 512
"""Approximate size of an answer without its ids and its reasoning."""


@dataclass(frozen=True, slots=True)
class SampledTurn:
    """Tokens sampled for one assistant message."""

    header: str
    """End of the prompt, from its last control token on."""
    token_ids: Sequence[int]
    """Sampled tokens without the end token."""
    reasoning: str = ""


class Replay:
    """Sampled answers of one server in ``limit_bytes``, by tenant and digest of the chat up to
    them. Replayed prompts keep the beginning of earlier ones: sampled tokens replace answers that
    come back. Thread-safe."""

    def __init__(
        self, tokenizer: Tokenizer, limit_bytes: int, *, keeps_thinking: bool = False
    ) -> None:
        """``keeps_thinking``: the default of requests without the switch ``KEEPS_THINKING``."""
        self._tokenizer, self._keeps_thinking = tokenizer, keeps_thinking
        self._known = BoundedMemory[Place, SampledTurn](limit_bytes)

    def render(
        self,
        messages: Sequence[Message],
        tenant: Hashable,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ChatPrompt:
        """Render a chat with the turns that were sampled for its answers; see ``render_chat``.

        With ``KEEPS_THINKING``, messages get the reasoning that their client dropped.
        """
        keeps = (variables or {}).get(KEEPS_THINKING, self._keeps_thinking) is True
        if keeps:
            variables = {**(variables or {}), KEEPS_THINKING: True}
        chat = list(messages)
        sampled: dict[int, SampledTurn] = {}
        place = tenant, _digest(b"", tools)
        for index, message in enumerate(chat):
            place, reasoning = _place_behind(place, message)
            turn = self._known.get(place) if message.get("role") == "assistant" else None
            if turn is None or reasoning not in (turn.reasoning.strip(), "" if keeps else None):
                continue
            sampled[index] = turn
            if turn.reasoning and not reasoning:
                chat[index] = {**message, "reasoning_content": turn.reasoning}
        prompt = render_chat(
            self._tokenizer,
            chat,
            tools=tools,
            variables=variables,
            sampled=sampled,
            keeps_thinking=keeps,
            **options,
        )
        return replace(prompt, place=place)

    def keep(self, prompt: ChatPrompt, message: Message, output: RequestOutput) -> None:
        """Store the tokens of the answer to ``prompt``, sent as ``message``, that a client can send
        back completely: one ended by the model or by its length limit. O(its size)."""
        token_ids, place = output.output.tolist(), prompt.place
        controls = self._tokenizer.control_ids
        if output.finish_reason == "stop" and token_ids[-1] in self._tokenizer.eos_token_ids:
            token_ids.pop()
        elif output.finish_reason != "length":
            return
        if place is None or not prompt.header or not controls.isdisjoint(token_ids):
            return
        ids, reasoning = array("i", token_ids), message["reasoning_content"]
        num_bytes = ENTRY_BYTES + 4 * len(ids) + sum(map(sys.getsizeof, (prompt.header, reasoning)))
        turn = SampledTurn(prompt.header, ids, reasoning)
        self._known.put(_place_behind(place, message)[0], turn, num_bytes)


Place = tuple[Hashable, bytes]
"""Tenant, and digest of a chat up to a message, without reasoning."""


def _place_behind(place: Place, message: Message) -> tuple[Place, str]:
    """Return (place behind ``message``, its reasoning). O(its size)."""
    (tenant, before), (*said, reasoning) = place, said_by(message)
    return (tenant, _digest(before, [message.get("role"), *said])), reasoning


def _digest(before: bytes, value: Any) -> bytes:
    text = json.dumps(value, default=repr).encode()
    return hashlib.blake2b(before + text, digest_size=16).digest()


class Cut(NamedTuple):
    """A place in a chat up to which the client declares that later chats will be equal."""

    message: int | None
    """Index of the message that contains or ends at the cut, or None for the end of the tools."""
    content: str | None = None
    """Shared beginning of its content, or None if all of it is shared."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as the input of the model."""

    spec: RequestSpec
    """Request for the answer, without sampling parameters. Its boundaries are the positions up to
    which later prompts will be equal: the end of the system segment, the position where the next
    turn differs, and in a tool loop the position where the prompt with the tool's result
    differs."""
    cuts: tuple[int, ...] = ()
    """Positions of the requested cuts, in their order, without those at which the template rejects
    the chat."""
    is_thinking: bool = False
    """True if the prompt ends inside reasoning, which the answer continues."""
    header: str = ""
    """End of the prompt from its last control token on, with which the answer's turn begins."""
    place: Place | None = None
    """Place of the chat's end, if its answer is to be replayed."""

    @property
    def tokens(self) -> Tokens:
        """The prompt, int32[n]."""
        return cast("Tokens", self.spec.prompt)


def no_chat(tokenizer: Tokenizer) -> str:
    """Return the error of a chat with a model that has no chat template."""
    if isinstance(tokenizer, IdTokenizer):
        return (
            "This model has no tokenizer, so it cannot chat: use /v1/completions with token ids, "
            "as numbers."
        )
    return "This model has no chat template: use /v1/completions."


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
    namespace: Hashable = None,
    cuts: Sequence[Cut] = (),
    sampled: Mapping[int, SampledTurn] | None = None,
    keeps_thinking: bool = False,
    continues_last: bool = False,
) -> ChatPrompt:
    """Render and encode a chat.

    ``sampled`` has the sampled turns by the index of their message. Their tokens are used under the
    conditions of ``find_splices``; with ``keeps_thinking`` also where the template drops reasoning
    from history, so that the prompt differs from the template's.

    ``tokenizer.control_tokens`` inside the chat's texts (contents, names, arguments, tools) are
    encoded as text, so that a client cannot forge turns. ``namespace`` is that of the request, and
    of ``Tokenizer.encode``. With ``continues_last``, the prompt ends with the content of the last
    message.

    Raises TemplateError if the model has no chat template, or if the template rejects the chat.
    Takes at most five renders plus one for each of ``cuts``, one encoding of the whole chat and a
    few of its ends.
    """
    template = tokenizer.chat_template
    if template is None:
        raise TemplateError(no_chat(tokenizer))
    mark, (messages, tools, variables, cuts) = mark_control_tokens(
        tokenizer.control_tokens, (messages, tools, variables, cuts)
    )
    cuts = [Cut(*cut) for cut in cuts]

    def render(chat: Sequence[Message]) -> str:
        return template.render(
            chat, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables
        )

    encode_text = partial(
        tokenizer.encode, add_special_tokens=False, mark=mark, namespace=namespace
    )

    written = render(messages)
    sampled = dict(sampled or {})
    if continues_last:
        sampled.pop(len(messages) - 1, None)
    splices = find_splices(tokenizer, render, messages, written, sampled, keeps_thinking)

    def encode(text: str) -> Tokens:
        return as_tokens(splices.encode(text, encode_text))

    text = splices.apply(written)
    if continues_last:
        text = _up_to_content(text, messages[-1])
    tokens = encode(text)

    def shared(future: Sequence[Message]) -> list[int]:
        """Return the number of tokens that a later chat shares with this one, or [] if the template
        rejects it."""
        try:
            later = splices.apply(render(future))
        except TemplateError:
            return []
        return [common_token_prefix(encode, tokenizer.special_tokens, text, tokens, later)]

    ending = written[-64:].rstrip() if add_generation_prompt else ""
    continued = _content(messages[-1]) if continues_last else ""
    is_thinking = ending.endswith(OPEN) or continued.rfind(OPEN) > continued.rfind(CLOSE)
    other, *longer = _futures(messages, bool(tools), thinks=not ending.endswith(CLOSE))
    cut_at = [end for cut in cuts for end in shared(_future_behind(cut, messages))]
    kept = {end for future in longer for end in shared(future)}
    if keeps_thinking and add_generation_prompt:
        kept.add(len(tokens))
    turn = _last(control_pattern(tokenizer), text, len(text)) if add_generation_prompt else None
    header = "" if turn is None else text[turn:]
    spec = RequestSpec(
        tokens,
        namespace=namespace,
        boundaries=chat_boundaries(len(tokens), {*shared(other), *cut_at}, kept),
        answer_starts_text=not continues_last,
    )
    return ChatPrompt(spec, tuple(cut_at), is_thinking, header)


def _content(message: Message) -> str:
    return str(message.get("content") or "").strip()


def _up_to_content(text: str, message: Message) -> str:
    """Return the rendered ``text`` up to the end of the content of its last ``message``."""
    content = _content(message)
    at = text.rfind(content)
    if not content or at < 0:
        raise TemplateError("the last message has no content to continue")
    return text[: at + len(content)]


def _futures(messages: Sequence[Message], with_tools: bool, thinks: bool) -> list[list[Message]]:
    """Return possible later chats that share a beginning with this one. ``thinks``: the answer may
    contain reasoning."""
    system = list(
        itertools.takewhile(lambda message: message["role"] in ("system", "developer"), messages)
    )
    ask: Message = {"role": "user", "content": PROBE}
    answer: Message = {"role": "assistant", "content": PROBE}
    futures = [[*system, ask], [*messages, answer, ask]]
    if with_tools or messages[-1]["role"] == "tool":
        call = {"id": PROBE, "type": "function", "function": {"name": PROBE, "arguments": {}}}
        thoughts = {"reasoning_content": PROBE} if thinks else {}
        tool_turn: Message = {**answer, **thoughts, "tool_calls": [call]}
        result: Message = {"role": "tool", "tool_call_id": PROBE, "name": PROBE, "content": PROBE}
        futures.append([*messages, tool_turn, result])
    return futures


def _future_behind(cut: Cut, messages: Sequence[Message]) -> list[Message]:
    """Return a chat that equals this one up to ``cut``, and differs right after it."""
    ask: Message = {"role": "user", "content": PROBE}
    if cut.message is None:
        return [{"role": "system", "content": PROBE}, ask]
    before, last = list(messages[: cut.message]), messages[cut.message]
    if cut.content is None and last["role"] == "assistant":
        after = {"role": "tool", "content": PROBE} if last.get("tool_calls") else ask
        return [*before, last, after]
    content = last["content"] if cut.content is None else cut.content
    chat: list[Message] = [*before, {**last, "content": content + PROBE}]
    return chat if any(message["role"] == "user" for message in chat) else [*chat, ask]


def mark_control_tokens(control_tokens: Sequence[str], value: Any) -> tuple[str | None, Any]:
    """Return (mark, ``value`` with marks in its texts that prevent control tokens).

    With the marks, no text can become a control token, alone or with adjacent text. The mark is a
    character that does not occur in ``value``, or None if no mark is needed. O(size of ``value``).
    Raises TemplateError if the value is nested too deep, or has all characters that could be one.
    """
    try:
        texts, cuts = list[str](), _Cuts(control_tokens)
        _each_text(value, texts.append)
        if all(cuts.marked(text, PROBE) == text for text in texts):
            return None, value
        marks = (chr(code) for code in MARK_CODES)
        mark = next((mark for mark in marks if not any(mark in text for text in texts)), None)
        if mark is None:
            raise TemplateError("its texts have every private-use character: remove some.")
        return mark, _each_text(value, lambda text: cuts.marked(text, mark))
    except RecursionError as error:
        raise TemplateError("something in it is nested too deep.") from error


class _Cuts:
    """Places at which a text must be cut, independent of the text that a template writes around it.

    There are three cases for a control token that shares a character with the text. It is inside
    the text. Or it begins in the text, so that the text ends with a beginning of the token. Or it
    begins before the text, so that the text starts with an end of the token, or is its middle.
    """

    def __init__(self, control_tokens: Sequence[str]) -> None:
        self._tokens = tokens = [token for token in control_tokens if len(token) > 1]
        self._heads = tuple({token[:end] for token in tokens for end in range(1, len(token))})
        self._tails = tuple({token[start:] for token in tokens for start in range(1, len(token))})

    def marked(self, text: str, mark: str) -> str:
        is_middle = text != "" and any(text in token for token in self._tokens)
        before = mark if is_middle or text.startswith(self._tails) else ""
        after = mark if text.endswith(self._heads) else ""
        for token in self._tokens:
            while token in text:  # Again for tokens that overlapped.
                text = text.replace(token, token[0] + mark + token[1:])
        return before + text + after


def _each_text(value: Any, change: Callable[[str], Any]) -> Any:
    """Return a copy of ``value`` in which ``change`` was applied to every text."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            name if _is_plain(name) else change(name): _each_text(entry, change)
            for name, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [_each_text(entry, change) for entry in value]
    return value


def _is_plain(name: Any) -> bool:
    """Return True for names that templates may use, such as ``text``: they stay as they are."""
    return not isinstance(name, str) or name.isidentifier()


def common_token_prefix(
    encode: Callable[[str], Tokens],
    special_tokens: Sequence[str],
    text: str,
    tokens: Tokens,
    later: str,
) -> int:
    """Return the number of leading ``tokens`` of ``text`` that the encoding of ``later`` begins
    with.

    The texts are compared first. Then only the text after the last special token of their common
    part is encoded, because the text is split at special tokens. O(len(text)) comparisons, and
    encoding of the shorter side of the split.
    """
    shared = _common_prefix(text, later)
    split = _last(any_of(special_tokens), text, shared) or 0
    if split <= len(text) // 2:
        start = len(encode(text[:split]))
    else:
        start = len(tokens) - len(encode(text[split:]))
    return start + common_prefix_len(tokens[start:], encode(later[split:]))


def _common_prefix(first: str, second: str) -> int:
    """Return the length of the common prefix, by bisection over slices: O(n) memory comparison,
    O(log n) in Python."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _last(pattern: re.Pattern[str], text: str, end: int) -> int | None:
    """Return the start of the last match that is complete in ``text[:end]``, or None."""
    window = 1024
    while True:
        begin = max(0, end - window)
        starts = [found.start() for found in pattern.finditer(text, begin, end)]
        if starts or not begin:
            return starts[-1] if starts else None
        window *= 8


def said_by(message: Mapping[str, Any]) -> list[Any]:
    """Return text, calls and reasoning of a message in a normal form, which is equal for an answer
    and its copy from a client."""
    return [
        str(message.get("content") or "").strip(),
        [_call(call) for call in message.get("tool_calls") or ()],
        str(message.get("reasoning_content") or "").strip(),
    ]


def _call(call: Any) -> list[Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return [repr(call)]
    return [function.get("name"), _plain(function.get("arguments"))]


def _plain(arguments: Any) -> str:
    """Return arguments in a normal form, independent of the JSON formatting."""
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments or {}
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return str(arguments)


FIRST, LAST = 0x100000, 0x10FFFD
"""Private-use characters that stand for a message, and for its turn."""
_PLACES = re.compile(f"([{chr(FIRST)}-{chr(LAST)}])")


Span = tuple[int, int, SampledTurn]
"""Start and end of a turn in a rendered chat, and the tokens that replace it."""


class Splices:
    """Turns of one rendered chat that are replaced by sampled tokens."""

    def __init__(self, text: str, spans: Sequence[Span]) -> None:
        """``spans`` of ``text``, ascending."""
        self._text = text
        self._spans = spans

    def apply(self, text: str) -> str:
        """Return ``text`` with a character in place of each turn that it shares with the chat.

        ``text`` is a rendering that begins as the chat does. O(turns) comparisons.
        """
        pieces, end = [], 0
        for number, (start, until, _) in enumerate(self._spans):
            if text[end : until + 1] != self._text[end : until + 1]:
                break
            pieces += [text[end:start], chr(FIRST + number)]
            end = until
        return "".join((*pieces, text[end:]))

    def encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Return the ids of a text that ``apply`` made."""
        if not self._spans:
            return encode(text)
        token_ids: list[int] = []
        for number, piece in enumerate(_PLACES.split(text)):
            if number % 2:
                turn = self._spans[ord(piece) - FIRST][2]
                token_ids += encode(turn.header)
                token_ids += turn.token_ids
            elif piece:
                token_ids += encode(piece)
        return token_ids


NO_SPLICES = Splices("", ())


def find_splices(
    tokenizer: Tokenizer,
    render: Callable[[Sequence[Message]], str],
    messages: Sequence[Message],
    text: str,
    turns: Mapping[int, SampledTurn],
    keeps_thinking: bool,
) -> Splices:
    """Return the turns that can be replaced in ``text``, the rendering of ``messages``.

    ``turns`` are given by the index of their message. Takes one render, and O(len(text)) per turn.
    """
    if not turns or len(messages) > LAST - FIRST or _PLACES.search(text):
        return NO_SPLICES
    ends = _ends(tokenizer)
    if ends is None:
        return NO_SPLICES
    marked = list(messages)
    for index in turns:
        marked[index] = _marked(messages[index], chr(FIRST + index))
    pieces = _PLACES.split(render(marked))
    if "".join(pieces[::2]) != text:
        return NO_SPLICES
    control, spans, at, last = control_pattern(tokenizer), list[Span](), 0, 0
    for before, place in zip(pieces[::2], pieces[1::2], strict=False):
        at += len(before)
        starts = [found.start() for found in control.finditer(text, last, at)]
        end = ends.search(text, at)
        if not starts or end is None or pieces.count(place) > 1:
            continue
        start, last, turn = starts[-1], end.start(), turns[ord(place) - FIRST]
        if keeps_thinking or (
            text.startswith(turn.header, start) and turn.reasoning.strip() in text[start:last]
        ):
            spans.append((start, last, turn))
    return Splices(text, spans)


def _marked(message: Message, mark: str) -> Message:
    """Return ``message`` with a mark in its text: before the first character of its content that
    templates keep, or in the name of its first call, because templates look for empty contents."""
    content = str(message.get("content") or "")
    kept = content.lstrip()
    match message.get("tool_calls"):
        case [{"function": {"name": str(name)}} as call, *others] if not kept:
            called = {**call, "function": {**call["function"], "name": mark + name}}
            return {**message, "tool_calls": [called, *others]}
    return {**message, "content": content[: len(content) - len(kept)] + mark + kept}


def _ends(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern of the tokens that end an answer, or None if the text cannot be split at
    them."""
    walls = set(tokenizer.special_tokens) & set(tokenizer.control_tokens)
    texts = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.eos_token_ids]
    known = [text for text in texts if text in walls]
    return any_of(known) if known else None


def control_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return a pattern of the tokens that begin and end turns."""
    walls = set(tokenizer.special_tokens)
    return any_of(text for text in tokenizer.control_tokens if text in walls)
