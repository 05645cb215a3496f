"""Script of an agent: several questions, each with a loop of tool calls before its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SYSTEM = (
    "You are a careful engineer who works in a repository. Read before you write, change as little "
    "as possible, and say what you did in a sentence. "
) * 6
FILES = ("engine/text/chat_prompt.py", "hybridcache/lease.py", "kernels/gdn/chunk.py", "README.md")
QUESTIONS = (
    "Where is a prompt's boundary decided, and what would break if it moved?",
    "Make the message of that error name the file.",
    "Does anything else depend on it? Check before you answer.",
    "Write the test first, please, and then the change.",
)


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call and its result."""

    name: str
    arguments: dict[str, Any]
    result: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer of the agent: reasoning, text, and tool calls unless it is the last of its
    question."""

    reasoning: str
    content: str
    calls: tuple[Call, ...]


def _tool(name: str, **properties: str) -> dict[str, Any]:
    named = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": named}
    described = f"{name.capitalize()} something in the repository."
    return {
        "type": "function",
        "function": {"name": name, "description": described, "parameters": parameters},
    }


TOOLS = [
    _tool("read", path="string", first="integer", last="integer"),
    _tool("grep", pattern="string", paths="array"),
    _tool("write", path="string", text="string"),
]


def questions(num_loops: int = 3) -> Iterator[tuple[str, list[Turn]]]:
    """Yield (question, answers). The last answer to a question calls no tool."""
    for number, question in enumerate(QUESTIONS):
        loop = [_step(number, step) for step in range(num_loops)]
        done = (
            "I looked at "
            + ", ".join(FILES[: number + 1])
            + f": {question.lower()} Done, as asked."
        )
        thoughts = "That is all I need to know; the answer is short. " * (2 + number)
        yield question, [*loop, Turn(thoughts, done, ())]


def _step(number: int, step: int) -> Turn:
    path = FILES[(number + step) % len(FILES)]
    thoughts = f"Step {step} of question {number}: I should look at {path}, for it decides. " * 3
    read = Call(
        "read",
        {"path": path, "first": 10 * step, "last": 10 * step + 40},
        "\n".join(f"{line}: def part_{line}(): return {line * number}" for line in range(12)),
    )
    grep = Call("grep", {"pattern": f"part_{step}\\b", "paths": [path, "tests"]}, "3 lines match.")
    return Turn(thoughts, "Let me look." if step else "", (read, grep) if step == 1 else (read,))


def written(turn: Turn, form: str, thinks: bool, header: str) -> str:
    """Return a turn as a model may write it after ``header``, in the ``form`` of a template.

    Spacing of its JSON differs from the usual serialisers.
    """
    thoughts = ""
    if thinks and form != "coder":
        opened = "" if header.rstrip().endswith("<think>") else "<think>\n"
        thoughts = f"{opened}{turn.reasoning.strip()}\n</think>\n\n"
    calls = [_as_json(call) if form == "hermes" else _as_xml(call) for call in turn.calls]
    gap = "\n" if turn.content and calls else ""
    return thoughts + turn.content + gap + "\n".join(calls) + "<|im_end|>"


def _as_json(call: Call) -> str:
    arguments = json.dumps(call.arguments, separators=(",", ":"))
    return f'<tool_call>\n{{"name": "{call.name}","arguments":{arguments}}}\n</tool_call>'


def _as_xml(call: Call) -> str:
    values = (
        (name, value if isinstance(value, str) else json.dumps(value, separators=(",", ":")))
        for name, value in call.arguments.items()
    )
    lines = "".join(f"<parameter={name}>\n{text}\n</parameter>\n" for name, text in values)
    return f"<tool_call>\n<function={call.name}>\n{lines}</function>\n</tool_call>"
