"""Interface to llguidance: vocabulary, matchers, limits and messages.

A matcher is made of a Lark grammar, a JSON schema or a regular expression. After any tokens it
returns the tokens that may follow.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.requests.grammar import CALL, Grammar, GrammarError, TooComplex
from engine.requests.logit_rules import Mask
from hybridcache.command.extras import how_to_install
from hybridcache.tokens import Tokens

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

LIMITS: Mapping[str, Any] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 2_000,
    "max_items_in_row": 300,
    "max_lexer_states": 5_000,
    "max_grammar_size": 20_000,
    "verbose_errors": False,
}
"""Limits of one matcher. 4,900 random ambiguous grammars of up to 1 kB took at most 26 ms for one
call; schemas of ordinary size take microseconds."""
NUM_TRIED = 40
"""Number of tokens of the answer that is tried when a grammar is compiled."""
MARK = b"\xff"
"""First byte of a token that no text contains, in the library's form."""
OUR_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
QUOTED_REGEX = re.compile(r'invalid regex ".*" \(in regex\): regex parse error:$')
REGEX = "regex parse error:"
"""End of a first line that is less informative than a later line that begins with ``ERROR``."""
ERROR = "error: "
ENDLESS = "NoExtensionBias"
"""The library's whole message for a grammar that has a beginning but no end."""
TOOL = re.compile(
    rf'^ *\d+ \| {CALL}\d+: .*?"name": {{"const": ("(?:[^"\\]|\\.)*").*\n *\^', re.MULTILINE
)
"""Line of a message that quotes the engine's grammar of a call, with the tool's name."""


def load_library() -> Any:
    """Import llguidance. Raises GrammarError if it is not installed."""
    try:
        return importlib.import_module("llguidance")
    except ModuleNotFoundError as error:
        missing = how_to_install(error)
        raise GrammarError(f"guided answers are not available: {missing}.") from None


def make_vocabulary(library: Any, tokenizer: Tokenizer | None, vocab_size: int) -> Any:
    """Build the library's form of a vocabulary. Raises GrammarError without a token that ends
    answers.

    O(its tokens): a second for 150,000, during which no other thread of the process runs.
    """
    if tokenizer is None or not tokenizer.eos_token_ids:
        raise GrammarError("guided answers require a tokenizer with a token that ends answers.")
    size = max(vocab_size, tokenizer.vocab_size)
    ends = sorted(tokenizer.eos_token_ids)
    if (described := tokenizer.as_json()) is not None:
        return library.LLTokenizer(described, n_vocab=size, eos_token=ends)
    wrapped = library.TokenizerWrapper(_ByteVocabulary(tokenizer, size))
    return library.LLTokenizer(wrapped, n_vocab=size, eos_token=ends)


class _ByteVocabulary:
    """A tokenizer in the form that the library wraps: every token as bytes."""

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


def make_matcher(library: Any, vocabulary: Any, grammar: Grammar) -> Any:
    """Compile ``grammar``. Raises GrammarError if it is invalid or too large."""
    text, bounds = grammar.text, library.LLParserLimits(**LIMITS)
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
    matcher = library.LLMatcher(vocabulary, text, log_level=0, limits=bounds)
    if matcher.is_error():
        message = matcher.get_error()
        # A position in generated text is useless for the client.
        raise _wrong(message if grammar.kind == "given" else OUR_PLACE.sub("", message))
    return matcher


def check_beginning(matcher: Any, ends: Tokens) -> None:
    """Follow one possible answer of at most ``NUM_TRIED`` tokens.

    Raises GrammarError if no token can begin an answer, and TooComplex if the answer reaches the
    limits. Ambiguous grammars do so within few tokens.
    """
    tried, draw = matcher.deep_copy(), np.random.default_rng(0)
    for number in range(NUM_TRIED):
        allowed = _allowed(tried)
        allowed[ends] = 0
        possible = np.flatnonzero(allowed)
        if not len(possible) and not number:
            raise GrammarError("no answer fits this grammar, or only the empty one.")
        if not len(possible):
            return
        tried.consume_token(int(draw.choice(possible)))
    _allowed(tried)


def _allowed(tried: Any) -> Mask:
    """Return one number per token: 1 if it may come next."""
    allowed = np.unpackbits(np.frombuffer(tried.compute_bitmask(), np.uint8), bitorder="little")
    if tried.is_error():
        why = reason(tried.get_error())
        if why == ENDLESS:
            raise GrammarError("no answer fits this grammar: one of its rules never ends.")
        raise TooComplex(why)
    return allowed


def _wrong(message: str) -> GrammarError:
    tool, why = TOOL.search(message), reason(message)
    if "increase limits." in why:  # Advice for programs that use the library.
        return TooComplex(why.partition(";")[0])
    where = "" if tool is None else f"tool {json.loads(tool[1])!r}: "
    return GrammarError(f"{where}this grammar cannot be used: {why}.")


def reason(message: str) -> str:
    """Reduce a message of the library to one line with the cause of the error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    first = QUOTED_REGEX.sub(REGEX, lines[0]) if lines else "no reason given"
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    if first.endswith(REGEX) and errors:
        first = f"{first.removesuffix(REGEX)}a regular expression in it is wrong, {errors[-1]}"
    return first.rstrip(".")
