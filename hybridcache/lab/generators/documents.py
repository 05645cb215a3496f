"""Long prompts: sessions about documents that are shared between sessions."""

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
"""Standard deviation of the logarithms of all lengths."""
_SKEW = 0.7
"""Exponent of popularity: the k-th document has weight ``k ** -_SKEW``."""


@dataclass(frozen=True, slots=True)
class _DocumentsShape:
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
    """Generate sessions about one or two of ``documents`` texts of around ``length`` tokens.

    Popular documents appear in many sessions. Prompts have tens of thousands of tokens and grow. A
    session has ``turns`` turns on average, and each turn appends a question to the whole history.
    With probability ``more`` a turn adds a document. With probability ``again`` it rephrases the
    last question, so that its prompt diverges from the previous one before its end.

    Sessions start as a Poisson process with rate ``per_s``, and pause around ``pause_s``. Ids
    follow the form of published traces: one id stands for ``unit`` tokens and everything before
    them. Only the lengths of answers are given.
    """
    shape = _DocumentsShape(sessions, documents, length, turns, more, again)
    return Trace("shared-documents", unit, partial(_source, seed, shape, per_s, pause_s, unit))


def _source(
    seed: int, shape: _DocumentsShape, per_s: float, pause_s: float, unit: int
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
    shape: _DocumentsShape,
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
    """Convert to ids of blocks, each hashed with everything before it; an answer first fills the
    prompt's last block."""
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
