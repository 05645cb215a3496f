"""Evaluation on new generated tasks: answered greedily, compared as a whole."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.engine import Engine
from engine.requests.spec import SamplingParams
from engine.text.outputs import RequestOutput
from engine.text.tokenizer import ByteTokenizer
from experiments.training import tasks

SHOTS = 4
MOST_TOKENS = 200
"""Maximum length of an answer; no correct one is as long."""
NEWLINE = ord("\n")
TOKENIZER = ByteTokenizer()
TEMPLATE = TOKENIZER.chat_template
assert TEMPLATE is not None


@dataclass(frozen=True, slots=True)
class Question:
    prompt: str
    is_right: Callable[[str], bool]
    """True for the text of a correct answer."""
    ends_with_line: bool = True
    """Or else with the message."""


def _problem(rng: random.Random, num_steps: int) -> Question:
    prompt, problem = tasks.few_shot(rng, SHOTS, num_steps)
    return Question(prompt, lambda text: tasks.answer_of(text) == problem.answer)


def _line(prompt: str, wanted: str) -> Question:
    return Question(prompt, lambda text: text.strip() == wanted.strip())


def _tool_call(rng: random.Random) -> Question:
    messages = tasks.tool_chat(rng)
    call = messages[2]["tool_calls"][0]["function"]
    prompt = TEMPLATE.render(
        messages[:2], tools=rng.sample(tasks.TOOLS, len(tasks.TOOLS)), add_generation_prompt=True
    )
    return Question(prompt, lambda text: called(text) == call, ends_with_line=False)


def called(text: str) -> dict[str, Any] | None:
    """Name and arguments of the first call in an answer of the built-in template; None: no call."""
    _, mark, rest = text.partition("<tool_call>")
    body, end, _ = rest.partition("</tool_call>")
    try:
        found = json.loads(body)
    except ValueError:
        return None
    return found if mark and end and isinstance(found, dict) else None


KINDS: dict[str, Callable[[random.Random], Question]] = {
    "problems of one step": lambda rng: _problem(rng, 1),
    "problems of two steps": lambda rng: _problem(rng, 2),
    "problems of three steps": lambda rng: _problem(rng, 3),
    "look-ups in 8 rows": lambda rng: _line(*tasks.look_up(rng, 8)),
    "look-ups in 24 rows": lambda rng: _line(*tasks.look_up(rng, 24)),
    "copying": lambda rng: _line(*tasks.copying(rng)),
    "tool calls": _tool_call,
}


def questions(kind: str, count: int, seed: int = 0) -> list[Question]:
    """``count`` of a kind; of one seed always the same, and never one of training's draws."""
    rng = random.Random(f"{seed} evaluation {kind}")
    return [KINDS[kind](rng) for _ in range(count)]


def answers(engine: Engine, asked: Sequence[Question]) -> list[RequestOutput]:
    """Greedy."""
    prompts = [TOKENIZER.encode(question.prompt) for question in asked]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=MOST_TOKENS,
            stop_token_ids=(NEWLINE,) if question.ends_with_line else (),
        )
        for question in asked
    ]
    return engine.generate(prompts, params)


def solved(
    engine: Engine, count: int, seed: int = 0, kinds: Sequence[str] = tuple(KINDS)
) -> dict[str, float]:
    """Share of ``count`` questions answered rightly, by kind."""
    shares = {}
    for kind in kinds:
        asked = questions(kind, count, seed)
        right = [
            question.is_right(TOKENIZER.decode(answer.token_ids))
            for question, answer in zip(asked, answers(engine, asked), strict=True)
        ]
        shares[kind] = round(sum(right) / count, 4)
    return shares
