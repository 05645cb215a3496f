"""Long chats as Marconi's evaluation selects them from ShareGPT: sessions of ten turns or more,
started at a fixed rate.

The workload follows the published statistics: about 1,500 requests in 100 sessions, mean prompt
3,500 tokens, ideal token hit rate 97.6 %. Session k starts at k / (sessions per second). The pause
before a question is the time to type it at 90 words per minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from hybridcache.lab.arrivals import Fixed, interleave
from hybridcache.lab.generators.workloads import sent
from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.tokens import Tokens

_VOCAB = 150_000
_TOKENS_PER_S_TYPED = 90 / 60 * 1.3  # 90 words a minute, 1.3 tokens a word
_NOTHING: Tokens = np.zeros(0, np.int32)


def sharegpt_like(
    seed: int = 0,
    requests: int = 600,
    sessions: int = 100,
    sessions_per_s: float = 0.25,
    user: int = 70,
    answer: int = 245,
    systems: int = 0,
) -> Trace:
    """Generate the first ``requests`` of ``sessions`` chats. Questions and answers have log-normal
    lengths with medians ``user`` and ``answer``.

    If ``systems`` is positive, each session starts with one of ``systems`` shared prompts of 2,000
    tokens.
    """
    source = partial(_source, seed, sessions, sessions_per_s, user, answer, systems)
    return Trace("sharegpt-like", 1, source).head(requests)


def _source(
    seed: int, sessions: int, sessions_per_s: float, user: int, answer: int, systems: int
) -> Iterator[TraceRequest]:
    rng = np.random.default_rng(seed)
    shared = [rng.integers(0, _VOCAB, 2000, dtype=np.int32) for _ in range(systems)]
    openings = [
        shared[int(rng.integers(systems))] if systems else _NOTHING for _ in range(sessions)
    ]
    drawn = (
        _session(seed, number, user, answer, opening) for number, opening in enumerate(openings)
    )
    return interleave(drawn, Fixed(sessions_per_s))


def _session(seed: int, number: int, user: int, answer: int, opening: Tokens) -> list[TraceRequest]:
    rng = np.random.default_rng((seed, number))
    turns = 10 + int(rng.geometric(1 / 6)) - 1
    requests = []
    history = opening
    when = 0.0
    for _ in range(turns):
        question = rng.integers(0, _VOCAB, _length(rng, user), dtype=np.int32)
        prompt = np.concatenate((history, question))
        reply = rng.integers(0, _VOCAB, _length(rng, answer), dtype=np.int32)
        when += len(question) / _TOKENS_PER_S_TYPED
        known = sent(prompt, len(opening))
        requests.append(TraceRequest(when, number, None, prompt, reply, known))
        history = np.concatenate((prompt, reply))
    return requests


def _length(rng: np.random.Generator, median: int) -> int:
    return max(1, min(int(rng.lognormal(np.log(median), 0.8)), 4000))
