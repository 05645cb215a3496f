"""What the prefills of one step may take of it."""

from __future__ import annotations

from dataclasses import dataclass

TILE = 64
"""Tokens per tile of every kernel, unless the grid is finer: prefill chunks end on absolute
multiples of it."""

MAX_SCORED = 1024
"""Prompt positions of a step whose logits are wanted: for those of a whole step on a device,
gigabytes would be kept from the pools."""

SHORT_SHARE = 4
"""One part in so many of a step's prefill tokens is for those that fit in it whole."""
TILES = 2
"""How many times the tiles that a step's tokens fill may be begun in it: a few tokens cost nearly
half of what their whole tile does, so a hundred short ends would make one step of many."""


@dataclass(slots=True)
class Budget:
    """What prefills may still take of one step."""

    tokens: int
    num_for_short: int
    """The last so many of them are for prefills that fit in whole."""
    tiles: int
    """Tiles that may be begun, however few tokens are in them."""
    scored: int = MAX_SCORED
    """Of their positions, those whose logits may be wanted."""

    @classmethod
    def of(cls, tokens: int, *, is_shared: bool) -> Budget:
        """Of a step with ``tokens`` for prefills, one tile at least; not shared: there is but
        one."""
        num_for_short = min(tokens // SHORT_SHARE, tokens - TILE) if is_shared else 0
        return cls(tokens, num_for_short, TILES * tokens // TILE)

    @property
    def is_spent(self) -> bool:
        return self.tokens <= 0 or self.tiles <= 0

    def room(self, scores: bool) -> int:
        """How many tokens any prefill may compute, be it short or long."""
        if self.is_spent:
            return 0
        tokens = max(0, self.tokens - self.num_for_short)
        return min(tokens, self.scored) if scores else tokens

    def most(self, rest: int, scores: bool) -> int:
        """How many of its ``rest`` tokens a prefill may compute."""
        if self.is_spent:
            return 0
        short = min(self.num_for_short, self.tokens)
        is_short = rest <= (min(short, self.scored) if scores else short)
        return rest if is_short else min(rest, self.room(scores))

    def spend(self, num_tokens: int, scores: bool) -> None:
        self.tokens -= num_tokens
        self.tiles -= -(-num_tokens // TILE)
        self.scored -= num_tokens * scores
