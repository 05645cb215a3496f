"""Command ``engine chat``: a conversation in the terminal, with the reused tokens of each turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from engine.errors import RequestError
from engine.requests.spec import RequestSpec, SamplingParams
from engine.text.chat_prompt import render_chat

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.text.outputs import RequestOutput

PROMPT = "> "


def chat(engine: Engine, sampling: SamplingParams, system: str | None) -> int:
    """Answer the lines of the standard input until its end or Ctrl-C, and return the exit code.

    Answers are written to the standard output, token counts to the standard error output. A message
    that is refused, for example because it is too long, is removed from the conversation. Raises
    ValueError if the model has no chat template.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(
            f"{engine.model_name} has no chat template: use `engine generate`, or another --model."
        )
    messages = [] if system is None else [{"role": "system", "content": system}]
    try:
        for line in _lines():
            messages.append({"role": "user", "content": line})
            try:
                prompt = render_chat(tokenizer, messages)
                spec = RequestSpec(prompt.token_ids, sampling, boundaries=prompt.boundaries)
                output = _answer(engine, spec)
            except (ValueError, RequestError) as error:
                print(f"[{error}]", file=sys.stderr, flush=True)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": output.text})
            print(f"[{_counts(output)}]", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print()
    return 0


def _answer(engine: Engine, spec: RequestSpec) -> RequestOutput:
    """Print an answer while it is generated, and return its last output."""
    for output in engine.stream(spec):  # Leaving the loop aborts the request.
        print(output.new_text, end="", flush=True)
    print(flush=True)
    return output


def _counts(output: RequestOutput) -> str:
    reused, total = output.cached_len, len(output.prompt_token_ids)
    return (
        f"prompt {total:,} tokens: {reused:,} reused, {total - reused:,} computed; "
        f"answer {len(output.output):,} tokens"
    )


def _lines() -> Iterator[str]:
    """Yield messages, one per line, with a prompt in a terminal. Blank lines are omitted."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # Editing and history for input().
    while True:
        try:
            line = input(PROMPT).strip()
        except EOFError:
            print()
            return
        if line:
            yield line
