"""Seeded workloads that others were measured on, each exactly as it was stated. One id is one
token.

``spread`` below is U(.3, 1.7) around a mean: ``int(mean * uniform(.3, 1.7))``. Requests come one at
a time, a second apart. With ``boundaries`` (the default) a prompt says where its system prompt,
document or examples end, as a chat template or a client can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.tokens import Tokens

_VOCAB = 150_000


class _Writer:
    """Draws random texts and lengths."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def text(self, num_tokens: int) -> Tokens:
        return self.rng.integers(0, _VOCAB, num_tokens, dtype=np.int32)

    def spread(self, mean: int) -> int:
        return int(mean * self.rng.uniform(0.3, 1.7))

    def between(self, low: int, high: int) -> int:
        """Uniform, both ends included."""
        return int(self.rng.integers(low, high + 1))


_Drawn = Iterator[tuple[int, Tokens, Tokens, int]]
"""(session, prompt, answer, end of the part that others share: 0 where there is none)."""


def _numbered(draw: Callable[[int], _Drawn], seed: int, boundaries: bool) -> Iterator[TraceRequest]:
    """Requests a second apart; with ``boundaries`` each says where its shared part ends."""
    for second, (session, prompt, answer, shared_end) in enumerate(draw(seed)):
        known = (shared_end,) if shared_end and boundaries else ()
        yield TraceRequest(float(second), session, None, prompt, answer, known)


def chat(seed: int = 0, boundaries: bool = True) -> Trace:
    """40 conversations of 8 turns over 4 system prompts of 1,500; a turn brings about 300, its
    answer about 250.

    Each round visits the conversations in a fresh random order. Ideal token hit rate .918.
    """
    return Trace("chat", 1, partial(_numbered, _chat, seed, boundaries))


def _chat(seed: int) -> _Drawn:
    writer = _Writer(seed)
    systems = [writer.text(1500) for _ in range(4)]
    histories = [systems[conversation % 4] for conversation in range(40)]
    for _ in range(8):
        for conversation in writer.rng.permutation(40).tolist():
            question = writer.text(writer.spread(300))
            prompt = np.concatenate((histories[conversation], question))
            answer = writer.text(writer.spread(250))
            histories[conversation] = np.concatenate((prompt, answer))
            yield conversation, prompt, answer, 1500


def few_shot(seed: int = 0, boundaries: bool = True) -> Trace:
    """320 requests: one of 8 prefixes of 1,500 at random, then 700 of their own; answers of 32.
    Ideal .665."""
    return Trace("few-shot", 1, partial(_numbered, _few_shot, seed, boundaries))


def _few_shot(seed: int) -> _Drawn:
    writer = _Writer(seed)
    prefixes = [writer.text(1500) for _ in range(8)]
    for request in range(320):
        prefix = prefixes[int(writer.rng.integers(8))]
        yield request, np.concatenate((prefix, writer.text(700))), writer.text(32), 1500


def agent(seed: int = 0, boundaries: bool = True) -> Trace:
    """10 agents from 4,000 tokens of their own, 32 turns each adding U{50..600}, answers
    U{40..200}; round-robin. Ideal .960."""
    return Trace("agent", 1, partial(_numbered, _agent, seed, boundaries))


def _agent(seed: int) -> _Drawn:
    writer = _Writer(seed)
    histories = [writer.text(4000) for _ in range(10)]
    for _ in range(32):
        for number in range(10):
            observation = writer.text(writer.between(50, 600))
            prompt = np.concatenate((histories[number], observation))
            answer = writer.text(writer.between(40, 200))
            histories[number] = np.concatenate((prompt, answer))
            yield number, prompt, answer, 4000


def branch(seed: int = 0, boundaries: bool = True) -> Trace:
    """10 documents of 6,000, 4 questions of 120 on each, 4 samples of 40 on each question; depth
    first, answers of 60. Ideal .928."""
    return Trace("branch", 1, partial(_numbered, _branch, seed, boundaries))


def _branch(seed: int) -> _Drawn:
    writer = _Writer(seed)
    for number in range(10):
        document = writer.text(6000)
        for _ in range(4):
            stem = np.concatenate((document, writer.text(120)))
            for _ in range(4):
                yield number, np.concatenate((stem, writer.text(40))), writer.text(60), 6000


def resend(seed: int = 0, boundaries: bool = True) -> Trace:
    """40 prompts of U{400..6,000}, the whole list three times, answers of 16. Ideal .666."""
    return Trace("resend", 1, partial(_numbered, _resend, seed, boundaries))


def _resend(seed: int) -> _Drawn:
    writer = _Writer(seed)
    prompts = [writer.text(writer.between(400, 6000)) for _ in range(40)]
    for _ in range(3):
        for number, prompt in enumerate(prompts):
            yield number, prompt, writer.text(16), 0


def short(seed: int = 0, boundaries: bool = True) -> Trace:
    """40 conversations of 3 turns over 4 system prompts of 320; turns of 60, answers of 60; fresh
    order each round. Ideal .859."""
    return Trace("short", 1, partial(_numbered, _short, seed, boundaries))


def _short(seed: int) -> _Drawn:
    writer = _Writer(seed)
    systems = [writer.text(320) for _ in range(4)]
    histories = [systems[conversation % 4] for conversation in range(40)]
    for _ in range(3):
        for conversation in writer.rng.permutation(40).tolist():
            prompt = np.concatenate((histories[conversation], writer.text(60)))
            answer = writer.text(60)
            histories[conversation] = np.concatenate((prompt, answer))
            yield conversation, prompt, answer, 320


def conversations(
    live: int = 64,
    num_conversations: int = 2000,
    turns: int = 5,
    seed: int = 0,
    boundaries: bool = True,
) -> Trace:
    """The tree-cost workload: 16 system prompts of 500; a turn adds n = U{200..1,000}, floor(2n/3)
    of them the user's.

    ``live`` conversations are open, the next request comes from a random one, a finished one is
    replaced. The defaults are 10,000 requests of about 2,100 tokens; 20 conversations of 200 turns
    are the long variant (mean prompt 61,000).
    """
    name = f"conversations-{live}" if turns == 5 else f"conversations-{live}x{turns}"
    draw = partial(_conversations, live, num_conversations, turns)
    return Trace(name, 1, partial(_numbered, draw, seed, boundaries))


def _conversations(live: int, num_conversations: int, turns: int, seed: int) -> _Drawn:
    writer = _Writer(seed)
    systems = [writer.text(500) for _ in range(16)]
    opened = min(live, num_conversations)

    def begin(number: int) -> tuple[int, int, Tokens]:
        """An open conversation: (number, turns left, history)."""
        return number, turns, systems[int(writer.rng.integers(16))]

    table = [begin(number) for number in range(opened)]
    while table:
        place = int(writer.rng.integers(len(table)))
        number, left, history = table[place]
        added = writer.between(200, 1000)
        prompt = np.concatenate((history, writer.text(added * 2 // 3)))
        answer = writer.text(added - added * 2 // 3)
        yield number, prompt, answer, 500
        if left > 1:
            table[place] = (number, left - 1, np.concatenate((prompt, answer)))
        elif opened < num_conversations:
            table[place] = begin(opened)
            opened += 1
        else:
            table[place] = table[-1]
            table.pop()
