"""Grammars of answers: a JSON schema, a regular expression, a choice or a Lark or GBNF grammar.

Compilation must not delay other requests, so a grammar that would take long to compile is refused
first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from math import prod
from typing import Any, Literal

from engine.text.json_text import read_json

MAX_CHARS = 256 * 1024
"""Maximum length of a schema, of an expression, or of all choices together."""
MAX_GRAMMAR_CHARS = 16 * 1024
"""Maximum length of a grammar."""
MAX_CHOICES = 4096
MAX_DEPTH = 60
"""Maximum depth of a schema; the library fails at about twice that."""
MAX_MULTIPLE = 10_000
"""Maximum product of the ``multipleOf`` values in a schema, without their factors of ten. The
matcher has that many states, and the time to build them grows with the square."""
WHITESPACE = r" |\n {0,8}"
"""White space between the parts of a JSON answer, at most once: a blank, or a new line with its
indent. More would let a model spend ``max_tokens`` on white space."""
NESTED = ("%json", "%regex")
CALL = "call_"
"""Prefix of the names of the rules that are tool calls."""


class GrammarError(ValueError):
    """The grammar cannot be used; the message gives the reason in one sentence."""


class TooComplex(GrammarError):
    """The matcher reached its limits, at the beginning of an answer or later in it."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"this grammar is too complex to follow: use fewer repetitions or choices ({why})."
        )


@dataclass(frozen=True, slots=True)
class Grammar:
    """Grammar of a whole answer. Equal grammars are compiled once."""

    kind: Literal["lark", "regex", "given", "marks"]
    """Form of ``text``. ``lark``: llguidance's dialect of Lark; ``given``: that, or GBNF;
    ``marks``: see the field ``marks``."""
    text: str = ""
    """Grammar, in the form that ``kind`` names."""
    end_of_reasoning: str | None = None
    """Text that ends the reasoning before the guided part, or None if there is no reasoning."""
    marks: tuple[tuple[str, str], ...] = ()
    """(mark, Lark grammar of the text after it). An answer is free until a mark outside its
    reasoning, follows the mark's grammar to its end, and is free again."""
    may_think: bool = False
    """True if an answer with ``marks`` may begin with reasoning."""

    def behind(self, end_of_reasoning: str) -> Grammar:
        """Return this grammar, preceded by reasoning that ends with the given text."""
        return replace(self, end_of_reasoning=end_of_reasoning)

    @classmethod
    def of_schema(cls, schema: str | bool | Mapping[str, Any]) -> Grammar:
        """Return the grammar of JSON that matches a schema, given as an object or as its text.
        Raises GrammarError for an invalid schema."""
        if isinstance(schema, str):
            try:
                schema = read_json(schema)
            except ValueError as error:
                raise GrammarError(f"a JSON schema cannot be read: {error}.") from None
        if not isinstance(schema, bool | Mapping):
            raise GrammarError("a JSON schema must be an object, or the text of one.")
        return cls("lark", f"start: {json_rule(schema, {'whitespace_pattern': WHITESPACE})}")

    @classmethod
    def of_regex(cls, regex: str) -> Grammar:
        """Return the grammar of text that matches a regular expression as a whole. Raises
        GrammarError if the expression is too long."""
        return cls("regex", bounded("a regular expression", regex, MAX_CHARS))

    @classmethod
    def of_choices(cls, choices: Sequence[str]) -> Grammar:
        """Return the grammar of one of the given texts. Raises GrammarError if there is none, or
        one is empty."""
        if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
            raise GrammarError(
                f"a choice is made among 1 to {MAX_CHOICES} texts, none of them empty."
            )
        texts = bounded("a choice", " | ".join(map(quoted, choices)), MAX_CHARS)
        return cls("lark", f"start: CHOICE\nCHOICE: {texts}")

    @classmethod
    def of_text(cls, text: str) -> Grammar:
        """Return the grammar given in llguidance's Lark (start symbol ``start``) or in GBNF
        (``root``).

        Raises GrammarError if it is too long, or contains a nested schema or expression.
        """
        bounded("a grammar", text, MAX_GRAMMAR_CHARS)
        if any(word in text for word in NESTED):
            raise GrammarError(
                f"a grammar must not contain {' or '.join(NESTED)}: use a JSON schema or a regular "
                "expression instead."
            )
        return cls("given", text)


def json_rule(schema: bool | Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Return a Lark expression for JSON that matches ``schema``."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    _check(schema)
    text = json.dumps({**schema, "x-guidance": dict(options)})
    return f"%json {bounded('a JSON schema', text, MAX_CHARS)}"


def _check(schema: Mapping[str, Any]) -> None:
    """Raise GrammarError if the schema is nested too deep, or has ``multipleOf`` values that are
    invalid or would take long to compile."""
    multiples, left = set[int](), list[tuple[Any, int]]([(schema, 0)])
    while left:
        value, depth = left.pop()
        if depth > 2 * MAX_DEPTH:
            raise GrammarError(f"a schema may be nested at most {MAX_DEPTH} levels deep.")
        if isinstance(value, list):
            left += [(part, depth + 1) for part in value]
        if not isinstance(value, Mapping):
            continue
        left += [(part, depth + 1) for part in value.values()]
        number = value.get("multipleOf", 1)
        if isinstance(number, bool | Mapping):  # Schema of a property of this name.
            continue
        if not isinstance(number, int | float) or not number > 0:
            raise GrammarError("multipleOf must be a number above 0.")
        digits = Decimal(str(number)).normalize().as_tuple().digits
        multiples.add(int("".join(map(str, digits))))
    if prod(multiples) > MAX_MULTIPLE:
        raise GrammarError(
            f"the product of the multipleOf values of a schema must be at most {MAX_MULTIPLE}, "
            "not counting factors of ten: remove some."
        )


def bounded(what: str, text: str, most: int) -> str:
    if len(text) > most:
        raise GrammarError(f"{what} may have at most {most} characters (got {len(text)}).")
    return text


def quoted(text: str) -> str:
    """Return ``text`` as a Lark string. Raises GrammarError for a lone surrogate, which cannot be
    encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GrammarError("a choice must be text that can be encoded in UTF-8.") from None
    return json.dumps(text, ensure_ascii=False)
