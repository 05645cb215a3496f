"""Conversion of chats to prompts: the text of the template, the tokens that were sampled for
earlier answers, and the positions at which the next prompt will differ.

A template drops the end of the generation header and the reasoning of earlier turns, so the next
prompt of a chat differs before the end of this one, and a checkpoint at the exact end would never
be used again. So the history is rendered as in the next turn, and the common prefix is taken.

When a client sends an answer back, its JSON may be spaced and its words split differently, so the
prompt would differ from the cached one where the answer begins. If the sampled tokens are known,
they are used instead (``Replay``). A turn is replaced only if

- the chat before it, its text and its calls are the same as when it was sampled;
- the template writes the message exactly once, in a separate turn (from the last control token
  before it to the next end token), and nothing else depends on a character added to it;
- the turn begins with the end of the prompt that it was sampled for (``header``), and contains its
  reasoning if there was any. Templates that drop either from history are followed, unless
  ``keeps_thinking`` is set.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from array import array
from bisect import bisect, bisect_left
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from engine.errors import JsonObject
from engine.requests.request import Marks
from engine.text.answers import RequestOutput
from engine.text.bounded import BoundedMemory, read_json
from engine.text.sandbox import TemplateError
from engine.text.tokenizer import CLOSE, OPEN, PROBE, Message, Tokenizer, any_of, as_tokens
from hybridcache.radix.protocol import chat_boundaries
from hybridcache.radix.tokens import Tokens, common_prefix_len

MARK = "\ufdd0"
"""Character inside a control token that is text. No character has this code, so no text has it."""
KEEPS_THINKING = "preserve_thinking"
"""Template variable of newer templates; emulated for templates that do not support it."""
FIRST, LAST = 0x100000, 0x10FFFD
"""Private-use characters that stand for a message, and for its turn."""
END = f"{chr(LAST)} "
"""Mark behind the content that an answer continues, with white space."""
ASK: JsonObject = {"role": "user", "content": PROBE}
CALL: JsonObject = {"id": PROBE, "type": "function", "function": {"name": PROBE, "arguments": {}}}
CALLING: JsonObject = {"role": "assistant", "content": PROBE, "tool_calls": [CALL]}
"""Messages of chats that a template is tried with: a question, and an answer with a call."""
_PLACES = re.compile(f"([{chr(FIRST)}-{chr(LAST)}])")
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
    them. Thread-safe."""

    def __init__(
        self, tokenizer: Tokenizer, limit_bytes: int, *, keeps_thinking: bool = False
    ) -> None:
        """``keeps_thinking``: the default of requests without the switch ``KEEPS_THINKING``."""
        self._tokenizer, self._keeps_thinking = tokenizer, keeps_thinking
        self._known = BoundedMemory[Place, SampledTurn](limit_bytes)

    def render(
        self, chat: Conversation, tenant: Hashable, namespace: Hashable = None
    ) -> ChatPrompt:
        """Render a chat with the turns that were sampled for its answers. With ``KEEPS_THINKING``,
        messages get the reasoning that their client dropped."""
        variables, messages = chat.variables or {}, [*chat.messages]
        keeps = variables.get(KEEPS_THINKING, self._keeps_thinking) is True
        sampled: dict[int, SampledTurn] = {}
        place = tenant, json.dumps(chat.tools, default=repr).encode()
        for index, message in enumerate(chat.messages):
            place, reasoning = _place_behind(place, message)
            turn = self._known.get(place) if message.get("role") == "assistant" else None
            if turn is None or reasoning not in (turn.reasoning.strip(), "" if keeps else None):
                continue
            sampled[index] = turn
            if turn.reasoning and not reasoning:
                messages[index] = {**message, "reasoning_content": turn.reasoning}
        variables = {**variables, KEEPS_THINKING: True} if keeps else variables
        chat = replace(chat, messages=messages, variables=variables)
        rendering = Rendering(self._tokenizer, chat, sampled, keeps, namespace)
        return replace(rendering.prompt(), place=place)

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
        ids, reasoning = array("i", token_ids), str(message["reasoning_content"])
        num_bytes = ENTRY_BYTES + 4 * len(ids) + sum(map(sys.getsizeof, (prompt.header, reasoning)))
        turn = SampledTurn(prompt.header, ids, reasoning)
        self._known.put(_place_behind(place, message)[0], turn, num_bytes)


Place = tuple[Hashable, bytes]
"""Tenant, and digest of a chat up to a message, without reasoning; before the first one, tools."""


def _place_behind(place: Place, message: Message) -> tuple[Place, str]:
    """Return (place behind ``message``, its reasoning). O(its size)."""
    (tenant, before), (*said, reasoning) = place, said_by(message)
    text = json.dumps([message.get("role"), *said], default=repr).encode()
    return (tenant, hashlib.blake2b(before + text, digest_size=16).digest()), reasoning


class PromptCut(NamedTuple):
    """A place in a chat up to which the client declares that later chats will be equal."""

    message: int | None
    """Index of the message that contains or ends at the cut, or None for the end of the tools."""
    content: str | None = None
    """Shared beginning of its content, or None if all of it is shared."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat as the input of its template, whatever the dialect of its request."""

    messages: Sequence[JsonObject]
    tools: Sequence[Mapping[str, object]] | None = None
    variables: Mapping[str, object] | None = None
    """Switches of the template."""
    cuts: Sequence[PromptCut] = ()
    add_generation_prompt: bool = True
    """True if the prompt ends with the beginning of an answer."""
    continues_last: bool = False
    """True if the prompt ends with the content of the last message."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as the input of the model."""

    tokens: Tokens
    """int32[n]."""
    marks: Marks
    """Other fields of the ``RequestSpec`` of its answer: as boundaries the end of the system
    segment, and the positions where the next turn, and in a tool loop the prompt with the tool's
    result, differ; whether the prompt ends inside reasoning; and whether the answer is a separate
    text, so that it does not continue the last message."""
    cuts: tuple[int, ...] = ()
    """Positions of the requested cuts, without those at which the template rejects the chat."""
    header: str = ""
    """End of the prompt from its last control token on, with which the answer's turn begins."""
    place: Place | None = None
    """Place of the chat's end, if its answer is to be replayed."""


NO_CHAT = "This model has no chat template, so it cannot chat: use /v1/completions."


class Span(NamedTuple):
    """Turn in a rendered chat that is replaced by sampled tokens."""

    start: int
    end: int
    """Start of the token that ends the turn."""
    close: int
    """End of that token."""
    turn: SampledTurn


class Rendering:
    """Text of a chat, and the places in it that decide on its tokens.

    Control tokens inside the chat's texts (contents, names, arguments, tools) are encoded as text,
    so that a client cannot forge turns.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: Conversation,
        sampled: Mapping[int, SampledTurn] | None = None,
        keeps_thinking: bool = False,
        namespace: Hashable = None,
    ) -> None:
        """Render and encode ``chat``. ``sampled`` has the sampled turns by the index of their
        message; with ``keeps_thinking`` they are also used where the template drops reasoning from
        history. Raises TemplateError if the model has no chat template, or if it rejects the chat.
        """
        if (template := tokenizer.chat_template) is None:
            raise TemplateError(NO_CHAT)
        self._tokenizer, self._chat, self._keeps_thinking = tokenizer, chat, keeps_thinking
        given = chat.messages, chat.tools, chat.variables, chat.cuts
        marked = mark_control_tokens(controls_of(tokenizer.control_tokens), given)
        self._messages, self._tools, variables, self._cuts = marked
        self._render = partial(
            template.render,
            tools=self._tools,
            add_generation_prompt=chat.add_generation_prompt,
            variables=variables,
        )
        self._encode = partial(
            tokenizer.encode, add_special_tokens=False, mark=MARK, namespace=namespace
        )
        self.text = self._render(self._messages)
        self.walls = [*any_of(tokenizer.special_tokens).finditer(self.text)]
        """Special tokens. The texts on either side are encoded independently."""
        control_tokens = {*tokenizer.control_tokens}
        self._controls = [wall for wall in self.walls if wall[0] in control_tokens]
        turns = dict(sampled or {})
        if chat.continues_last:
            turns.pop(len(self._messages) - 1, None)
        self.spans = [*self._find_spans(turns)] if turns else []
        """Turns that are replaced by sampled tokens, in order."""
        self._ending = self.text[-64:].rstrip() if chat.add_generation_prompt else ""
        if chat.continues_last:
            self.text = self._open_end()
        self.tokens = self.encode(self.text)
        """int32[n]."""

    def _open_end(self) -> str:
        """Return the text up to the end of the content of the last message. Takes one render."""
        *others, last = self._messages
        marked = {**last, "content": f"{last.get('content') or ''}{END}"}
        before, mark, behind = self._render([*others, marked]).rpartition(END[0])
        if not mark:
            raise TemplateError("the template leaves out the content of the last message")
        # The template removes white space at the end of contents if it does so behind the mark.
        return before if behind.startswith(END[1]) else before.rstrip()

    def prompt(self) -> ChatPrompt:
        """Return the prompt with the positions at which later chats differ. Takes at most three
        renders plus one for each cut, and a few encodings of ends of the chat."""
        chat, messages, length = self._chat, self._messages, len(self.tokens)
        continued = str(messages[-1].get("content")) if chat.continues_last else ""
        thinks = self._ending.endswith(OPEN) or continued.rfind(OPEN) > continued.rfind(CLOSE)
        may_think = not self._ending.endswith(CLOSE)
        other, *longer = _futures(messages, bool(self._tools), may_think)
        futures = [_future_behind(messages, *cut) for cut in self._cuts]
        cuts = [end for future in futures for end in self.shared(future)]
        kept = {end for future in longer for end in self.shared(future)}
        header = ""
        if chat.add_generation_prompt:
            if self._keeps_thinking:
                kept.add(length)
            header = self.text[self._controls[-1].start() :] if self._controls else ""
        marks: Marks = {
            "boundaries": chat_boundaries(length, {*self.shared(other), *cuts}, kept),
            "is_thinking": thinks,
            "answer_starts_text": not chat.continues_last,
        }
        return ChatPrompt(self.tokens, marks, tuple(cuts), header)

    def encode(self, text: str, start: int = 0, known_len: int | None = None) -> Tokens:
        """Return the tokens of ``text[start:]``, with sampled tokens in place of the turns that end
        in its first ``known_len`` characters, which are those of this chat."""
        ids = list[int]()
        for span in self.spans:
            if start <= span.start and span.end <= (len(text) if known_len is None else known_len):
                ids += self._encode(text[start : span.start]) + self._encode(span.turn.header)
                ids += span.turn.token_ids
                start = span.end
        return as_tokens(ids + self._encode(text[start:]))

    def shared(self, future: Sequence[Message]) -> list[int]:
        """Return the number of tokens that a later chat shares with this one, or [] if the template
        rejects it. Only the text after the last special token of their common part is encoded."""
        try:
            later = self._render(future)
        except TemplateError:
            return []
        ours, theirs = (
            np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.int32)
            for text in (self.text, later)
        )
        same = common_prefix_len(ours, theirs)
        known_len = min([same, *(span.start for span in self.spans if span.close > same)])
        number = bisect(self.walls, known_len, key=re.Match.end)
        split = self.walls[number - 1].start() if number else 0
        if split <= len(self.text) // 2:
            num_before = len(self.encode(self.text[:split]))
        else:
            num_before = len(self.tokens) - len(self.encode(self.text, split))
        end = self.encode(later, split, known_len)
        return [num_before + common_prefix_len(self.tokens[num_before:], end)]

    def _find_spans(self, turns: Mapping[int, SampledTurn]) -> Iterator[Span]:
        """Yield the turns that can be replaced, in order. ``turns`` are given by the index of their
        message. Takes one render."""
        text, controls = self.text, self._controls
        if _PLACES.search(text):
            return
        marked = [*self._messages]
        for index in turns:
            marked[index] = _marked(marked[index], chr(FIRST + index))
        pieces = _PLACES.split(self._render(marked))
        if "".join(pieces[::2]) != text:
            return
        end_ids = self._tokenizer.eos_token_ids
        ends = {self._tokenizer.token_bytes(i).decode("utf-8", "replace") for i in end_ids}
        at = last = 0
        for before, place in zip(pieces[::2], pieces[1::2], strict=False):
            at += len(before)
            number = bisect_left(controls, at, key=re.Match.start)
            later = (controls[index] for index in range(number, len(controls)))
            close = next((one for one in later if one[0] in ends), None)
            if not number or controls[number - 1].start() < last or close is None:
                continue
            start, last = controls[number - 1].start(), close.start()
            turn = turns[ord(place) - FIRST]
            is_whole = text.startswith(turn.header, start)
            is_whole = is_whole and turn.reasoning.strip() in text[start:last]
            if pieces.count(place) == 1 and (self._keeps_thinking or is_whole):
                yield Span(start, last, close.end(), turn)


def _futures(messages: Sequence[Message], with_tools: bool, thinks: bool) -> list[list[Message]]:
    """Return possible later chats that share a beginning with this one. ``thinks``: the answer may
    contain reasoning."""
    num_system = 0
    while num_system < len(messages) and messages[num_system]["role"] in ("system", "developer"):
        num_system += 1
    answer: Message = {"role": "assistant", "content": PROBE}
    futures = [[*messages[:num_system], ASK], [*messages, answer, ASK]]
    if with_tools or messages[-1]["role"] == "tool":
        calling = CALLING | ({"reasoning_content": PROBE} if thinks else {})
        result: Message = {"role": "tool", "tool_call_id": PROBE, "name": PROBE, "content": PROBE}
        futures.append([*messages, calling, result])
    return futures


def _future_behind(
    messages: Sequence[Message], index: int | None, content: str | None
) -> list[Message]:
    """Return a chat that equals this one up to a ``PromptCut``, and differs right after it."""
    if index is None:
        return [{"role": "system", "content": PROBE}, ASK]
    before, last = list(messages[:index]), messages[index]
    if content is None and last["role"] == "assistant":
        after = {"role": "tool", "content": PROBE} if last.get("tool_calls") else ASK
        return [*before, last, after]
    shared = last["content"] if content is None else content
    assert isinstance(shared, str), "a cut is at the end of a text"
    chat: list[Message] = [*before, {**last, "content": shared + PROBE}]
    return chat if any(message["role"] == "user" for message in chat) else [*chat, ASK]


class ControlTokens(NamedTuple):
    """Texts of control tokens, and their parts by the character at which a text would be cut."""

    tokens: tuple[str, ...]
    pattern: re.Pattern[str]
    """Pattern of a whole one."""
    heads: Mapping[str, tuple[str, ...]]
    """Beginnings by their last character."""
    tails: Mapping[str, tuple[str, ...]]
    """Ends by their first character."""


@lru_cache(maxsize=64)
def controls_of(tokens: tuple[str, ...]) -> ControlTokens:
    """Return ``tokens`` with their beginnings and ends, without the whole tokens."""
    cuts = [(one[:at], one[at:]) for one in tokens for at in range(1, len(one))]
    letters = {*"".join(tokens)}
    heads = {last: tuple({head for head, _ in cuts if head[-1] == last}) for last in letters}
    tails = {first: tuple({tail for _, tail in cuts if tail[0] == first}) for first in letters}
    return ControlTokens(tokens, any_of(tokens), heads, tails)


def mark_control_tokens(controls: ControlTokens, value: Any) -> Any:
    """Return ``value`` with ``MARK`` in its texts, so that none can become a control token, alone
    or with adjacent text. O(size of ``value``).

    A control token is inside a text, or the text ends with a beginning of the token, or it starts
    with an end of it.
    """
    if isinstance(value, str):
        marked = value
        before = MARK * value.startswith(controls.tails.get(value[:1], ()))
        after = MARK * value.endswith(controls.heads.get(value[-1:], ()))
        for token in controls.tokens if controls.pattern.search(value) else ():
            while token in marked:  # Again for tokens that overlapped.
                marked = marked.replace(token, token[0] + MARK + token[1:])
        return before + marked + after
    mark = partial(mark_control_tokens, controls)
    if isinstance(value, list | tuple):
        return [*map(mark, value)]
    if isinstance(value, Mapping):
        # Names that templates may use, such as ``text``, stay as they are.
        names = (name if str(name).isidentifier() else mark(name) for name in value)
        return dict(zip(names, map(mark, value.values()), strict=True))
    return value


def said_by(message: Mapping[str, object]) -> tuple[str, list[list[object]], str]:
    """Return text, calls and reasoning of a message in a normal form, which is equal for an answer
    and its copy from a client."""
    calls: list[list[object]] = []
    told = message.get("tool_calls")
    for call in told if isinstance(told, Sequence) else ():
        named = call.get("function")
        function = named if isinstance(named, Mapping) else call
        calls.append([function.get("name"), _plain(function.get("arguments"))])
    reasoning = str(message.get("reasoning_content") or "").strip()
    return str(message.get("content") or "").strip(), calls, reasoning


def _plain(arguments: object) -> str:
    """Return arguments in a normal form, independent of the JSON formatting."""
    with suppress(ValueError):
        arguments = read_json(arguments or "{}") if isinstance(arguments, str) else arguments or {}
    return json.dumps(arguments, sort_keys=True)


def _marked(message: Message, mark: str) -> Message:
    """Return ``message`` with a mark in its text: before the first character of its content that
    templates keep, or in the name of its first call, because templates look for empty contents."""
    content = str(message.get("content") or "")
    kept = content.lstrip()
    match message.get("tool_calls"):
        case [dict({"function": dict({"name": str(name)}) as of}) as call, *others] if not kept:
            called = {**call, "function": {**of, "name": mark + name}}
            return {**message, "tool_calls": [called, *others]}
    return {**message, "content": content[: len(content) - len(kept)] + mark + kept}
