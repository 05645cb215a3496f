"""Schemas of a tool's arguments: the types of values that are written as text, and grammars."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from functools import cached_property
from itertools import chain, islice
from types import NoneType
from typing import Any

from engine.errors import Json, JsonObject
from engine.text.answers import MAX_NAME
from engine.text.bounded import MAX_DEPTH, read_json
from engine.text.grammar import (
    GrammarError,
    Schema,
    changed,
    json_rule,
    quoted,
    resolved,
    simplified,
)

AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space as written by ``json.dumps`` and chat templates, so that a call that comes back has
the same tokens."""
MAX_BRANCHES, MAX_STEPS = 64, 256
"""Maximum numbers of alternatives of one schema, and of schemas that are searched for them."""
MAX_LITERAL = 1 << 16
"""Maximum length of a value in Python's form."""
UNIONS = "anyOf", "oneOf"
UNMATCHED = {"format", "not", "if", "allOf", "$ref", "$dynamicRef"}
"""Keywords that the form with tags cannot enforce on texts."""
KINDS: Mapping[type, set[str]] = {
    NoneType: {"null"},
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    str: {"string"},
    list: {"array"},
    dict: {"object"},
}
ALIASES = {
    **{"str": "string", "int": "integer", "long": "integer", "float": "number", "double": "number"},
    **{"bool": "boolean", "list": "array", "tuple": "array", "dict": "object", "none": "null"},
}
"""Names of types of other languages, which clients send."""
NAMED = {"properties", "required", "additionalProperties"}
"""Keywords of the schema of all arguments that the form with tags enforces."""
PERMITTING = "additionalProperties", "patternProperties"
"""Keywords by which a schema permits arguments that it does not name."""
IMPLIED = {
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains"),
    "object": (*sorted(NAMED), "patternProperties", "minProperties", "maxProperties"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
"""Type -> keywords that show it in a schema without ``type``."""
LIMITS = {
    *chain.from_iterable(IMPLIED.values()),
    *("minLength", "maxLength", "pattern", "nullable", "propertyNames", "dependencies"),
    *("dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems"),
    *("additionalItems", "$recursiveRef", "oneOf", *UNMATCHED),
}
"""Keywords that exclude values, besides the types and lists of values."""
WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
SCALAR = {
    "null": "null",
    "boolean": "true|false",
    "integer": "-?(?:0|[1-9][0-9]*)",
    "number": r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?",
}
"""Type -> expression of its values without limits."""
_DATE = "[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:(?:[0-5][0-9]|60)"
_TIME += r"(?:\.[0-9]+)?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[tT]{_TIME}",
    "uuid": "[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
}
"""Format -> expression of its texts (RFC 3339, 9562, 2673), for values between tags."""
LARGEST = 2**53
"""Largest limit of a number that the matcher follows in any case."""
LOOKS = re.compile(r"\(\?<?[=!]|\\[bBAZzGkK1-9]")
"""Parts of regular expressions that cannot be matched forwards."""
BRACKETS = {"array": r"\[", "object": r"\{"}
"""Type -> first character of its values, in expressions of Lark."""


Pairs = list[tuple[str, str]]
"""Names and texts of arguments."""


class Parameters:
    """Schema of the arguments of one tool."""

    def __init__(self, function: Mapping[str, Any]) -> None:
        self._given = function.get("parameters") or {"type": "object", "properties": {}}
        self.is_strict = function.get("strict") is True
        self._found: dict[str, list[Schema]] = {}
        """Alternatives of arguments that were read."""

    @cached_property
    def root(self) -> Schema:
        """JSON schema of all arguments. A tool without parameters takes none."""
        found = simplified(self._given)
        return found if isinstance(found, dict) else {"enum": []}

    def branches(self, schema: object) -> list[Schema]:
        """Return the alternatives of ``schema``, without references and unions outside of their
        parts. Keywords that two schemas set differently are left in ``allOf``; ``oneOf`` is True
        if only one of several may match."""
        steps = iter(range(MAX_STEPS))

        def search(one: object) -> list[Schema]:
            if next(steps, None) is None or one is False:
                return []
            if not isinstance(one, Mapping):
                return [{}]
            found = [{k: v for k, v in one.items() if k not in ("$ref", "allOf", *UNIONS)}]
            if len(_listed(one, "oneOf")) > 1:
                found[0]["oneOf"] = True
            groups = [[resolved(one["$ref"], self.root)]] if "$ref" in one else []
            groups += [[each] for each in _listed(one, "allOf")]
            groups += [_listed(one, name) for name in UNIONS if _listed(one, name)]
            for group in groups:
                inner = list(islice(chain.from_iterable(map(search, group)), MAX_BRANCHES))
                both = (_merged(first, second) for first in found for second in inner)
                found = list(islice(both, MAX_BRANCHES))
            return found

        return search(schema)

    @property
    def is_open(self) -> bool:
        """True if the schema names no arguments and permits any."""
        first, *others = self.branches(self.root) or [{"properties": {}}]
        permits = first.get("additionalProperties", "properties" not in first) is True
        is_limited = self.is_strict and {*first} & (LIMITS - NAMED | {"required"})
        return permits and not (others or first.get("properties") or is_limited)

    def properties(self) -> dict[str, Any]:
        """Return the schemas of the named arguments, in their order."""
        found: dict[str, list[Any]] = {}
        for one in self.branches(self.root):
            named = one.get("properties")
            for name, schema in named.items() if isinstance(named, Mapping) else ():
                if schema not in found.setdefault(name, []):
                    found[name].append(schema)
        return {name: all[0] if len(all) == 1 else {"anyOf": all} for name, all in found.items()}

    def others(self, arguments: JsonObject) -> list[str]:
        """Return the arguments that a schema with names does not name, unless it permits them."""
        is_free = any(one.get(word) for one in self.branches(self.root) for word in PERMITTING)
        names = self.properties()
        return [] if is_free or not names else [name for name in arguments if name not in names]

    def needs(self, pairs: Pairs, others: Pairs) -> bool:
        """Return True if ``pairs`` have a required argument that ``others`` lack."""
        required = {name for one in self.branches(self.root) for name in _listed(one, "required")}
        missing = {*dict(pairs)} - {*dict(others)}
        return not required.isdisjoint(missing)

    def read(self, name: str, text: str) -> tuple[Json, bool]:
        """Return the value of an argument that is written as ``text``, and whether it has a type of
        the schema. Texts stay as they are unless the schema has only other types."""
        if name not in self._found:
            schemas = [self.properties().get(name)]
            if schemas == [None]:
                roots = self.branches(self.root)
                schemas = [one.get("additionalProperties") for one in roots]
                for one in roots:
                    named = one.get("patternProperties")
                    schemas += named.values() if isinstance(named, Mapping) else ()
            known = [one for one in schemas if isinstance(one, Mapping)]
            self._found[name] = self.branches({"anyOf": known}) if known else []
        branches, plain = self._found[name] or [{}], text.strip()
        kinds = set[str]().union(*map(kinds_of, branches))
        members = [member for one in branches for member in _members(one) or ()]
        is_text = "string" in kinds
        if is_text and (text in members or plain in members):
            return (text if text in members else plain), True
        if is_text and (text != plain or len(kinds) == 1):
            return text, True
        try:
            value = read_literal(plain, is_text)
        except ValueError:
            return text, is_text
        for member in members:
            if member == value and KINDS[type(member)] & KINDS[type(value)]:
                return member, True
        of_value = KINDS[type(value)]
        if isinstance(value, float) and value.is_integer():
            of_value = {"integer", "number"}
        if of_value & kinds:
            return value, True
        return (text, True) if is_text else (value, False)

    # --- Grammars -----------------------------------------------------------------------------

    def json(self, schema: Any, **more: Any) -> str:
        """Return a Lark expression for JSON that matches a schema inside this one, and has the
        further fields ``more``. Raises GrammarError."""
        root: object = self.root
        if not self.is_strict:
            root = changed(self.root, lambda one: _loosened(one, self.root))
            schema = changed(schema, lambda one: _loosened(one, self.root))
        # References point to the root, which becomes an inner part.
        schema = changed(schema, _moved)
        if '"$ref"' in json.dumps([schema, more]):
            more["$defs"] = {"parameters": changed(root, _moved)}
        options = AS_DUMPED | ({} if self.is_strict else {"lenient": True})
        schema = {} if schema is True else {"enum": []} if schema is False else schema
        return json_rule({**schema, **more}, options)

    def arguments(self) -> list[tuple[str, bool, Any]]:
        """Return (name, whether it is required, schema) of each argument. Raises GrammarError if a
        strict tool limits its arguments in a way that a form without JSON cannot enforce."""
        roots = self.branches(self.root)
        named = {name: one for name, one in self.properties().items() if one is not False}
        needed = [{*_listed(one, "required")} for one in roots] or [set()]
        if self.is_strict:
            limits = LIMITS - NAMED | {"enum", "const"}
            refused = [name for one in roots for name in one if name in limits]
            others = [one.get("additionalProperties") for one in roots]
            refused += ["additionalProperties"] * any(isinstance(one, Mapping) for one in others)
            refused += ["anyOf"] * (len(roots) > 1) + ["required"] * (not needed[0] <= {*named})
            if refused:
                raise self._unenforced(refused[0], "the arguments")
        return [(name, all(name in each for each in needed), one) for name, one in named.items()]

    def tagged(self, rule: str, end: str) -> tuple[list[tuple[str, bool, str]], list[str]]:
        """Return (name, whether it is required, expression of its value) of each argument in the
        form with tags, and the lines of the rules that the expressions use. ``rule`` begins their
        names, ``end`` is the expression of the end of a value. Raises GrammarError."""
        lines, parts = list[str](), []
        for number, (name, is_needed, schema) in enumerate(self.arguments()):
            texts, nested = self._texts(name, schema)
            if not texts:
                value = f"({self.json(schema)}) {end}"
            elif "VALUE" in texts and not nested:
                value = "value"
            else:  # One terminal: the matcher chooses the longest, and does not go back.
                value, terminal = f"{rule}_{number}_text", f"{rule}_{number}_text".upper()
                union = " | ".join(f"({one})" for one in texts)
                first = "|".join(BRACKETS[kind] for kind in nested)
                is_text = f" & ~/({first})(?s:.*)/" if nested else ""
                lines.append(f"{terminal}: ({union}){is_text}")
                lines.append(f"{value}[suffix={end}]: {terminal}")
                if nested:
                    both = {"allOf": [schema, {"type": nested}]}
                    value = f"({value} | ({self.json(both)}) {end})"
            parts.append((name, is_needed, value))
        return parts, lines

    def _texts(self, name: str, schema: Any) -> tuple[list[str], list[str]]:
        """Return expressions of the values of an argument that are written as text, none if all are
        JSON, and the types that are written as JSON beside them. Raises GrammarError."""
        texts, kinds, limited = list[str](), set[str](), set[str]()
        branches = self.branches(schema)
        for one in branches:
            of_one, is_limited = kinds_of(one), not LIMITS.isdisjoint(one)
            is_listed = _members(one) is not None and not is_limited
            if "string" in of_one or (of_one and is_listed):
                texts.append(" & ".join(self._text_limits(name, one)))
            kinds |= set() if is_listed else of_one
            limited |= of_one if is_limited else set()
        apart = [member for one in branches for member in _members(one) or ("", "")]
        is_one_of = len(texts) > 1 and any("oneOf" in one for one in branches)
        if self.is_strict and texts:
            if is_one_of and any(apart.count(one) > 1 for one in apart):
                raise self._unenforced("oneOf", repr(name[:MAX_NAME]))
            if limited & {"integer", "number"}:  # A text that is read as one may break its limits.
                keyword = next((one for one in UNIONS if one in schema), "type")
                raise self._unenforced(keyword, repr(name[:MAX_NAME]))
        nested = sorted((limited if "VALUE" in texts else kinds) & {*BRACKETS})
        scalars = [f"/{SCALAR[kind]}/" for kind in sorted(kinds & {*SCALAR})]
        return texts + scalars if texts else [], nested

    def _text_limits(self, name: str, schema: Schema) -> list[str]:
        """Return expressions of terminals that a text must all match."""
        limits = ["VALUE" if _members(schema) is None else _any_member(schema)]
        sizes = [schema.get(name) for name in ("minLength", "maxLength")]
        least, most = (int(one) if isinstance(one, int | float) else None for one in sizes)
        is_possible = most is None or (least or 0) <= most
        if is_possible and (least or most is not None):
            limits.append(f"/(?s:.{{{least or 0},{'' if most is None else most}}})/")
        form = FORMATS.get(str(schema.get("format")))
        limits += [f"/{form}/"] if form else []
        refused = [one for one in schema if one in UNMATCHED and (one != "format" or not form)]
        refused += [] if is_possible else ["maxLength"]
        if "pattern" in schema:
            pattern = schema["pattern"]
            is_matched = not LOOKS.search(str(pattern)) if self.is_strict else _is_matched(pattern)
            if is_matched and (found := _searched(pattern)) is not None:
                limits.append(f"/{found}/")
            else:
                refused.insert(0, "pattern")
        if refused and self.is_strict:
            raise self._unenforced(refused[0], repr(name[:MAX_NAME]))
        return limits

    def _unenforced(self, keyword: str, place: str) -> GrammarError:
        return GrammarError(
            f"{keyword!r} of {place} cannot be enforced in the form in which this model writes "
            "calls: remove it, or 'strict'."
        )


def kinds_of(schema: Schema) -> set[str]:
    """Return the JSON types of values that match a branch; ``string`` if it shows none."""
    given, members = schema.get("type"), _members(schema)
    named = {*_types(given)}
    if members is not None:
        shown = [KINDS[type(member)] for member in members]
        is_typed = named or given == []  # Two types that exclude each other.
        found = set[str]().union(*(one & named if is_typed else one for one in shown))
    else:
        implied = {kind for kind, words in IMPLIED.items() if any(one in schema for one in words)}
        found = named or (set() if given == [] else implied or {"string"})
    return found | ({"null"} if schema.get("nullable") is True else set())


def _types(given: object) -> list[str]:
    """Return the names of JSON types in the value of ``type``, in lower case."""
    listed = given if isinstance(given, list) else [given]
    names = [one.lower() for one in listed if isinstance(one, str)]
    known = set[str]().union(*KINDS.values())
    return [found for one in names if (found := ALIASES.get(one, one)) in known]


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


def _members(schema: Schema) -> list[Json] | None:
    """Return the only values that match a schema, or None if it lists none."""
    listed = schema.get("enum")
    if "const" in schema:
        only = schema["const"]
        return [only] if not isinstance(listed, list) or only in listed else []
    return listed if isinstance(listed, list) else None


def _any_member(schema: Schema) -> str:
    """Return an expression of the values that a schema lists."""
    kinds, found = kinds_of(schema), []
    for one in _members(schema) or ():
        text = one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)
        found += [quoted(text)] if KINDS[type(one)] & kinds else []
    return f"({' | '.join(found)})"


def _merged(first: Schema, second: Schema) -> Schema:
    """Return a schema that means both."""
    both, conflicts = {**second, **first}, list[Schema]()
    for name in {*first} & {*second} & {"type", "enum", "const", *LIMITS}:
        one, other = first[name], second[name]
        if one == other:
            continue
        if name == "properties" and isinstance(one, Mapping) and isinstance(other, Mapping):
            same = {key: {"allOf": [one[key], other[key]]} for key in {*one} & {*other}}
            both[name] = {**other, **one, **same}
        elif name in ("required", "allOf"):
            both[name] = [*_listed(first, name), *_listed(second, name)]
        elif name in ("type", "enum"):
            lists = [x if isinstance(x, list) else [x] for x in (one, other)]
            lists = [[*x, *["integer"] * ("number" in x)] if name == "type" else x for x in lists]
            both[name] = [each for each in lists[0] if each in lists[1]]
        else:
            conflicts.append({name: other})
    return both | ({"allOf": [*_listed(both, "allOf"), *conflicts]} if conflicts else {})


def read_literal(text: str, may_be_text: bool) -> Any:
    """Return a value in the form of JSON or Python. Raises ValueError for any other text."""
    word = text if may_be_text else {"none": "null"}.get(text.lower(), text.lower())
    if word in WORDS:
        return WORDS[word]
    try:
        return read_leniently(text)
    except ValueError:
        depth = sum(map(text.count, "[{("))
        if (
            (may_be_text and text[:1] not in ("[", "{"))
            or len(text) > MAX_LITERAL
            or depth > MAX_DEPTH
        ):
            raise
    try:
        with warnings.catch_warnings():  # About escapes.
            warnings.simplefilter("ignore")
            return read_json(json.dumps(ast.literal_eval(text), allow_nan=False))
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from None


STRING_PARTS = re.compile(r'"(?:[^"\\]|\\.)*+(?P<end>"?)', re.DOTALL)
"""A string of JSON, or its beginning up to the end of the text."""
_CONTROLS = {code: f"\\u{code:04x}" for code in range(32)}


def read_leniently(text: str) -> Any:
    """Parse JSON, in whose strings a model may write line breaks and tabs as they are. Raises
    ValueError."""
    try:
        return read_json(text)
    except ValueError:
        return read_json(STRING_PARTS.sub(lambda one: one[0].translate(_CONTROLS), text))


def _moved(schema: Schema) -> Schema:
    """Return a schema whose references to the root name its new place."""
    for name in ("$id", "id", "$schema"):
        if isinstance(schema.get(name), str):
            base = schema.pop(name)
            if str(schema.get("$ref")).startswith(f"{base}#"):
                schema["$ref"] = schema["$ref"].removeprefix(base)
    if str(schema.get("$ref")).startswith("#"):
        schema["$ref"] = f"#/$defs/parameters{schema['$ref'][1:]}"
    return schema


def _loosened(schema: Schema, root: Schema) -> Schema:
    """Return a schema without limits that the matcher refuses even if it is lenient."""
    if "$ref" in schema and not isinstance(resolved(schema["$ref"], root), Mapping | bool):
        del schema["$ref"]
    if not _is_matched(schema.get("pattern", "")):
        del schema["pattern"]
    if isinstance(named := schema.get("patternProperties"), dict):
        schema["patternProperties"] = {k: v for k, v in named.items() if _is_matched(k)}
    for name in IMPLIED["number"]:
        limit = schema.get(name, 0)
        if type(limit) not in (int, float) or abs(limit) > LARGEST:
            del schema[name]
    if not isinstance(schema.get("required", []), list):
        del schema["required"]
    if kinds := _types(schema.pop("type", [])):
        schema["type"] = kinds if len(kinds) > 1 else kinds[0]
    return schema


def _is_matched(pattern: Any) -> bool:
    """Return True if the matcher supports a regular expression, as far as is known."""
    try:
        return not LOOKS.search(re.compile(pattern).pattern.replace("\\\\", ""))
    except (re.error, TypeError, RecursionError, OverflowError):
        return False


_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()|^$/\n]|[^\\\[()|^$/\n]+|.", re.DOTALL)


def _searched(pattern: object) -> str | None:
    """Return an expression of whole texts that have ``pattern``, or None for anchors inside."""
    if not isinstance(pattern, str):
        return None
    options, depth = [list[str]()], 0
    for piece in _PIECE.findall(pattern):
        depth += {"(": 1, ")": -1}.get(piece, 0)
        if piece == "|" and not depth:
            options.append([])
        else:
            piece = piece.replace("\n", "\\n")
            options[-1].append(piece if piece[0] == "\\" else piece.replace("/", "\\/"))
    found = []
    for one in options:
        first, last = one[:1] == ["^"], one[-1:] == ["$"]
        inner = one[first : len(one) - last]
        if "^" in inner or "$" in inner:
            return None
        found.append("(?s:.*)" * (not first) + f"(?:{''.join(inner)})" + "(?s:.*)" * (not last))
    return "|".join(found)
