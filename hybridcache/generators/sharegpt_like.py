"""Long chats as Marconi's evaluation selects them from ShareGPT: sessions of ten turns or more, started at a fixed rate.

The published statistics it follows: about 1,500 requests in 100 sessions, mean prompt 3,500 tokens, ideal token hit rate 97.6 %;
session k starts at k / (sessions a second); a person answers after the time it takes to type the next question at 90 words a minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from hybridcache.arrivals import Fixed, interleave
from hybridcache.trace import Trace, TraceRequest

_VOCAB = 150_000
_TOKENS_PER_S_TYPED = 90 / 60 * 1.3  # 90 words a minute, 1.3 tokens a word


def sharegpt_like(
    seed: int = 0,
    requests: int = 600,
    sessions: int = 100,
    sessions_per_s: float = 0.25,
    user: int = 70,
    answer: int = 245,
) -> Trace:
    """The first ``requests`` of ``sessions`` chats; questions and answers log-normal around medians ``user`` and ``answer``."""
    source = partial(_source, seed, sessions, sessions_per_s, user, answer)
    return Trace("sharegpt-like", 1, source).head(requests)


def _source(
    seed: int, sessions: int, sessions_per_s: float, user: int, answer: int
) -> Iterator[TraceRequest]:
    drawn = (_session(seed, number, user, answer) for number in range(sessions))
    return interleave(drawn, Fixed(sessions_per_s))


def _session(seed: int, number: int, user: int, answer: int) -> list[TraceRequest]:
    rng = np.random.default_rng((seed, number))
    turns = 10 + int(rng.geometric(1 / 6)) - 1
    requests = []
    history = np.zeros(0, np.int32)
    when = 0.0
    for _ in range(turns):
        question = rng.integers(0, _VOCAB, _length(rng, user), dtype=np.int32)
        prompt = np.concatenate((history, question))
        reply = rng.integers(0, _VOCAB, _length(rng, answer), dtype=np.int32)
        when += len(question) / _TOKENS_PER_S_TYPED
        requests.append(TraceRequest(when, number, None, prompt, reply))
        history = np.concatenate((prompt, reply))
    return requests


def _length(rng: np.random.Generator, median: int) -> int:
    return max(1, min(int(rng.lognormal(np.log(median), 0.8)), 4000))
