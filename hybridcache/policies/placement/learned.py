"""Placement learnt by regret: every label earns its checkpoints."""

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
    """Checkpoints of one label that were saved, and the tokens that they earned; both fade."""

    __slots__ = (
        "due",
        "earned",
        "hope_lasts",
        "hope_tokens",
        "is_tried",
        "offered",
        "placed",
        "wait",
    )

    def __init__(self, hope: float, mean_prompt: float, offered: int) -> None:
        self.hope_tokens = self.earned = hope * mean_prompt
        self.hope_lasts = hope * HOPE_LASTS
        self.placed = 1.0
        self.offered = offered
        """Prefills that could have had it. Labels start apart, so that not all of them are tried in
        the same prefill."""
        self.is_tried = False
        """Whether the latest of these prefills gets it as a trial."""
        self.due = self.wait = TRIAL_AFTER
        """While it does not pay, the next trial comes at ``due``, later ones after ``wait`` more
        prefills."""

    @property
    def yield_tokens(self) -> float:
        """Tokens that one checkpoint of this label earns."""
        return self.earned / self.placed

    def save(self) -> None:
        """Count a checkpoint that was saved."""
        self.placed += 1
        if self.hope_tokens and self.placed > self.hope_lasts:
            self.earned -= self.hope_tokens
            self.hope_tokens = 0.0
        if self.placed > MEMORY:
            self.placed *= 0.5
            self.earned *= 0.5

    def offer(self, pays: bool) -> None:
        """Count a prefill that could have it, and decide whether that is a trial."""
        self.offered += 1
        self.is_tried = False
        if pays:
            self.wait = TRIAL_AFTER
        elif self.offered >= self.due:
            self.is_tried = True
            self.due = self.offered + self.wait
            self.wait = min(self.wait * TRIAL_GROWTH, MEMORY)


class Learned(PlacementPolicy):
    """Forks and boundaries always; the end of the answer, and back-offs from the prompt's end, one
    token and 4, 16, 64 … grid steps, while they earn more than they displace.

    A prompt *forks* where other tokens were seen to follow. Where it continues the end of all that
    was seen, a checkpoint there would serve no other prompt, whatever was evicted above.

    A checkpoint *earns* the tokens between it and the checkpoint above when a request resumes from
    it, or would have, had it not been evicted; one at an end earns down to the nearest that is no
    back-off, for those only stand in for it. It *displaces* the worth of a checkpoint at the
    margin: the tokens that requests missed because their checkpoint had been evicted, per
    checkpoint saved. With ample memory nothing is displaced and all labels that ever earn are
    placed; under pressure the labels in use follow the regret. A label that does not pay is tried
    more and more seldom.

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
        """Tokens that one more checkpoint displaces."""
        return self._missed_tokens / self._num_placed

    def num_saved(self) -> dict[str, float]:
        """Return the saved checkpoints counted so far, by label; large counts have faded."""
        return {label: account.placed - 1.0 for label, account in self._accounts.items()}

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        if prefill.branch_len > prefill.cached_len and prefill.forks:
            yield Placed(prefill.branch_len, "branch")
        for boundary in reversed(prefill.boundaries):
            if boundary > prefill.cached_len:
                yield Placed(boundary, "boundary")
        for placed in _back_offs(prefill):
            if self._wants(placed.label):
                yield placed

    def decode_interval(self) -> int | None:
        return 1 if self._wants("decode") else None

    def on_prefill(self, prefill: Prefill) -> None:
        """Count the prompt, and each label that it could have."""
        self._num_prompts = min(self._num_prompts + 1, MEMORY)
        self._mean_prompt += (prefill.prompt_len - self._mean_prompt) / self._num_prompts
        labels = [label for _, label in _back_offs(prefill)]
        for label in [*labels, "decode"] if prefill.answer_survives else labels:
            account = self._account(label)
            account.offer(self._pays(account))

    def on_hit(self, item: Item) -> None:
        self._account(item.label).earned += _covers(item)

    def on_ghost_hit(self, item: Item, num_tokens: int) -> None:
        self._account(item.label).earned += num_tokens
        self._missed_tokens += num_tokens

    def on_saved(self, position: int, label: str) -> None:
        self._account(label).save()
        self._num_placed += 1
        if self._num_placed > 4 * MEMORY:
            self._num_placed *= 0.5
            self._missed_tokens *= 0.5

    def _account(self, label: str) -> _Account:
        account = self._accounts.get(label)
        if account is None:
            offered = TRIAL_AFTER * (len(self._accounts) + 1) // 8
            account = _Account(_hope(label), self._mean_prompt, offered)
            self._accounts[label] = account
        return account

    def _wants(self, label: str) -> bool:
        account = self._accounts.get(label)
        if account is None:
            account = _Account(_hope(label), self._mean_prompt or 1.0, 0)
        return account.is_tried or self._pays(account)

    def _pays(self, account: _Account) -> bool:
        needed = MARGIN * self.price_tokens + COPY * self._mean_prompt
        return account.yield_tokens > needed


def _hope(label: str) -> float:
    return HOPE if label in END_WORDS else SPECULATIVE_HOPE


def _back_offs(prefill: Prefill) -> Iterator[Placed]:
    """Yield the back-offs of ``prefill``, the deepest first. O(log prompt)."""
    distance = 1
    while (position := prefill.prompt_len - distance) - prefill.cached_len >= prefill.grid:
        yield Placed(position, f"back:{distance}")
        distance = distance * STRIDE if distance > 1 else max(STRIDE, prefill.grid * STRIDE)


def _covers(item: Item) -> int:
    """Return the tokens that ``item`` saved the request that resumed from it."""
    above = item.above
    if item.label in END_WORDS:
        while (
            above is not None and above.label.startswith("back:") and above.label not in END_WORDS
        ):
            above = above.above
    return item.position - (0 if above is None else above.position)
