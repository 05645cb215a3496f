"""Sessions: groups of requests, recognised by the tokens of their prompts alone.

A session is a conversation or an agent's run. Its requests never overlap. Each prompt begins with
the previous prompt, possibly without its last few tokens if a chat template rewrites them. So each
session leaves one *anchor*: the part of its newest prompt with which the next prompt is expected to
begin. A prompt belongs to the session of the longest anchor that it begins with.

A session with an open request takes no other: a second request on the same prefix (a fork, a
subagent) begins another session. Exceptions are the choices of one answer, which the embedder
declares (``choice_of``). Prompts that share only a system prompt share no anchor.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Collection, Hashable

import numpy as np
import numpy.typing as npt

from hybridcache.policies.admission.base import Session
from hybridcache.policies.boundaries import end_of_prompt
from hybridcache.tokens import Tokens

MAX_KNOWN = 4096
"""Number of idle sessions that are remembered: the most recently active ones."""
LIVE_S = 300.0
"""Seconds for which an idle session counts as live."""
TAIL_LEN = 64
"""Maximum number of tokens at the end of a prompt that a chat template rewrites in the next one."""
BLIND_TAIL_LEN = 8
"""``TAIL_LEN`` of a prompt without a known boundary in its last ``TAIL_LEN`` tokens."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Sessions:
    """Assigns requests to sessions, numbered in the order in which they began.

    Tenants (namespaces) share none. Memory is O(``MAX_KNOWN`` + open requests).
    """

    def __init__(self, max_known: int = MAX_KNOWN) -> None:
        self._max_known = max_known
        self._anchors: dict[Hashable, _Anchors] = {}
        self._open: dict[Session, None] = {}
        self._idle: OrderedDict[Session, None] = OrderedDict()
        self._by_newest: dict[str, Session] = {}
        """Remembered sessions by the name of their newest request."""
        self._num_begun = 0
        self._powers: npt.NDArray[np.uint64] = np.empty(0, np.uint64)

    @property
    def open(self) -> Collection[Session]:
        """Sessions with a waiting or running request."""
        return self._open.keys()

    @property
    def idle(self) -> Collection[Session]:
        """Remembered sessions without an open request; the one idle for longest first."""
        return self._idle.keys()

    def num_live(self, now_s: float) -> int:
        """Return the number of sessions that are open, or idle for ``LIVE_S`` at most. O(them)."""
        num_live = len(self._open)
        for session in reversed(self._idle):
            if now_s - session.idle_since_s > LIVE_S:
                break
            num_live += 1
        return num_live

    def arrived(
        self,
        request_id: str,
        prompt: Tokens,
        now_s: float,
        *,
        tenant: Hashable = None,
        boundaries: tuple[int, ...] = (),
        choice_of: str | None = None,
    ) -> Session:
        """Assign a request to its session, or to a new one.

        ``choice_of`` is the name of the first request, if this is another choice of its answer.
        O(length + known anchors of the tenant), vectorised; O(1) for a further choice.
        """
        session = self._by_newest.get(choice_of) if choice_of else None
        if session is not None:
            session.num_open += 1
            self._idle.pop(session, None)
            self._open[session] = None
            return session
        anchors = self._anchors.get(tenant)
        if anchors is None:
            anchors = self._anchors[tenant] = _Anchors()
        hashes = self._prefix_hashes(prompt)
        session, known_len = anchors.find(hashes)
        if session is None:
            self._num_begun += 1
            session = Session(self._num_begun, tenant, now_s)
        else:
            anchors.remove(session)
            self._idle.pop(session, None)
            self._drop_name(session)
        session.newest_id = choice_of or request_id
        self._by_newest[session.newest_id] = session
        session.num_requests += 1
        session.num_open += 1
        session.num_admitted = 0
        session.known_len = known_len
        session.num_tokens = max(session.num_tokens, len(prompt))
        for length in anchor_lens(len(prompt), boundaries):
            anchors.add(session, length, int(hashes[length - 1]))
        self._open[session] = None
        return session

    def left(self, session: Session, num_tokens: int, now_s: float) -> None:
        """Remove a request of ``session`` that was answered or aborted. Its text has ``num_tokens``
        tokens. Amortised O(log sessions)."""
        session.num_open -= 1
        session.num_tokens = max(session.num_tokens, num_tokens)
        if session.num_open:
            return
        session.idle_since_s = now_s
        del self._open[session]
        self._idle[session] = None
        if len(self._idle) > self._max_known:
            oldest, _ = self._idle.popitem(last=False)
            self._forget(oldest)

    def end(self, request_id: str) -> Session | None:
        """End and forget the idle session with ``request_id`` as its newest request, and return it.
        None if there is no such session. O(1)."""
        session = self._by_newest.get(request_id)
        if session is None or session not in self._idle:
            return None
        del self._idle[session]
        self._forget(session)
        session.has_ended = True
        return session

    def _prefix_hashes(self, tokens: Tokens) -> npt.NDArray[np.uint64]:
        """Return the polynomial hash, modulo 2**64, of every prefix of ``tokens``: uint64[n]. Only
        prefixes of one length are ever compared. O(n)."""
        if len(self._powers) < len(tokens):
            size = max(len(tokens), 2 * len(self._powers))
            self._powers = np.cumprod(np.full(size, _FACTOR), dtype=np.uint64)
        return np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * self._powers[: len(tokens)])

    def _drop_name(self, session: Session) -> None:
        if self._by_newest.get(session.newest_id) is session:
            del self._by_newest[session.newest_id]

    def _forget(self, session: Session) -> None:
        self._drop_name(session)
        anchors = self._anchors[session.tenant]
        anchors.remove(session)
        if not anchors.lengths:
            del self._anchors[session.tenant]


def anchor_lens(prompt_len: int, boundaries: tuple[int, ...]) -> tuple[int, ...]:
    """Return the candidate lengths of the part shared with the session's next prompt.

    A boundary near the end is the position where, by the chat template, the next prompt diverges
    from this one. Without such a boundary, the next prompt continues this one, or diverges a few
    tokens before its end.

    >>> anchor_lens(1000, (300, 995)), anchor_lens(1000, (300,)), anchor_lens(5, ())
    ((995,), (992, 1000), (5,))
    """
    end = end_of_prompt(prompt_len, boundaries, TAIL_LEN)
    if end is not None:
        return (end,)
    if prompt_len <= BLIND_TAIL_LEN:
        return (prompt_len,)
    return prompt_len - BLIND_TAIL_LEN, prompt_len


class _Anchors:
    """(length, hash, session) of one tenant's anchors, in parallel arrays sorted by length."""

    def __init__(self) -> None:
        self.lengths = array("q")
        self._hashes = array("Q")
        self._owners: list[Session] = []

    def add(self, session: Session, length: int, prefix_hash: int) -> None:
        at = bisect_right(self.lengths, length)
        self.lengths.insert(at, length)
        self._hashes.insert(at, prefix_hash)
        self._owners.insert(at, session)
        session.anchors.append((length, prefix_hash))

    def remove(self, session: Session) -> None:
        """Remove the anchors of ``session``, if it has any."""
        for length, _ in session.anchors:
            at = bisect_left(self.lengths, length)
            while self._owners[at] is not session:
                at += 1
            del self.lengths[at], self._hashes[at], self._owners[at]
        session.anchors.clear()

    def find(self, hashes: npt.NDArray[np.uint64]) -> tuple[Session | None, int]:
        """Return the session without an open request that has the longest anchor among the prefixes
        with these hashes, the newest of several, and that anchor's length; (None, 0) if there is
        none. O(anchors), vectorised."""
        count = bisect_right(self.lengths, len(hashes))
        if not count:
            return None, 0
        lengths = np.frombuffer(self.lengths, np.int64, count)
        known = np.frombuffer(self._hashes, np.uint64, count)
        places = np.flatnonzero(hashes[lengths - 1] == known)
        del lengths, known
        for at in reversed(places.tolist()):
            session = self._owners[at]
            if not session.num_open:
                return session, self.lengths[at]
        return None, 0
