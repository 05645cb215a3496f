"""Token budget of the prefills of one step."""

from __future__ import annotations

from dataclasses import dataclass

TILE = 64
"""Tokens per tile of every kernel, unless the grid is finer. Prefill chunks end at absolute
multiples of it."""

MAX_SCORED = 1024
"""Most prompt positions per step for which logits are computed. The logits of a whole step would
take gigabytes of device memory."""

SHORT_SHARE = 4
"""Divisor of the share of a step's prefill tokens that is reserved for prefills that fit in it
whole."""
TILES = 2
"""Most tiles begun in a step, as a multiple of the tiles that its tokens fill. A few tokens cost
nearly half as much as a whole tile, so a hundred short chunks would make a step several times
longer."""


@dataclass(slots=True)
class Budget:
    """Remaining budget for prefills in one step."""

    tokens: int
    num_for_short: int
    """The last ``num_for_short`` tokens are reserved for prefills that fit in whole."""
    tiles: int
    """Tiles that may still be begun, however few tokens they contain."""
    scored: int = MAX_SCORED
    """Positions for which logits may still be computed."""

    @classmethod
    def of(cls, tokens: int, *, is_shared: bool) -> Budget:
        """Return the budget of a step with ``tokens`` for prefills, at least one tile.
        ``is_shared`` is False if there is only one prefill."""
        num_for_short = min(tokens // SHORT_SHARE, tokens - TILE) if is_shared else 0
        return cls(tokens, num_for_short, TILES * tokens // TILE)

    @property
    def is_spent(self) -> bool:
        return self.tokens <= 0 or self.tiles <= 0

    def room(self, scores: bool) -> int:
        """Return the number of tokens that any prefill may compute, short or long."""
        if self.is_spent:
            return 0
        tokens = max(0, self.tokens - self.num_for_short)
        return min(tokens, self.scored) if scores else tokens

    def most(self, rest: int, scores: bool) -> int:
        """Return the number of the ``rest`` remaining tokens that a prefill may compute."""
        if self.is_spent:
            return 0
        short = min(self.num_for_short, self.tokens)
        is_short = rest <= (min(short, self.scored) if scores else short)
        return rest if is_short else min(rest, self.room(scores))

    def spend(self, num_tokens: int, scores: bool) -> None:
        self.tokens -= num_tokens
        self.tiles -= -(-num_tokens // TILE)
        self.scored -= num_tokens * scores
