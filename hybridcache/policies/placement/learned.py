"""Placement learnt by regret: every word earns its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from hybridcache.policies.protocol import Item, Placed, PlacementPolicy, Prefill

STRIDE = 4
"""Each back-off lies this many times further from the prompt's end than the one before."""
HOPE = 1.0
"""What the end of the prompt and of the answer are believed to earn with their first checkpoint:
this part of a prompt."""
SPECULATIVE_HOPE = 0.125
"""The same of the back-offs further up."""
HOPE_LASTS = 128
"""Checkpoints after which those two must live on what they earned; the others after as large a part
of it as their hope is."""
COPY = 1 / 4096
"""What saving one costs by itself: a copy of a state takes about the time that this part of a
prompt takes to prefill."""
MARGIN = 3.0
"""Times what it displaces that a checkpoint has to earn: the word that looks best by chance is not
the best."""
TRIAL_AFTER = 32
"""A word that does not pay is tried again after so many prefills, and after ``TRIAL_GROWTH`` times
as many every time it fails."""
TRIAL_GROWTH = 4
MEMORY = 1024
"""Checkpoints after which a word has forgotten half, and prefills after which it is tried again at
the latest."""
END_WORDS = ("back:1", "decode")
"""The ends of the prompt and of the answer."""


class _Account:
    """One word's checkpoints and what they earned, tokens; both fade."""

    __slots__ = ("due", "earned", "hope_lasts", "hope_tokens", "offered", "placed", "wait")

    def __init__(self, hope: float, mean_prompt: float, offered: int) -> None:
        self.hope_tokens = self.earned = hope * mean_prompt
        self.hope_lasts = hope * HOPE_LASTS
        self.placed = 1.0
        self.offered = offered
        """Prefills that could have had it; words start apart, so that they are not all tried in the
        same one."""
        self.due = self.wait = TRIAL_AFTER
        """It is tried again at ``due``, if it does not pay, and then after ``wait`` prefills."""

    @property
    def yield_tokens(self) -> float:
        """Tokens a checkpoint of this word earns."""
        return self.earned / self.placed

    def place(self) -> None:
        self.placed += 1
        if self.hope_tokens and self.placed > self.hope_lasts:
            self.earned -= self.hope_tokens
            self.hope_tokens = 0.0
        if self.placed > MEMORY:
            self.placed *= 0.5
            self.earned *= 0.5

    def tries(self, pays: bool) -> bool:
        """Whether it gets a checkpoint now."""
        self.offered += 1
        if pays:
            self.wait = TRIAL_AFTER
        elif self.offered >= self.due:
            self.due = self.offered + self.wait
            self.wait = min(self.wait * TRIAL_GROWTH, MEMORY)
            return True
        return pays


class Learned(PlacementPolicy):
    """Forks and boundaries always; the end of the answer, and back-offs from the prompt's end, one
    token and 4, 16, 64 … grid steps, while they earn more than they displace.

    A prompt *forks* where other tokens were seen to follow. Where all that was seen ends it goes
    on, and a checkpoint there would serve nobody else, whatever was evicted above.

    A checkpoint *earns* the tokens between it and the checkpoint above when a request resumes from
    it, or would have, had it not been evicted; one at an end earns down to the nearest that is no
    back-off, for those only stand in for it. It *displaces* what a checkpoint is worth at the
    margin: the tokens that requests missed because their checkpoint had been evicted, per
    checkpoint placed. With ample memory nothing is displaced and all that ever earns is placed;
    under pressure the budget of words follows the regret. A word that does not pay is tried more
    and more seldom.

    Source: this project. O(log prompt) per prefill.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._missed_tokens = 0.0
        self._num_placed = 1.0
        self._mean_prompt = 0.0
        self._num_prompts = 0

    @property
    def price_tokens(self) -> float:
        """What one more checkpoint displaces."""
        return self._missed_tokens / self._num_placed

    def positions(self, prefill: Prefill) -> Iterator[Placed]:
        self._settle(prefill)
        if prefill.branch_len > prefill.cached_len and prefill.forks:
            yield self._place(prefill.branch_len, "branch")
        for boundary in reversed(prefill.boundaries):
            if boundary > prefill.cached_len:
                yield self._place(boundary, "boundary")
        distance = 1
        while (position := prefill.prompt_len - distance) - prefill.cached_len >= prefill.grid:
            label = f"back:{distance}"
            if self._pays(label):
                yield self._place(position, label)
            distance = distance * STRIDE if distance > 1 else max(STRIDE, prefill.grid * STRIDE)

    def decode_interval(self) -> int | None:
        """Asked once a request, after ``positions``."""
        if not self._pays("decode"):
            return None
        self._place(0, "decode")
        return 1

    def _settle(self, prefill: Prefill) -> None:
        """Credit what this request resumed from, or would have."""
        self._num_prompts = min(self._num_prompts + 1, MEMORY)
        self._mean_prompt += (prefill.prompt_len - self._mean_prompt) / self._num_prompts
        if prefill.resumed is not None:
            self._account(prefill.resumed.label).earned += _covers(prefill.resumed)
        missed = prefill.missed
        if missed is not None:
            lost = missed.position - prefill.cached_len
            self._account(missed.label).earned += lost
            self._missed_tokens += lost

    def _account(self, label: str) -> _Account:
        account = self._accounts.get(label)
        if account is None:
            hope = HOPE if label in END_WORDS else SPECULATIVE_HOPE
            offered = TRIAL_AFTER * (len(self._accounts) + 1) // 8
            account = self._accounts[label] = _Account(hope, self._mean_prompt, offered)
        return account

    def _pays(self, label: str) -> bool:
        account = self._account(label)
        needed = MARGIN * self.price_tokens + COPY * self._mean_prompt
        return account.tries(account.yield_tokens > needed)

    def _place(self, position: int, label: str) -> Placed:
        self._account(label).place()
        self._num_placed += 1
        if self._num_placed > 4 * MEMORY:
            self._num_placed *= 0.5
            self._missed_tokens *= 0.5
        return Placed(position, label)


def _covers(item: Item) -> int:
    """Tokens that ``item`` saved the request that resumed from it."""
    above = item.above
    if item.label in END_WORDS:
        while (
            above is not None and above.label.startswith("back:") and above.label not in END_WORDS
        ):
            above = above.above
    return item.position - (0 if above is None else above.position)
