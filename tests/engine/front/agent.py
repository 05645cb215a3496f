"""A conversation of an agent: a chat template, a small tokenizer, and scripted answers.

The template is like Qwen3.5's: calls in XML. A prompt ends inside of reasoning, which is rendered
since the last question. Without thinking, a prompt ends with empty reasoning.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.text.tokenizer_files import HFTokenizer

TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content ~ '\\n\\n' }}{% endif %}
{{- 'Tools:\\n<tools>' }}{% for tool in tools %}{{ '\\n' ~ tool|tojson }}{% endfor %}
{{- '\\n</tools>\\n<tool_call>\\n<function=NAME>\\n<parameter=NAME>\\nVALUE\\n</parameter>\\n' }}
{{- '</function>\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' ~ messages[0].content ~ '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if ns.last < 0 %}{{ raise_exception('No user query found in messages.') }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif m.role == 'assistant' %}{% set content = (m.content or '')|trim %}
{{- '<|im_start|>assistant\\n' }}{% set thoughts = (m.reasoning_content or '')|trim %}
{%- if loop.index0 > ns.last %}
{{- '<think>\\n' ~ thoughts ~ '\\n</think>\\n\\n' }}{% endif %}
{{- content }}{% for call in m.tool_calls or [] %}
{%- if loop.first and content %}{{ '\\n\\n' }}{% elif not loop.first %}{{ '\\n' }}{% endif %}
{{- '<tool_call>\\n<function=' ~ call.function.name ~ '>\\n' }}
{%- for name, value in call.function.arguments.items() %}
{{- '<parameter=' ~ name ~ '>\\n' ~ (value if value is string else value|tojson) }}
{{- '\\n</parameter>\\n' }}{% endfor %}{{ '</function>\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# --- Tokenizer ----------------------------------------------------------------------------------

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PARTS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
CORPUS = Path(__file__).resolve().parents[3] / "README.md"


def make_model_dir(directory: Path) -> Path:
    """Write a directory with the template and a tokenizer trained on the README. About a
    second."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS.read_text(encoding="utf-8")], trainer)
    parts = [tokenizers.AddedToken(part, special=False, normalized=False) for part in PARTS]
    backend.add_tokens(parts)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (directory / "config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return directory


def sampled_like(tokenizer: HFTokenizer, text: str, seed: int) -> list[int]:
    """Return ids of ``text`` that the tokenizer would not choose, like those sampled from a
    model."""
    draw = random.Random(seed)
    while (token_ids := _cut_ids(tokenizer, text, draw)) == tokenizer.encode(
        text, add_special_tokens=False
    ):
        pass
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text
    return token_ids


def _cut_ids(tokenizer: HFTokenizer, text: str, draw: random.Random) -> list[int]:
    token_ids: list[int] = []
    marks = "|".join(map(re.escape, (*SPECIAL, *PARTS)))
    for piece in filter(None, re.split(f"({marks})", text)):
        start = 0
        while start < len(piece):
            end = start + draw.randrange(4, 40) if not piece.startswith("<") else len(piece)
            token_ids += tokenizer.encode(piece[start:end], add_special_tokens=False)
            start = end
    return token_ids


# --- Answers ------------------------------------------------------------------------------------

SYSTEM = (
    "You are a careful engineer who works in a repository. Read before you write, change as little "
    "as possible, and say what you did in a sentence. "
) * 6
QUESTIONS = (
    "Where is a prompt's boundary decided, and what would break if it moved?",
    "Make the message of that error name the file.",
    "Does anything else depend on it? Check before you answer.",
    "Write the test first, please, and then the change.",
)


def _tool(name: str, **properties: str) -> dict[str, Any]:
    named = {key: {"type": kind} for key, kind in properties.items()}
    described = f"{name.capitalize()} something in the repository."
    parameters = {"type": "object", "properties": named}
    return {"name": name, "description": described, "parameters": parameters}


TOOLS = [
    _tool("read", path="string", first="integer", last="integer"),
    _tool("grep", pattern="string", paths="array"),
]


class Turn(NamedTuple):
    """One answer, with tool calls unless it is the last of its question."""

    text: str
    """Text as a model writes it after an opened ``<think>``. The spacing of its JSON differs from
    the usual serialisers."""
    num_calls: int


def questions() -> Iterator[tuple[str, list[Turn]]]:
    """Yield (question, answers): one with calls, and one that ends it."""
    for number, question in enumerate(QUESTIONS):
        path = f"engine/text/part_{number}.py"
        calls = [_call("read", path=path, first=10 * number, last=10 * number + 40)]
        calls += [_call("grep", pattern=f"part_{number}\\b", paths=[path, "tests"])] * (number % 2)
        thoughts = f"Question {number}: I should look at {path}, for it decides. " * 3
        said = "Let me look.\n" if number % 2 else ""
        looks = Turn(_written(thoughts, said + "\n".join(calls)), len(calls))
        thoughts = "That is all I need to know; the answer is short. " * (2 + number)
        yield question, [looks, Turn(_written(thoughts, f"I looked at {path}. Done, as asked."), 0)]


def _written(thoughts: str, rest: str) -> str:
    return f"{thoughts.strip()}\n</think>\n\n{rest}<|im_end|>"


def _call(name: str, **arguments: Any) -> str:
    values = (
        (key, value if isinstance(value, str) else json.dumps(value, separators=(",", ":")))
        for key, value in arguments.items()
    )
    lines = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in values)
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"
