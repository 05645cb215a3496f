"""Random texts and lengths of generated traces, and the decorator of their functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any, ParamSpec

import numpy as np

from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.policies.boundaries import chat_boundaries
from hybridcache.tokens import Tokens

_VOCAB = 150_000
Requests = Iterator[TraceRequest]
Options = ParamSpec("Options")


def generator(draw: Callable[Options, Requests]) -> Callable[Options, Trace]:
    """Return the function that makes the trace of the requests that ``draw`` yields, under the name
    of ``draw``. It refuses wrong arguments, which ``draw`` would find when the trace is read."""
    signature = inspect.signature(draw)

    @wraps(draw)
    def make(*args: Options.args, **options: Options.kwargs) -> Trace:
        try:
            bound = signature.bind(*args, **options)
        except TypeError as error:
            raise TypeError(f"{draw.__name__}: {error}") from None
        bound.apply_defaults()  # All ways to write the same options are one trace (identity_of).
        source = partial(_drawn, make, *bound.args, **bound.kwargs)
        return Trace(draw.__name__.replace("_", "-"), 1, source)

    shown: Any = make
    shown.__signature__ = signature.replace(return_annotation="Trace")
    return make


def _drawn(make: Any, *args: Any, **options: Any) -> Requests:
    """Yield the requests of a trace. ``make`` can be pickled; the function in it cannot."""
    requests: Requests = make.__wrapped__(*args, **options)
    return requests


class Writer:
    """Draws texts and lengths, and numbers requests, which arrive one second apart."""

    def __init__(self, seed: int | tuple[int, ...], boundaries: bool = True) -> None:
        self.rng = np.random.default_rng(seed)
        self._boundaries = boundaries
        self._num_requests = 0

    def text(self, num_tokens: int) -> Tokens:
        return self.rng.integers(0, _VOCAB, num_tokens, dtype=np.int32)

    def spread(self, mean: int) -> int:
        return int(mean * self.rng.uniform(0.3, 1.7))

    def between(self, low: int, high: int) -> int:
        """Draw an integer uniformly from ``low`` to ``high``, both included."""
        return int(self.rng.integers(low, high + 1))

    def request(self, session: int, prompt: Tokens, answer: Tokens, *shared: int) -> TraceRequest:
        """Return the next request. ``shared`` are ends of parts that other sessions share."""
        known = sent(prompt, *shared) if self._boundaries else ()
        second = float(self._num_requests)
        self._num_requests += 1
        return TraceRequest(second, session, None, prompt, answer, known)


def sent(prompt: Tokens, *shared: int) -> tuple[int, ...]:
    """Return the boundaries that a chat server sends for a prompt that the next turn continues.
    ``shared`` are ends of parts that other sessions share, or 0."""
    return chat_boundaries(len(prompt), shared, (len(prompt),)).positions
