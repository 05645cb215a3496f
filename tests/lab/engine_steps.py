"""Requests of the simulator that take memory in the pieces in which the engine takes it."""

from __future__ import annotations

from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.target import LeasedRequest, LeaseTarget, build_target
from hybridcache.tokens import Tokens

TOKEN_BUDGET = 256
"""Prompt tokens of a step."""
TILE = 64
"""Chunks end on its multiples, or with the prompt."""
DECODE_PIECE = 32
"""Rows taken ahead while decoding."""


class SteppedRequest(LeasedRequest):
    """Makes a replay in turn equal to the engine's, eviction for eviction."""

    __slots__ = ("_end",)

    def claim(self) -> bool:
        self._end = self.cached_len
        return self._next_piece()

    def _next_piece(self) -> bool:
        start, end = self._end, len(self._request.tokens)
        end = end if start + TOKEN_BUDGET >= end else (start + TOKEN_BUDGET) // TILE * TILE
        has_memory = self._extend(start, end)
        self._target.cache.take_step().done()
        self._end = end if has_memory else start
        return has_memory

    def prefilled(self) -> None:
        tokens = self._request.tokens
        self._lease.publish(tokens, self._end)
        while self._end < len(tokens) and self._next_piece():
            self._lease.publish(tokens, self._end)

    def finish(self, output: Tokens) -> None:
        if self._end == len(self._request.tokens):
            super().finish(output)
        else:
            self._lease.finish(self._request.tokens, self._end)

    def _decode(self, computed_len: int) -> int:
        """Decode step by step, without the steps that touch no memory."""
        lease, grid = self._lease, self._target.cache.grid
        at = len(self._request.tokens)
        max_len = at + len(self._request.output)
        while at < computed_len:
            rows = lease.extended_len
            following = min(
                rows + 1 if rows > at else at + 1, at // grid * grid + grid, computed_len
            )
            if following > rows:
                ahead = max(following, min(rows + DECODE_PIECE, max_len))
                if not (lease.extend(ahead) or lease.extend(following)):
                    return at
            lease.take_checkpoint_slots(following - 1, following)
            at = following
        self._target.cache.take_step().done()
        return at


def stepped_target(cell: Scenario) -> LeaseTarget:
    """Return the cache of ``cell``, whose requests run in steps."""
    target = build_target(cell, 1)
    assert isinstance(target, LeaseTarget)
    target.request_type = SteppedRequest
    return target
