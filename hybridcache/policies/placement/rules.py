"""Where a prefill saves states, by what is known of the prompt; and several rules as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hybridcache.policies.protocol import Item, Placed, PlacementPolicy, Prefill


class Branch(PlacementPolicy):
    """Where this prompt leaves what was seen before: the fork that the next prompt of its kind will
    share."""

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        return (Placed(prefill.branch_len, "branch"),)


class Boundary(PlacementPolicy):
    """Every known boundary: ends of message parts that survive into later prompts, the deepest
    first."""

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        return [Placed(boundary, "boundary") for boundary in reversed(prefill.boundaries)]


class Backoff(PlacementPolicy):
    """The last ``count`` grid positions before the prompt's last token, the deepest first.

    One, so that the same prompt sent again hits. Each further one for a prompt cut short by up to
    one more grid step, at the price of one more state a prompt: superseded at once, it goes before
    all others when slots run out.
    """

    def __init__(self, count: int = 1) -> None:
        if count < 1:
            raise ValueError(f"backoff:K needs K of at least 1 position, got {count}")
        self.count = count

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        last = prefill.prompt_len - 1
        first = max(prefill.cached_len, last - self.count * prefill.grid)
        for position in range(last, first, -prefill.grid):
            yield Placed(position, "backoff")


class Prompt(PlacementPolicy):
    """The prompt's end, so that a prompt which goes on from it hits."""

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        return (Placed(prefill.prompt_len, "prompt"),)


class Every(PlacementPolicy):
    """Each multiple of ``interval`` tokens, absolute, the deepest first."""

    def __init__(self, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"every:N needs N of at least 1 token, got {interval}")
        self.interval = interval

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        last = prefill.prompt_len // self.interval * self.interval
        for position in range(last, prefill.cached_len, -self.interval):
            yield Placed(position, "every")


class End(PlacementPolicy):
    """The last grid position of the finished answer, so that the next turn resumes there."""

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        """Return no position: the prefill saves nothing."""
        return ()

    def decode_interval(self) -> int | None:
        """Every token, which the caller rounds up to the grid: only the last crossing is kept."""
        return 1


class Placement(PlacementPolicy):
    """Several placement rules combined, the first most wanted; without rules nothing is saved.

    ``cap``: maximum number of checkpoints that one prefill saves, the most wanted first; None for
    no limit. Every rule is notified of every checkpoint, whichever rule wanted it.
    """

    def __init__(self, rules: tuple[PlacementPolicy, ...], cap: int | None = None) -> None:
        self.rules = rules
        self.cap = cap

    def plan(self, prefill: Prefill) -> list[Placed]:
        placed: list[Placed] = []
        for rule in self.rules:
            placed += rule.plan(prefill)
        return placed if self.cap is None else list(self._capped(placed, prefill, self.cap))

    def _capped(self, asked: list[Placed], prefill: Prefill, cap: int) -> Iterator[Placed]:
        taken: set[int] = set()
        for placed in asked:
            floored = prefill.floor(placed.position)
            if floored is not None:
                taken.add(floored)
            if len(taken) <= cap:
                yield placed

    def decode_interval(self) -> int | None:
        """Return the shortest interval of any rule; the caller rounds it up to the grid."""
        shortest: int | None = None
        for rule in self.rules:
            interval = rule.decode_interval()
            if interval is not None and (shortest is None or interval < shortest):
                shortest = interval
        return shortest

    def on_prefill(self, prefill: Prefill) -> None:
        for rule in self.rules:
            rule.on_prefill(prefill)

    def on_hit(self, item: Item) -> None:
        for rule in self.rules:
            rule.on_hit(item)

    def on_ghost_hit(self, item: Item, num_tokens: int) -> None:
        for rule in self.rules:
            rule.on_ghost_hit(item, num_tokens)

    def on_saved(self, position: int, label: str) -> None:
        for rule in self.rules:
            rule.on_saved(position, label)

    def on_dropped(self, position: int, label: str) -> None:
        for rule in self.rules:
            rule.on_dropped(position, label)
