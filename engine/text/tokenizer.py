"""Tokenizers: their chat templates and interface, that of models without one, and decoders of
streams.

``decode`` and the pieces of a ``StreamDecoder`` give the same text, and no piece ends inside a
UTF-8 sequence.
"""

from __future__ import annotations

import codecs
import datetime
import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np

from engine.text.json_text import REPLACEMENT
from hybridcache.tokens import Tokens

Message = Mapping[str, Any]
PROBE = "\ue000"
"""Stands for text that is not known yet. It is a private-use character: no template and no merge of
a tokenizer begins with it."""


class TemplateError(ValueError):
    """The template rejects this chat; the message is the template's."""


class ChatTemplate:
    """A Hugging Face chat template: sandboxed Jinja with the filters and globals that such
    templates use.

    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "hi"}])
    '<user>hi'
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        try:
            self._template = _compiled(source)
        except jinja2.TemplateSyntaxError as error:
            said = str(error).rstrip(".")
            raise TemplateError(f"The chat template does not parse: {said}.") from error

    @cached_property
    def takes_late_system(self) -> bool:
        """True if a system message may follow others. Takes one render, the first time."""
        chat: list[Message] = [
            {"role": "system", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
            {"role": "system", "content": PROBE},
            {"role": "user", "content": "d"},
        ]
        try:
            return PROBE in self.render(chat)
        except TemplateError:
            return False

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the chat as text.

        ``variables`` are switches of the template such as ``enable_thinking``. Raises TemplateError
        for any exception in the template.
        """
        try:
            return self._template.render(
                self.special_tokens
                | dict(variables or {})
                | {
                    "messages": messages,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except TemplateError:
            raise
        except Exception as error:  # A template is a program, and clients choose its inputs.
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise TemplateError(f"{kind}{error}") from error


class _GenerationTag(jinja2.ext.Extension):
    """Tag ``{% generation %}``, which marks text for training. Serving renders its contents."""

    tags = {"generation"}  # noqa: RUF012 the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """Compile a template (25 ms), once for all engines of a process that use it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
    """Write JSON without HTML escapes, unlike Jinja's own filter, with the options of
    ``transformers``."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of the ``texts``, the longest first; it matches nothing if there are
    none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def as_tokens(token_ids: Sequence[int]) -> Tokens:
    """Return ``token_ids`` as int32[n]. Raises ValueError if one does not fit. O(n)."""
    try:
        return np.asarray(token_ids, np.int32)
    except OverflowError:
        raise ValueError("prompt must contain token ids below 2**31.") from None


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """Options of ``Tokenizer.encode``."""

    add_special_tokens: bool = True
    """Also return the tokens that the model expects around a text, such as a BOS."""
    mark: str | None = None
    """Character that is not part of the text; it separates the text on either side."""
    namespace: Hashable = None
    """Namespace of cached pieces. The time of encoding does not reveal pieces of other
    namespaces."""


AS_PROMPT = EncodeOptions()
AS_TEXT = EncodeOptions(add_special_tokens=False)


class Tokenizer(Protocol):
    """Interface of tokenizers."""

    vocab_size: int
    """Highest id plus one. The model's own table may be longer."""
    eos_token_ids: frozenset[int]
    """Ids that end an answer."""
    special_tokens: tuple[str, ...]
    """Strings that always become one token and split the text around them. The text on either side
    can be encoded independently."""
    control_tokens: tuple[str, ...]
    """Special tokens that never occur in a text, such as those at the beginning and end of a turn.
    (``<think>`` is a token, but part of the text.)"""
    chat_template: ChatTemplate | None

    def encode(self, text: str, how: EncodeOptions = AS_PROMPT) -> list[int]:
        """Return the ids of ``text``. O(len(text))."""
        ...

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``token_ids``. Ids without text (padding of the vocabulary) give none,
        invalid bytes give U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, special tokens included."""
        ...

    def stream_decoder(
        self, skip_special_tokens: bool = True, before: Sequence[int] = ()
    ) -> StreamDecoder:
        """Return a decoder of the tokens that follow ``before``. It does not return their text."""
        ...

    def as_json(self) -> str | None:
        """Return the contents of a ``tokenizer.json``, or None if there is none."""
        ...


class StreamDecoder(Protocol):
    """Converts the tokens of one request to text, which is returned only when later tokens cannot
    change it."""

    def push(self, token_id: int) -> str:
        """Return the text that is certain with this token. Bytes of an unfinished character wait
        for the next token."""
        ...

    def flush(self) -> str:
        """Return the bytes held back as replacement characters, after the last token."""
        ...


class ByteStreamDecoder:
    """Decoder for vocabularies of byte strings: an incremental UTF-8 decoder. O(1) per token."""

    def __init__(self, token_bytes: Callable[[int], bytes], hidden: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._hidden = hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._hidden else self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


MAX_CONTEXT = 8
"""Tokens before an answer that its first text depends on: a space and its neighbours."""


class WindowStreamDecoder:
    """Decoder for other vocabularies, in which a token's text depends on its neighbours. Decodes a
    short window twice.

    The window starts one emission back, so that the boundary is decoded with its context. A
    character has at most four bytes: at the fourth token in a row that ends in a replacement
    character, it is final and no longer held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = [*before[-MAX_CONTEXT:]]
        self._num_emitted = len(self._window)
        self._emitted_text = decode(self._window)
        self._num_waiting = 0

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        new = text[len(self._emitted_text) :]
        self._num_waiting = self._num_waiting % 4 + 1 if new.endswith(REPLACEMENT) else 0
        return self._emit(text) if new and self._num_waiting in (0, 4) else ""

    def _emit(self, text: str) -> str:
        new = text[len(self._emitted_text) :]
        self._window = self._window[self._num_emitted :]
        self._num_emitted = len(self._window)
        self._emitted_text = self._decode(self._window)
        return new

    def flush(self) -> str:
        text = self._decode(self._window)
        return self._emit(text) if len(text) > len(self._emitted_text) else ""


class IdTokenizer:
    """Tokenizer for models without one: writes each id in decimal, after a space.

    >>> tokenizer = IdTokenizer(320, frozenset({2}))
    >>> tokenizer.encode("17 4"), tokenizer.decode([17, 4])
    ([17, 4], ' 17 4')
    """

    special_tokens: tuple[str, ...] = ()
    control_tokens: tuple[str, ...] = ()
    chat_template: ChatTemplate | None = None

    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids

    def encode(self, text: str, how: EncodeOptions = AS_PROMPT) -> list[int]:
        """Return the ids in ``text``. Raises ValueError if the text is not a list of numbers."""
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise ValueError(
                "prompt must be token ids, or a text of numbers, because this model has no "
                "tokenizer."
            ) from None

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id]).encode()

    def stream_decoder(
        self, skip_special_tokens: bool = True, before: Sequence[int] = ()
    ) -> StreamDecoder:
        return ByteStreamDecoder(self.token_bytes, frozenset())

    def as_json(self) -> None:
        return None
