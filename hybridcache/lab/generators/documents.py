"""Long prompts: sessions about documents that other sessions read too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcache.lab.arrivals import Pauses, Poisson, interleave
from hybridcache.lab.trace import FreshIds, Trace, TraceRequest, units
from hybridcache.tokens import Tokens

_VOCAB = 150_000
_QUESTION, _ANSWER = 150, 150
"""Medians, tokens."""
_SPREAD = 0.7
"""Of the logarithms of all lengths."""
_SKEW = 0.7
"""The k-th document is as popular as k to the minus this."""


@dataclass(frozen=True, slots=True)
class _Shape:
    sessions: int
    documents: int
    length: int
    turns: float
    more: float
    again: float


def shared_documents(
    seed: int = 0,
    sessions: int = 1000,
    documents: int = 1500,
    length: int = 8000,
    turns: float = 4.0,
    more: float = 0.2,
    again: float = 0.1,
    per_s: float = 0.1,
    pause_s: float = 1000.0,
    unit: int = 512,
) -> Trace:
    """Sessions about one or two of ``documents`` texts around ``length`` tokens, some read by many;
    prompts of tens of thousands of tokens that grow.

    A turn (``turns`` of them on average) asks a question after all that was said; with chance
    ``more`` it brings one more document, with chance ``again`` it asks the last question in other
    words, so that its prompt leaves the one before above its end. Sessions start as a Poisson
    process, ``per_s``, and pause around ``pause_s``. Told as published traces are: an id stands for
    ``unit`` tokens and all before them, and answers are known by their lengths alone.
    """
    shape = _Shape(sessions, documents, length, turns, more, again)
    return Trace("shared-documents", unit, partial(_source, seed, shape, per_s, pause_s, unit))


def _source(
    seed: int, shape: _Shape, per_s: float, pause_s: float, unit: int
) -> Iterator[TraceRequest]:
    rng = np.random.default_rng(seed)
    library = [_text(rng, _length(rng, shape.length)) for _ in range(shape.documents)]
    chances = np.arange(1, shape.documents + 1, dtype=np.float64) ** -_SKEW
    chances /= chances.sum()
    drawn = (_session(seed, number, shape, library, chances) for number in range(shape.sessions))
    pauses = Pauses(pause_s, 1.2)
    requests = interleave(drawn, Poisson(per_s), pauses, seed=seed)
    return requests if unit == 1 else _in_blocks(requests, unit)


def _session(
    seed: int,
    number: int,
    shape: _Shape,
    library: list[Tokens],
    chances: npt.NDArray[np.floating[Any]],
) -> list[TraceRequest]:
    rng = np.random.default_rng((seed, number))

    def document() -> Tokens:
        return library[int(rng.choice(len(library), p=chances))]

    history = np.concatenate([document() for _ in range(int(rng.integers(1, 3)))])
    before, requests = history, []
    for turn in range(int(rng.geometric(1 / shape.turns))):
        if turn and rng.random() < shape.again:
            history = before
        elif turn and rng.random() < shape.more:
            history = np.concatenate((history, document()))
        before = history
        prompt = np.concatenate((history, _text(rng, _length(rng, _QUESTION))))
        answer = _text(rng, _length(rng, _ANSWER))
        requests.append(TraceRequest(0.0, number, None, prompt, answer))
        history = np.concatenate((prompt, answer))
    return requests


def _in_blocks(requests: Iterator[TraceRequest], unit: int) -> Iterator[TraceRequest]:
    """Ids for blocks, each with all before it; an answer fills the prompt's last block first."""
    known: dict[bytes, int] = {}
    fresh = FreshIds()
    for request in requests:
        length, path, ids = len(request.tokens), b"", []
        for start in range(0, length, unit):
            block = request.tokens[start : start + unit].tobytes()
            path = blake2b(block, key=path, digest_size=16).digest()
            ids.append(known.setdefault(path, len(known)))
        answer = fresh.take(units(length + len(request.output), unit) - len(ids))
        partial_tokens = length - (len(ids) - 1) * unit
        yield request._replace(
            tokens=np.array(ids, np.int32),
            output=answer,
            partial_tokens=partial_tokens,
            answer_tokens=len(request.output),
        )


def _text(rng: np.random.Generator, num_tokens: int) -> Tokens:
    return rng.integers(0, _VOCAB, num_tokens, dtype=np.int32)


def _length(rng: np.random.Generator, median: int) -> int:
    return max(1, min(int(rng.lognormal(np.log(median), _SPREAD)), 5 * median))
