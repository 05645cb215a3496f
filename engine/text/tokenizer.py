"""Tokenizers: their chat templates, that of a Hugging Face directory, that of models without one,
and decoders of streams.

``decode`` and the pieces of a ``StreamDecoder`` give the same text, and no piece ends inside a
UTF-8 sequence.
"""

from __future__ import annotations

import codecs
import datetime
import json
import re
import sys
from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np

from engine.config import BUILTIN_DIR
from engine.text.bounded_memory import BoundedMemory
from engine.text.json_text import REPLACEMENT
from hybridcache.tokens import Tokens

if TYPE_CHECKING:
    import tokenizers

Message = Mapping[str, Any]
PROBE = "\ue000"
"""Stands for text that is not known yet. It is a private-use character: no template and no merge of
a tokenizer begins with it."""


OPEN, CLOSE = "<think>", "</think>"
"""Marks around the reasoning before an answer; the first may be in the prompt."""
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
"""Marks around a tool call in the text of an answer."""
MARKS = (OPEN, CLOSE, CALL_OPEN, CALL_CLOSE)
"""Marks of the parts of an answer. They are part of the text, even if the vocabulary lists them as
tokens that are not shown."""


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


PIECE = 1 << 16
"""Number of tokens that are converted at once."""


def as_tokens(token_ids: Sequence[int]) -> Tokens:
    """Return ``token_ids`` as int32[n]. Raises ValueError if one does not fit. O(n), in pieces
    between which other threads can run."""
    try:
        firsts = range(0, max(1, len(token_ids)), PIECE)
        return np.concatenate(
            [np.asarray(token_ids[first : first + PIECE], np.int32) for first in firsts]
        )
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


class ByteStreamDecoder:
    """Converts the tokens of one request to text, which is returned only when later tokens cannot
    change it. For vocabularies of byte strings: an incremental UTF-8 decoder. O(1) per token."""

    def __init__(self, token_bytes: Callable[[int], bytes], hidden: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._hidden = hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the text that is certain with this token. Bytes of an unfinished character wait
        for the next token."""
        return "" if token_id in self._hidden else self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """Return the bytes held back as replacement characters, after the last token."""
        return self._utf8.decode(b"", final=True)


MAX_CONTEXT = 8
"""Tokens before an answer that its first text depends on: a space and its neighbours."""


class WindowStreamDecoder:
    """Decoder for other vocabularies, in which a token's text depends on its neighbours; see
    ``ByteStreamDecoder``. Decodes a short window twice.

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


StreamDecoder = ByteStreamDecoder | WindowStreamDecoder


class IdTokenizer:
    """Tokenizer for models without one: writes each id in decimal, after a space.

    >>> tokenizer = IdTokenizer(320, frozenset({2}))
    >>> tokenizer.encode("17 4"), tokenizer.decode([17, 4])
    ([17, 4], ' 17 4')
    """

    special_tokens: tuple[str, ...] = ()
    control_tokens: tuple[str, ...] = ()
    control_ids: frozenset[int] = frozenset()
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


ENTRY_BYTES = 256
"""Approximate size of a cache entry without its text and ids."""
REMEMBERED_BYTES = 32 << 20
"""Limit of the cache of text pieces between special tokens, with their ids. A piece that needs more
than a quarter of it is not stored."""
LONG = 4096
"""Minimum number of characters of a long text."""
WORD_JOINER = "\u2060"
_FALLBACK = re.compile("<0x([0-9A-F]{2})>")
"""Token of one byte in vocabularies that are not byte-level."""


class HFTokenizer:
    """A ``tokenizer.json`` with the template, special tokens and end tokens of its directory.

    Uses only the ``tokenizers`` library. ``transformers`` is used only for a directory without a
    ``tokenizer.json``, to convert its files.
    """

    def __init__(self, model_dir: Path = BUILTIN_DIR, max_ids: int | None = None) -> None:
        """Load the files of ``model_dir``. ``max_ids`` is the number of ids of the model. Raises
        FileNotFoundError if there is no tokenizer, and ValueError if it has more ids."""
        self._backend = _load_backend(model_dir)
        settings = read_json(model_dir / "tokenizer_config.json")
        added = self._backend.get_added_tokens_decoder()
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        """Highest id plus one. The model's own table may be longer."""
        plain = self._backend.get_vocab(with_added_tokens=False)
        # The model's table may be padded, and a few added tokens past its end are never used.
        if max_ids is not None and (num_ids := max(plain.values(), default=-1) + 1) > max_ids:
            raise ValueError(
                f"the tokenizer of {model_dir} has {num_ids:,} token ids, and the model has "
                f"{max_ids:,}: use the tokenizer that belongs to the model."
            )
        self.special_tokens = tuple(
            token.content
            for token in added.values()
            if not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        )
        """Strings that always become one token and split the text around them. The text on either
        side can be encoded independently."""
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._hidden = frozenset(
            token_id
            for token_id, token in added.items()
            if token.special and token.content not in MARKS
        )
        own_eos = self._backend.token_to_id(_content(settings.get("eos_token")) or "")
        self.eos_token_ids = named_eos(model_dir) | (set() if own_eos is None else {own_eos})
        """Ids that end an answer."""
        self.chat_template = _find_template(model_dir, settings)
        described = json.loads(self._backend.to_str())
        self._is_byte_level = (described["decoder"] or {}).get("type") == "ByteLevel"
        # Texts on either side of a special token are encoded independently, except by a tokenizer
        # that treats the first word of a text differently.
        splitter = described["pre_tokenizer"] or {}
        parts = splitter.get("pretokenizers", [splitter])
        adds_space = any(part.get("add_prefix_space", False) for part in parts)
        has_walls = self._is_byte_level and not adds_space
        # With a group, so that splitting keeps the special tokens.
        walls = f"({any_of(self.special_tokens).pattern})"
        self._walls = re.compile(walls) if has_walls and self.special_tokens else None
        self.control_ids = frozenset(i for i in self._hidden if len(self._added[i]) > 1)
        self.control_tokens = tuple(self._added[i] for i in self.control_ids)
        """Special tokens that never occur in a text, such as those at the beginning and end of a
        turn. (``<think>`` is a token, but part of the text.)"""
        self._pieces = BoundedMemory[tuple[Hashable, str], "array[int]"](REMEMBERED_BYTES)
        """Token ids of text pieces, by namespace."""

    def encode(self, text: str, how: EncodeOptions = AS_PROMPT) -> list[int]:
        """Return the ids of ``text``. The pieces of a chat are cached, so its next turn costs only
        the new text. O(len(text)).

        If the tokenizer treats the first word of a text differently, pieces cannot be encoded
        independently. A mark then becomes a word joiner, which is invisible.
        """
        clean = text.encode("utf-8", "replace").decode("utf-8")
        if self._walls is None or how.add_special_tokens:
            if how.mark is not None:
                clean = clean.replace(how.mark, WORD_JOINER)
            return self._encode_alone(clean, how.add_special_tokens)
        token_ids: list[int] = []
        for piece in self._walls.split(clean):
            for part in piece.split(how.mark) if how.mark is not None else (piece,):
                if not part:
                    continue
                known = self._pieces.get((how.namespace, part))
                if known is None:
                    known = array("i", self._encode_alone(part, add_special_tokens=False))
                    size = sys.getsizeof(part) + sys.getsizeof(known) + ENTRY_BYTES
                    if size <= self._pieces.limit_bytes // 4:
                        self._pieces.put((how.namespace, part), known, size)
                token_ids.extend(known)
        return token_ids

    def _encode_alone(self, text: str, add_special_tokens: bool) -> list[int]:
        """Encode one text. A long text is encoded as a batch of one, because the library then lets
        other threads run, without offsets, which take three quarters of the time."""
        if len(text) > LONG:
            encode = self._backend.encode_batch_fast
            ids: list[int] = encode([text], add_special_tokens=add_special_tokens)[0].ids
        else:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``token_ids``. Ids without text (padding of the vocabulary) give none,
        invalid bytes give U+FFFD."""
        hidden = self._hidden if skip_special_tokens else frozenset()
        shown = [i for i in token_ids if i not in hidden]
        if not self._is_byte_level:
            return str(self._backend.decode(shown, skip_special_tokens=False))
        return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, special tokens included."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if not self._is_byte_level:
            if byte := _FALLBACK.fullmatch(token):
                return bytes.fromhex(byte[1])
            # After another token, because a text loses the space at its beginning.
            alone, twice = (self._backend.decode([token_id] * n, False) for n in (1, 2))
            return str(twice[len(alone) :]).encode()
        try:
            return bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError:  # Not in the byte alphabet: kept as it is, as in HF's decoder.
            return token.encode()

    def stream_decoder(
        self, skip_special_tokens: bool = True, before: Sequence[int] = ()
    ) -> StreamDecoder:
        """Return a decoder of the tokens that follow ``before``. It does not return their text."""
        if self._is_byte_level:
            hidden = self._hidden if skip_special_tokens else frozenset()
            return ByteStreamDecoder(self.token_bytes, hidden)
        decode = partial(self.decode, skip_special_tokens=skip_special_tokens)
        return WindowStreamDecoder(decode, before)

    def as_json(self) -> str:
        """Return the contents of the ``tokenizer.json``."""
        described: str = self._backend.to_str()
        return described


Tokenizer = HFTokenizer | IdTokenizer


def named_eos(model_dir: Path) -> frozenset[int]:
    """Return the end tokens of generation_config.json, or else of config.json."""
    config = read_json(model_dir / "config.json")
    candidates = (
        read_json(model_dir / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        (config.get("text_config") or {}).get("eos_token_id"),
    )
    named: int | list[int] = next((ids for ids in candidates if ids is not None), [])
    return frozenset({named} if isinstance(named, int) else named)


def has_tokenizer(model_dir: Path) -> bool:
    """Return True if there is a tokenizer.json, or a file that it can be converted from."""
    return any(
        found
        for form in ("tokenizer.json", "tokenizer.model", "vocab*")
        for found in model_dir.glob(form)
    )


def _load_backend(model_dir: Path) -> tokenizers.Tokenizer:
    import tokenizers

    path = model_dir / "tokenizer.json"
    if path.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises nothing narrower.
            raise ValueError(
                f"{path} cannot be read as a tokenizer ({error}): download it again."
            ) from None
    if not has_tokenizer(model_dir):
        raise FileNotFoundError(
            f"No tokenizer in {model_dir}: put the model's tokenizer.json there."
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir, local_files_only=True).backend_tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in ``path``, or {} if the file does not exist. Raises ValueError if the
    file is not an object in JSON."""
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not an object in JSON: download it again.")
    return content


def _find_template(model_dir: Path, settings: dict[str, Any]) -> ChatTemplate | None:
    path = model_dir / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.exists() else settings.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    if source is None:
        return None
    specials = {
        name: _content(settings.get(name)) or ""
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    return ChatTemplate(source, specials)


def _content(token: str | dict[str, Any] | None) -> str | None:
    """Return the text of a special token, which settings write as a string or as an object."""
    return token["content"] if isinstance(token, dict) else token


def _letters_of_bytes() -> dict[str, int]:
    """Map the letters of byte-level BPE to bytes: printable bytes stand for themselves, the others
    start at U+0100."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _letters_of_bytes()
