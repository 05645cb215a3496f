"""Tokenizers: that of a Hugging Face directory, that of models without one, chat templates, and
decoders of streams.
"""

from __future__ import annotations

import codecs
import datetime
import json
import pickle
import re
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np

from engine.config import BUILTIN_DIR
from engine.text.bounded import BoundedMemory
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
        self.thinks = CLOSE in source
        """True if the model may write reasoning."""
        self.special_tokens = dict(special_tokens or {})
        try:
            self._template = _compiled(source)
        except jinja2.TemplateSyntaxError as error:
            said = str(error).rstrip(".")
            raise TemplateError(f"The chat template does not parse: {said}.") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the chat as text. ``variables`` are switches of the template such as
        ``enable_thinking``. Raises TemplateError for any exception in the template."""
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
    """Return ``token_ids`` as int32[n]. O(n), in pieces between which other threads can run."""
    firsts = range(0, max(1, len(token_ids)), PIECE)
    return np.concatenate(
        [np.asarray(token_ids[first : first + PIECE], np.int32) for first in firsts]
    )


class StreamDecoder:
    """Converts the tokens of one request to text, which is returned only when later tokens cannot
    change it: the bytes of an unfinished character wait. O(1) per token."""

    def __init__(
        self,
        token_bytes: Callable[[int, bool], bytes],
        hidden: frozenset[int] = frozenset(),
        starts_text: bool = True,
    ) -> None:
        """See ``Tokenizer.token_bytes``. Tokens in ``hidden`` have no text."""
        self._token_bytes, self._hidden, self._starts_text = token_bytes, hidden, starts_text
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

    @abstractmethod
    def token_bytes(self, token_id: int, starts_text: bool = False) -> bytes:
        """Return the bytes of one token, special tokens included; b"" for an id without text. Some
        vocabularies have tokens that lose a space if a text starts with them."""

    def stream_decoder(
        self, skip_special_tokens: bool = True, starts_text: bool = True
    ) -> StreamDecoder:
        """Return a decoder of the next tokens of a text."""
        hidden = self.hidden_ids if skip_special_tokens else frozenset()
        return StreamDecoder(self.token_bytes, hidden, starts_text)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``token_ids``, with U+FFFD for invalid bytes."""
        decoder = self.stream_decoder(skip_special_tokens)
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

    def encode(self, text: str, **options: Any) -> list[int]:
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
_FALLBACK = re.compile("<0x([0-9A-F]{2})>")
"""Token of one byte in vocabularies that are not byte-level."""


class HFTokenizer(Tokenizer):
    """A ``tokenizer.json`` with the template, special tokens and end tokens of its directory.
    ``transformers`` is used only to convert a directory without a ``tokenizer.json``."""

    def __init__(self, model_dir: Path = BUILTIN_DIR, max_ids: int | None = None) -> None:
        """Load the files of ``model_dir``. ``max_ids`` is the number of ids of the model. Raises
        FileNotFoundError if there is no tokenizer, and ValueError if it has more ids."""
        self._backend = _load_backend(model_dir)
        settings = read_json(model_dir / "tokenizer_config.json")
        added = self._backend.get_added_tokens_decoder()
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        # The model's table may be padded, and a few added tokens past its end are never used.
        num_ids = self._backend.get_vocab_size(with_added_tokens=False)
        if max_ids is not None and num_ids > max_ids:
            raise ValueError(
                f"the tokenizer of {model_dir} has {num_ids:,} token ids, and the model has "
                f"{max_ids:,}: use the tokenizer that belongs to the model."
            )
        self.special_tokens = tuple(
            token.content
            for token in added.values()
            if not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        )
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.hidden_ids = frozenset(
            token_id
            for token_id, token in added.items()
            if token.special and token.content not in MARKS
        )
        self.control_ids = frozenset(i for i in self.hidden_ids if len(self._added[i]) > 1)
        self.control_tokens = tuple(self._added[i] for i in self.control_ids)
        own_eos = self._backend.token_to_id(_content(settings.get("eos_token")) or "")
        self.eos_token_ids = named_eos(model_dir) | (set() if own_eos is None else {own_eos})
        self.chat_template = _find_template(model_dir, settings)
        self._is_byte_level = type(self._backend.decoder).__name__ == "ByteLevel"
        # Texts on either side of a special token are encoded independently, except by a tokenizer
        # that treats the first word of a text differently.
        adds_space = b'"add_prefix_space":true' in pickle.dumps(self._backend.pre_tokenizer)
        # With a group, so that splitting keeps the special tokens.
        walls = f"({any_of(self.special_tokens).pattern})"
        self._walls = re.compile(walls) if self._is_byte_level and not adds_space else None
        self._pieces = BoundedMemory[tuple[Hashable, str], "array[int]"](REMEMBERED_BYTES)
        """Token ids of text pieces, by namespace."""

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
        ids: list[int] = encoding.ids
        return ids

    def token_bytes(self, token_id: int, starts_text: bool = False) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if not self._is_byte_level:
            if byte := _FALLBACK.fullmatch(token):
                return bytes.fromhex(byte[1])
            alone, twice = (self._backend.decode([token_id] * n, False) for n in (1, 2))
            return str(alone if starts_text else twice[len(alone) :]).encode()
        try:
            return bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError:  # Not in the byte alphabet: kept as it is, as in HF's decoder.
            return token.encode()

    def as_json(self) -> str:
        described: str = self._backend.to_str()
        return described


def named_eos(model_dir: Path) -> frozenset[int]:
    """Return the end tokens of generation_config.json, or else of config.json, which are ids or
    texts of tokens. Raises ValueError for other values."""
    config = read_json(model_dir / "config.json")
    places = (
        ("generation_config.json", read_json(model_dir / "generation_config.json")),
        ("config.json", config),
        ("config.json", config.get("text_config") or {}),
    )
    for name, settings in places:
        if (named := settings.get("eos_token_id")) is None:
            continue
        ids, added = set[int](), dict[str, int]()
        for one in named if isinstance(named, list) else [named]:
            if isinstance(one, str) and not added:
                added = _ids_by_text(model_dir)
            token: Any = added.get(one) if isinstance(one, str) else one
            if type(token) in (int, float) and float(token).is_integer():
                ids |= {int(token)} if token >= 0 else set()  # -1 stands for none.
            elif one is not None:
                raise ValueError(
                    f"{model_dir / name}: eos_token_id must be token ids or texts of tokens "
                    f"(got {one!r}): correct it."
                )
        return frozenset(ids)
    return frozenset()


def _ids_by_text(model_dir: Path) -> dict[str, int]:
    """Return the ids of tokens by their texts, without loading the tokenizer."""
    listed = read_json(model_dir / "tokenizer_config.json").get("added_tokens_decoder") or {}
    described = read_json(model_dir / "tokenizer.json")
    vocab = (described.get("model") or {}).get("vocab")
    found: dict[str, int] = {**vocab} if isinstance(vocab, dict) else {}
    found |= {str(_content(token)): int(token_id) for token_id, token in listed.items()}
    return found | {one["content"]: one["id"] for one in described.get("added_tokens") or ()}


def has_tokenizer(model_dir: Path) -> bool:
    """Return True if there is a tokenizer.json, or a file that it can be converted from."""
    forms = "tokenizer.json", "tokenizer.model", "vocab*"
    return any(any(model_dir.glob(form)) for form in forms)


def _load_backend(model_dir: Path) -> tokenizers.Tokenizer:
    import tokenizers

    path = model_dir / "tokenizer.json"
    if path.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library has no class of its own.
            raise ValueError(f"{path} cannot be read ({error}): download it again.") from error
    if not has_tokenizer(model_dir):
        raise FileNotFoundError(
            f"No tokenizer in {model_dir}: put the model's tokenizer.json there."
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir, local_files_only=True).backend_tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in ``path``, or {} if the file does not exist. Raises ValueError for any
    other content."""
    if not path.exists():
        return {}
    with suppress(ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    raise ValueError(f"{path} is not an object in JSON: download it again.")


def _find_template(model_dir: Path, settings: dict[str, Any]) -> ChatTemplate | None:
    path = model_dir / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.exists() else settings.get("chat_template")
    if isinstance(source, list):
        source = next((one["template"] for one in source if one["name"] == "default"), None)
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
