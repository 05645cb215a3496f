"""Compiles grammars for one vocabulary with llguidance, caches them by tenant, and follows answers.

A matcher is made of a Lark grammar, a JSON schema or a regular expression. After any tokens it
returns the tokens that may follow. A grammar is compiled once, outside the engine's thread, and
copied for each answer. Each mask is computed in the step that draws with it. The library's limits
end every call within milliseconds, so the same grammars are refused on every machine. A request
whose grammar takes more than its share of the engine's time fails.
"""

from __future__ import annotations

import importlib
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from engine.requests.logit_rules import LogitRule, Mask, Ruling, before_draws
from engine.text.grammar import Grammar, GrammarError
from hybridcache.command.extras import how_to_install
from hybridcache.radix.tokens import Tokens

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from engine.text.tokenizer import Tokenizer

Found = TypeVar("Found")
LIMITS: Mapping[str, int | bool] = {
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
STACK_BYTES, STACK_LOCK = 256 << 20, threading.Lock()
"""Stack of a compilation. A schema of ``MAX_CHARS`` with one level in ten characters needs less.
The system provides memory for the used part only."""
NUM_TRIED = 40
"""Number of tokens of the answer that is tried when a grammar is compiled."""
BEFORE = "\x02"
"""Character that is part of no longer token."""
MARK = b"\xff"
"""First byte of a token that no text contains, in the library's form."""
OUR_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
ENDLESS = "NoExtensionBias"
"""The library's whole message for a grammar that has a beginning but no end."""
QUOTE = re.compile(r"^ *\d+ \| (.*)\n *\^", re.MULTILINE)
"""Line of a message that quotes the engine's grammar. It is searched in linear time."""
TOOL = re.compile(r""" // (tool (['"])(?:\\.|(?!\2)[^\\])*\2)$""")
"""Comment of a line of rules, with the name of its tool."""

UNENFORCED = (
    (re.compile("^Unimplemented keys: (.*)"), r"keywords that cannot be enforced: \1"),
    (re.compile("^Unknown format: (.*)"), r"'format' \1 cannot be enforced"),
    (re.compile("^oneOf constraints .*"), "'oneOf' cannot be enforced, as its options may overlap"),
    (
        re.compile("^Schema intersection .*"),
        "recursive '$ref' cannot be enforced with other limits",
    ),
    (re.compile("^(?=regex parse error|lookarounds )"), "'pattern' cannot be enforced: "),
)
"""The library's messages about keywords of a schema, and plain ones."""

SHARE, BURST_S = 0.08, 0.015
"""Share of the engine's time that all grammars may take together, and maximum at once."""
REQUEST_S, TOKEN_S = 0.05, 1e-4
"""Time that the grammar of one request may take in any case: at once, and for each token."""
CALL_S = 0.01
"""Maximum time that one call is charged, so that a garbage collection, page faults or a repeated
compilation in one call do not fail a request."""
RENEWAL_S = 0.02
"""Maximum time of a compilation that is repeated while an answer is followed."""
SPENT_STATES = "lexer error: too many states"
"""Message of a matcher with copies that have together reached the limit of states."""


class TooComplex(GrammarError):
    """The matcher reached its limits, at the beginning of an answer or later in it."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"this grammar is too complex to follow: use fewer repetitions or choices ({why})."
        )


class Compiled:
    """One grammar, for all answers that follow it."""

    def __init__(self, make: Callable[[], LLMatcher]) -> None:
        """``make`` compiles the grammar. Raises as it does."""
        self._make = make
        self.matcher, self._seconds = with_deep_stack(make)

    def copy(self, spent: LLMatcher | None = None) -> tuple[LLMatcher, LLMatcher]:
        """Return a matcher at the beginning of an answer, and the one that it shares states with.

        ``spent`` is a shared matcher with states that its copies have used up: it is compiled
        again, unless that has happened for another answer. Raises TooComplex if that takes long.
        """
        if self.matcher is spent:
            if self._seconds > RENEWAL_S:
                raise TooComplex(SPENT_STATES)
            self.matcher, _ = with_deep_stack(self._make)
        return self.matcher.deep_copy(), self.matcher


class Guide(LogitRule):
    """Follows one answer that must follow a grammar. Used in the engine's thread."""

    def __init__(self, compiled: Compiled, guides: Guides) -> None:
        """Copy the matcher for the first token only, so queued requests do not have one."""
        self._compiled, self._guides = compiled, guides
        self._matcher: LLMatcher | None = None
        self._source: LLMatcher | None = None
        """Matcher that ``_matcher`` shares its states with."""
        self._num_taken = 0
        self._spent_s = 0.0

    def apply(self, answer: Tokens, drafts: Tokens, rulings: Sequence[Ruling]) -> list[Ruling]:
        """Return the mask of each draw. If nothing can follow, the mask allows a token that ends
        answers. O(new tokens) and the library's time for each."""
        found: list[Ruling] = []
        try:
            for known in before_draws(answer, drafts):
                found.append(Ruling(self._found(known, self._mask)))
        except GrammarError as error:
            found += [Ruling(fault=error, is_final=True)] * (len(rulings) - len(found))
        if len(drafts):
            self._go_to(answer)  # The drafts may be rejected.
        return found

    def possible(self, answer: Tokens, drafts: Tokens) -> Tokens:
        """Return the beginning of ``drafts`` that the grammar allows after ``answer``, without a
        token that ends it."""
        try:
            num = self._found(answer, lambda matcher: matcher.validate_tokens(drafts.tolist()))
        except GrammarError:
            return drafts[:0]
        ends = np.isin(drafts[:num], self._guides.ends)
        return drafts[: int(ends.argmax()) if ends.any() else num]

    def is_done(self, answer: Tokens) -> bool:
        """Return True if nothing can follow ``answer``. Raises TooComplex if following it takes too
        much time."""
        return self._found(answer, lambda matcher: matcher.is_stopped())

    def _found(self, answer: Tokens, find: Callable[[LLMatcher], Found]) -> Found:
        """Return the result of ``find`` at the end of ``answer``. Raises TooComplex."""
        started_s = time.thread_time()
        for is_repeated in (False, True):
            matcher = self._go_to(answer)
            found = find(matcher)
            if not matcher.is_error():
                break
            message, self._matcher = matcher.get_error(), None
            if is_repeated or not message.startswith(SPENT_STATES):
                raise TooComplex(reason(message))
            # Other answers may have used up the states that all copies share.
            self._matcher, self._source = self._compiled.copy(self._source)
            self._num_taken = 0
        self._charge(time.thread_time() - started_s, len(answer))
        return found

    def _charge(self, seconds: float, num_tokens: int) -> None:
        seconds = min(seconds, CALL_S)
        self._spent_s += seconds
        is_over = self._guides.spend(seconds)
        if is_over and self._spent_s > REQUEST_S + TOKEN_S * num_tokens:
            raise TooComplex(
                f"it took {1e3 * self._spent_s:.0f} ms for {num_tokens} tokens, and grammars may "
                f"take {SHARE:.0%} of the engine's time"
            )

    def _go_to(self, answer: Tokens) -> LLMatcher:
        """Move the matcher to the end of ``answer``, forwards or backwards. O(difference)."""
        if self._matcher is None:
            self._matcher, self._source = self._compiled.copy()
            self._num_taken = 0
        surplus = self._num_taken - len(answer)
        if surplus > 0:
            self._matcher.rollback(surplus)
        elif surplus < 0:
            self._matcher.consume_tokens(answer[self._num_taken :].tolist())
        self._num_taken = len(answer)
        return self._matcher

    def _mask(self, matcher: LLMatcher) -> Mask:
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return mask[: self._guides.num_mask_bytes]


NUM_REMEMBERED = 128
"""Number of compiled grammars that are cached, of all tenants. One takes 0.1 to 1 MB."""


class Guides:
    """Makes the guides of one engine. Safe to call from any thread, except for ``spend``."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.num_mask_bytes = -(-vocab_size // 8)
        self.ends = np.array(sorted(tokenizer.eos_token_ids if tokenizer else ()), np.int32)
        """Tokens that end an answer."""
        self._left_s, self._at_s = BURST_S, time.perf_counter()
        """Processor time of the engine's thread that grammars could still use, and when."""
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._compiled: dict[Hashable, OrderedDict[Grammar, Compiled]] = {}
        """Grammars of each namespace; namespaces and grammars used last are at the end."""

    def spend(self, seconds: float) -> bool:
        """Take ``seconds``. Returns True if grammars have used more than their share."""
        now_s = time.perf_counter()
        self._left_s = min(BURST_S, self._left_s + SHARE * (now_s - self._at_s)) - seconds
        self._at_s = now_s
        return self._left_s < 0

    def rule(self, grammar: Grammar, namespace: Hashable) -> LogitRule:
        """Return the guide of a new answer, and compile the grammar if ``namespace`` has not used
        it lately. So the time does not tell whether others have.

        Raises GrammarError if the library is missing, or the grammar is invalid, too large, or
        matches only the empty answer. Raises TooComplex if its beginning takes too much time.
        """
        compiled = self._known(grammar, namespace)
        if compiled is None:
            library = load_library()
            with self._lock:
                if self._vocabulary is None:
                    self._vocabulary = make_vocabulary(library, self._tokenizer, self._vocab_size)
            # Outside the lock: it may take a tenth of a second, and other threads compile too.
            compiled = Compiled(partial(make_matcher, library, self._vocabulary, grammar))
            check_beginning(compiled.matcher, self.ends)
            self._keep(grammar, namespace, compiled)
        return Guide(compiled, self)

    def _known(self, grammar: Grammar, namespace: Hashable) -> Compiled | None:
        with self._lock:
            own = self._compiled.pop(namespace, None)
            if own is None:
                return None
            self._compiled[namespace] = own
            if grammar in own:
                own.move_to_end(grammar)
            return own.get(grammar)

    def _keep(self, grammar: Grammar, namespace: Hashable, compiled: Compiled) -> None:
        """Cache a grammar. If there are too many, drop the oldest one of the namespace that has the
        most: each of n namespaces keeps its ``NUM_REMEMBERED / n`` latest. O(namespaces)."""
        with self._lock:
            self._compiled.setdefault(namespace, OrderedDict())[grammar] = compiled
            if sum(map(len, self._compiled.values())) > NUM_REMEMBERED:
                largest = max(self._compiled, key=lambda one: len(self._compiled[one]))
                self._compiled[largest].popitem(last=False)
                if not self._compiled[largest]:
                    del self._compiled[largest]


def load_library() -> ModuleType:
    """Import llguidance. Raises GrammarError if it is not installed."""
    try:
        return importlib.import_module("llguidance")
    except ModuleNotFoundError as error:
        missing = how_to_install(error)
        raise GrammarError(f"guided answers are not available: {missing}.") from None


def make_vocabulary(
    library: ModuleType, tokenizer: Tokenizer | None, vocab_size: int
) -> LLTokenizer:
    """Build the library's form of a vocabulary. Raises GrammarError without a token that ends
    answers.

    O(its tokens): a second for 150,000, during which no other thread of the process runs.
    """
    if tokenizer is None or not tokenizer.eos_token_ids:
        raise GrammarError("guided answers require a tokenizer with a token that ends answers.")
    wrapped = library.TokenizerWrapper(_ByteVocabulary(tokenizer, vocab_size))
    made: LLTokenizer = library.LLTokenizer(wrapped, eos_token=sorted(tokenizer.eos_token_ids))
    return made


class _ByteVocabulary:
    """A tokenizer in the form that the library wraps: every token as bytes. Unlike the library's
    own reader of tokenizers, it treats ``<think>`` and ``<tool_call>`` as text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        ends = tokenizer.eos_token_ids
        controls = tokenizer.control_ids | ends
        self.special_token_ids, self.eos_token_id = sorted(controls), min(ends)
        ids = range(max(vocab_size, tokenizer.vocab_size))
        self.tokens = [MARK * (i in controls) + tokenizer.token_bytes(i) for i in ids]
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens of the only text that may follow. It may begin inside a character."""
        # Behind another character, because some tokenizers add a space to the beginning of a text.
        ids = self._encode(f"{BEFORE}{text.decode('utf-8', 'replace')}", add_special_tokens=False)
        ends = (n for n, i in enumerate(ids, 1) if self.tokens[i].endswith(BEFORE.encode()))
        ids = ids[next(ends, 0) :]
        is_same = b"".join(self.tokens[i] for i in ids) == text
        return ids if is_same else [self.tokens.index(bytes((byte,))) for byte in text]


def make_matcher(library: ModuleType, vocabulary: LLTokenizer, grammar: Grammar) -> LLMatcher:
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
    matcher: LLMatcher = library.LLMatcher(vocabulary, text, log_level=0, limits=bounds)
    if matcher.is_error():
        message = matcher.get_error()
        # A position in generated text is useless for the client.
        message = message if grammar.kind == "given" else OUR_PLACE.sub("", message)
        raise _wrong(message, has_schema=grammar.kind == "lark")
    return matcher


def with_deep_stack(make: Callable[[], Found]) -> tuple[Found, float]:
    """Return the value of ``make`` and its processor time. It runs in a thread of its own with
    ``STACK_BYTES``: the library follows the references of a schema by recursion, and ends the
    process at the end of a stack."""
    found: list[tuple[Found, float]] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append((make(), time.thread_time()))
        except BaseException as error:
            errors.append(error)

    with STACK_LOCK:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


def check_beginning(matcher: LLMatcher, ends: Tokens) -> None:
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
            raise GrammarError("no answer fits this grammar, or only the empty one: send another.")
        if not len(possible):
            return
        tried.consume_token(int(draw.choice(possible)))
    _allowed(tried)


def _allowed(tried: LLMatcher) -> Mask:
    """Return one number per token: 1 if it may come next."""
    allowed = np.unpackbits(np.frombuffer(tried.compute_bitmask(), np.uint8), bitorder="little")
    if tried.is_error():
        why = reason(tried.get_error())
        if why == ENDLESS:
            raise GrammarError("no answer fits this grammar, as a rule never ends: send another.")
        raise TooComplex(why)
    return allowed


def _wrong(message: str, has_schema: bool = False) -> GrammarError:
    quote, why = QUOTE.search(message), reason(message)
    if has_schema:
        for pattern, said in UNENFORCED:
            why = pattern.sub(said, why)
    if "increase limits." in why:  # Advice for programs that use the library.
        return TooComplex(why.partition(";")[0])
    tool = TOOL.search(quote[1]) if quote else None
    where = f"{tool[1]}: " if tool else ""
    return GrammarError(f"{where}this grammar cannot be used: {why}.")


def reason(message: str) -> str:
    """Reduce a message of the library to its first line and the error of a regular expression."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines[1:] if line.startswith("error: ")]
    return " ".join([*lines[:1], *errors[-1:]]).rstrip(".")
