"""Checkpoint placement: rules without learning, their combination, and adaptive placement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import inf
from typing import Any

from hybridcache.radix.protocol import Item, Placed, PlacementPolicy, Prefill, end_of_prompt
from hybridcache.radix.tree import SHARED


class Branch(PlacementPolicy):
    """Save where the prompt diverges from earlier ones, or before its last token.

    The label is ``rejoin`` where the prompt goes on after the end of all known text: only its own
    conversation shares that prefix.
    """

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        position = min(prefill.seen_len, prefill.prompt_len - 1)
        return (Placed(position, "branch" if prefill.forks else "rejoin"),)


class Boundary(PlacementPolicy):
    """Save at every known boundary (end of text that later prompts share), the deepest first."""

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        ends = reversed(prefill.boundaries)
        return [Placed(end, "boundary") for end in ends if end > prefill.cached_len]


class Backoff(PlacementPolicy):
    """Save at the last ``count`` (N) grid positions before the prompt's last token, deepest first.

    One position makes a repeated prompt hit. Each further one serves prompts that are shorter by
    up to one more grid step, with a state that is superseded immediately.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        last, grid = prefill.prompt_len - 1, prefill.grid
        first = max(prefill.cached_len, last - self.count * grid)
        return [Placed(position, "backoff") for position in range(last, first, -grid)]


class Every(PlacementPolicy):
    """Save at each multiple of ``interval`` (N) tokens from the root, rounded down to the grid, the
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
        return ()

    def decode_interval(self) -> int | None:
        return 1


class Placement(PlacementPolicy):
    """Combination of several placement rules, by descending priority. Every rule is notified of
    every checkpoint."""

    rules: tuple[PlacementPolicy, ...] = ()

    def __init__(self, rules: tuple[PlacementPolicy, ...]) -> None:
        self.rules = rules
        self.is_guarded = all(rule.is_guarded for rule in rules)

    def plan(self, prefill: Prefill) -> list[Placed]:
        return [placed for rule in self.rules for placed in rule.plan(prefill)]

    def decode_interval(self) -> int | None:
        """Return the shortest interval of any rule."""
        intervals = (rule.decode_interval() for rule in self.rules)
        return min((one for one in intervals if one is not None), default=None)

    def on_prefill(self, prefill: Prefill) -> None:
        for rule in self.rules:
            rule.on_prefill(prefill)

    def on_hit(self, item: Item) -> None:
        for rule in self.rules:
            rule.on_hit(item)

    def on_ghost_hit(self, item: Item, num_tokens: int) -> None:
        for rule in self.rules:
            rule.on_ghost_hit(item, num_tokens)

    def on_saved(self, placed: Placed) -> None:
        for rule in self.rules:
            rule.on_saved(placed)

    def on_dropped(self, placed: Placed) -> None:
        for rule in self.rules:
            rule.on_dropped(placed)


# --- Adaptive -------------------------------------------------------------------------------------


STRIDE = 4
"""Ratio of the distances of two successive back-offs from the end of the prompt."""
MARGIN = 3.0
"""Factor by which earnings must exceed the displaced value, because a label can look best by
chance. In scarce room: that of others, to come before shared positions."""
TRIAL_AFTER = 32
"""Prefills before the first trial of a label that does not pay, and checkpoints after which assumed
earnings are withdrawn if no fewer fit."""
TRIAL_GROWTH = 4
"""Growth of that number after each failed trial."""
MEMORY = 1024
"""Checkpoints of a label, or uses of a class of ``survival``, after which the counts are halved.
Also the maximum number of prefills between trials."""
COMPARED_AFTER = 8
"""Checkpoints of a label before others are compared with it."""
HEAD_AFTER = 8
"""Requests for an evicted shared position before it is saved again as a head."""
FOUND_ONE_IN = 8
"""Requests for ends of which at least one finds its end while newcomers save theirs."""
TRIAL_OF_END = 64
"""Conversations for one trial of an end."""
ENDS_MEMORY = 64
"""Requests for ends after which their counts are halved."""
OFFERS_APART = 4
"""Prefills by which the first trials of two labels are apart."""
Rule = tuple[str, int]
"""Label and distance of a checkpoint (``Placed``): each has an account of its own."""
BACK = "back"
"""Label of a back-off. Its distance is 1 at the end of the prompt."""
PROMPT_END: Rule = (BACK, 1)
ANSWER_END: Rule = ("decode", 0)
ENDS = (PROMPT_END, ANSWER_END)
"""Rules of the end of the prompt and of the answer."""
REJOIN = "rejoin"
"""Label of a checkpoint at which a prompt continues the end of a known text."""
HEAD = "head"
"""Label of an evicted checkpoint that is saved again, because several texts follow it."""
TIPS = frozenset({*ENDS, (REJOIN, 0)})
"""Rules of positions from which one conversation continues. Those of ``SHARED`` are always
candidates."""
HEADER = 16
"""Longest header of an answer, in tokens. A boundary at most this far from the end of the prompt,
and less than a grid step or one token, is the end of that prompt, not of a shared text."""
UNSAVED = {"_accounts", "_latest"}
"""Attributes of ``Adaptive`` that are not saved as they are."""
Positions = tuple[tuple[int, ...], list[Placed], bool]
"""Shared boundaries of a prompt, ascending, its back-offs, deepest first, and whether it forks."""
Bars = tuple[float, float, float]
"""Tokens per checkpoint that a label must exceed: by earnings, or by real hits those of forks and
what one more displaces. See ``Adaptive._bars``."""


class _Account:
    """Saved checkpoints of one rule and the tokens that they earned. Old counts fade."""

    def __init__(self, mean_prompt: float, offered: int, most: float) -> None:
        self.hope_tokens = self.earned = mean_prompt
        """``hope_tokens`` is the assumed part of ``earned``, and 0 once it is withdrawn."""
        self.hope_lasts = min(most, TRIAL_AFTER)
        self.used = 0.0
        """Part of ``earned`` from real hits, without hope and ghost hits."""
        self.uses = 0.0
        """Requests that resumed from such a checkpoint, or would have without its eviction. Those
        for an evicted head are left out (rule *Room*)."""
        self.placed = 1.0
        self.offered = offered
        """Prefills in which the label was possible. Labels start with different counts, so that
        their trials do not coincide."""
        self.is_tried = False
        """True if the latest of these prefills is a trial."""
        self.due = self.wait = TRIAL_AFTER
        """While the label does not pay: ``offered`` at the next trial, and prefills from there to
        the trial after it."""

    def save(self) -> None:
        """Count a saved checkpoint."""
        self.placed += 1
        if self.hope_tokens and self.placed > self.hope_lasts:
            self.earned -= self.hope_tokens
            self.hope_tokens = 0.0
        if self.placed > MEMORY:
            self._fade()

    def _fade(self) -> None:
        """Halve all counts."""
        self.placed *= 0.5
        self.earned *= 0.5
        self.used *= 0.5
        self.uses *= 0.5

    def pays(self, bars: Bars) -> bool:
        """Return whether the label earns more than the first of ``bars``, or has more real hits
        than the others. The last one needs evidence."""
        earned, of_forks, displaced = bars
        if self.earned > earned * self.placed:
            return True
        used = self.used / self.placed
        return used > of_forks and (self.placed < COMPARED_AFTER or used > displaced)

    def offer(self, bars: Bars, is_end: bool = False) -> None:
        """Count a prefill in which the label is possible, and decide if it is a trial.

        Each trial halves the counts before it, so that a label pays again after a few trials with
        hits, however long it had none. Those of ends keep their counts, because the rule *Turnover*
        has trials of its own.
        """
        self.offered += 1
        self.is_tried = False
        if self.pays(bars):
            self.wait = TRIAL_AFTER
        elif self.offered >= self.due:
            self.is_tried = True
            self.due = self.offered + self.wait
            self.wait = min(self.wait * TRIAL_GROWTH, MEMORY)
            if not self.hope_tokens and not is_end:  # It weighs as much as all before it, or more.
                self._fade()


class _Accounts(dict[Rule, _Account]):
    """Accounts by rule. One that is read for the first time begins with ``begin``."""

    def __init__(self, begin: Callable[[], _Account]) -> None:
        self._begin = begin

    def __missing__(self, rule: Rule) -> _Account:
        account = self[rule] = self._begin()
        return account


class Adaptive(PlacementPolicy):
    """Save forks and boundaries, the successor of the resumed tip, and other positions that pay.

    Other positions are the end of the answer, back-offs from the end of the prompt (one token and
    4, 16, 64 … grid steps), and the *rejoin*. A boundary at the end of the prompt itself is not
    shared: it is where the first back-off is saved. A prompt *forks* where other tokens were seen
    to follow. It rejoins where it continues the end of all known text, or the evicted tip of its
    conversation with another text for the answer (without its reasoning, for example). A
    checkpoint there serves only repetitions of the same text, so it must pay.

    A checkpoint *earns* the tokens between it and the checkpoint above if a request resumes from
    it, or would have done so without its eviction. An end earns the tokens down to the nearest
    checkpoint that is not a back-off, because back-offs only replace it. A checkpoint *displaces*
    the mean loss per saved checkpoint: the tokens missed because of evictions. A label *pays* if it
    earns ``MARGIN`` times as much. With ample memory nothing is displaced, and every label with
    earnings is saved. Trials of a label that does not pay become rarer with each failure, and each
    halves the older counts of the label, unless it is that of an end.

    Eight rules keep useful positions from being starved or displaced:

    - *Head*: an evicted shared checkpoint on the path is saved again if ``HEAD_AFTER`` requests or
      more resumed from it, or would have, or if two different texts that were used themselves
      follow it within a grid step (``Item.is_shared_head``). It is above the fork and the declared
      boundaries, which are candidates anyway. Of several, the one with the most requests times the
      tokens that each saves. Of cuts of a long text, which all requests pass, that is the deepest.
    - *Succession*: a prompt that resumes from the tip of its conversation saves the end, of prompt
      or answer, with the higher earnings. This supersedes the old tip, which is then evicted in its
      place. A conversation in the cache therefore stays there.
    - *Turnover*: a conversation that is not in the cache saves its end too while one in
      ``FOUND_ONE_IN`` requests for an end finds it. Otherwise the tips in the cache keep their
      places, so that some conversations hit when not all fit. A miss counts as the first request
      for its end only: a conversation that was refused since then misses the same end at every
      turn.
      This holds in the first round of a loop too, before any request for an end. One conversation
      in ``TRIAL_OF_END`` is saved even then. It replaces tips of conversations that have ended, and
      shows when more can be kept. More trials would displace most tips under an order by recency,
      which evicts those that are due next.
    - *Rank*: a label also pays if its real hits save more tokens per checkpoint than those of
      forks, and, from ``COMPARED_AFTER`` checkpoints on, more than a checkpoint displaces or than
      those of all labels. Forks are saved anyway, so poor forks alone are no reason to save more.
    - *Free memory*: a back-off without earnings is saved in free memory only. Under pressure it is
      saved in trials.
    - *Spare slots*: if tokens were missed although a slot for each position is free, and KV has
      memory of its own, KV is short and not slots. A checkpoint then displaces nothing, and every
      position is saved.
    - *Room*: a prompt with its answer takes at most half of the checkpoints that fit, and at least
      one. Positions with the highest expected savings go first: the uses per checkpoint of their
      label times the tokens since the resumed position. Only shared positions have assumed uses.
      Requests for an evicted head are none, or they would rank the forks that displace it: they are
      uses of the label ``head``, if it has fewer. A prompt's end has the uses of an answer's end
      too, because a request resumes from it where the answer's end was not saved.
    - *Hope*: the assumed earnings of a new label last for at most as many checkpoints as fit, so
      that a small cache is not filled with trials.

    Source: this project. O(log prompt) per prefill.
    """

    def __init__(self) -> None:
        self._accounts = _Accounts(self._new_account)
        self._missed_tokens = 0.0
        self._num_placed = 1.0
        self._mean_prompt = 0.0
        self._num_prompts = 0
        self._ends_used = self._ends_lost = 0.0
        """Requests that found the end of a prompt or answer, and ends evicted before any did."""
        self._num_newcomers = 0
        """Prefills that do not resume from the tip of their conversation."""
        self._room = 1 << 30
        """Checkpoints that fit, as of the latest prefill."""
        self._saves_answer = True
        """True if the answer of the latest prefill gets a checkpoint."""
        self._latest: tuple[Prefill, list[Placed]] | None = None
        """Latest prefill and its plan, until ``plan`` returns it."""

    def state_dict(self) -> dict[str, Any]:
        numbers = {name: value for name, value in vars(self).items() if name not in UNSAVED}
        accounts = [[*rule, dict(vars(account))] for rule, account in self._accounts.items()]
        return {"accounts": accounts} | numbers

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._accounts, self._latest = _Accounts(self._new_account), None
        for label, distance, fields in state["accounts"]:
            rule = label, distance
            account = self._accounts[rule] = _Account(0.0, 0, 0.0)
            vars(account).update(fields)
        for name in vars(self).keys() - UNSAVED:
            setattr(self, name, state[name])

    def plan(self, prefill: Prefill) -> list[Placed]:
        latest = self._latest
        if latest is not None and latest[0] is prefill:
            self._latest = None
            return latest[1]
        return self._choose(prefill, _positions(prefill), self._bars())[0]

    def decode_interval(self) -> int | None:
        return 1 if self._saves_answer else None

    def on_prefill(self, prefill: Prefill) -> None:
        self._num_prompts = min(self._num_prompts + 1, MEMORY)
        self._mean_prompt += (prefill.prompt_len - self._mean_prompt) / self._num_prompts
        if prefill.free_slots is not None:
            self._room = prefill.free_slots + prefill.num_checkpoints
        shared, back_offs, forks = positions = _positions(prefill)
        # The assumed earnings of shared positions start before those of the other labels.
        if forks and prefill.seen_len > prefill.cached_len:
            self._accounts["branch", 0]
        if shared and shared[-1] > prefill.cached_len:
            self._accounts["boundary", 0]
        self._num_newcomers += not resumes_from_tip(prefill)
        bars = self._bars()
        for back_off in back_offs:
            self._accounts[back_off[1:]].offer(bars, back_off[1:] == PROMPT_END)
        if not forks and prefill.floor(prefill.seen_len) is not None:
            self._accounts[REJOIN, 0].offer(bars)
        if prefill.answer_survives:
            self._accounts[ANSWER_END].offer(bars, is_end=True)
        planned, self._saves_answer = self._choose(prefill, positions, bars)
        self._latest = prefill, planned

    def on_hit(self, item: Item) -> None:
        rule, above = (item.label, item.distance), item.above
        if rule in ENDS:
            while above is not None and above.label == BACK:
                if above.distance == 1 and not above.stop_reason:
                    break
                above = above.above
            self._count_end(is_used=True)
        account = self._accounts[rule]
        num_tokens = item.position - (0 if above is None else above.position)
        account.earned += num_tokens
        account.used += num_tokens
        account.uses += 1

    def on_ghost_hit(self, item: Item, num_tokens: int) -> None:
        rule = item.label, item.distance
        if rule in ENDS and item.uses + item.earlier_uses <= 1:
            self._count_end(is_used=False)
        account = self._accounts[rule]
        account.earned += num_tokens
        is_head = item.label in SHARED - {HEAD} and item.uses + item.earlier_uses >= HEAD_AFTER
        account.uses += not is_head
        self._missed_tokens += num_tokens

    def on_saved(self, placed: Placed) -> None:
        self._accounts[placed[1:]].save()
        self._num_placed += 1
        if self._num_placed > MEMORY:
            self._num_placed *= 0.5
            self._missed_tokens *= 0.5

    def _choose(
        self, prefill: Prefill, positions: Positions, bars: Bars
    ) -> tuple[list[Placed], bool]:
        """Return the positions to save, by descending priority, and whether to save the answer."""
        shared, back_offs, _ = positions
        num_spare = 0 if prefill.shares_memory else prefill.free_slots or 0
        is_spare = self._missed_tokens > 0 and num_spare >= len(shared) + len(back_offs) + 2
        if is_spare:
            bars = -inf, -inf, -inf
        head, end = _head(prefill), self._end(prefill)
        wanted = self._wanted_shared(prefill, positions, head, bars)
        free_slots = None if is_spare else prefill.free_slots
        for back_off in back_offs:
            free = inf if free_slots is None else free_slots // 2 - len(wanted)
            if back_off[1:] == end or self._wants(back_off[1:], free, bars):
                wanted.append(back_off)
        saves_answer = end == ANSWER_END or self._wants(ANSWER_END, inf, bars)
        if free_slots is None:
            return wanted, saves_answer
        room = max((free_slots + prefill.num_checkpoints) // 2, 1)
        if len(wanted) + saves_answer <= room:
            return wanted, saves_answer
        return self._most_savings(prefill, wanted, saves_answer, room, head)

    def _wanted_shared(
        self, prefill: Prefill, positions: Positions, head: Item | None, bars: Bars
    ) -> list[Placed]:
        """Return the head, the fork or rejoin, and the boundaries, the deepest first."""
        shared, _, forks = positions
        cached_len, seen_len = prefill.cached_len, prefill.seen_len
        wanted = [] if head is None else [Placed(head.position, HEAD)]
        if seen_len > cached_len:
            if forks:
                wanted.append(Placed(seen_len, "branch"))
            elif self._wants((REJOIN, 0), inf, bars):
                wanted.append(Placed(seen_len, REJOIN))
        return wanted + [Placed(end, "boundary") for end in reversed(shared) if end > cached_len]

    def _most_savings(
        self,
        prefill: Prefill,
        wanted: list[Placed],
        saves_answer: bool,
        room: int,
        head: Item | None,
    ) -> tuple[list[Placed], bool]:
        """Return the ``room`` positions with the highest expected savings (rule *Room*)."""
        if saves_answer:
            wanted.append(Placed(prefill.prompt_len + prefill.grid, *ANSWER_END))
        ranked = sorted(
            (-self._savings(prefill, placed, saves_answer, head), order, placed)
            for order, placed in enumerate(wanted)
        )
        found: dict[int, Placed] = {}
        saves_answer = False
        for _, _, placed in ranked:
            if len(found) + saves_answer == room:
                break
            floored = prefill.floor(placed.position)
            if placed[1:] == ANSWER_END:
                saves_answer = True
            elif floored is not None:
                found.setdefault(floored, placed)
        return list(found.values()), saves_answer

    def _savings(
        self, prefill: Prefill, placed: Placed, saves_answer: bool, head: Item | None
    ) -> float:
        """Return the expected savings of a position, in tokens."""
        account = self._accounts[placed[1:]]
        uses = account.uses
        if placed.label in SHARED:
            uses = MARGIN * (uses + 1.0)
        if placed.label == HEAD and head is not None:
            uses = max(uses, head.uses + head.earlier_uses)
        if placed[1:] == PROMPT_END and saves_answer:
            decode = self._accounts[ANSWER_END]
            uses += decode.uses / decode.placed * account.placed
        return uses / account.placed * (placed.position - prefill.cached_len)

    def _end(self, prefill: Prefill) -> Rule | None:
        """Return the rule of the end to save, of prompt or answer, or None (rules *Succession* and
        *Turnover*)."""
        rule, account = PROMPT_END, self._accounts.get(PROMPT_END)
        decode = self._accounts.get(ANSWER_END) if prefill.answer_survives else None
        if decode is not None and (
            account is None or decode.earned / decode.placed > account.earned / account.placed
        ):
            rule, account = ANSWER_END, decode
        if resumes_from_tip(prefill):
            return rule
        if account is None:
            return None
        num_asked = self._ends_used + self._ends_lost
        is_trial = num_asked > 0 and self._num_newcomers % TRIAL_OF_END == 0
        is_used = not account.hope_tokens and FOUND_ONE_IN * self._ends_used > num_asked
        return rule if is_trial or is_used else None

    def _count_end(self, is_used: bool) -> None:
        """Count a request for an end, which was in the cache or evicted. Old counts fade."""
        self._ends_used += is_used
        self._ends_lost += not is_used
        if self._ends_used + self._ends_lost > ENDS_MEMORY:
            self._ends_used *= 0.5
            self._ends_lost *= 0.5

    def _new_account(self) -> _Account:
        offered = OFFERS_APART * (len(self._accounts) + 1)
        return _Account(self._mean_prompt, offered, self._room)

    def _wants(self, rule: Rule, free_slots: float, bars: Bars) -> bool:
        """Return whether a checkpoint of ``rule`` is worth saving.

        ``free_slots`` is the free memory left for rules without earnings; inf is no limit.
        """
        account = self._accounts.get(rule)
        if account is not None and account.is_tried:
            return True
        if free_slots <= 0 and rule not in TIPS and (account is None or account.hope_tokens > 0):
            return False
        if account is None:
            return (self._mean_prompt or 1.0) > bars[0]
        return account.pays(bars)

    def _bars(self) -> Bars:
        """Return what one more checkpoint must exceed: ``MARGIN`` times the tokens missed per
        checkpoint, the real hits of forks, and what it displaces. That is the tokens missed, or the
        real hits of all labels, if they are fewer."""
        forks, accounts = self._accounts.get(("branch", 0)), self._accounts.values()
        of_forks = (
            inf if forks is None or forks.placed < COMPARED_AFTER else forks.used / forks.placed
        )
        missed = self._missed_tokens / self._num_placed
        used = sum(one.used for one in accounts) / (sum(one.placed for one in accounts) or 1.0)
        return MARGIN * missed, of_forks, min(missed, used)


def resumes_from_tip(prefill: Prefill) -> bool:
    """Return whether ``prefill`` continues a conversation from its last checkpoint."""
    resumed = prefill.resumed
    if resumed is None or resumed.superseded:
        return False
    return (resumed.label, resumed.distance) in TIPS


def _head(prefill: Prefill) -> Item | None:
    """Return the evicted checkpoint of the rule *Head*, or None. O(evicted checkpoints)."""
    if not prefill.evicted:
        return None
    known, grid = (prefill.seen_len, *prefill.boundaries, prefill.prompt_len), prefill.grid
    first = min(end - end % grid for end in known if end > prefill.cached_len)
    found, most = None, 0
    for item in prefill.evicted:  # the deepest first
        if item.label in SHARED and not item.stop_reason and item.position < first:
            asked = item.uses + item.earlier_uses
            saved = asked * (item.position - prefill.cached_len)
            if saved > most and (asked >= HEAD_AFTER or item.is_shared_head(grid)):
                found, most = item, saved
    return found


def _positions(prefill: Prefill) -> Positions:
    """Return the shared boundaries of ``prefill``, its back-offs, and whether it forks.

    It does not fork at an evicted tip that no earlier request asked for: only its conversation
    comes back to it, with another text for the answer. O(log prompt).
    """
    prompt_len, grid, shared = prefill.prompt_len, prefill.grid, prefill.boundaries
    forks = prefill.forks
    if forks and prefill.evicted:
        tip = prefill.evicted[0]
        is_own = (tip.label, tip.distance) in TIPS and tip.uses + tip.earlier_uses <= 1
        forks = not is_own or tip.position != prefill.seen_len - prefill.seen_len % grid
    own_end = end_of_prompt(prompt_len, shared, min(HEADER, grid - 1) or 1)
    if own_end is not None:
        shared = shared[:-1]
    furthest = prompt_len - prefill.cached_len - grid
    if furthest < 1:
        return shared, [], forks
    last = prompt_len - 1 if own_end is None else min(prompt_len - 1, own_end)
    back_offs = [Placed(last, BACK, 1)]
    distance = STRIDE * grid
    while distance <= furthest:
        back_offs.append(Placed(prompt_len - distance, BACK, distance))
        distance *= STRIDE
    return shared, back_offs, forks
