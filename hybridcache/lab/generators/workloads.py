"""Seeded workloads of published measurements, each exactly as stated there. One id is one token.

In the descriptions, "about n" means U(.3, 1.7) around the mean: ``int(n * uniform(.3, 1.7))``.
Requests arrive one second apart. With ``boundaries`` (the default) a prompt has the boundaries
that a chat server sends: the end of the system prompt, document or examples, and of the prompt.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hybridcache.lab.generators.writer import Requests, Writer, generator
from hybridcache.lab.trace import Trace
from hybridcache.tokens import Tokens


@generator
def chat(seed: int = 0, boundaries: bool = True) -> Requests:
    """Generate 40 conversations of 8 turns over 4 system prompts of 1,500 tokens. A turn adds about
    300 tokens, its answer about 250.

    Each round visits the conversations in a new random order. Ideal token hit rate .918.
    """
    writer = Writer(seed, boundaries)
    systems = [writer.text(1500) for _ in range(4)]
    histories = [systems[conversation % 4] for conversation in range(40)]
    for _ in range(8):
        for conversation in writer.rng.permutation(40).tolist():
            question = writer.text(writer.spread(300))
            prompt = np.concatenate((histories[conversation], question))
            answer = writer.text(writer.spread(250))
            histories[conversation] = np.concatenate((prompt, answer))
            yield writer.request(conversation, prompt, answer, 1500)


@generator
def few_shot(seed: int = 0, boundaries: bool = True) -> Requests:
    """Generate 320 requests: one of 8 prefixes of 1,500 tokens at random, then 700 unique tokens;
    answers of 32. Ideal token hit rate .665."""
    writer = Writer(seed, boundaries)
    prefixes = [writer.text(1500) for _ in range(8)]
    for request in range(320):
        prefix = prefixes[int(writer.rng.integers(8))]
        prompt = np.concatenate((prefix, writer.text(700)))
        yield writer.request(request, prompt, writer.text(32), 1500)


@generator
def agent(seed: int = 0, boundaries: bool = True) -> Requests:
    """Generate 10 agents with unique beginnings of 4,000 tokens, in round-robin order. Each of 32
    turns adds U{50..600} tokens; answers have U{40..200}. Ideal token hit rate .960."""
    writer = Writer(seed, boundaries)
    histories = [writer.text(4000) for _ in range(10)]
    for _ in range(32):
        for number in range(10):
            observation = writer.text(writer.between(50, 600))
            prompt = np.concatenate((histories[number], observation))
            answer = writer.text(writer.between(40, 200))
            histories[number] = np.concatenate((prompt, answer))
            yield writer.request(number, prompt, answer, 4000)


@generator
def branch(seed: int = 0, boundaries: bool = True) -> Requests:
    """Generate 10 documents of 6,000 tokens, 4 questions of 120 on each, and 4 samples of 40 on
    each question. Depth first, answers of 60. Ideal token hit rate .928."""
    writer = Writer(seed, boundaries)
    for number in range(10):
        document = writer.text(6000)
        for _ in range(4):
            stem = np.concatenate((document, writer.text(120)))
            for _ in range(4):
                prompt = np.concatenate((stem, writer.text(40)))
                yield writer.request(number, prompt, writer.text(60), 6000)


@generator
def resend(seed: int = 0, boundaries: bool = True) -> Requests:
    """Generate 40 prompts of U{400..6,000} tokens, the whole list three times, answers of 16. Ideal
    token hit rate .666."""
    writer = Writer(seed, boundaries)
    prompts = [writer.text(writer.between(400, 6000)) for _ in range(40)]
    for _ in range(3):
        for number, prompt in enumerate(prompts):
            yield writer.request(number, prompt, writer.text(16))


@generator
def short(seed: int = 0, boundaries: bool = True) -> Requests:
    """Generate 40 conversations of 3 turns over 4 system prompts of 320 tokens. Turns and answers
    have 60 tokens; each round has a new order. Ideal token hit rate .859."""
    writer = Writer(seed, boundaries)
    systems = [writer.text(320) for _ in range(4)]
    histories = [systems[conversation % 4] for conversation in range(40)]
    for _ in range(3):
        for conversation in writer.rng.permutation(40).tolist():
            prompt = np.concatenate((histories[conversation], writer.text(60)))
            answer = writer.text(60)
            histories[conversation] = np.concatenate((prompt, answer))
            yield writer.request(conversation, prompt, answer, 320)


def conversations(
    live: int = 64,
    num_conversations: int = 2000,
    turns: int = 5,
    seed: int = 0,
    boundaries: bool = True,
) -> Trace:
    """Generate the tree-cost workload: 16 system prompts of 500 tokens. A turn adds n =
    U{200..1,000} tokens, floor(2n/3) of them the user's.

    ``live`` conversations are open. The next request comes from a random one, and a finished one is
    replaced. The defaults give 10,000 requests of about 2,100 tokens; 20 conversations of 200 turns
    are the long variant (mean prompt 61,000).
    """
    name = f"conversations-{live}" if turns == 5 else f"conversations-{live}x{turns}"
    return replace(_conversations(live, num_conversations, turns, seed, boundaries), name=name)


@generator
def _conversations(
    live: int, num_conversations: int, turns: int, seed: int, boundaries: bool
) -> Requests:
    writer = Writer(seed, boundaries)
    systems = [writer.text(500) for _ in range(16)]
    opened = min(live, num_conversations)

    def begin(number: int) -> tuple[int, int, Tokens]:
        """Open a conversation: (number, turns left, history)."""
        return number, turns, systems[int(writer.rng.integers(16))]

    table = [begin(number) for number in range(opened)]
    while table:
        place = int(writer.rng.integers(len(table)))
        number, left, history = table[place]
        added = writer.between(200, 1000)
        prompt = np.concatenate((history, writer.text(added * 2 // 3)))
        answer = writer.text(added - added * 2 // 3)
        yield writer.request(number, prompt, answer, 500)
        if left > 1:
            table[place] = (number, left - 1, np.concatenate((prompt, answer)))
        elif opened < num_conversations:
            table[place] = begin(opened)
            opened += 1
        else:
            table[place] = table[-1]
            table.pop()
