"""Texts for measurements: tasks drawn from a seed, and the Python standard library.

The tasks are word problems in one to three steps and short chats, also with tool calls. Names,
things and numbers are drawn. No text of a person is used. The modules are under the PSF License
(``LICENSE.txt`` of Python). The built-in model was trained on such tasks and modules, except one
module in thirty.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ada Ben Cleo Dan Eva Finn Gina Hugo Ines Jan Kira Leo Mia Nils Olga Paul Rosa Sam Tara Uwe "
    "Vera Will Yara Zoe"
)
THINGS = _words(
    "apples pens books coins stamps shells cards eggs plums cups nails seeds tickets marbles "
    "buttons candles"
)
PLACES = _words("box bag shelf basket drawer tin crate jar")
MOST = 99
"""Largest number in a word problem. A model of a few million weights can learn these."""
KEYS = _words(
    "amber birch cedar delta ember fjord grove heron ivory jasper karst lotus maple north opal "
    "pearl quartz raven slate tulip umber violet willow xenon yarrow zinc"
)


class Problem(NamedTuple):
    """Question with one whole number as its answer."""

    question: str
    working: str
    """Steps of the solution, ending in ``#### answer`` as in GSM8K."""


def word_problem(rng: random.Random, num_steps: int) -> Problem:
    """Return a problem of one to three additions, subtractions and small multiplications."""
    name, other = rng.sample(NAMES, 2)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    value = rng.randint(2, 40)
    sentences = [rng.choice(_BEGINNINGS).format(n=name, v=value, t=thing, p=place)]
    working = []
    for _ in range(num_steps):
        sentence, sign, amount = _step(rng, value, name, other, thing, place)
        after = {"+": value + amount, "-": value - amount, "*": value * amount}[sign]
        sentences.append(sentence)
        working.append(f"{value} {sign} {amount} = {after}.")
        value = after
    sentences.append(rng.choice(_QUESTIONS).format(n=name, t=thing))
    return Problem(" ".join(sentences), " ".join([*working, f"#### {value}"]))


_BEGINNINGS = (
    "{n} has {v} {t}.",
    "There are {v} {t} in {n}'s {p}.",
    "{n} starts with {v} {t}.",
    "{n} keeps {v} {t} in a {p}.",
)
_QUESTIONS = (
    "How many {t} does {n} have now?",
    "How many {t} are there in the end?",
    "How many {t} does that make?",
)
_GAINS: tuple[str, ...] = (
    "{n} buys {a} more.",
    "{o} gives {n} {a} more {t}.",
    "{n} finds {a} {t} in a {p}.",
    "Then {a} {t} are added.",
)
_LOSSES = (
    "{n} gives {a} to {o}.",
    "{n} loses {a} {t}.",
    "{o} takes {a} of them.",
    "Then {a} {t} are sold.",
)
_TIMES = ("Then {n} gets {a} times as many.", "The number of {t} grows {a} times.")


def _step(
    rng: random.Random, value: int, name: str, other: str, thing: str, place: str
) -> tuple[str, str, int]:
    """Return (sentence, sign, amount). The value stays between 0 and ``MOST``."""
    signs = []
    if value < MOST - 1:
        signs += ["+", "+"]
    if value > 3:
        signs += ["-", "-"]
    if 2 <= value <= MOST // 4:
        signs.append("*")
    sign = rng.choice(signs)
    if sign == "+":
        amount, forms = rng.randint(2, min(MOST - value, 20)), _GAINS
    elif sign == "-":
        amount, forms = rng.randint(2, min(value - 1, 20)), _LOSSES
    else:
        amount, forms = rng.randint(2, 4), _TIMES
    words = {"n": name, "o": other, "t": thing, "p": place, "a": amount}
    return rng.choice(forms).format(**words), sign, amount


def few_shot(rng: random.Random, shots: int) -> tuple[str, Problem]:
    """Return (prompt, open problem). The prompt has ``shots`` solved problems before the open one,
    each with a random number of steps."""
    steps = [rng.choice((1, 1, 2, 2, 3)) for _ in range(shots + 1)]
    *solved, problem = (word_problem(rng, count) for count in steps)
    blocks = [f"Question: {p.question}\nAnswer: {p.working}\n" for p in solved]
    return "\n".join([*blocks, f"Question: {problem.question}\nAnswer:"]), problem


ASSISTANT = "You are a helpful assistant."


def _tool(name: str, about: str, **fields: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {field: {"type": kind} for field, kind in fields.items()},
        "required": list(fields),
    }
    function = {"name": name, "description": about, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = (
    _tool("get_count", "How many of a thing a person has.", person="string", thing="string"),
    _tool("look_up", "The value of a key in the table.", key="string"),
    _tool("add", "The sum of two numbers.", a="integer", b="integer"),
)
"""Tools in the form of a request's ``tools``."""


def tool_chat(rng: random.Random) -> list[dict[str, Any]]:
    """Return messages: one to three times a question, a call, its result and the answer."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": ASSISTANT}]
    for ask in rng.sample((_ask_count, _ask_key, _ask_sum), rng.randint(1, 3)):
        name, arguments, question, result, answer = ask(rng)
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": answer},
        ]
    return messages


ToolQuestion = tuple[str, dict[str, str | int], str, str, str]
"""(tool name, arguments, question, result, answer)."""


def _ask_count(rng: random.Random) -> ToolQuestion:
    person, thing, count = rng.choice(NAMES), rng.choice(THINGS), rng.randint(1, 99)
    question = f"How many {thing} does {person} have?"
    answer = f"{person} has {count} {thing}."
    return "get_count", {"person": person, "thing": thing}, question, str(count), answer


def _ask_key(rng: random.Random) -> ToolQuestion:
    key, value = f"{rng.choice(KEYS)}-{rng.randint(10, 99)}", rng.randint(100, 999)
    question = rng.choice(("What is the value of {}?", "Look up {}, please.")).format(key)
    return "look_up", {"key": key}, question, str(value), f"The value of {key} is {value}."


def _ask_sum(rng: random.Random) -> ToolQuestion:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    question = rng.choice(("What is {} plus {}?", "Add {} and {}.")).format(a, b)
    return "add", {"a": a, "b": b}, question, str(a + b), f"{a} plus {b} is {a + b}."


def chat(rng: random.Random) -> list[dict[str, Any]]:
    """Return messages: one to three small questions about earlier messages."""
    person, thing, count = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 99)
    turns = [
        (f"My name is {person}.", f"Hello {person}, how can I help you?"),
        (f"I have {count} {thing}.", f"You have {count} {thing}."),
        ("What is my name?", f"Your name is {person}."),
        (f"How many {thing} do I have?", f"You have {count} {thing}."),
        ("Thank you.", "You are welcome."),
    ]
    messages = [{"role": "system", "content": ASSISTANT}]
    for question, answer in turns[: rng.randint(2, 5)]:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


EXCLUDED = ("site-packages", "dist-packages", "__pycache__", "/test/", "/tests/", "/idle_test/")
MAX_BYTES = 120_000
"""Maximum size of one file. A few generated tables have megabytes."""
HELD_OUT = 30
"""One module in this many is held out."""


def sources(held_out: bool) -> Iterator[str]:
    """Yield the texts of the standard library's modules, in the same order on every machine with
    the same Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not any(part in f"/{path.relative_to(root).as_posix()}" for part in EXCLUDED)
    )
    for name in sorted(paths, key=_digest):
        # Modules that were excluded from training depend only on their names.
        if (int(_digest(name)[:8], 16) % HELD_OUT == 0) != held_out:
            continue
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if len(text) <= MAX_BYTES:
            yield f"# {name}\n{text}<|endoftext|>"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
