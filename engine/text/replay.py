"""Replay of sampled answers: the tokens that were sampled for an answer replace it when a client
sends it back, so that the prompt equals the cached one.

When a client sends an answer back, the template writes it again and the tokenizer encodes it again.
Its JSON may be spaced differently and its words split differently, so the prompt would differ from
the cached one where the answer begins. If the sampled tokens are known, they are used instead, and
all text around them stays as the template writes it. A turn is replaced only if

- the template writes the message exactly once, in a separate turn (from the last control token
  before it to the next end token);
- the rest of the chat does not depend on the message;
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
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.text.bounded_memory import BoundedMemory
from engine.text.outputs import RequestOutput
from engine.text.tokenizer import AS_TEXT, Message, Tokenizer, any_of

KEEPS_THINKING = "preserve_thinking"
"""Template variable of newer templates; emulated for templates that do not support it."""
ENTRY_BYTES = 512
"""Approximate size of an answer without its ids and its reasoning."""
MAX_ALIKE = 8
"""Maximum number of answers with the same text and calls. They are distinguished by their place and
their reasoning."""


@dataclass(frozen=True, slots=True)
class SampledTurn:
    """Tokens sampled for one assistant message."""

    header: str
    """End of the prompt, from its last control token on."""
    token_ids: Sequence[int]
    """Sampled tokens without the end token."""
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class _Entry:
    place: int
    turn: SampledTurn
    chat: bytes | None

    @property
    def num_bytes(self) -> int:
        return ENTRY_BYTES + 4 * len(self.turn.token_ids) + sys.getsizeof(self.turn.reasoning)


class AnswerMemory:
    """Sampled answers in ``limit_bytes``, by tenant and digest of the message. Thread-safe, except
    that one thread calls ``put``."""

    def __init__(self, limit_bytes: int) -> None:
        self._known = BoundedMemory[tuple[Hashable, bytes], tuple[_Entry, ...]](limit_bytes)

    def put(
        self,
        tenant: Hashable,
        place: int,
        message: Mapping[str, Any],
        turn: SampledTurn,
        chat: bytes | None = None,
    ) -> None:
        """Store an answer to a chat of ``place`` messages, which was sent as ``message``. O(its
        size).

        ``chat`` is the digest of that chat if the reasoning is only for clients that send the whole
        chat.
        """
        turn = SampledTurn(turn.header, array("i", turn.token_ids), turn.reasoning)
        key, entry = (tenant, _digest(message)), _Entry(place, turn, chat)
        alike = (*(self._known.get(key) or ()), entry)[-MAX_ALIKE:]
        while len(alike) > 1 and _num_bytes(alike) > self._known.limit_bytes:
            alike = alike[1:]
        self._known.put(key, alike, _num_bytes(alike))

    def find(
        self,
        tenant: Hashable,
        place: int,
        message: Mapping[str, Any],
        keeps_thinking: bool,
        chat: bytes | None = None,
    ) -> SampledTurn | None:
        """Return the turn sampled for ``message``, which has the index ``place``, or None. O(its
        size).

        Its reasoning must be equal, or with ``keeps_thinking`` be missing in the same ``chat``. Of
        several turns, the one at the same place is returned, else the latest.
        """
        if message.get("role") != "assistant":
            return None
        alike = self._known.get((tenant, _digest(message))) or ()
        given = str(message.get("reasoning_content") or "").strip()
        fits = [
            entry
            for entry in alike
            if entry.turn.reasoning.strip() == given
            or (keeps_thinking and not given and entry.chat == chat)
        ]
        best = max(
            enumerate(fits), key=lambda pair: (pair[1].place == place, pair[0]), default=None
        )
        return None if best is None else best[1].turn

    def check(self) -> None:
        """Raise AssertionError if the recorded size is wrong. O(answers)."""
        self._known.check()


def _num_bytes(entries: Sequence[_Entry]) -> int:
    return sum(entry.num_bytes for entry in entries)


def _digest(message: Mapping[str, Any]) -> bytes:
    """Return the digest of text and calls, without reasoning."""
    return hashlib.blake2b(json.dumps(said_by(message)[:2]).encode(), digest_size=16).digest()


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


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a chat."""

    tenant: Hashable
    index: int
    """Number of messages before it."""
    chat: bytes | None
    """Digest of the chat before it. None if a secret identifies the tenant: its answers may then be
    replaced with their reasoning at any place."""


@dataclass(frozen=True, slots=True)
class RestoredChat:
    """Inputs for rendering a chat whose earlier answers are replayed."""

    messages: list[dict[str, Any]]
    variables: Mapping[str, Any] | None
    sampled: Mapping[int, SampledTurn]
    """Tokens that were sampled for earlier answers, by index of the message."""
    keeps_thinking: bool
    place: Place
    """Place of the answer in the chat."""


class Replay:
    """Sampled answers of one server. Replayed prompts keep the beginning of earlier ones: sampled
    tokens replace answers that come back."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        limit_bytes: int,
        *,
        keeps_thinking: bool = False,
    ) -> None:
        """``keeps_thinking``: the default of requests without the switch ``KEEPS_THINKING``."""
        self.answers = AnswerMemory(limit_bytes)
        self._keeps_thinking = keeps_thinking
        self._end_ids = tokenizer.eos_token_ids
        self._control_ids = frozenset(
            i for text in tokenizer.control_tokens for i in tokenizer.encode(text, AS_TEXT)[:1]
        )

    def restore(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        tenant: Hashable,
        *,
        is_known: bool,
    ) -> RestoredChat:
        """Return the chat with the turns that were sampled for its answers. O(its size).

        With ``KEEPS_THINKING``, messages get the reasoning that their client dropped. ``is_known``:
        a secret identifies the ``tenant``.
        """
        keeps = (variables or {}).get(KEEPS_THINKING, self._keeps_thinking) is True
        if keeps:
            variables = {**(variables or {}), KEEPS_THINKING: True}
        chat = list(messages)
        sampled: dict[int, SampledTurn] = {}
        seen = None if is_known else hashlib.blake2b(digest_size=16)
        _see(seen, tools)
        for index, message in enumerate(chat):
            before = None if seen is None else seen.digest()
            _see(seen, [message.get("role"), *said_by(message)[:2]])
            turn = self.answers.find(tenant, index, message, keeps, before)
            if turn is not None:
                sampled[index] = turn
                if turn.reasoning and not message.get("reasoning_content"):
                    chat[index] = {**message, "reasoning_content": turn.reasoning}
        place = Place(tenant, len(chat), None if seen is None else seen.digest())
        return RestoredChat(chat, variables, sampled, keeps, place)

    def keep(
        self, header: str, place: Place, message: Mapping[str, Any], output: RequestOutput
    ) -> None:
        """Store the tokens of an answer, sent as ``message``, that a client can send back
        completely: one ended by the model or by its length limit. O(its size).

        ``header``: end of its prompt; see ``ChatPrompt``.
        """
        token_ids = output.output.tolist()
        if output.finish_reason == "stop" and token_ids[-1] in self._end_ids:
            token_ids.pop()
        elif output.finish_reason != "length":
            return
        if not header or not self._control_ids.isdisjoint(token_ids):
            return
        turn = SampledTurn(header, token_ids, message["reasoning_content"])
        self.answers.put(place.tenant, place.index, message, turn, place.chat)


def _see(seen: Any, value: Any) -> None:
    """Add ``value`` to a running digest, if there is one."""
    if seen is not None:
        seen.update(json.dumps(value, default=repr).encode())


FIRST, LAST = 0x100000, 0x10FFFD
"""Private-use characters that stand for a message, and for its turn."""
_PLACES = re.compile(f"([{chr(FIRST)}-{chr(LAST)}])")


Encode = Callable[[str], list[int]]
Render = Callable[[Sequence[Message]], str]


@dataclass(frozen=True, slots=True)
class Span:
    """A turn in a rendered chat, and the tokens that replace it."""

    start: int
    end: int
    turn: SampledTurn


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
        for number, span in enumerate(self._spans):
            if text[end : span.end + 1] != self._text[end : span.end + 1]:
                break
            pieces += [text[end : span.start], chr(FIRST + number)]
            end = span.end
        return "".join((*pieces, text[end:]))

    def encode(self, text: str, encode: Encode) -> list[int]:
        """Return the ids of a text that ``apply`` made."""
        if not self._spans:
            return encode(text)
        token_ids: list[int] = []
        for number, piece in enumerate(_PLACES.split(text)):
            if number % 2:
                turn = self._spans[ord(piece) - FIRST].turn
                token_ids += encode(turn.header)
                token_ids += turn.token_ids
            elif piece:
                token_ids += encode(piece)
        return token_ids


NO_SPLICES = Splices("", ())


def find_splices(
    tokenizer: Tokenizer,
    render: Render,
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
        marked[index] = {
            **messages[index],
            "content": chr(FIRST + index) + _content(messages[index]),
        }
    regions = _regions(render(marked), control_pattern(tokenizer), ends)
    spans = [
        Span(start, end, turns[index])
        for index, start, end in _aligned(text, regions, ends)
        if keeps_thinking or _is_kept(text[start:end], turns[index])
    ]
    return Splices(text, spans)


def _is_kept(written: str, turn: SampledTurn) -> bool:
    """Return True if the template writes the turn as it was sampled: after its header, and with its
    reasoning."""
    return written.startswith(turn.header) and turn.reasoning.strip() in written


def _content(message: Message) -> str:
    """Return the text of a message without leading blanks, which templates strip at the start of a
    turn."""
    return str(message.get("content") or "").lstrip()


class _Region(NamedTuple):
    """One marked turn."""

    message: int | None
    """Index of the message, or None for the end of the chat."""
    before: str
    """Text between the previous turn and this one."""


def _regions(text: str, control: re.Pattern[str], ends: re.Pattern[str]) -> list[_Region]:
    """Return the turns with a mark that occurs once in ``text``, each in a separate turn."""
    regions, last = [], 0
    counts = Counter(_PLACES.findall(text))
    for place in _PLACES.finditer(text):
        starts = [found.start() for found in control.finditer(text, last, place.start())]
        end = ends.search(text, place.end())
        if starts and end is not None and counts[place.group()] == 1:
            before = _PLACES.sub("", text[last : starts[-1]])
            regions.append(_Region(ord(place.group()) - FIRST, before))
            last = end.start()
    return [*regions, _Region(None, _PLACES.sub("", text[last:]))]


def _aligned(
    text: str, regions: Sequence[_Region], ends: re.Pattern[str]
) -> list[tuple[int, int, int]]:
    """Return (message, start, end) of each turn in ``text``, or [] if the text around the turns
    differs."""
    spans: list[tuple[int, int, int]] = []
    at = 0
    for index, before in regions:
        start = at + len(before)
        end = ends.search(text, start + 1)
        if text[at:start] != before or (index is not None and end is None):
            return []
        if index is None:
            return spans if start == len(text) else []
        assert end is not None
        spans.append((index, start, end.start()))
        at = end.start()
    return []


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
