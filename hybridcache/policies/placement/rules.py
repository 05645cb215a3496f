"""Where a prefill saves states, by what is known of the prompt; and several rules as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hybridcache.policies.protocol import Placed, PlacementPolicy, Prefill, PrefillRule


class Branch(PrefillRule):
    """Where this prompt leaves what was seen before: the fork that the next prompt of its kind will
    share."""

    def positions(self, prefill: Prefill) -> Iterable[Placed]:
        return (Placed(prefill.branch_len, "branch"),)


class Boundary(PrefillRule):
    """Every known boundary: ends of message parts that survive into later prompts, the deepest
    first."""

    def positions(self, prefill: Prefill) -> Iterable[Placed]:
        return [Placed(boundary, "boundary") for boundary in reversed(prefill.boundaries)]


class Backoff(PrefillRule):
    """The last ``count`` grid positions before the prompt's last token, the deepest first.

    One, so that the same prompt sent again hits. Each further one for a prompt cut short by up to
    one more grid step, at the price of one more state a prompt: superseded at once, it goes before
    all others when slots run out.
    """

    def __init__(self, count: int = 1) -> None:
        if count < 1:
            raise ValueError(f"backoff:K needs K of at least 1 position, got {count}")
        self.count = count

    def positions(self, prefill: Prefill) -> Iterator[Placed]:
        last = prefill.prompt_len - 1
        first = max(prefill.cached_len, last - self.count * prefill.grid)
        for position in range(last, first, -prefill.grid):
            yield Placed(position, "backoff")


class Prompt(PrefillRule):
    """The prompt's end, so that a prompt which goes on from it hits."""

    def positions(self, prefill: Prefill) -> Iterable[Placed]:
        return (Placed(prefill.prompt_len, "prompt"),)


class Every(PrefillRule):
    """Each multiple of ``interval`` tokens, absolute, the deepest first."""

    def __init__(self, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"every:N needs N of at least 1 token, got {interval}")
        self.interval = interval

    def positions(self, prefill: Prefill) -> Iterator[Placed]:
        last = prefill.prompt_len // self.interval * self.interval
        for position in range(last, prefill.cached_len, -self.interval):
            yield Placed(position, "every")


class End(PlacementPolicy):
    """The last grid position of the finished answer, so that the next turn resumes there."""

    def positions(self, prefill: Prefill) -> Iterable[Placed]:
        """None: the prefill saves nothing."""
        return ()

    def decode_interval(self) -> int | None:
        """Every token, which the caller rounds up to the grid: only the last crossing is kept."""
        return 1


class Placement(PlacementPolicy):
    """Several placement rules at once, the first most wanted; no rule: nothing is saved.

    ``cap``: one prefill saves at most so many, the most wanted; None: all.
    """

    def __init__(self, rules: tuple[PlacementPolicy, ...], cap: int | None = None) -> None:
        self.rules = rules
        self.cap = cap

    def positions(self, prefill: Prefill) -> list[Placed]:
        placed: list[Placed] = []
        for rule in self.rules:
            placed += rule.positions(prefill)
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
        """The shortest that any rule asks for; the caller rounds it up to the grid."""
        shortest: int | None = None
        for rule in self.rules:
            interval = rule.decode_interval()
            if interval is not None and (shortest is None or interval < shortest):
                shortest = interval
        return shortest

    def plan(self, prefill: Prefill) -> tuple[Placed, ...]:
        """What a caller makes of ``positions``: on the grid, in (cached_len, prompt_len], each
        once, ascending."""
        planned: dict[int, Placed] = {}
        for position, label in self.positions(prefill):
            floored = prefill.floor(position)
            if floored is not None:
                planned.setdefault(floored, Placed(floored, label))
        return tuple(planned[position] for position in sorted(planned))
