"""Which tokens can come next for an answer to become what its grammar allows, by llguidance.

Of the library a Lark grammar, a JSON schema or an expression becomes a matcher, which knows after
any tokens which may follow; its work and its memory are bounded by ``LIMITS``.
"""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.guided.grammar import CALL, Grammar, GrammarError, TooComplex
from hybridcache.extras import how_to_install
from hybridcache.tokens import Tokens

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

LIMITS = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 8_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 20_000,
    "verbose_errors": False,
}
"""Milliseconds a step, and tens of MiB, for the worst that was tried; a schema of a thousand
objects still passes."""
NUM_REMEMBERED = 64
"""Compiled grammars."""
MARK = b"\xff"
"""Begins the bytes of a token that no text has, in the library's own form."""
OUR_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
QUOTED_REGEX = re.compile(r'invalid regex ".*" \(in regex\): regex parse error:$')
REGEX = "regex parse error:"
"""Ends a first line that says less than the line behind it that begins with ``ERROR``."""
ERROR = "error: "
ENDLESS = "NoExtensionBias"
"""The library's whole message for a grammar with a beginning but no end."""
TOOL = re.compile(
    rf'^ *\d+ \| {CALL}\d+: .*?"name": {{"const": ("(?:[^"\\]|\\.)*").*\n *\^', re.MULTILINE
)
"""Of a message, the line of our making that it means, and in it the tool's name."""

Mask = npt.NDArray[np.uint8]
"""Bit ``i % 8`` of byte ``i // 8``: whether token i is allowed."""


class Guides:
    """Compiles grammars for one vocabulary. Safe to call from any thread."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._num_bytes = -(-vocab_size // 8)
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def guide(self, grammar: Grammar) -> Guide:
        """The state of a new answer. GrammarError: see ``compile``, which takes its time where
        the grammar is not one of the last that were compiled."""
        beginning = self.compile(grammar)
        return Guide(
            beginning, self._ends(), self._num_bytes, lambda: self._anew(grammar, beginning)
        )

    def _anew(self, grammar: Grammar, spent: Any) -> Any:
        """The matcher in place of one whose copies, which share what they find out, have ``spent``
        its limits together."""
        with self._lock:
            if self._compiled.get(grammar) is spent:
                del self._compiled[grammar]
        return self.compile(grammar)

    def compile(self, grammar: Grammar) -> Any:
        """The library's matcher of ``grammar`` at its beginning, remembered: it is copied, never
        moved on. GrammarError: there is no library, or the grammar is wrong, too large, or one that
        only the empty answer fits; TooComplex: its first two tokens already take too much."""
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
            library, vocabulary = self._load()
        # Not under the lock: it may take a tenth of a second, and others have theirs compiled.
        matcher = _matcher(library, vocabulary, grammar)
        _check_beginning(matcher, self._ends())
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > NUM_REMEMBERED:
                self._compiled.popitem(last=False)
        return matcher

    def _ends(self) -> Tokens:
        """Of the vocabulary's tokens those that end an answer."""
        assert self._tokenizer is not None
        return np.array(sorted(self._tokenizer.eos_token_ids), np.int32)

    def _load(self) -> tuple[Any, Any]:
        try:
            library = importlib.import_module("llguidance")
        except ModuleNotFoundError as error:
            missing = how_to_install(error)
            raise GrammarError(f"an answer can not be guided here: {missing}.") from None
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary(library)
        return library, self._vocabulary

    def _make_vocabulary(self, library: Any) -> Any:
        """The vocabulary as the library keeps it. O(its tokens): a second for 150,000."""
        tokenizer = self._tokenizer
        if tokenizer is None or not tokenizer.eos_token_ids:
            raise GrammarError(
                "an answer can not be guided without a tokenizer that has a token for its end."
            )
        size = max(self._vocab_size, tokenizer.vocab_size)
        ends = sorted(tokenizer.eos_token_ids)
        if (described := tokenizer.as_json()) is not None:
            return library.LLTokenizer(described, n_vocab=size, eos_token=ends)
        wrapped = library.TokenizerWrapper(_ByteVocabulary(tokenizer, size))
        return library.LLTokenizer(wrapped, n_vocab=size, eos_token=ends)


class Guide:
    """Where one answer stands in its grammar. Of the engine's thread."""

    __slots__ = ("_anew", "_beginning", "_ends", "_matcher", "_num_bytes", "_num_taken")

    def __init__(
        self, beginning: Any, ends: Tokens, num_bytes: int, anew: Callable[[], Any]
    ) -> None:
        """``beginning`` is copied at the first token: who waits needs no matcher of its own. Where
        a limit is reached, the answer is followed once more with the beginning that ``anew`` makes:
        others may have reached it."""
        self._beginning = beginning
        self._anew: Callable[[], Any] | None = anew
        self._ends = ends
        self._matcher: Any = None
        self._num_bytes = num_bytes
        self._num_taken = 0

    def masks(self, answer: Tokens, drafts: Tokens) -> list[Mask]:
        """What may follow ``answer``, and it with each beginning of ``drafts``, which ``cut`` has
        left: 1 + d masks. O(new tokens) and the library's time for each."""
        masks = self._masks(answer, drafts)
        return self._masks(answer, drafts) if self._begins_anew() else masks

    def _masks(self, answer: Tokens, drafts: Tokens) -> list[Mask]:
        self._go_to(answer)
        masks = [self._mask()]
        for token in drafts.tolist():
            self._matcher.consume_token(token)
            masks.append(self._mask())
        self._num_taken += len(drafts)
        self._go_to(answer)
        return masks

    def cut(self, answer: Tokens, drafts: Tokens) -> Tokens:
        """As many of ``drafts`` as the grammar allows after ``answer``; none that ends it."""
        self._go_to(answer)
        drafts = drafts[: self._matcher.validate_tokens(drafts.tolist())]
        ends = np.isin(drafts, self._ends)
        return drafts[: int(ends.argmax())] if ends.any() else drafts

    def is_done(self, answer: Tokens) -> bool:
        """Whether nothing can follow ``answer``, which the grammar allows. TooComplex: following
        it took too much."""
        self._go_to(answer)
        if self._begins_anew():
            self._go_to(answer)
        if self._matcher.is_error():
            raise TooComplex(_reason(self._matcher.get_error()))
        return bool(self._matcher.is_stopped())

    def _begins_anew(self) -> bool:
        """Whether a limit was reached for the first time: nothing is taken then."""
        if self._anew is None or not self._matcher.is_error():
            return False
        self._beginning, self._anew = self._anew(), None
        self._matcher, self._num_taken = None, 0
        return True

    def _go_to(self, answer: Tokens) -> None:
        """Have taken just ``answer``, which begins or goes on as what was taken. O(difference)."""
        if self._matcher is None:
            self._matcher = self._beginning.deep_copy()
        surplus = self._num_taken - len(answer)
        if surplus > 0:
            self._matcher.rollback(surplus)
        elif surplus < 0:
            self._matcher.consume_tokens(answer[self._num_taken :].tolist())
        self._num_taken = len(answer)

    def _mask(self) -> Mask:
        """Everything, where the grammar became too much for its limits: ``is_done`` then says
        so."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)[: self._num_bytes]
        return np.full_like(mask, 0xFF) if self._matcher.is_error() else mask


class _ByteVocabulary:
    """A tokenizer whose tokens are bytes, as the library wants it."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        ends = tokenizer.eos_token_ids
        controls = {tokenizer.encode(text)[0] for text in tokenizer.control_tokens}
        self.special_token_ids = sorted(controls | ends)
        self.eos_token_id, self.bos_token_id = min(ends), None
        self.tokens = [
            MARK + tokenizer.token_bytes(token)
            if token in controls or token in ends
            else tokenizer.token_bytes(token)
            for token in range(tokenizer.vocab_size)
        ]
        self.tokens += [b""] * (size - len(self.tokens))
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _matcher(library: Any, vocabulary: Any, grammar: Grammar) -> Any:
    text, limits = grammar.text, library.LLParserLimits(**LIMITS)
    if grammar.kind == "regex":
        text = json.loads(library.LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]
    elif grammar.kind == "given":
        try:
            text = library.grammar_from("grammar", text)
        except (ValueError, RecursionError) as error:
            raise _wrong(str(error)) from None
    if grammar.end_of_reasoning is not None:
        end = json.dumps(grammar.end_of_reasoning)
        first = f"start: thought /\\s*/ @answer\nthought[suffix={end}]: /(?s:.*)/"
        parts = [{"lark_grammar": first}, {"name": "answer", "lark_grammar": text}]
        text = json.dumps({"grammars": parts})
    matcher = library.LLMatcher(vocabulary, text, log_level=0, limits=limits)
    if matcher.is_error():
        message = matcher.get_error()
        # Where in a text of our own making means nothing to whoever asked.
        raise _wrong(message if grammar.kind == "given" else OUR_PLACE.sub("", message))
    return matcher


def _check_beginning(matcher: Any, ends: Tokens) -> None:
    """GrammarError: no token can begin an answer; TooComplex: what can, or what can follow one
    that can, took too long to find."""
    tried = matcher.deep_copy()
    allowed = _allowed(tried)
    allowed[ends] = 0
    if not allowed.any():
        raise GrammarError("no answer fits this grammar, or only the empty one.")
    tried.consume_token(int(allowed.argmax()))
    # Limits of repetitions are reached behind the first token only.
    _allowed(tried)


def _allowed(tried: Any) -> Mask:
    """Which token may come next, one of these bits each. GrammarError: the grammar has no end;
    TooComplex: it took too long to find."""
    allowed = np.unpackbits(np.frombuffer(tried.compute_bitmask(), np.uint8), bitorder="little")
    if tried.is_error():
        reason = _reason(tried.get_error())
        if reason == ENDLESS:
            raise GrammarError(
                "no answer fits this grammar: one of its rules never comes to an end."
            )
        raise TooComplex(reason)
    return allowed


def _wrong(message: str) -> GrammarError:
    tool = TOOL.search(message)
    where = "" if tool is None else f"tool {json.loads(tool[1])!r}: "
    return GrammarError(f"{where}this grammar can not be served: {_reason(message)}.")


def _reason(message: str) -> str:
    """Of the library's message what says what is wrong, on one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    first = QUOTED_REGEX.sub(REGEX, lines[0]) if lines else "no reason given"
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    if first.endswith(REGEX) and errors:
        first = f"{first.removesuffix(REGEX)}a regular expression in it is wrong, {errors[-1]}"
    return first.rstrip(".")
