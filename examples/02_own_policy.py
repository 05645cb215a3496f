"""An eviction policy in ten lines, compared with two built-in ones.

    python examples/02_own_policy.py [figure.pdf]

``examples/policies`` has a policy that learns from misses, and a placement.
"""

from __future__ import annotations

import sys

from hybridcache import Item, ScorePolicy, simulate


class TokensPerByte(ScorePolicy):
    """Evicts the item that saves the fewest tokens per byte, weighted by its uses.

    ``span`` is the number of tokens that the next request computes again if the item is evicted.
    The score of an item changes only when it is used, which ``ScorePolicy`` requires: scores that
    fall with time belong in a ``SampledPolicy``.
    """

    orders_classes = False  # as in lru and gdsf: a comparison needs the same setting

    def score(self, item: Item) -> float:
        """Return the value of keeping ``item``: expected tokens saved per byte of memory."""
        return (item.uses + 1) * item.span / item.size_bytes


def main(arguments: list[str]) -> None:
    """Compare the policies over three sizes; draw the curves if a file is named."""
    result = simulate("short?head=120", gib=[0.5, 1, 2], policy=["lru", "gdsf", TokensPerByte])
    print(result.table())
    best = result.best(1)
    print(f"best at 1 GiB: {best.label}, {best.token_hit_rate:.1%} of the prompt tokens reused")
    if arguments:
        result.figure(arguments[0])


if __name__ == "__main__":
    main(sys.argv[1:])
