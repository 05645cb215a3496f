"""Sessions, recognised by the tokens of their prompts.

A session is a conversation or an agent's run. Its requests never overlap. Each prompt begins with
the previous prompt, possibly without its last few tokens if a chat template rewrites them. So each
session leaves an *anchor*: the part of its newest prompt with which the next one is expected to
begin. A prompt belongs to the session of the longest anchor that it begins with, unless a request
of that session is open. Exceptions are the choices of one answer (``choice_of``).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from hybridcache.radix.protocol import end_of_prompt
from hybridcache.radix.tokens import Tokens

MAX_KNOWN = 4096
"""Number of idle sessions that are remembered: the most recently active ones."""
LIVE_S = 300.0
"""Seconds for which an idle session counts as live."""
TAIL_LEN = 64
"""Maximum number of tokens at the end of a prompt that a chat template rewrites in the next one."""
BLIND_TAIL_LEN = 8
"""``TAIL_LEN`` of a prompt without a known boundary in its last ``TAIL_LEN`` tokens."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Session:
    """One conversation or agent run of one tenant, recognised by the tokens of its prompts."""

    def __init__(self, number: int, tenant: Hashable, began_s: float) -> None:
        self.number = number
        """Rank among all sessions, by the arrival of the first request."""
        self.tenant = tenant
        """Namespace of its requests."""
        self.has_ended = False
        """True if its client said that no further request follows."""
        self.newest_id = ""
        """Id of the newest request; of several choices, the id of the first one."""
        self.num_requests = 0
        """Prompts so far; several choices of one prompt count once."""
        self.num_admitted = 0
        """Choices of the newest prompt that were admitted."""
        self.num_open = 0
        """Requests that wait or run."""
        self.num_tokens = 0
        """Tokens of the longest text so far: prompt and, once it has ended, answer."""
        self.known_len = 0
        """Tokens of the newest prompt that were sent before: the part that can have been lost."""
        self.shared_len = 0
        """Tokens of the first prompt that were cached for other sessions."""
        self.idle_since_s = began_s
        """Time at which the last request ended, if none is open."""
        self.anchors: list[tuple[int, int]] = []
        """(length, hash) of the prefixes that the next prompt may begin with; see ``Sessions``."""


class Sessions:
    """Assigns requests to sessions, numbered in the order in which they began. Tenants share none.

    Memory is O(``MAX_KNOWN`` + open requests).
    """

    def __init__(self, max_known: int = MAX_KNOWN, *, recognises: bool = True) -> None:
        """Without ``recognises``, prompts are not compared: each begins a session."""
        self._max_known, self._recognises = max_known, recognises
        self._anchors: defaultdict[Hashable, _Anchors] = defaultdict(_Anchors)
        self.open: dict[Session, None] = {}
        """Sessions with a waiting or running request."""
        self.idle: OrderedDict[Session, None] = OrderedDict()
        """Remembered sessions without an open request; the one idle for longest first."""
        self._by_newest: dict[str, Session] = {}
        """Remembered sessions by the name of their newest request."""
        self._num_begun = 0
        self._powers: npt.NDArray[np.uint64] = np.empty(0, np.uint64)

    def num_live(self, now_s: float) -> int:
        """Return the number of sessions that are open, or idle for ``LIVE_S`` at most. O(them)."""
        num_live = len(self.open)
        for session in reversed(self.idle):
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
        O(length + known anchors of the tenant), vectorised; O(1) for a further choice, or if
        sessions are not recognised.
        """
        session = self._by_newest.get(choice_of) if choice_of else None
        if session is not None:
            session.num_open += 1
            self.idle.pop(session, None)
            self.open[session] = None
            return session
        num_tokens, known_len = len(prompt), 0
        anchors = self._anchors[tenant] if self._recognises else None
        if anchors is not None:
            # The polynomial hash, modulo 2**64, of every prefix. Those of one length are compared.
            if len(self._powers) < num_tokens:
                size = max(num_tokens, 2 * len(self._powers))
                self._powers = np.cumprod(np.full(size, _FACTOR), dtype=np.uint64)
            numbers = prompt.astype(np.uint64) + np.uint64(1)
            hashes = np.cumsum(numbers * self._powers[:num_tokens])
            session, known_len = anchors.find(hashes)
            if session is not None:
                anchors.remove(session)
                self.idle.pop(session, None)
                self._drop_name(session)
        if session is None:
            self._num_begun += 1
            session = Session(self._num_begun, tenant, now_s)
        if anchors is not None:
            for length in anchor_lens(num_tokens, boundaries):
                anchors.add(session, length, int(hashes[length - 1]))
        session.known_len, session.newest_id = known_len, choice_of or request_id
        self._by_newest[session.newest_id] = session
        session.num_requests += 1
        session.num_open += 1
        session.num_admitted = 0
        session.num_tokens = max(session.num_tokens, num_tokens)
        self.open[session] = None
        return session

    def left(self, session: Session, num_tokens: int, now_s: float) -> None:
        """Remove a request of ``session`` that was answered or aborted, with a text of
        ``num_tokens``."""
        session.num_open -= 1
        session.num_tokens = max(session.num_tokens, num_tokens)
        if session.num_open:
            return
        session.idle_since_s = now_s
        del self.open[session]
        self.idle[session] = None
        if len(self.idle) > self._max_known:
            oldest, _ = self.idle.popitem(last=False)
            self._forget(oldest)

    def end(self, request_id: str) -> Session | None:
        """End, forget and return the idle session with ``request_id`` as its newest request. None
        if there is no such session."""
        session = self._by_newest.get(request_id)
        if session is None or session not in self.idle:
            return None
        del self.idle[session]
        self._forget(session)
        session.has_ended = True
        return session

    def _drop_name(self, session: Session) -> None:
        if self._by_newest.get(session.newest_id) is session:
            del self._by_newest[session.newest_id]

    def _forget(self, session: Session) -> None:
        self._drop_name(session)
        if session.anchors:
            anchors = self._anchors[session.tenant]
            anchors.remove(session)
            if not anchors.lengths:
                del self._anchors[session.tenant]


def anchor_lens(prompt_len: int, boundaries: tuple[int, ...]) -> tuple[int, ...]:
    """Return the candidate lengths of the part shared with the session's next prompt: a boundary
    near the end; else all of it, or all but a few tokens.

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
        for length, _ in session.anchors:
            at = bisect_left(self.lengths, length)
            while self._owners[at] is not session:
                at += 1
            del self.lengths[at], self._hashes[at], self._owners[at]
        session.anchors.clear()

    def find(self, hashes: npt.NDArray[np.uint64]) -> tuple[Session | None, int]:
        """Return the session without an open request that has the longest anchor among these prefix
        hashes, the newest of several, and the anchor's length; (None, 0) if there is none.
        O(anchors), vectorised."""
        count = bisect_right(self.lengths, len(hashes))
        if not count:
            return None, 0
        lengths = np.frombuffer(self.lengths, np.int64, count)
        known = np.frombuffer(self._hashes, np.uint64, count)
        places = np.flatnonzero(hashes[lengths - 1] == known)
        for at in reversed(places.tolist()):
            session = self._owners[at]
            if not session.num_open:
                return session, self.lengths[at]
        return None, 0
