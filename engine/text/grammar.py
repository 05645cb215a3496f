"""Grammars of answers: a JSON schema, a regular expression, a choice, or a Lark or GBNF grammar.

Compilation must not delay other requests, so a grammar that would take long to compile is refused
first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import prod
from typing import Any, Literal
from urllib.parse import unquote

from engine.text.bounded import read_json

MAX_CHARS = 256 * 1024
"""Maximum length of a schema, of an expression, or of all choices or tools together."""
MAX_CHOICES = 4096
MAX_EXPRESSION_CHARS = 4096
"""Maximum length of a regular expression, or of all patterns of a schema together. The time to
compile one grows with the square: 10,000 characters take three seconds."""
MAX_GIVEN_CHARS = 8 * 1024
"""Maximum length of a grammar that a client has written, expressions included."""
MAX_MULTIPLE = 10_000
"""Maximum product of the ``multipleOf`` values in a schema, without their factors of ten. The
matcher has that many states, and the time to build them grows with the square."""
WHITESPACE = r" |\n {0,8}"
"""White space between the parts of a JSON answer, at most once: a blank, or a new line with its
indent. More would let a model spend ``max_tokens`` on white space."""
NESTED = ("%json", "%regex")


class GrammarError(ValueError):
    """The grammar cannot be used; the message gives the reason in one sentence."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """Grammar of a whole answer. Its constructors raise GrammarError. Equal grammars are compiled
    once."""

    kind: Literal["lark", "regex", "given"]
    """Form of ``text``. ``lark``: llguidance's dialect of Lark; ``given``: that, or GBNF."""
    text: str
    end_of_reasoning: str | None = None
    """Text that ends the reasoning before the guided part, or None if there is no reasoning."""
    looser: Grammar | None = None
    """Grammar to use if this one cannot be compiled, or None to refuse it."""

    def __post_init__(self) -> None:
        most = MAX_GIVEN_CHARS if self.kind == "given" else MAX_CHARS
        if len(self.text) > most:
            raise GrammarError(
                f"its grammar may have at most {most} characters (got {len(self.text)})."
            )

    @classmethod
    def of_schema(cls, schema: str | bool | Mapping[str, object]) -> Grammar:
        """Return the grammar of JSON that matches a schema, given as an object or as its text."""
        if isinstance(schema, str):
            try:
                schema = read_json(schema)
            except ValueError as error:
                raise GrammarError(f"a JSON schema cannot be read: {error}.") from None
        if not isinstance(schema, bool | Mapping):
            raise GrammarError("a JSON schema must be an object, or the text of one.")
        try:
            rule = json_rule(schema, {"whitespace_pattern": WHITESPACE})
        except RecursionError:
            raise GrammarError("a JSON schema is nested too deep: give it fewer levels.") from None
        return cls("lark", f"start: {rule}")

    @classmethod
    def of_regex(cls, regex: str) -> Grammar:
        """Return the grammar of text that matches a regular expression as a whole."""
        _check_expressions(len(regex))
        return cls("regex", regex)

    @classmethod
    def of_choices(cls, choices: Sequence[str]) -> Grammar:
        """Return the grammar of one of the given texts. Raises GrammarError if one is empty."""
        if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
            raise GrammarError(f"send 1 to {MAX_CHOICES} choices, none of them empty.")
        return cls("lark", f"start: CHOICE\nCHOICE: {' | '.join(map(quoted, choices))}")

    @classmethod
    def of_text(cls, text: str) -> Grammar:
        """Return the grammar given in llguidance's Lark (start symbol ``start``) or in GBNF
        (``root``). It has no nested schema or expression."""
        if any(word in text for word in NESTED):
            raise GrammarError(
                f"a grammar must not contain {' or '.join(NESTED)}: use a JSON schema or a regular "
                "expression instead."
            )
        return cls("given", text)


def json_rule(schema: bool | Mapping[str, object], options: Mapping[str, object]) -> str:
    """Return a Lark expression for JSON that matches ``schema``."""
    root = simplified(schema if isinstance(schema, Mapping) else {} if schema else {"enum": []})
    root = root if isinstance(root, dict) else {"enum": []}
    _check_numbers(root)
    return f"%json {json.dumps({**root, 'x-guidance': dict(options)})}"


NAMED_SCHEMAS = (
    *("properties", "patternProperties", "$defs", "definitions"),
    *("dependentSchemas", "dependencies"),
)
"""Keywords of a schema whose values are schemas by name."""
DATA = ("enum", "const", "default", "examples", "example")
"""Keywords of a schema whose values are data."""
Schema = dict[str, Any]
"""An object of a JSON schema, which a client has written."""


def changed(schema: object, change: Callable[[Schema], object]) -> object:
    """Return a copy of ``schema`` in which ``change`` replaced each schema, the inner ones first.
    O(its size)."""
    if not isinstance(schema, Mapping):
        return schema
    copy: Schema = {}
    for name, value in schema.items():
        if name in NAMED_SCHEMAS and isinstance(value, Mapping):
            value = {key: changed(one, change) for key, one in value.items()}
        elif name not in DATA:
            is_list = isinstance(value, list)
            value = [changed(one, change) for one in value] if is_list else changed(value, change)
        copy[name] = value
    return change(copy)


def resolved(reference: object, root: Mapping[str, object]) -> object:
    """Return the schema inside ``root`` that a ``$ref`` points to, or None if there is none."""
    base, _, pointer = str(reference).partition("#")
    value: object = root if base in ("", root.get("$id")) else None
    for part in unquote(pointer).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value if pointer[:1] in ("", "/") else None


def simplified(schema: Mapping[str, object]) -> object:
    """Return ``schema`` without keywords that the matcher does not support and that have no effect,
    or that others express: zod and pydantic write them."""
    return changed(schema, lambda one: _simplified(one, schema))


def _simplified(schema: Schema, root: Mapping[str, object]) -> Schema | bool:
    if schema.get("uniqueItems") is False or schema.get("maxItems") in (0, 1):
        schema.pop("uniqueItems", None)
    if schema.get("not") in ({}, True):
        return False
    if isinstance(options := schema.get("oneOf"), list):  # Compared only without references.
        alone = [
            one["$ref"] if isinstance(one, dict) and [*one] == ["$ref"] else None for one in options
        ]
        schema["oneOf"] = [
            (ref and resolved(ref, root)) or one for ref, one in zip(alone, options, strict=True)
        ]
    names, others = schema.get("propertyNames"), schema.get("additionalProperties", True)
    if names in ({"type": "string"}, {}, True):
        del schema["propertyNames"]
    elif isinstance(names, dict) and {"properties", "patternProperties"}.isdisjoint(schema):
        kinds = {*names} - {"type", "title", "description"}
        if kinds == {"enum"} and isinstance(names["enum"], list):
            schema |= {"properties": {str(name): others for name in names["enum"]}}
        elif kinds == {"pattern"}:
            schema |= {"patternProperties": {names["pattern"]: others}}
        else:
            return schema
        del schema["propertyNames"]
        schema["additionalProperties"] = False
    return schema


def _check_expressions(num_chars: int) -> None:
    if num_chars > MAX_EXPRESSION_CHARS:
        raise GrammarError(
            f"regular expressions may have at most {MAX_EXPRESSION_CHARS} characters together (got "
            f"{num_chars}): for a list of texts, use choices or an enum."
        )


def _check_numbers(schema: Mapping[str, object]) -> None:
    """Raise GrammarError if the ``multipleOf`` values or the patterns of a schema would take long
    to compile."""
    multiples, parts, num_chars = set[int](), list[object]([schema]), 0
    for part in parts:
        if isinstance(part, list):
            parts += part
        elif isinstance(part, Mapping):
            parts += part.values()
            pattern, by_pattern = part.get("pattern"), part.get("patternProperties")
            num_chars += len(pattern) if isinstance(pattern, str) else 0
            num_chars += sum(map(len, by_pattern)) if isinstance(by_pattern, Mapping) else 0
            number = part.get("multipleOf")
            if type(number) in (int, float) and number:
                digits = Decimal(str(number)).normalize().as_tuple().digits
                multiples.add(int("".join(map(str, digits))))
    _check_expressions(num_chars)
    if prod(multiples) > MAX_MULTIPLE:
        raise GrammarError(
            f"the product of the multipleOf values of a schema must be at most {MAX_MULTIPLE}, "
            "not counting factors of ten: remove some."
        )


def quoted(text: str) -> str:
    """Return ``text`` as a Lark string."""
    return json.dumps(text, ensure_ascii=False)
