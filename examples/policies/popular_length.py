"""A placement policy: save checkpoints where earlier prompts resumed.

``plan`` is pure: it may be called any number of times. All learning happens in the ``on_``
methods, which are called once per event.

    hybridcache simulate --trace short --model qwen3-next --gib 1 \\
        --checkpoints branch,end,popular_length:PopularLength
"""

from collections import Counter
from collections.abc import Iterable

from hybridcache import Item, Placed, PlacementPolicy, Prefill


class PopularLength(PlacementPolicy):
    """Saves at the prompt lengths from which requests resumed most often, and at the prompt's end.

    Useful where many prompts share templates of a few fixed lengths.
    """

    num_positions = 2

    def __init__(self) -> None:
        self.resumed: Counter[int] = Counter()
        self.num_saved = 0

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        """Return the popular lengths inside this prefill, most popular first."""
        yield Placed(prefill.prompt_len, "prompt")
        fitting = [n for n in self.resumed if prefill.cached_len < n < prefill.prompt_len]
        for length in sorted(fitting, key=lambda n: -self.resumed[n])[: self.num_positions]:
            yield Placed(length, "popular")

    def on_hit(self, item: Item) -> None:
        """Count the position from which a request resumes."""
        self.resumed[item.position] += 1

    def on_ghost_hit(self, item: Item, num_tokens: int) -> None:
        """Count a position from which a request would have resumed."""
        self.resumed[item.position] += 1

    def on_saved(self, placed: Placed) -> None:
        """Count checkpoints that were really stored."""
        self.num_saved += 1
