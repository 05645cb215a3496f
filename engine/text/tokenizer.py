"""Tokenizers: those of the library ``tokenizers``, that of models without one, chat templates, and
decoders of streams.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.text.bounded import BoundedMemory
from engine.text.sandbox import TOO_MUCH, Renderer, TemplateError
from hybridcache.radix.tokens import Tokens

if TYPE_CHECKING:
    import tokenizers

Message = Mapping[str, object]
Settings = dict[str, Any]
"""Contents of a tokenizer_config.json, not checked: a wrong value fails where it is used."""
Described = dict[str, Any]
"""Token or step of the library ``tokenizers`` as its files describe it: content or type, flags."""
PROBE = "\ue000"
"""Stands for text that is not known yet. It is a private-use character: no template and no merge of
a tokenizer begins with it."""


OPEN, CLOSE = "<think>", "</think>"
"""Marks around the reasoning before an answer; the first may be in the prompt."""
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
"""Marks around a tool call in the text of an answer."""
IS_MARK = re.compile("</?think>|tool_?call|function_call", re.IGNORECASE)
"""Marks of the parts of an answer: of reasoning, and of calls in any form. They are part of the
text, even if the vocabulary lists them as tokens that are not shown."""


class ChatTemplate:
    """A Hugging Face chat template: sandboxed Jinja with the filters and globals that such
    templates use, rendered by another process (``engine/text/sandbox.py``).

    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "hi"}])
    '<user>hi'
    """

    renderer = Renderer()
    """Process of all templates."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Raise TemplateError if the template does not parse, or exceeds a limit for a short
        chat."""
        self.source = source
        self.thinks = CLOSE in source
        """True if the model may write reasoning."""
        self.special_tokens = dict(special_tokens or {})
        self.renderer.render(source, None)
        try:
            self.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        except TemplateError as error:
            if str(error) == TOO_MUCH:
                raise

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Return the chat as text. ``variables`` are switches of the template such as
        ``enable_thinking``. Raises TemplateError for any exception in the template, and if it
        exceeds a limit."""
        given: dict[str, object] = {"messages": messages, "tools": tools}
        given["add_generation_prompt"] = add_generation_prompt
        return self.renderer.render(
            self.source, {**self.special_tokens, **(variables or {}), **given}
        )


@lru_cache(maxsize=256)
def any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern of the ``texts``, the longest first; it matches nothing if there are
    none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


PIECE = 1 << 16
"""Number of tokens that are converted at once."""


def as_tokens(token_ids: Sequence[int]) -> Tokens:
    """Return ``token_ids`` as int32[n]. O(n), in pieces between which other threads can run."""
    firsts = range(0, max(1, len(token_ids)), PIECE)
    return np.concatenate(
        [np.asarray(token_ids[first : first + PIECE], np.int32) for first in firsts]
    )


class StreamDecoder:
    """Converts the tokens of one request to text, which is returned only when later tokens cannot
    change it: the bytes of an unfinished character wait. O(1) per token."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, starts_text: bool = True
    ) -> None:
        """``starts_text``: see ``Tokenizer.token_bytes``."""
        self._token_bytes, self._starts_text = tokenizer.token_bytes, starts_text
        self._hidden = tokenizer.hidden_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the text that is certain with this token."""
        if token_id in self._hidden:
            return ""
        new = self._token_bytes(token_id, self._starts_text)
        self._starts_text = False
        return self._utf8.decode(new)

    def flush(self) -> str:
        """Return the bytes held back as replacement characters, after the last token."""
        return self._utf8.decode(b"", final=True)


class Tokenizer(ABC):
    """Converts text to tokens, and tokens to text."""

    special_tokens: tuple[str, ...] = ()
    """Strings that always become one token and split the text around them. The text on either side
    can be encoded independently."""
    control_tokens: tuple[str, ...] = ()
    """Special tokens that never occur in a text, such as those at the beginning and end of a turn.
    (``<think>`` is a token, but part of the text.)"""
    control_ids: frozenset[int] = frozenset()
    hidden_ids: frozenset[int] = frozenset()
    """Special tokens, which are not shown."""
    eos_token_ids: frozenset[int]
    """Ids that end an answer."""
    vocab_size: int
    """Highest id plus one. The model's own table may be longer."""
    chat_template: ChatTemplate | None = None
    token_bytes: Callable[..., bytes]
    """Function of ``token_id`` and ``starts_text`` (default False) that returns the bytes of one
    token, special tokens included; b"" for an id without text. Some vocabularies have tokens that
    lose a space if a text starts with them."""

    @abstractmethod
    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        mark: str | None = None,
        namespace: Hashable = None,
    ) -> list[int]:
        """Return the ids of ``text``. O(len(text)).

        ``add_special_tokens``: also the tokens that the model expects around a text, such as a BOS.
        ``mark``: a character that is not part of the text, and separates the text on either side.
        ``namespace``: the time of encoding does not reveal texts of other namespaces.
        """

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``token_ids``, with U+FFFD for invalid bytes."""
        decoder = StreamDecoder(self, skip_special_tokens)
        return "".join([*map(decoder.push, token_ids), decoder.flush()])

    def as_json(self) -> str | None:
        """Return the contents of the ``tokenizer.json``, or None if there is none."""
        return None


class IdTokenizer(Tokenizer):
    """Tokenizer for models without one: each id in decimal, after a space.

    >>> tokenizer = IdTokenizer(320, frozenset({2}))
    >>> tokenizer.encode("17 4"), tokenizer.decode([17, 4])
    ([17, 4], ' 17 4')
    """

    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self.vocab_size, self.eos_token_ids = vocab_size, eos_token_ids

    def encode(self, text: str, **options: object) -> list[int]:
        """Return the ids in ``text``. Raises ValueError for any other text."""
        try:
            return [int(np.int32(word)) for word in text.split()]
        except (ValueError, OverflowError):
            raise ValueError(
                "prompt must be token ids, or a text of them as numbers, because this model has no "
                "tokenizer."
            ) from None

    def token_bytes(self, token_id: int, starts_text: bool = False) -> bytes:
        return f" {token_id}".encode()


ENTRY_BYTES = 256
"""Approximate size of a cache entry without its text and ids."""
REMEMBERED_BYTES = 32 << 20
"""Limit of the cache of text pieces between special tokens, with their ids."""
WORD_JOINER = "\u2060"
_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")
"""Token of one byte in vocabularies that are not byte-level."""


class BackendTokenizer(Tokenizer):
    """Tokenizer of the library ``tokenizers``, with settings as in a ``tokenizer_config.json``."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Settings,
        *,
        eos_token_ids: Iterable[int] = (),
        max_ids: int | None = None,
        source: str = "the model",
    ) -> None:
        """Take ``backend`` over, and apply ``settings`` to it as ``transformers`` does.

        ``settings``: special tokens by name (``bos_token``, ``eos_token`` ...), ``chat_template``,
        ``added_tokens_decoder``, ``additional_special_tokens`` and ``split_special_tokens``, all
        optional. ``eos_token_ids`` also end an answer. ``max_ids`` is the number of ids of the
        model. Raises ValueError, which names ``source``, if the tokenizer has more ids.
        """
        self._backend = backend
        marked = backend.get_added_tokens_decoder()
        _apply_settings(backend, settings)
        added = backend.get_added_tokens_decoder()
        # The library does not show tokens that were special before.
        special = {i for tokens in (marked, added) for i, token in tokens.items() if token.special}
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        # The model's table may be padded, and a few added tokens past its end are never used.
        num_ids = backend.get_vocab_size(with_added_tokens=False)
        if max_ids is not None and num_ids > max_ids:
            raise ValueError(
                f"the tokenizer of {source} has {num_ids:,} token ids, and the model has "
                f"{max_ids:,}: use the tokenizer that belongs to the model."
            )
        self.special_tokens = tuple(
            token.content
            for token_id, token in added.items()
            if not (token.lstrip or token.rstrip or token.single_word or token.normalized)
            and not (token_id in special and backend.encode_special_tokens)
        )
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.hidden_ids = frozenset(i for i in special if not IS_MARK.search(self._added[i]))
        self.control_ids = frozenset(i for i in self.hidden_ids if len(self._added[i]) > 1)
        self.control_tokens = tuple(self._added[i] for i in self.control_ids)
        own_eos = backend.token_to_id(content_of(settings.get("eos_token")) or "")
        self.eos_token_ids = frozenset(eos_token_ids) | (set() if own_eos is None else {own_eos})
        self.chat_template = _find_template(settings)
        before = [*_steps(backend.normalizer), *_steps(backend.pre_tokenizer)]
        after = _steps(backend.decoder)
        self._is_byte_level = any(step["type"] == "ByteLevel" for step in [*before, *after])
        codes = "".join(map(_code, after))
        if not ({*codes} <= {*"LF"} if self._is_byte_level else _STREAMED.fullmatch(codes)):
            names = ", ".join(step["type"] for step in after)
            raise ValueError(
                f"the tokenizer of {source} is not supported: with its decoder ({names}) the text "
                "of a token depends on other tokens."
            )
        # Texts on either side of a special token are encoded independently, except by a tokenizer
        # that treats the beginning or the end of a text differently, or looks across tokens.
        has_ends = any(
            step["type"] in ("Metaspace", "Prepend", "Strip") or step.get("add_prefix_space")
            for step in before
        )
        has_ends |= backend.encode_special_tokens or any(one.single_word for one in added.values())
        # With a group, so that splitting keeps the special tokens.
        walls = f"({any_of(self.special_tokens).pattern})"
        self._walls = re.compile(walls) if self._is_byte_level and not has_ends else None
        self._pieces = BoundedMemory[tuple[Hashable, str], "array[int]"](REMEMBERED_BYTES)
        """Token ids of text pieces, by namespace."""
        self.token_bytes = lru_cache(maxsize=1 << 16)(self._bytes_of)

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        mark: str | None = None,
        namespace: Hashable = None,
    ) -> list[int]:
        """Return the ids of ``text``; see ``Tokenizer``. The pieces of a chat are cached, so its
        next turn costs only the new text.

        If the tokenizer treats the first word of a text differently, pieces cannot be encoded
        independently. A mark then becomes a word joiner, which is invisible.
        """
        clean = text.encode("utf-8", "replace").decode("utf-8")
        if self._walls is None or add_special_tokens:
            clean = clean if mark is None else clean.replace(mark, WORD_JOINER)
            return self._encode_alone(clean, add_special_tokens)
        token_ids: list[int] = []
        for piece in self._walls.split(clean):
            for part in (piece,) if mark is None else piece.split(mark):
                known = self._pieces.get((namespace, part))
                if known is None:
                    known = array("i", self._encode_alone(part, add_special_tokens=False))
                    size = sys.getsizeof(part) + sys.getsizeof(known) + ENTRY_BYTES
                    self._pieces.put((namespace, part), known, size)
                token_ids.extend(known)
        return token_ids

    def _encode_alone(self, text: str, add_special_tokens: bool) -> list[int]:
        """Encode one text as a batch, because the library then lets other threads run, without
        offsets, which take most of the time."""
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def _bytes_of(self, token_id: int, starts_text: bool = False) -> bytes:
        """Compute ``token_bytes``."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            if token_id in self._added:
                return token.encode()
            try:
                return bytes(map(BYTE_OF.__getitem__, token))
            except KeyError:  # Not in the byte alphabet: kept as it is, as in HF's decoder.
                return token.encode()
        alone, twice = (self._backend.decode([token_id] * n, False) for n in (1, 2))
        if alone == "\ufffd" and (byte := _FALLBACK.fullmatch(token)):
            return bytes.fromhex(byte[1])
        return str(alone if starts_text else twice[len(alone) :]).encode()

    def as_json(self) -> str:
        return self._backend.to_str()


def _named_tokens(settings: Settings) -> dict[str, str | Described]:
    """Return ``bos_token``, ``image_token`` and the others that have a name, as text or object."""
    named = {name: token for name, token in settings.items() if name.endswith("_token")}
    others = settings.get("extra_special_tokens")
    named |= others if isinstance(others, dict) else {}
    return {name: token for name, token in named.items() if isinstance(token, str | dict)}


def special_tokens_of(settings: Settings) -> list[str | Described]:
    """Return the special tokens in ``settings``, each as text or object."""
    others = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    return [*_named_tokens(settings).values(), *(others if isinstance(others, list) else ())]


def _apply_settings(backend: tokenizers.Tokenizer, settings: Settings) -> None:
    """Change ``backend`` as ``transformers`` does (class TokenizersBackend).

    Truncation, padding and dropout, which a trainer may have left in the file, are switched off.
    The tokens in ``settings`` are added or get other flags.
    """
    from tokenizers import AddedToken

    backend.no_truncation()
    backend.no_padding()
    if hasattr(backend.model, "dropout"):
        backend.model.dropout = None
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
    known = {token.content: repr(token) for token in backend.get_added_tokens_decoder().values()}
    named = {*map(content_of, _named_tokens(settings).values())}

    def described(token: str | Described) -> AddedToken:
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        given = {} if isinstance(token, str) else {k: token[k] for k in flags if k in token}
        if isinstance(token, str) or token["content"] in named:
            given["special"] = True
        return AddedToken(content_of(token), **given)

    listed = settings.get("added_tokens_decoder") or {}
    new = [described(listed[token_id]) for token_id in sorted(listed, key=int)]
    new = [token for token in new if known.get(token.content) != repr(token)]
    names = {*known, *(token.content for token in new)}
    for token in [*settings.get("added_tokens", ()), *special_tokens_of(settings)]:
        text = content_of(token)
        if text and text not in names:
            names.add(text)
            new.append(described(token))
    backend.add_tokens(new)


def _find_template(settings: Settings) -> ChatTemplate | None:
    """Return the template of a chat; of a list, the one of the name ``tool_use`` with tools.

    >>> named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    >>> template = _find_template({"chat_template": named})
    >>> template.render([]), template.render([], tools=[{}])
    ('a', 'b')
    """
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {one["name"]: one["template"].removesuffix("\n") for one in source}
        said = json.dumps(f"none of the chat templates {', '.join(named)} is named default")
        source = named.get("default", f"{{{{ raise_exception({said}) }}}}")
        if "tool_use" in named:
            source = f"{{% if tools +%}}{named['tool_use']}{{%+ else +%}}{source}{{%+ endif %}}"
    if source is None:
        return None
    absent = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
    named = {name: content_of(token) or "" for name, token in _named_tokens(settings).items()}
    return ChatTemplate(source, absent | named)


def content_of(token: str | Described | None) -> str | None:
    """Return the text of a special token, which settings write as a string or as an object."""
    return token["content"] if isinstance(token, dict) else token


def _steps(part: Any) -> list[Described]:
    """Return the descriptions of a normalizer, pre-tokenizer or decoder. Those of a sequence, at
    any depth, follow each other."""

    def flat(described: Described) -> list[Described]:
        if described["type"] != "Sequence":
            return [described]
        inner = next(value for value in described.values() if isinstance(value, list))
        return [step for one in inner for step in flat(one)]

    return [] if part is None else flat(json.loads(part.__getstate__()))


_STREAMED = re.compile("[RrqSsMW]*|[RrqSsM]*B+(F[Frs]*)?|[RrqSsMW]*F[FrqsM]*")
"""Decoders whose tokens have the same text everywhere in a text, except for its first token. Each
letter is the code of a step: Byte fallback, Fuse, Metaspace, Replace, Strip or Word piece."""


def _code(step: Described) -> str:
    """Return the code of a decoder's step: a small letter if it looks at one character only."""
    codes = {"ByteFallback": "B", "ByteLevel": "L", "Fuse": "F", "Metaspace": "M", "WordPiece": "W"}
    match step["type"]:
        case "Replace":
            text = step["pattern"].get("String", "")
            return "R" if len(text) != 1 else "r" if text.isascii() else "q"
        case "Strip":
            return "s" if step["start"] <= 1 and not step["stop"] else "S"
        case kind:
            return codes.get(kind, "?")


def _letters_of_bytes() -> dict[str, int]:
    """Map the letters of byte-level BPE to bytes: printable bytes stand for themselves, the others
    start at U+0100."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + rank): byte for rank, byte in enumerate(others)}


BYTE_OF = _letters_of_bytes()
