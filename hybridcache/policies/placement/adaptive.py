"""Adaptive placement: every label earns its checkpoints."""

from __future__ import annotations

from hybridcache.policies.protocol import Item, Placed, PlacementPolicy, Prefill, base_label

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
REJOIN = "rejoin"
"""Label of a checkpoint where a prompt continues the end of all that was seen."""
TIPS = frozenset({*END_WORDS, REJOIN})
"""Labels of positions from which one conversation goes on."""
SHARED = frozenset({"branch", "boundary"})
"""Labels that are placed whatever they earn: several prompts meet there."""
FEW = 8
"""Checkpoints that a label needs before others are compared with it."""


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
        "used",
        "wait",
    )

    def __init__(self, hope: float, mean_prompt: float, offered: int, most: float) -> None:
        self.hope_tokens = self.earned = hope * mean_prompt
        """``hope_tokens`` is 0 once the label has to live on what it earned."""
        self.hope_lasts = min(hope * HOPE_LASTS, most)
        self.used = 0.0
        """Part of ``earned`` that requests did resume from: neither hope nor ghosts."""
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

    @property
    def used_tokens(self) -> float:
        """Tokens that one checkpoint of this label saved in fact."""
        return self.used / self.placed

    def save(self) -> None:
        """Count a checkpoint that was saved."""
        self.placed += 1
        if self.hope_tokens and self.placed > self.hope_lasts:
            self.earned -= self.hope_tokens
            self.hope_tokens = 0.0
        if self.placed > MEMORY:
            self.placed *= 0.5
            self.earned *= 0.5
            self.used *= 0.5

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


class Adaptive(PlacementPolicy):
    """Forks and boundaries always; the successor of the tip that the prompt resumes from; other
    positions while they earn more than they displace.

    Other positions are the end of the answer, back-offs from the prompt's end (one token and 4, 16,
    64 … grid steps), and the *rejoin*. A prompt *forks* where other tokens were seen to follow.
    Where it continues the end of all that was seen, it rejoins: a checkpoint there serves only
    prompts that continue the same text again, so it has to pay.

    A checkpoint *earns* the tokens between it and the checkpoint above when a request resumes from
    it, or would have, had it not been evicted; one at an end earns down to the nearest that is no
    back-off, for those only stand in for it. It *displaces* the worth of a checkpoint at the
    margin: the tokens that requests missed because their checkpoint had been evicted, per
    checkpoint saved. With ample memory nothing is displaced and all labels that ever earn are
    placed; under pressure the labels in use follow the ghost hits. A label that does not pay is
    tried more and more seldom.

    Four rules keep this from starving useful positions or crowding them out:

    - *Succession*: a prompt that resumes from the tip of its conversation places its own end, the
      prompt's or the answer's, whichever earns more. It supersedes the old tip, which can be
      evicted in its place, so a conversation that is held stays held.
    - *Rank*: a label that does not pay by the price still does if its checkpoints save more tokens
      in fact than those of forks, which are placed anyway.
    - *Free memory*: a back-off that has earned nothing yet takes free memory only. Under pressure
      it is placed in trials.
    - *Room*: one prompt, its answer included, takes at most half of the checkpoints that fit, and
      at least one.

    Source: this project. O(log prompt) per prefill.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._missed_tokens = 0.0
        self._num_placed = 1.0
        self._mean_prompt = 0.0
        self._num_prompts = 0
        self._room = 1 << 30
        """Checkpoints that fit, as of the latest prefill."""
        self._saves_answer = True
        """Whether the latest prefill's answer gets a checkpoint."""
        self._latest: tuple[Prefill, list[Placed]] | None = None
        """Plan of the latest prefill until it is asked for."""

    @property
    def price_tokens(self) -> float:
        """Tokens that one more checkpoint displaces."""
        return self._missed_tokens / self._num_placed

    def num_saved(self) -> dict[str, float]:
        """Return the saved checkpoints counted so far, by label; large counts have faded."""
        return {label: account.placed - 1.0 for label, account in self._accounts.items()}

    def plan(self, prefill: Prefill) -> list[Placed]:
        latest = self._latest
        if latest is not None and latest[0] is prefill:
            self._latest = None
            return latest[1]
        return self._choose(prefill, _back_offs(prefill))[0]

    def decode_interval(self) -> int | None:
        return 1 if self._saves_answer else None

    def on_prefill(self, prefill: Prefill) -> None:
        """Count the prompt, and each label that it could have."""
        self._num_prompts = min(self._num_prompts + 1, MEMORY)
        self._mean_prompt += (prefill.prompt_len - self._mean_prompt) / self._num_prompts
        if prefill.free_slots is not None:
            self._room = prefill.free_slots + prefill.num_checkpoints
        back_offs = _back_offs(prefill)
        if prefill.forks and prefill.seen_len > prefill.cached_len:
            self._account("branch")
        if prefill.boundaries and prefill.boundaries[-1] > prefill.cached_len:
            self._account("boundary")
        for _, label in back_offs:
            self._offer(label)
        if not prefill.forks and prefill.floor(prefill.seen_len) is not None:
            self._offer(REJOIN)
        if prefill.answer_survives:
            self._offer("decode")
        planned, self._saves_answer = self._choose(prefill, back_offs)
        self._latest = prefill, planned

    def on_hit(self, item: Item) -> None:
        account, num_tokens = self._account(base_label(item.label)), _covers(item)
        account.earned += num_tokens
        account.used += num_tokens

    def on_ghost_hit(self, item: Item, num_tokens: int) -> None:
        self._account(base_label(item.label)).earned += num_tokens
        self._missed_tokens += num_tokens

    def on_saved(self, position: int, label: str) -> None:
        self._account(base_label(label)).save()
        self._num_placed += 1
        if self._num_placed > 4 * MEMORY:
            self._num_placed *= 0.5
            self._missed_tokens *= 0.5

    def _choose(self, prefill: Prefill, back_offs: list[Placed]) -> tuple[list[Placed], bool]:
        """Return the positions to save, the most wanted first, and whether to save the answer's
        end."""
        cached_len, free_slots = prefill.cached_len, prefill.free_slots
        wanted: list[Placed] = []
        if prefill.seen_len > cached_len:
            if prefill.forks:
                wanted.append(Placed(prefill.seen_len, "branch"))
            elif self._wants(REJOIN, None):
                wanted.append(Placed(prefill.seen_len, REJOIN))
        for boundary in reversed(prefill.boundaries):
            if boundary > cached_len:
                wanted.append(Placed(boundary, "boundary"))
        successor = self._successor(prefill)
        for placed in back_offs:
            free = None if free_slots is None else free_slots // 2 - len(wanted)
            if placed.label == successor or self._wants(placed.label, free):
                wanted.append(placed)
        saves_answer = successor == "decode" or self._wants("decode", None)
        if free_slots is None:
            return wanted, saves_answer
        room = max((free_slots + prefill.num_checkpoints) // 2, 1)
        if len(wanted) + saves_answer <= room:
            return wanted, saves_answer
        if saves_answer:
            wanted.append(Placed(prefill.prompt_len + prefill.grid, "decode"))
        kept: dict[int, Placed] = {}
        for placed in self._ranked(wanted):
            is_answer = placed.label == "decode"
            position = placed.position if is_answer else prefill.floor(placed.position)
            if position is not None and len(kept) < room:
                kept.setdefault(position, placed)
        found = [placed for placed in kept.values() if placed.label != "decode"]
        return found, len(found) < len(kept)

    def _ranked(self, wanted: list[Placed]) -> list[Placed]:
        shared = {placed.label for placed in wanted} & SHARED
        bar = MARGIN * max((self._account(label).yield_tokens for label in shared), default=0.0)

        def rank(placed: Placed) -> int:
            if placed.label in SHARED:
                return 1
            account = self._account(placed.label)
            return 0 if account.earned - account.hope_tokens > bar * account.placed else 2

        return sorted(wanted, key=rank)

    def _successor(self, prefill: Prefill) -> str | None:
        """Return the end word that succeeds the tip that ``prefill`` resumes from, or None if it
        resumes from no tip."""
        resumed = prefill.resumed
        if resumed is None or resumed.superseded or base_label(resumed.label) not in TIPS:
            return None
        if not prefill.answer_survives:
            return "back:1"
        return max(END_WORDS, key=lambda label: self._account(label).yield_tokens)

    def _offer(self, label: str) -> None:
        account = self._account(label)
        account.offer(self._pays(account))

    def _account(self, label: str) -> _Account:
        account = self._accounts.get(label)
        if account is None:
            offered = TRIAL_AFTER * (len(self._accounts) + 1) // 8
            account = _Account(_hope(label), self._mean_prompt, offered, max(self._room, 2))
            self._accounts[label] = account
        return account

    def _wants(self, label: str, free_slots: int | None) -> bool:
        """Return whether a checkpoint of ``label`` is worth saving. ``free_slots``: those left for
        labels that have earned nothing yet; None for no limit."""
        account = self._accounts.get(label)
        if account is None:
            account = _Account(_hope(label), self._mean_prompt or 1.0, 0, 2)
        if account.is_tried:
            return True
        is_unproven = account.hope_tokens > 0 and label not in TIPS
        if is_unproven and free_slots is not None and free_slots <= 0:
            return False
        return self._pays(account)

    def _pays(self, account: _Account) -> bool:
        copy = COPY * self._mean_prompt
        if account.earned > (MARGIN * self.price_tokens + copy) * account.placed:
            return True
        forks = self._accounts.get("branch")
        if forks is None or forks.placed < FEW:
            return False
        return account.used_tokens > forks.used_tokens + copy


def _hope(label: str) -> float:
    return HOPE if label in END_WORDS or label in SHARED else SPECULATIVE_HOPE


def _back_offs(prefill: Prefill) -> list[Placed]:
    """Return the back-offs of ``prefill``, the deepest first. O(log prompt)."""
    found = []
    distance, furthest = 1, prefill.prompt_len - prefill.cached_len - prefill.grid
    while distance <= furthest:
        found.append(Placed(prefill.prompt_len - distance, f"back:{distance}"))
        distance = distance * STRIDE if distance > 1 else max(STRIDE, prefill.grid * STRIDE)
    return found


def _covers(item: Item) -> int:
    """Return the tokens that ``item`` saved the request that resumed from it."""
    above = item.above
    if base_label(item.label) in END_WORDS:
        while (
            above is not None and above.label.startswith("back:") and above.label not in END_WORDS
        ):
            above = above.above
    return item.position - (0 if above is None else above.position)
