"""Schemas and regular expressions of up to a megabyte: each is compiled or refused in bounded time
and memory, and none ends the process.

Each is compiled in a process of its own, which is a fork, so that a crash of the library is seen.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from engine.plugins.guided.guides import Guides
from engine.requests.logit_rules import ruled
from engine.text.grammar import Grammar, GrammarError
from engine.text.tokenizer_files import HFTokenizer

MAX_S, MAX_MIB = 3.0, 256
"""Limits of one grammar: processor time, and memory above that of the process before."""
NUM_TOKENS = 5
"""Tokens for which the mask is computed."""
Schema = dict[str, Any]

NESTED: dict[str, Callable[[Schema], Schema]] = {
    "properties": lambda inner: {"properties": {"a": inner}},
    "items": lambda inner: {"items": inner},
    "prefix": lambda inner: {"prefixItems": [inner]},
    "additional": lambda inner: {"additionalProperties": inner},
    "any of": lambda inner: {"anyOf": [inner, {"type": "null"}]},
    "all of": lambda inner: {"allOf": [inner, {"title": "a"}]},
}


def chain(kind: str, number: int, depth: int) -> Schema:
    """Return a schema whose definitions refer to each other, each ``depth`` levels deep."""
    definitions: Schema = {f"d{number}": {"type": "string"}}
    for index in range(number):
        inner: Schema = {"$ref": f"#/$defs/d{index + 1}"}
        for _ in range(depth):
            inner = NESTED[kind](inner)
        definitions[f"d{index}"] = inner
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def named(number: int, schema: Schema) -> Schema:
    return {"type": "object", "properties": {f"p{index}": schema for index in range(number)}}


SCHEMAS: dict[str, Callable[[], Schema]] = {
    "a megabyte of texts": lambda: {"enum": [f"xxxxxxxxxx{index}" for index in range(60_000)]},
    "20,000 texts": lambda: {"enum": [f"xxx{index}" for index in range(20_000)]},
    "a text of 250 kB": lambda: {"const": "x" * 250_000},
    "7,000 names": lambda: named(7000, {"type": "string"}),
    "6,000 required names": lambda: named(6000, {}) | {"required": [f"p{i}" for i in range(6000)]},
    "3,500 options": lambda: {"anyOf": [named(1, {"const": index}) for index in range(3500)]},
    "3,500 parts": lambda: {"allOf": [named(1, {"minimum": index}) for index in range(3500)]},
    "many patterns": lambda: named(150, {"type": "string", "pattern": "^(a|b)*c{1,50}$"}),
    "a slow pattern": lambda: {"type": "string", "pattern": ".?" * 1365 + "." * 1365},
    "names by patterns": lambda: {
        "patternProperties": {f"^p{i}.*[a-z]{{1,20}}$": {} for i in range(180)}
    },
    "a longest text": lambda: {"type": "string", "maxLength": 10**9},
    "a shortest list": lambda: {"type": "array", "items": {"type": "string"}, "minItems": 10**7},
    "5,000 levels": lambda: chain("items", 1, 5000),
    **{
        f"{number} references, {depth} levels, {kind}": partial(chain, kind, number, depth)
        for kind in NESTED
        for number, depth in ((120, 60), (3000, 1))
    },
}
EXPRESSIONS = {
    "a megabyte": "a" * (1 << 20),
    "optional": "a?" * 2048,
    "optional and demanded": ".?" * 1365 + "." * 1365,
    "counted": "a{1000000}",
    "counted five times": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}",
    "classes": r"[\w\W]{1000}" * 300,
    "letters": r"\p{L}+\p{N}+" * 340,
    "stars": "(a*)*b" * 680,
    "anything": ".*a.*b.*c" * 455,
    "groups": "(" * 2000 + "a" + ")" * 2000,
    "states": r"(.|\n)*e(.|\n){2000}",
    "and, not": "a&~b" * 1024,
}
TEXTS = {
    "slow expression": "start: /" + ".?" * 2725 + "." * 2725 + "/",
    "rules": "start: "
    + " ".join(f"a{i}" for i in range(450))
    + "".join(f'\na{i}: "x"?' for i in range(450)),
    "concatenated": "start: T\nT: " + " ".join(["/.?/"] * 1360),
}


def grammars() -> dict[str, Callable[[], Grammar]]:
    """Return the makers of all grammars by name."""
    found: dict[str, Callable[[], Grammar]] = {
        f"schema: {name}": lambda make=make: Grammar.of_schema(make())
        for name, make in SCHEMAS.items()
    }
    found |= {f"regex: {n}": partial(Grammar.of_regex, text) for n, text in EXPRESSIONS.items()}
    return found | {f"grammar: {n}": partial(Grammar.of_text, t) for n, t in TEXTS.items()}


def attempt(guides: Guides, make: Callable[[], Grammar]) -> None:
    """Compile a grammar and follow it for some tokens, unless it is refused."""
    try:
        rule = guides.rule(make(), None)
    except GrammarError:
        return
    for number in range(NUM_TOKENS):
        ruled([rule], np.full(number, 97, np.int32), np.zeros(0, np.int32))


def cost(guides: Guides, make: Callable[[], Grammar]) -> tuple[int, float, float]:
    """Return the exit status, seconds and MiB of an attempt in another process."""
    child = os.fork()
    if not child:
        most = round(2 * MAX_S)
        resource.setrlimit(resource.RLIMIT_CPU, (most, most))
        status = 1
        try:
            before = resource.getrusage(resource.RUSAGE_SELF)
            attempt(guides, make)
            after = resource.getrusage(resource.RUSAGE_SELF)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            mib = (after.ru_maxrss - before.ru_maxrss) / 1024
            status = int(seconds > MAX_S or mib > MAX_MIB)
        finally:
            os._exit(status)
    began = time.monotonic()
    _, status, used = os.wait4(child, 0)
    assert time.monotonic() - began < 600
    return status, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def run(seed: int, number: int) -> dict[str, Any]:
    """Try ``number`` grammars. Returns the slowest and the largest."""
    tokenizer = HFTokenizer()
    guides = Guides(tokenizer, tokenizer.vocab_size)
    guides.rule(Grammar.of_choices(("a",)), None)
    costs: dict[str, tuple[float, float]] = {}
    for name, make in list(grammars().items())[:number]:
        status, seconds, mib = cost(guides, make)
        assert not status, f"{name}: status {status} after {seconds:.1f} s with {mib:.0f} MiB"
        costs[name] = seconds, mib
    slowest = max(costs, key=lambda name: costs[name][0])
    largest = max(costs, key=lambda name: costs[name][1])
    return {
        "grammars": len(costs),
        "slowest": f"{slowest}: {costs[slowest][0]:.2f} s",
        "largest": f"{largest}: {costs[largest][1]:.0f} MiB with the process",
    }
