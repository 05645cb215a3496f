"""Long chats as Marconi's evaluation selects them from ShareGPT: sessions of ten turns or more,
started at a fixed rate.

The workload follows the published statistics: about 1,500 requests in 100 sessions, mean prompt
3,500 tokens, ideal token hit rate 97.6 %. Session k starts at k / (sessions per second). The pause
before a question is the time to type it at 90 words per minute.
"""

from __future__ import annotations

from itertools import islice

import numpy as np

from hybridcache.lab.arrivals import Fixed, interleave
from hybridcache.lab.generators.writer import Requests, Writer, generator
from hybridcache.lab.trace import TraceRequest
from hybridcache.tokens import Tokens

_TOKENS_PER_S_TYPED = 90 / 60 * 1.3  # 90 words a minute, 1.3 tokens a word


@generator
def sharegpt_like(
    seed: int = 0,
    requests: int = 600,
    sessions: int = 100,
    sessions_per_s: float = 0.25,
    user: int = 70,
    answer: int = 245,
    systems: int = 0,
) -> Requests:
    """Generate the first ``requests`` of ``sessions`` chats. Questions and answers have log-normal
    lengths with medians ``user`` and ``answer``.

    If ``systems`` is positive, each session starts with one of ``systems`` shared prompts of 2,000
    tokens.
    """
    writer = Writer(seed)
    shared = [writer.text(2000) for _ in range(systems)] or [writer.text(0)]
    openings = [shared[int(writer.rng.integers(len(shared)))] for _ in range(sessions)]
    drawn = (
        _session(seed, number, user, answer, opening) for number, opening in enumerate(openings)
    )
    return islice(interleave(drawn, Fixed(sessions_per_s)), requests)


def _session(seed: int, number: int, user: int, answer: int, opening: Tokens) -> list[TraceRequest]:
    writer = Writer((seed, number))
    turns = 10 + int(writer.rng.geometric(1 / 6)) - 1
    requests = []
    history = opening
    when = 0.0
    for _ in range(turns):
        question = writer.text(_length(writer.rng, user))
        prompt = np.concatenate((history, question))
        reply = writer.text(_length(writer.rng, answer))
        when += len(question) / _TOKENS_PER_S_TYPED
        request = writer.request(number, prompt, reply, len(opening))
        requests.append(request._replace(timestamp_s=when))
        history = np.concatenate((prompt, reply))
    return requests


def _length(rng: np.random.Generator, median: int) -> int:
    return max(1, min(int(rng.lognormal(np.log(median), 0.8)), 4000))
