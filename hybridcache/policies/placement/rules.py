"""Where a prefill saves states: words in a dict -> small classes, composed with commas.

>>> prefill = Prefill(prompt_len=1000, cached_len=0, kv_len=0, branch_len=300, boundaries=(996,), grid=64)
>>> for placed in parse_placement("branch,boundary,backoff,every:512").plan(prefill):
...     print(*placed)
256 branch
512 every
960 boundary
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from hybridcache.policies.placement.by_length import (
    Aligned,
    Balanced,
    Chunks,
    Dyadic,
    Sqrt,
    Thinned,
)
from hybridcache.policies.placement.learned import Learned
from hybridcache.policies.placement.planned import Planned
from hybridcache.policies.protocol import Placed, PlacementPolicy, Prefill, PrefillRule
from hybridcache.policies.user import load_placement


class Branch(PrefillRule):
    """Where this prompt leaves what was seen before: the fork that the next prompt of its kind will share."""

    def positions(self, prefill: Prefill) -> Iterable[Placed]:
        return (Placed(prefill.branch_len, "branch"),)


class Boundary(PrefillRule):
    """Every known boundary: ends of message parts that survive into later prompts, the deepest first."""

    def positions(self, prefill: Prefill) -> Iterable[Placed]:
        return [Placed(boundary, "boundary") for boundary in reversed(prefill.boundaries)]


class Backoff(PrefillRule):
    """The last ``count`` grid positions before the prompt's last token, the deepest first.

    One, so that the same prompt sent again hits. Each further one for a prompt cut short by up to one more grid step, at the
    price of one more state a prompt: superseded at once, it goes before all others when slots run out.
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
            floored = placed.position - placed.position % prefill.grid
            if prefill.cached_len < floored <= prefill.prompt_len:
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
        """What a caller makes of ``positions``: on the grid, in (cached_len, prompt_len], each once, ascending."""
        planned: dict[int, Placed] = {}
        for position, label in self.positions(prefill):
            floored = position - position % prefill.grid
            if prefill.cached_len < floored <= prefill.prompt_len:
                planned.setdefault(floored, Placed(floored, label))
        return tuple(planned[position] for position in sorted(planned))


PLACEMENT: dict[str, Callable[[], PlacementPolicy]] = {
    "end": End,
    "branch": Branch,
    "boundary": Boundary,
    "backoff": Backoff,
    "prompt": Prompt,
    "sqrt": Sqrt,
    "dyadic": Dyadic,
    "regret": Learned,
}
"""Words for checkpoint placement."""

NUMBERED_PLACEMENT: dict[str, Callable[[int], PlacementPolicy]] = {
    "every": Every,
    "aligned": Aligned,
    "chunks": Chunks,
}
"""Words that take a length in tokens, written ``word:number``."""

COUNTED_PLACEMENT: dict[str, Callable[[int], PlacementPolicy]] = {
    "backoff": Backoff,
    "balanced": Balanced,
    "thinned": Thinned,
    "planned": Planned,
}
"""Words that take a number of checkpoints, written ``word:number``; ``backoff`` alone is ``backoff:1``."""


def parse_placement(words: str) -> Placement:
    """``"branch,boundary,backoff,every:1024"`` -> Placement; ``"none"`` (alone) saves nothing; with ``cap:N`` at most N.

    ValueError names a word that does not exist, or whose number is missing, superfluous or wrong.
    """
    if words.strip() == "none":
        return Placement(())
    rules, cap = [], None
    for word in (word.strip() for word in words.split(",")):
        name, _, argument = word.partition(":")
        if name == "cap":
            cap = _number(name, argument, "cap:2")
        else:
            rules.append(_parse_rule(word))
    return Placement(tuple(rules), cap)


def _number(word: str, argument: str, example: str) -> int:
    if not argument.isdecimal() or int(argument) < 1:
        raise ValueError(
            f"checkpoint placement {word!r} needs a number of at least 1, as in {example}"
        )
    return int(argument)


def _parse_rule(word: str) -> PlacementPolicy:
    name, colon, argument = word.partition(":")
    if name in PLACEMENT and not colon:
        return PLACEMENT[name]()
    if name in NUMBERED_PLACEMENT:
        return NUMBERED_PLACEMENT[name](_number(name, argument, f"{name}:1024"))
    if name in COUNTED_PLACEMENT:
        return COUNTED_PLACEMENT[name](_number(name, argument, f"{name}:4"))
    if name in PLACEMENT:
        raise ValueError(f"checkpoint placement {name!r} takes no number, got {word!r}")
    if colon:
        return load_placement(word)
    known = ", ".join(placement_words())
    raise ValueError(f"unknown checkpoint placement {name!r}; known: {known}, or none alone")


def placement_words() -> list[str]:
    """The words that ``parse_placement`` puts together, beside ``none`` and ``module:Class``."""
    numbered = (*NUMBERED_PLACEMENT, *COUNTED_PLACEMENT, "cap")
    return [*PLACEMENT, *(f"{word}:N" for word in numbered)]
