"""Evaluation of a model on newly generated tasks, with greedy answers and exact comparison."""

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
MAX_TOKENS = 200
"""Maximum length of an answer. Correct answers are shorter."""
NEWLINE = ord("\n")
TOKENIZER = ByteTokenizer()
TEMPLATE = TOKENIZER.chat_template
assert TEMPLATE is not None


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt and the check of its answer."""

    prompt: str
    is_correct: Callable[[str], bool]
    """True for the text of a correct answer."""
    ends_with_line: bool = True
    """True if the answer ends with its line, False if it ends with the message."""


def _problem(rng: random.Random, num_steps: int) -> Question:
    prompt, problem = tasks.few_shot(rng, SHOTS, num_steps)
    return Question(prompt, lambda text: tasks.answer_of(text) == problem.answer)


def _line(prompt: str, expected: str) -> Question:
    return Question(prompt, lambda text: text.strip() == expected.strip())


def _tool_call(rng: random.Random) -> Question:
    messages = tasks.tool_chat(rng)
    call = messages[2]["tool_calls"][0]["function"]
    prompt = TEMPLATE.render(
        messages[:2], tools=rng.sample(tasks.TOOLS, len(tasks.TOOLS)), add_generation_prompt=True
    )
    return Question(prompt, lambda text: called(text) == call, ends_with_line=False)


def called(text: str) -> dict[str, Any] | None:
    """Return name and arguments of the first call in an answer of the built-in template, or None if
    there is no call."""
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
    """Return ``count`` questions of one kind: the same for the same seed, and never a sample of the
    training."""
    rng = random.Random(f"{seed} evaluation {kind}")
    return [KINDS[kind](rng) for _ in range(count)]


def answers(engine: Engine, batch: Sequence[Question]) -> list[RequestOutput]:
    """Generate greedy answers."""
    prompts = [TOKENIZER.encode(question.prompt) for question in batch]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=MAX_TOKENS,
            stop_token_ids=(NEWLINE,) if question.ends_with_line else (),
        )
        for question in batch
    ]
    return engine.generate(prompts, params)


def solved(
    engine: Engine, count: int, seed: int = 0, kinds: Sequence[str] = tuple(KINDS)
) -> dict[str, float]:
    """Return the share of ``count`` questions that are answered correctly, by kind."""
    shares = {}
    for kind in kinds:
        batch = questions(kind, count, seed)
        correct = [
            question.is_correct(TOKENIZER.decode(answer.token_ids))
            for question, answer in zip(batch, answers(engine, batch), strict=True)
        ]
        shares[kind] = round(sum(correct) / count, 4)
    return shares
