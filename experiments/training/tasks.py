"""Generated tasks with answers that can be checked, drawn from a seed.

The tasks are word problems in one to three steps, sums, look-ups in a table, copying, and short
chats with tool calls. Every text has the form of the server's built-in chat template or of a plain
completion, so prompts look like the training data. Names, things and numbers are drawn. No text of
a person is used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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


@dataclass(frozen=True, slots=True)
class Problem:
    """Question with one whole number as its answer."""

    question: str
    working: str
    """Steps of the solution, ending in ``#### answer`` as in GSM8K."""
    answer: int
    num_steps: int


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
    return Problem(" ".join(sentences), " ".join([*working, f"#### {value}"]), value, num_steps)


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
_GAINS = (
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
_TIMES = (
    "Then {n} gets {a} times as many.",
    "The number of {t} grows {a} times.",
)


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


def few_shot(rng: random.Random, shots: int, num_steps: int | None = None) -> tuple[str, Problem]:
    """Return (prompt, open problem). The prompt has ``shots`` solved problems before the open one.

    The number of steps is drawn for each problem if ``num_steps`` is None.
    """
    steps = [num_steps or rng.choice((1, 1, 2, 2, 3)) for _ in range(shots + 1)]
    solved = [word_problem(rng, count) for count in steps[:-1]]
    problem = word_problem(rng, steps[-1])
    blocks = [f"Question: {p.question}\nAnswer: {p.working}\n" for p in solved]
    return "\n".join([*blocks, f"Question: {problem.question}\nAnswer:"]), problem


def answer_of(text: str) -> int | None:
    """Return the number after the first ``####``, or None if there is none."""
    _, mark, rest = text.partition("####")
    digits = rest.strip().split()[:1]
    number = digits[0].rstrip(".,").replace(",", "") if mark and digits else ""
    return int(number) if number.lstrip("-").isdecimal() else None


def look_up(rng: random.Random, rows: int, answered: int = 0) -> tuple[str, str]:
    """Return (prompt, value). The prompt is a table of ``rows`` keys and a question for one of
    them.

    ``answered`` questions with their answers precede the question.
    """
    keys = [f"{rng.choice(KEYS)}-{rng.randint(10, 99)}" for _ in range(rows)]
    keys = list(dict.fromkeys(keys))
    values = [str(rng.randint(100, 999)) for _ in keys]
    table = [f"{key} = {value}" for key, value in zip(keys, values, strict=True)]
    before = [f"Look up: {row}" for row in rng.choices(table, k=answered)]
    rank = rng.randrange(len(keys))
    lines = ["Table:", *table, "", *before, f"Look up: {keys[rank]} ="]
    return "\n".join(lines), f" {values[rank]}"


def sums(rng: random.Random) -> str:
    """Return lines like those of a word problem's working, with drawn numbers."""
    lines = []
    for _ in range(rng.randint(6, 16)):
        value = rng.randint(2, rng.choice((MOST // 4, MOST)))
        _, sign, amount = _step(rng, value, "", "", "", "")
        after = {"+": value + amount, "-": value - amount, "*": value * amount}[sign]
        lines.append(f"{value} {sign} {amount} = {after}.\n")
    return "".join(lines)


def copying(rng: random.Random) -> tuple[str, str]:
    """Return (prompt with a text to repeat, the text)."""
    words = [rng.choice((*KEYS, *THINGS, *NAMES)) for _ in range(rng.randint(4, 24))]
    text = " ".join(words) + f" {rng.randint(1000, 9999)}"
    return f"Repeat exactly: {text}\nRepeated:", f" {text}"


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
    return (
        "get_count",
        {"person": person, "thing": thing},
        f"How many {thing} does {person} have?",
        str(count),
        f"{person} has {count} {thing}.",
    )


def _ask_key(rng: random.Random) -> ToolQuestion:
    key, value = f"{rng.choice(KEYS)}-{rng.randint(10, 99)}", rng.randint(100, 999)
    return (
        "look_up",
        {"key": key},
        rng.choice(("What is the value of {}?", "Look up {}, please.")).format(key),
        str(value),
        f"The value of {key} is {value}.",
    )


def _ask_sum(rng: random.Random) -> ToolQuestion:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    return (
        "add",
        {"a": a, "b": b},
        rng.choice(("What is {} plus {}?", "Add {} and {}.")).format(a, b),
        str(a + b),
        f"{a} plus {b} is {a + b}.",
    )


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


def problem_chat(rng: random.Random) -> list[dict[str, Any]]:
    """Return messages: a word problem and its working."""
    problem = word_problem(rng, rng.choice((1, 1, 2, 2, 3)))
    return [
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": problem.working},
    ]


Render = Callable[..., str]
"""Signature of ``ChatTemplate.render``: messages, and ``tools=``."""


def sample(rng: random.Random, render: Render) -> str:
    """Return one text of a task that is drawn by its share.

    ``render`` formats messages as the chat template does.
    """
    kind = rng.choices(
        ("problems", "problem_chat", "sums", "look_up", "copying", "tools", "chat"),
        (10, 2, 24, 3, 2, 1, 1),
    )[0]
    if kind == "problems":
        prompt, problem = few_shot(rng, rng.choice((0, 2, 4)))
        return f"{prompt} {problem.working}\n<|endoftext|>"
    if kind == "sums":
        return sums(rng) + "<|endoftext|>"
    if kind == "look_up":
        table = look_up(rng, rng.choice((4, 8, 16, 24)), answered=rng.randint(4, 12))
        return "".join(table) + "\n<|endoftext|>"
    if kind == "copying":
        return "".join(copying(rng)) + "\n<|endoftext|>"
    if kind == "tools":
        return render(tool_chat(rng), tools=rng.sample(TOOLS, len(TOOLS)))
    return render({"problem_chat": problem_chat, "chat": chat}[kind](rng))


_ANSWER = re.compile(
    r"(?:Answer:|Repeated:|Look up: \S+ =)(.*\n)|\d = (\d+\.\n)"
    r"|<\|im_start\|>assistant\n((?s:.*?)<\|im_end\|>)|(<\|endoftext\|>)"
)


def parts(text: str) -> list[tuple[str, bool]]:
    """Split a text of ``sample`` into (piece, is_answer).

    Answers follow from the text before them. The other pieces are drawn, so a model can only guess
    them.
    """
    found, end = [], 0
    for match in _ANSWER.finditer(text):
        start, stop = match.span(match.lastindex or 0)
        found += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    return [(piece, is_answer) for piece, is_answer in [*found, (text[end:], False)] if piece]
