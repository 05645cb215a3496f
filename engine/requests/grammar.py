"""What an answer must look like: a JSON schema, a regular expression, a choice or a grammar.

Whoever asks for one is not to keep others waiting: what would take long to compile is refused
before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from math import prod
from typing import Any, Literal

from engine.text.json_text import JSONValueError, read_json

MAX_CHARS = 256 * 1024
"""Of a schema, an expression or all choices."""
MAX_GRAMMAR_CHARS = 16 * 1024
"""Of a grammar."""
MAX_CHOICES = 4096
MAX_DEPTH = 60
"""Of a schema; the library stops at about twice that."""
MAX_MULTIPLE = 10_000
"""The product of the ``multipleOf`` in a schema, without their tens: the states of what checks
them are as many, and the time to find them grows as the square."""
WHITESPACE = r" |\n {0,8}"
"""Between the parts of a JSON answer, at most once: a blank, or a new line and its indent. More
would be spent of ``max_tokens`` by a model that goes on with it."""
NESTED = ("%json", "%regex")
CALL = "call_"
"""Begins the names of the rules that are calls."""


class GrammarError(ValueError):
    """A grammar that can not be served, in one sentence."""


class TooComplex(GrammarError):
    """A grammar that took too much to follow, at its beginning or far in an answer."""

    def __init__(self, why: str) -> None:
        super().__init__(
            "this grammar is too complex to be followed: ask for fewer repetitions or choices "
            f"({why})."
        )


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a whole answer must be. Equal ones are compiled once."""

    kind: Literal["lark", "regex", "given", "marks"]
    """In which form: ``lark`` in llguidance's dialect; ``given``: in that, or in GBNF; ``marks``:
    see there."""
    text: str = ""
    end_of_reasoning: str | None = None
    """What comes first is free, up to this text; None: nothing does."""
    marks: tuple[tuple[str, str], ...] = ()
    """(mark, Lark grammar of what follows it). An answer is free up to a mark that does not stand
    in its reasoning, follows the mark's grammar to its end, and is free again."""
    may_think: bool = False
    """Of an answer with ``marks``: it may begin with reasoning."""

    def behind(self, end_of_reasoning: str) -> Grammar:
        """The same, behind reasoning that ends so."""
        return replace(self, end_of_reasoning=end_of_reasoning)

    @classmethod
    def of_schema(cls, schema: str | bool | Mapping[str, Any]) -> Grammar:
        """JSON that a schema (an object, or its text) allows. GrammarError: it is none."""
        if isinstance(schema, str):
            try:
                schema = read_json(schema)
            except JSONValueError as error:
                raise GrammarError(f"a JSON schema cannot be read: {error}.") from None
            except ValueError:
                schema = ""
        if not isinstance(schema, bool | Mapping):
            raise GrammarError("a JSON schema must be an object, or the text of one.")
        return cls("lark", f"start: {json_rule(schema, {'whitespace_pattern': WHITESPACE})}")

    @classmethod
    def of_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.of_schema({"type": "object"})

    @classmethod
    def of_regex(cls, regex: str) -> Grammar:
        """Text that a regular expression matches as a whole. GrammarError: it is too long."""
        return cls("regex", bounded("a regular expression", regex, MAX_CHARS))

    @classmethod
    def of_choices(cls, choices: Sequence[str]) -> Grammar:
        """One of the texts given. GrammarError: there is none, or an empty one."""
        if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
            raise GrammarError(
                f"a choice is made among 1 to {MAX_CHOICES} texts, none of them empty."
            )
        texts = bounded("a choice", " | ".join(map(quoted, choices)), MAX_CHARS)
        return cls("lark", f"start: CHOICE\nCHOICE: {texts}")

    @classmethod
    def of_text(cls, text: str) -> Grammar:
        """What ``start`` (of GBNF ``root``) derives in a grammar in llguidance's Lark, or in GBNF.
        GrammarError: it is too long, or nests a schema or an expression in a form of its own."""
        bounded("a grammar", text, MAX_GRAMMAR_CHARS)
        if any(word in text for word in NESTED):
            raise GrammarError(
                f"a grammar may not hold {' or '.join(NESTED)}: ask for a JSON schema or a regular "
                "expression by itself."
            )
        return cls("given", text)


def json_rule(schema: bool | Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """JSON that ``schema`` allows, as part of a Lark grammar."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    _check(schema)
    text = json.dumps({**schema, "x-guidance": dict(options)})
    return f"%json {bounded('a JSON schema', text, MAX_CHARS)}"


def _check(schema: Mapping[str, Any]) -> None:
    """GrammarError: the schema is nested too deep, or would take long for its ``multipleOf``."""
    multiples: set[int] = set()
    for value in _multiples(schema):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise GrammarError("multipleOf must be a number above 0.")
        digits = Decimal(str(value)).normalize().as_tuple().digits
        multiples.add(int("".join(map(str, digits))))
    if prod(multiples) > MAX_MULTIPLE:
        raise GrammarError(
            f"the multipleOf of a schema, multiplied, must stay within {MAX_MULTIPLE} without "
            "their tens: leave some out."
        )


def _multiples(schema: Mapping[str, Any]) -> Iterator[Any]:
    """Every ``multipleOf``, wherever it stands."""
    left: list[tuple[Any, int]] = [(schema, 0)]
    while left:
        value, depth = left.pop()
        if depth > 2 * MAX_DEPTH:
            raise GrammarError(f"a schema may be nested {MAX_DEPTH} deep, not deeper.")
        if isinstance(value, Mapping):
            if "multipleOf" in value:
                yield value["multipleOf"]
            left += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, list):
            left += [(part, depth + 1) for part in value]


def bounded(what: str, text: str, most: int) -> str:
    if len(text) > most:
        raise GrammarError(f"{what} may have {most} characters here, not {len(text)}.")
    return text


def quoted(text: str) -> str:
    """A string of Lark. GrammarError: a lone surrogate, which no text has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GrammarError("a choice must be text that has a UTF-8 form.") from None
    return json.dumps(text, ensure_ascii=False)
