"""Mechanical rules for prose: docstrings, comments, error messages and help texts.

Each rule finds a habit that made this code base hard to read. A match is reported with file, line
and text. The rules hold for every file under `COVERED`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

COVERED = ("hybridcache", "kernels", "engine", "experiments", "tests")
"""Folders that follow the rules."""

NOUNS = (
    "The A An One Every All Each Same Number Bytes Seconds FLOPs True False None Whether ValueError"
)
"""First words of a function's docstring that are in place of a verb. Properties are described by a
noun, and constructors by their arguments."""

MAX_WORDS = 30
"""Words in one sentence."""

OPENERS = "What Whatever Who Whose Whom Of Where How Which Those These That Let Have If When"
"""First words of a docstring that announce a clause in place of a verb or a noun."""

RULES = {
    "opener": re.compile(rf"(?:{OPENERS.replace(' ', '|')})\b"),
    "noun": re.compile(rf"(?:(?:{NOUNS.replace(' ', '|')})\b|O\()"),
    "fragment": re.compile(r"\b(?:None|False|True|empty|0): (?!if\b)[a-z]"),
    "person": re.compile(
        r"\b(?:nobody|somebody|anybody|everybody|who|whoever|whose|whom|oneself|one's"
        r"|knows?|wants?|asks?|told|tells|believes?|minds)\b",
        re.IGNORECASE,
    ),
    "phrase": re.compile(
        r"\b(?:can not|to be had|lies|so many|of (?:its|one's|their) own|beside|anew|afresh"
        r"|thereof|therein|wherein|whereof|what|whatever|none of its"
        r"|(?<!there )is no (?!longer\b))\b",
        re.IGNORECASE,
    ),
}
LITERAL = re.compile(r"``[^`]*``|`[^`\n]*`|'[^'\n]{1,30}'(?!\w)|\"[^\"\n]{1,60}\"")
"""Quoted code and names: they are not prose."""

SENTENCE_END = re.compile(r"(?<=[.:;?!)])\s+|\n\s*\n|\n\s*(?=[-*|] |\d+\. )")


class Prose(NamedTuple):
    """One piece of text in a source file."""

    place: str
    kind: str
    """`docstring`, `function` (a docstring that starts with a verb), `comment` or `message`."""
    text: str


def test_the_rules_find_the_habits_they_name() -> None:
    bad = {
        "opener": "Of these, sent: counted by the thread.",
        "noun": "True if there is one.",
        "fragment": "Its tier. None: there is none.",
        "person": "A cache knows nobody.",
        "phrase": "It can not find what is evicted.",
        "long": "word " * (MAX_WORDS + 1),
    }
    for rule, text in bad.items():
        assert rule in broken_rules(Prose("", "function", text)), rule
    good = "Number of queued bytes, or None if there is no `whose` tier.\n\n>>> what = None"
    assert broken_rules(Prose("", "docstring", good)) == []


@pytest.mark.parametrize("rule", [*RULES, "long"])
def test_prose_follows_the_style_guide(rule: str) -> None:
    found = [f"{p.place}: {p.text.strip()!r}" for r, p in violations() if r == rule]
    assert found == [], f"{len(found)} places break the rule {rule!r}:\n" + "\n".join(found)


@cache
def violations() -> list[tuple[str, Prose]]:
    return [(rule, prose) for prose in all_prose() for rule in broken_rules(prose)]


def broken_rules(prose: Prose) -> list[str]:
    """Return the names of the rules that a text breaks."""
    text = LITERAL.sub("x", without_code(prose.text))
    broken = [name for name in ("fragment", "person", "phrase") if RULES[name].search(text)]
    is_docstring = prose.kind in ("docstring", "function")
    if is_docstring and RULES["opener"].match(prose.text.strip()):
        broken.append("opener")
    if prose.kind == "function" and RULES["noun"].match(prose.text.strip()):
        broken.append("noun")
    if any(len(sentence.split()) > MAX_WORDS for sentence in SENTENCE_END.split(text)):
        broken.append("long")
    return broken


def without_code(text: str) -> str:
    """Remove doctests with their output, and tables."""
    kept, in_doctest = [], False
    for line in text.split("\n"):
        bare = line.strip()
        in_doctest = bare.startswith((">>>", "...")) or (in_doctest and bare != "")
        if not in_doctest and "|" not in bare and not re.search(r"\S {3,}\S", bare):
            kept.append(line)
    return "\n".join(kept)


def all_prose() -> Iterator[Prose]:
    for folder in COVERED:
        paths = sorted((ROOT / folder).rglob("*.py"))
        assert paths, folder
        for path in paths:
            yield from prose_of(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


def prose_of(name: str, source: str) -> Iterator[Prose]:
    """Yield the docstrings, messages and comments of one file."""
    in_strings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for child in body if isinstance(body, list) else ():
            match child:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    is_function = child is body[0] and starts_with_verb(node)
                    kind = "function" if is_function else "docstring"
                    yield Prose(f"{name}:{child.lineno}", kind, text)
        if isinstance(node, ast.Constant | ast.JoinedStr):
            in_strings.update(range(node.lineno + 1, (node.end_lineno or node.lineno) + 1))
        for message in messages_of(node):
            yield Prose(f"{name}:{node.lineno}", "message", message)
    lines, comment, start = source.split("\n"), "", 0
    for number, line in enumerate([*lines, ""], 1):
        found = None if number in in_strings else re.search(r"(?:^\s*|  )# (.*)$", line)
        if comment and not (found and line.lstrip().startswith("#")):
            yield Prose(f"{name}:{start}", "comment", comment)
            comment = ""
        if found:
            start = start if comment else number
            comment += found[1] + "\n"


def starts_with_verb(node: ast.AST) -> bool:
    """Return True for functions that are neither properties, fixtures, tests nor special."""
    return (
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith(("__", "test_"))
        and not re.search("property|fixture", " ".join(map(ast.unparse, node.decorator_list)))
    )


def messages_of(node: ast.AST) -> Iterator[str]:
    """Yield the texts of raised errors and of `help=` arguments."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        for argument in node.exc.args:
            yield from literal_text(argument)
    elif isinstance(node, ast.keyword) and node.arg == "help":
        yield from literal_text(node.value)


def literal_text(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) else "x" for p in node.values]
        yield "".join(map(str, parts))
