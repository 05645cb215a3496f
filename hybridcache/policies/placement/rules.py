"""Placement rules without learning, and their combination."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hybridcache.policies.protocol import Item, Placed, PlacementPolicy, Prefill


class Branch(PlacementPolicy):
    """Save where the prompt diverges from earlier ones: similar prompts will share that prefix.
    In a prompt that is known as a whole, save before its last token, which is always computed.

    The label is ``rejoin`` where the prompt goes on after the end of all known text: only its own
    conversation shares that prefix.
    """

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        position = min(prefill.seen_len, prefill.prompt_len - 1)
        return (Placed(position, "branch" if prefill.forks else "rejoin"),)


class Boundary(PlacementPolicy):
    """Save at every known boundary, the deepest first.

    Boundaries are ends of message parts that later prompts share.
    """

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        ends = reversed(prefill.boundaries)
        return [Placed(end, "boundary") for end in ends if end > prefill.cached_len]


class Backoff(PlacementPolicy):
    """Save at the last ``count`` grid positions before the prompt's last token, the deepest first.

    One position makes a repeated prompt hit. Each further one serves prompts that are shorter by
    up to one more grid step, and costs one more state per prompt. That state is superseded
    immediately, so it is evicted first when slots run out.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        last = prefill.prompt_len - 1
        first = max(prefill.cached_len, last - self.count * prefill.grid)
        for position in range(last, first, -prefill.grid):
            yield Placed(position, "backoff")


class Every(PlacementPolicy):
    """Save at each multiple of ``interval`` tokens from the root, rounded down to the grid, the
    deepest first."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        last = prefill.prompt_len // self.interval * self.interval
        for position in range(last, prefill.cached_len, -self.interval):
            yield Placed(position, "every")


class End(PlacementPolicy):
    """Save at the last grid position of the finished answer, so that the next turn resumes
    there."""

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        """Return no positions: nothing is saved during prefill."""
        return ()

    def decode_interval(self) -> int | None:
        """Return 1: save at every grid position. The caller keeps only the newest checkpoint."""
        return 1


STATELESS = (Branch, Boundary, Backoff, Every, End)
"""Rules that ignore all notifications."""


class Placement(PlacementPolicy):
    """Combination of several placement rules, by descending priority. No rules save nothing.

    Every rule is notified of every checkpoint, including those of other rules.
    """

    def __init__(self, rules: tuple[PlacementPolicy, ...]) -> None:
        self._rules = rules
        self.is_guarded = all(rule.is_guarded for rule in rules)
        self._learning = [rule for rule in rules if type(rule) not in STATELESS]
        fixed = [rule.decode_interval() for rule in rules if type(rule) in STATELESS]
        self._interval = min((one for one in fixed if one is not None), default=None)
        """Shortest interval of the rules without learning, which does not change."""

    @property
    def rules(self) -> tuple[PlacementPolicy, ...]:
        return self._rules

    def plan(self, prefill: Prefill) -> list[Placed]:
        placed: list[Placed] = []
        for rule in self._rules:
            placed += rule.plan(prefill)
        return placed

    def decode_interval(self) -> int | None:
        """Return the shortest interval of any rule. The caller rounds it up to the grid."""
        shortest = self._interval
        for rule in self._learning:
            interval = rule.decode_interval()
            if interval is not None and (shortest is None or interval < shortest):
                shortest = interval
        return shortest

    def on_prefill(self, prefill: Prefill) -> None:
        for rule in self._learning:
            rule.on_prefill(prefill)

    def on_hit(self, item: Item) -> None:
        for rule in self._learning:
            rule.on_hit(item)

    def on_ghost_hit(self, item: Item, num_tokens: int) -> None:
        for rule in self._learning:
            rule.on_ghost_hit(item, num_tokens)

    def on_saved(self, position: int, label: str) -> None:
        for rule in self._learning:
            rule.on_saved(position, label)

    def on_dropped(self, position: int, label: str) -> None:
        for rule in self._learning:
            rule.on_dropped(position, label)
