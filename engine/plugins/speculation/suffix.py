"""Drafters that look up earlier text: the radix tree, and an index of short token runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import numpy.typing as npt

from engine.requests.request import Request
from engine.schedule.batch import NO_TOKENS, Newest
from hybridcache.tokens import Tokens

MAX_TEXTS, MAX_KEPT = 16, 1 << 16
"""Maximum number of finished texts that are kept, and of their tokens in total."""
MAX_READ = 1024
"""Maximum number of tokens indexed in one step, for all requests: 0.2 ms."""


class Drafter:
    """Source of drafts. A wrong draft costs time but changes no token. Every method does nothing
    unless it is overridden.

    It is called between two steps, once for all requests that may take drafts. A drafter that
    computes, such as the model's multi-token head, makes one pass over the batch. It reads a hidden
    vector of each request, declared as a state of the sequence: like any other state, it is saved
    with checkpoints and advanced by commits.
    """

    name: str

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens | None]:
        """Return a draft for each (request, maximum number of tokens), in order: int32[d].

        None if the drafter needs more steps; the next step calls it again. Must take a bounded
        time, because all requests wait for it.
        """
        return [NO_TOKENS] * len(wanted)

    def forget(self, request: Request) -> None:
        """Drop the state of ``request``, which has ended."""

    def reset(self) -> None:
        """Drop the state of requests that ended: the cache was emptied."""


class TreeDrafter(Drafter):
    """Drafts the continuation of the request's path in the radix tree of its namespace.

    It finds answers to the same prompt, earlier turns and retries. A read does not change the tree.
    """

    name = "tree"

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens | None]:
        return [
            request.claims[0].continuation(request.tokens, max_tokens)
            for request, max_tokens in wanted
        ]


class SuffixDrafter(Drafter):
    """Drafts the continuation of an earlier occurrence of the request's last tokens (prompt
    lookup).

    It searches the request itself and the texts of its namespace that ended last, while the cache
    is kept. A long prompt is indexed in pieces, so that no step waits for it.
    """

    name = "suffix"

    def __init__(self, *, shares: bool, memory: IndexMemory) -> None:
        """``shares``: keep texts that ended. ``memory`` is for all indices together; text that does
        not fit is not searched."""
        self._shares = shares
        self._memory = memory
        self._indices: dict[Request, SuffixIndex] = {}
        self._ended: deque[tuple[Hashable, SuffixIndex]] = deque()
        """Ended texts, newest first."""
        self._num_kept = 0

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens | None]:
        """See ``Drafter.propose``. O(new tokens), at most ``MAX_READ`` for all requests."""
        left = MAX_READ
        found: list[Tokens | None] = []
        for request, max_tokens in wanted:
            index = self._indices.get(request)
            if index is None:
                index = self._indices[request] = SuffixIndex(self._memory)
            left -= self._read(index, request.tokens, left)
            if not index.has_read(request.tokens):
                found.append(None)
                continue
            others = [other for namespace, other in self._ended if namespace == request.namespace]
            found.append(index.continuation(request.tokens, max_tokens, others))
        return found

    def _read(self, index: SuffixIndex, tokens: Tokens, most: int) -> int:
        """Index up to ``most`` tokens, if necessary in place of texts that ended."""
        num_read = index.read(tokens, most)
        while index.is_full and self._ended:
            self._drop_oldest()
            num_read += index.read(tokens, most - num_read)
        return num_read

    def forget(self, request: Request) -> None:
        index = self._indices.pop(request, None)
        if index is None:
            return
        self._read(index, request.tokens, MAX_READ)
        is_whole = index.has_read(request.tokens) and not index.is_full
        if not self._shares or not is_whole or len(request.tokens) > MAX_KEPT:
            index.free()
            return
        index.text = request.tokens.copy()
        self._num_kept += len(index.text)
        while self._num_kept > MAX_KEPT or len(self._ended) == MAX_TEXTS:
            self._drop_oldest()
        self._ended.appendleft((request.namespace, index))

    def reset(self) -> None:
        while self._ended:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, index = self._ended.pop()
        assert index.text is not None, "a text that still grows"
        self._num_kept -= len(index.text)
        index.free()


Guess = Callable[[Sequence[Newest], Sequence[int]], Sequence[Tokens]]
"""See ``Runner.guess``."""


class HeadDrafter(Drafter):
    """Drafts with the chained multi-token head: one pass per token, for all requests together.

    It reads the states that the last step wrote on the device. So requests that resumed from the
    cache have drafts like any other.
    """

    name = "mtp"

    def __init__(self, guess: Guess) -> None:
        self._guess = guess

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens | None]:
        if not wanted:
            return []
        return self._guess([_newest(request) for request, _ in wanted], [n for _, n in wanted])


def _newest(request: Request) -> Newest:
    lease, row = request.claims
    assert lease.state_slot is not None, "a head keeps a state"
    return Newest(row, lease.state_slot, int(request.tokens[-1]), request.num_tokens - 1)


SIZES = (6, 3)
"""Lengths of the runs that must be equal, longest first. Shorter runs are often equal by chance."""
FEW = 16
"""Number of tokens below which they are indexed one by one, because numpy would take longer."""
FACTOR = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
FIRST_TOKENS, MAX_TOKENS = 256, 1 << 15
"""Minimum size of the first segment of an index, and maximum size of any, in tokens."""
BYTES_PER_TOKEN = 12 * len(SIZES)
"""Memory of a segment per token."""
MAX_TRIES = 32
"""Maximum number of runs of one bucket that are compared. Most buckets have one."""


class IndexMemory:
    """Memory for all indices together.

    >>> memory = IndexMemory(100)
    >>> memory.take(80), memory.take(80), memory.used_bytes
    (True, False, 80)
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0

    def take(self, num_bytes: int) -> bool:
        """Reserve memory. Returns False if not enough is left."""
        if self.used_bytes + num_bytes > self.max_bytes:
            return False
        self.used_bytes += num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        self.used_bytes -= num_bytes


class SuffixIndex:
    """Index of the last end of every run of ``SIZES`` tokens that is followed by another token.

    The text is divided into segments, each a hash table with buckets that are chained from the
    latest run to earlier ones. Matches are compared with the text. A segment is allocated
    completely and never grows, so indexing n tokens always takes O(n).

    >>> index = SuffixIndex()
    >>> text = np.array([7, 1, 2, 3, 8, 9, 1, 2, 3], np.int32)
    >>> index.read(text)
    8
    >>> index.continuation(text, 4).tolist()
    [8, 9, 1, 2]
    """

    __slots__ = ("_memory", "_num_read", "_segments", "is_full", "text")

    def __init__(self, memory: IndexMemory | None = None) -> None:
        """``memory`` is shared by all indices; None for an unbounded index."""
        self._memory = memory
        self._segments: list[_Segment] = []
        self._num_read = 0
        self.is_full = False
        """True if there was no memory for the rest of the text at the last read."""
        self.text: Tokens | None = None
        """The whole text when it is complete, else None."""

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return sum(segment.num_bytes for segment in self._segments)

    def has_read(self, tokens: Tokens) -> bool:
        """Return True if all possible runs of ``tokens`` are indexed."""
        return self.is_full or self._num_read >= len(tokens) - 1

    def read(self, tokens: Tokens, most: int | None = None) -> int:
        """Index up to ``most`` more tokens of ``tokens``, which begins with all tokens given
        before.

        The last token is not followed by any yet. Returns the number of indexed tokens. O(that
        number).
        """
        until = len(tokens) - 1
        if most is not None:
            until = min(until, self._num_read + most)
        start = self._num_read
        self.is_full = False
        while self._num_read < until and not self.is_full:
            segment = self._segment(len(tokens))
            if segment is None:
                self.is_full = True
                break
            end = min(until, segment.end)
            segment.add(tokens, self._num_read, end)
            self._num_read = end
        return self._num_read - start

    def continuation(
        self, tokens: Tokens, max_tokens: int, others: Sequence[SuffixIndex] = ()
    ) -> Tokens:
        """Return up to ``max_tokens`` ids that followed the longest earlier run that ends
        ``tokens``.

        Empty if there is no such run. The longest runs are also searched in ``others``, which are
        complete texts; the first match counts. A continuation that reaches the end of ``tokens``
        wraps around. O(segments).
        """
        for size in SIZES:
            run = tokens[-size:].tolist()
            if len(run) < size:
                continue
            end = self._find(size, run, tokens)
            if end is not None:
                return np.resize(tokens[end:][:max_tokens], max_tokens)
            for other in others if size == SIZES[0] else ():
                assert other.text is not None, "a text that still grows"
                end = other._find(size, run, other.text)
                if end is not None:
                    return other.text[end:][:max_tokens]
        return tokens[:0]

    def free(self) -> None:
        """Release all memory."""
        if self._memory is not None:
            self._memory.give_back(self.num_bytes)
        self._segments.clear()

    def _find(self, size: int, run: list[int], text: Tokens) -> int | None:
        key = _key(run)
        for segment in reversed(self._segments):
            end = segment.find(size, key, run, text)
            if end is not None:
                return end
        return None

    def _segment(self, num_tokens: int) -> _Segment | None:
        """Return the segment of the next token, or None if there is no memory for another."""
        if self._segments and self._num_read < self._segments[-1].end:
            return self._segments[-1]
        wanted = max(num_tokens - self._num_read, self._num_read, FIRST_TOKENS)
        capacity = min(1 << (wanted - 1).bit_length(), MAX_TOKENS)
        if self._memory is not None and not self._memory.take(capacity * BYTES_PER_TOKEN):
            return None
        self._segments.append(_Segment(self._num_read, capacity))
        return self._segments[-1]


class _Segment:
    """Runs that end in one part of a text: after ``capacity`` tokens from ``start`` on."""

    __slots__ = ("_before", "_latest", "_shift", "_start", "end")

    def __init__(self, start: int, capacity: int) -> None:
        """``capacity`` is a power of two."""
        self._start = start
        self.end = start + capacity
        self._shift = 64 - capacity.bit_length()
        # Ends count from 1, and 0 means that there is none.
        self._latest = {size: np.zeros(2 * capacity, np.int32) for size in SIZES}
        self._before = {size: np.zeros(capacity, np.int32) for size in SIZES}

    @property
    def num_bytes(self) -> int:
        return (self.end - self._start) * BYTES_PER_TOKEN

    def add(self, tokens: Tokens, start: int, end: int) -> None:
        """Add the runs that end after tokens ``start`` to ``end`` - 1."""
        for size in SIZES:
            first = max(start, size - 1)
            if first >= end:
                continue
            read = tokens[first - size + 1 : end]
            if end - first < FEW:
                told = read.tolist()
                for place in range(end - first):
                    self._add_one(size, _key(told[place : place + size]), first + place + 1)
            else:
                self._add_many(size, _hashes(read, size), first + 1)

    def _add_one(self, size: int, key: int, run_end: int) -> None:
        bucket = ((key * FACTOR) & MASK) >> self._shift
        latest = self._latest[size]
        self._before[size][run_end - 1 - self._start] = latest[bucket]
        latest[bucket] = run_end

    def _add_many(self, size: int, hashes: npt.NDArray[np.uint64], first_end: int) -> None:
        buckets = ((hashes * np.uint64(FACTOR)) >> np.uint64(self._shift)).astype(np.int64)
        ends = np.arange(first_end, first_end + len(buckets), dtype=np.int32)
        order = np.argsort(buckets, kind="stable")
        ordered = buckets[order]
        is_first = np.empty(len(order), np.bool_)
        is_first[0] = True
        np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
        latest, before = self._latest[size], self._before[size]
        earlier = np.empty(len(order), np.int32)
        earlier[1:] = ends[order[:-1]]
        earlier[is_first] = latest[ordered[is_first]]
        before[ends[order] - 1 - self._start] = earlier
        latest[buckets] = ends  # the last of equal buckets remains

    def find(self, size: int, key: int, run: list[int], text: Tokens) -> int | None:
        """Return the last end of ``run`` in this part of ``text``, or None."""
        before = self._before[size]
        end = int(self._latest[size][((key * FACTOR) & MASK) >> self._shift])
        for _ in range(MAX_TRIES):
            if not end:
                return None
            if text[end - size : end].tolist() == run:
                return end
            end = int(before[end - 1 - self._start])
        return None


def _key(run: list[int]) -> int:
    """Hash one run, as ``_hashes`` does."""
    mixed = 0
    for token in run:
        mixed = (mixed * FACTOR + token) & MASK
    return mixed


def _hashes(tokens: Tokens, size: int) -> npt.NDArray[np.uint64]:
    """Hash every run of ``size`` adjacent tokens: uint64[n - size + 1]."""
    count = len(tokens) - size + 1
    wide = tokens.astype(np.uint64)
    hashes = np.zeros(count, np.uint64)
    for at in range(size):
        hashes = hashes * np.uint64(FACTOR) + wide[at : at + count]
    return hashes
