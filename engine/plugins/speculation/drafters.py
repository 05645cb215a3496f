"""Drafters: continuations of earlier text, in the radix tree or after the same tokens, and the
multi-token head; and the plugin that makes them from the settings."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import islice

import numpy as np

from engine.core import Plugin
from engine.requests.request import Request
from engine.runner.model_runner import ModelRunner
from engine.runner.predictor import Newest
from engine.schedule.drafting import Drafter, Drafting, GlobalAcceptance
from engine.text.bounded import BoundedMemory
from hybridcache.geometry.units import counted, format_bytes
from hybridcache.radix.tokens import EMPTY, Tokens
from hybridcache.radix.tree import TOKEN_BYTES, NodeHandle, RadixNode, edge_tokens, members

MAX_TEXTS, MAX_KEPT = 16, 1 << 16
"""Maximum number of finished texts that are kept, and of their tokens in total. A short text counts
as an equal share."""
MAX_SEARCHED = 1 << 16
"""Maximum number of tokens of a text that are searched, the latest ones."""


class TreeDrafter(Drafter):
    """Drafts the continuation of the request's path in the radix tree of its namespace.

    It finds answers to the same prompt, earlier turns and retries. A read does not change the tree.
    """

    name = "tree"

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens]:
        drafts = []
        for request, max_tokens in wanted:
            lease = request.claims[0]
            node = lease.node or lease.cache.root(request.namespace)
            drafts.append(following(lease.cache.page_size, node, request.tokens, max_tokens))
        return drafts


MAX_BRANCHES = 64
"""Number of children, the newest, that are compared if several continue alike."""


def following(page_size: int, node: NodeHandle | None, tokens: Tokens, max_tokens: int) -> Tokens:
    """Return up to ``max_tokens`` ids that followed ``tokens`` in earlier requests.

    ``node`` is a node on the path of ``tokens``, or None. At a fork, the child used last is
    followed, resident ones before ghosts. The result is empty if ``tokens`` never occurred.
    O(tokens after ``node``, compared as bytes, plus up to ``MAX_BRANCHES`` per fork).
    """
    while isinstance(node, RadixNode) and node.end > len(tokens):
        node = node.parent
    if not isinstance(node, RadixNode):
        return EMPTY
    first = node.end
    rest, at, found = tokens[first:].tobytes(), 0, [EMPTY]
    num_missing, num_left = max_tokens, len(tokens) - first
    while num_missing > 0:
        child = _next(node, page_size, tokens[first + at :])
        if child is None:
            break
        end = min(at + len(child.edge) // TOKEN_BYTES, num_left)
        shared = (end - at) * TOKEN_BYTES
        if child.edge[:shared] != rest[at * TOKEN_BYTES : end * TOKEN_BYTES]:
            break
        if shared < len(child.edge):
            found.append(edge_tokens(child.edge[shared:])[:num_missing])
            num_missing -= len(found[-1])
        node, at = child, end
    return np.concatenate(found)


def _next(node: RadixNode, page_size: int, tokens: Tokens) -> RadixNode | None:
    """Return the child on which ``tokens`` continue, or None.

    If less than a page remains, this is the child used last of those that begin with it.
    """
    families = (node.children, node.ghosts)
    if len(tokens) >= page_size:
        key = tokens[:page_size].tobytes()
        for family in families:
            child = family.get(key) if isinstance(family, dict) else family
            if child is not None and child.key == key:
                return child
        return None
    start = tokens.tobytes()
    alike = [
        child
        for family in families
        for child in (
            islice(reversed(family.values()), MAX_BRANCHES)
            if isinstance(family, dict)
            else members(family)
        )
        if child.edge[: len(start)] == start
    ]
    return max(alike, key=lambda one: -1 if one.kv is None else one.kv.last_used, default=None)


class SuffixDrafter(Drafter):
    """Drafts the continuation of an earlier occurrence of the request's last tokens (prompt
    lookup).

    It searches the request itself and the texts of its namespace that ended last, while the cache
    is kept.
    """

    name = "suffix"

    def __init__(self, *, shares: bool) -> None:
        """``shares``: keep texts that ended."""
        self._shares = shares
        self.reset()

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens]:
        """See ``Drafter.propose``. O(``MAX_SEARCHED``) for each request without a match."""
        ended = [text for _, text in reversed(self._ended.listed())]
        return [
            continuation(
                request.tokens,
                max_tokens,
                [text for namespace, text in ended if namespace == request.namespace],
            )
            for request, max_tokens in wanted
        ]

    def forget(self, request: Request) -> None:
        if self._shares:
            text = request.namespace, request.tokens.copy()
            num_tokens = max(len(request.tokens), MAX_KEPT // MAX_TEXTS)
            self._ended.put(request.request_id, text, num_tokens)

    def reset(self) -> None:
        self._ended = BoundedMemory[str, tuple[Hashable, Tokens]](MAX_KEPT)
        """Ended texts, the newest last, by the id of their request; their sizes are in tokens."""


Guess = Callable[[Sequence[Newest], Sequence[int]], Sequence[Tokens]]
"""See ``Verification.guess``."""


class HeadDrafter(Drafter):
    """Drafts with the chained multi-token head: one pass per token, for all requests together.

    It reads the states that the last step wrote on the device. So requests that resumed from the
    cache have drafts like any other.
    """

    name = "mtp"

    def __init__(self, guess: Guess) -> None:
        self._guess, self.acceptance = guess, GlobalAcceptance()

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens]:
        newest = []
        for request, _ in wanted:
            lease, row = request.claims
            assert lease.state_slot is not None, "a head keeps a state"
            last = int(request.tokens[-1])
            newest.append(Newest(row, lease.state_slot, last, request.num_tokens - 1))
        return self._guess(newest, [n for _, n in wanted])


def drafters_of(
    lengths: Mapping[str, int], guess: Guess, *, shares: bool
) -> list[tuple[Drafter, int]]:
    """Make the drafters of the setting ``draft`` with their maximum ``lengths``. ``shares``: drafts
    may use the texts of other requests."""
    drafters: list[tuple[Drafter, int]] = []
    for word, most in lengths.items():
        if word == "mtp":
            drafters.append((HeadDrafter(guess), most))
        else:
            drafters += [(TreeDrafter(), most), (SuffixDrafter(shares=shares), most)]
    return drafters


SIZES = (6, 3)
"""Lengths of the runs that must be equal, longest first. Shorter runs are often equal by chance."""
BLOCK = 1 << 13
"""Number of tokens that are searched at once, the latest first."""


def continuation(tokens: Tokens, max_tokens: int, others: Sequence[Tokens] = ()) -> Tokens:
    """Return up to ``max_tokens`` ids that followed the longest earlier run that ends ``tokens``.

    Empty if there is no such run. The longest runs are also searched in ``others``; the first match
    counts. A continuation that reaches the end of ``tokens`` wraps around.

    >>> continuation(np.array([7, 1, 2, 3, 8, 9, 1, 2, 3], np.int32), 4).tolist()
    [8, 9, 1, 2]
    """
    for size in SIZES:
        run = tokens[-size:]
        if len(run) < size:
            continue
        end = _last_end(run, tokens)
        if end is not None:
            return np.resize(tokens[end:][:max_tokens], max_tokens)
        for other in others if size == SIZES[0] else ():
            end = _last_end(run, other)
            if end is not None:
                return other[end:][:max_tokens]
    return tokens[:0]


def _last_end(run: Tokens, text: Tokens) -> int | None:
    """Return the last end of ``run`` in ``text`` that another token follows, or None if there is
    none in the last ``MAX_SEARCHED`` tokens."""
    least = max(0, len(text) - MAX_SEARCHED)
    for stop in range(len(text) - len(run), least, -BLOCK):
        first = max(least, stop - BLOCK)
        starts = np.flatnonzero(text[first:stop] == run[0]) + first
        for place in range(1, len(run)):
            if not len(starts):
                break
            starts = starts[text[starts + place] == run[place]]
        if len(starts):
            return int(starts[-1]) + len(run)
    return None


RUNNING_ON_CPU = 4
"""Maximum number of decoding requests with drafts where each token of a step costs time."""


class SpeculationPlugin(Plugin):
    """Plans drafts (setting ``draft``)."""

    def drafting(self, runner: ModelRunner, *, shares: bool) -> Drafting:
        verification = runner.drafts
        assert verification is not None, "the runner was loaded with the same settings"
        self._state_bytes = verification.state_bytes
        limit = self.config.draft_running or (None if runner.is_asynchronous else RUNNING_ON_CPU)
        drafters = drafters_of(self.config.drafters, verification.guess, shares=shares)
        room = self.config.num_step_states
        return Drafting(drafters, max_verified=room, max_decoding=limit)

    def start_screen(self) -> Sequence[tuple[str, str]]:
        longest, number = self.config.drafts.max_len, self.config.num_step_states
        states = f", whose states take {format_bytes(self._state_bytes)}"
        words = (
            f"{self.config.draft}: up to {counted(longest, 'token')} a request; up to {number} "
            f"verified a step{states if self._state_bytes else ''}"
        )
        return [("drafts", words)]
