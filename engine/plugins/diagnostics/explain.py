"""Explanation of a cache miss: where the prompt differs from an earlier one, and why shared tokens
were computed.

An ``Outline`` of each request is kept: digests of its parts, and its tokens, in a namespace as
keyed hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from engine.text.replay import SYSTEM_ROLES
from hybridcache.api import Losses
from hybridcache.geometry.units import counted
from hybridcache.tokens import Tokens, common_prefix_len

Marks = npt.NDArray[np.int32] | npt.NDArray[np.uint64]
"""Values that represent a sequence of ids."""
Digest = bytes
Said = tuple[Digest, ...]
"""Digests of the fields ``SAID_FIELDS`` of a message."""
SAID_FIELDS = ("content", "tool_calls", "reasoning_content")
ENTRY_BYTES = 512
"""Approximate size of an outline without its tokens and digests."""


@dataclass(frozen=True, slots=True)
class MessageOutline:
    """One message: its role, and a digest of each of its fields."""

    role: str
    fields: tuple[tuple[str, Digest], ...]
    said: Said
    """Digests of its contents in a normal form."""


@dataclass(frozen=True, slots=True)
class Outline:
    """One request with its answer."""

    model: str
    namespace: Hashable
    tools: tuple[Digest, ...]
    variables: tuple[tuple[str, Digest], ...]
    """Switches of the template, by name."""
    messages: tuple[MessageOutline, ...]
    tokens: Marks
    """Prompt and answer: ids, int32[n]. In a namespace, keyed hashes of (position, id), uint64[n],
    which are equal if the ids are and reveal nothing else."""
    prompt_len: int
    turn_start: int
    """Start of the header of the answer; everything after it is the answer's turn."""
    answer: Said | None = None
    """Digests of the answer, as ``MessageOutline.said``, or None if not known."""

    @property
    def is_hashed(self) -> bool:
        return self.tokens.dtype == np.uint64

    @property
    def num_bytes(self) -> int:
        """Approximate size."""
        fields = sum(len(message.fields) for message in self.messages)
        return ENTRY_BYTES + self.tokens.nbytes + 128 * (fields + len(self.tools))


SHOWN = 12
"""Number of tokens shown on each side of the difference."""
Change = Literal[
    "model",  # another model was asked
    "tools",  # the list of tools
    "system",  # the system message
    "variables",  # the template's switches, such as enable_thinking
    "messages",  # an earlier message
    "answer",  # the answer came back other than it was sampled
    "template",  # the same messages, which the template writes, or the tokenizer cuts, otherwise
]
NEW = "new"
"""Cause of a request that does not continue the earlier one: only the beginning is the same."""
How = Literal["changed", "added", "removed", "reordered"]
CAUSES = (
    "refused",
    "not_fetched",
    "checkpoint_evicted",
    "never_checkpointed",
    "below_grid",
    "kv_evicted",
    "forgotten",
)
"""Causes for which shared tokens were computed again, in the order of their positions: those of
``Losses``, and ``forgotten`` for tokens that the cache does not even remember."""

USUAL_FIELDS = ("content", "reasoning_content", "tool_calls", "tool_call_id", "name")
"""Names of a message's fields that reveal nothing about its author."""
_USUAL = ("never_checkpointed", "below_grid")
Decode = Callable[[Sequence[int]], str]
Locate = Callable[[int], "str | None"]


class Found(NamedTuple):
    """Tokens of a prompt that the cache had."""

    cached_len: int
    losses: Losses


@dataclass(frozen=True, slots=True)
class Parting:
    """Place at which two prompts differ."""

    at: int
    """Number of tokens that both share."""
    change: Change
    how: How
    path: str | None
    """Part of the request, such as ``messages[3].content``, or None if not known."""
    before: str | None
    """Last tokens that both share, as text. None in a namespace, where no text is shown."""
    was: str | None
    """Tokens of the earlier request, as text. None if they may be another client's."""
    now: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Reasons why a request computed its tokens, compared with an earlier one."""

    prompt_len: int
    cached_len: int
    earlier_len: int
    """Number of tokens of the earlier prompt, or 0 without one."""
    known_len: int
    """Number of tokens of the earlier prompt and its answer."""
    shared_len: int
    """Number of tokens that could have been read if the cache kept all of the earlier request, or
    without one, all tokens that it knew."""
    parting: Parting | None
    """Difference, or None if one prompt is a beginning of the other request."""
    lost: dict[str, int]
    """Number of tokens below ``shared_len`` that were computed again, by cause."""
    grid: int = 0
    """Distance of the positions at which a state may be saved, in tokens; 0 if not known."""
    is_new: bool = False
    """True if less than one step of ``grid`` is shared with the nearest earlier request."""

    @property
    def cause(self) -> str | None:
        """The cause that cost the most tokens, or None if all shared tokens were read.

        A missing state at the difference, and positions off the grid, are normal. These two causes
        count only without any other. ``NEW`` for a new conversation.
        """
        if self.is_new:
            return NEW
        costs: dict[str, int] = {n: lost for n, lost in self.lost.items() if n not in _USUAL}
        if self.parting is not None:
            costs[self.parting.change] = max(self.known_len - self.parting.at, 1)
        for names in (costs, {name: self.lost[name] for name in _USUAL}):
            worst = max(names, key=lambda name: names[name])
            if names[worst]:
                return worst
        return None

    @property
    def advice(self) -> str | None:
        """Change that makes more of such a prompt reusable. None if there is no cause.

        Without a grid position between the cached and the shared length, no state could be saved
        there: the tokens in between are computed again however much memory there is.
        """
        if self.cause is None:
            return None
        advice = ADVICE[self.cause]
        if self.cause == "answer" and self.parting is not None:
            path = self.parting.path or ""
            is_said = path.endswith((".content", ".tool_calls"))
            return advice if is_said else f"{advice} {_WITH_REASONING}"
        if advice is _MORE_MEMORY and self.grid and self.cached_len % self.grid == 0:
            is_tail = self.shared_len - self.cached_len < self.grid
            return ADVICE["below_grid"] if is_tail else advice
        return advice

    def as_dict(self) -> dict[str, Any]:
        """Return the explanation for JSON. docs/engine/capabilities.md describes the fields."""
        parting = self.parting
        parted = None if parting is None else {n: getattr(parting, n) for n in Parting.__slots__}
        return {
            "prompt_tokens": self.prompt_len,
            "cached_tokens": self.cached_len,
            "earlier_tokens": self.earlier_len,
            "shared_tokens": self.shared_len,
            "new_tokens": self.prompt_len - self.shared_len,
            "parted": parted,
            "lost": {name: number for name, number in self.lost.items() if number},
            "cause": self.cause,
            "advice": self.advice,
            "text": self.text,
        }

    @property
    def text(self) -> str:
        """The explanation in one or two sentences."""
        computed = self.prompt_len - self.cached_len
        words = [
            f"{self.cached_len:,} of {self.prompt_len:,} tokens were reused, {computed:,} computed."
        ]
        if self.is_new:
            shared = counted(self.shared_len, "token")
            known = (
                f"no earlier request shares more than its first {shared}, less than one step of "
                f"--grid ({self.grid})."
            )
            if not self.earlier_len:
                known = _ALONE
            words.append(f"It is a new conversation, or its beginning changed: {known}")
            return f"{words[0]} {words[1]} {self.advice}"
        if not self.earlier_len:
            words.append(_ALONE.capitalize())
        if self.parting is not None:
            words.append(_say(self.parting))
        lost = [f"{number:,} {WORDS[name]}" for name, number in self.lost.items() if number]
        if lost:
            shared = counted(self.shared_len, "token")
            sharing = "that both share" if self.earlier_len else "that the cache knew"
            words.append(f"Of the {shared} {sharing}: {', '.join(lost)}.")
        if self.advice is not None:
            words.append(self.advice)
        return " ".join(words)


WORDS = {
    "refused": "without memory to resume in",
    "not_fetched": "in a lower tier and not worth fetching",
    "checkpoint_evicted": "past a state that was evicted",
    "never_checkpointed": "past the last state that was saved",
    "below_grid": "past the last position at which a state may be saved",
    "kv_evicted": "evicted",
    "forgotten": "no longer known to the cache",
}
_MORE_MEMORY = "More memory (--cache-gib) or a tier (--host-gib, --state-dir) would keep them."
_ALONE = "no stored request shares any of it."
_WITH_REASONING = "Their reasoning belongs to them: send it, or use --preserve-thinking."
ADVICE = {
    "model": "Ask the same model each time.",
    "tools": "Send the same tools in the same order with each request.",
    "system": "Put text that changes at the end of the system message or into the last message, or "
    "start the server with --volatile-line.",
    "variables": "Send the same chat_template_kwargs with each request.",
    "messages": "Only append to a conversation.",
    "answer": "Send answers back as they came.",
    "template": "Start the server with --preserve-thinking if the template drops reasoning.",
    "refused": _MORE_MEMORY,
    "checkpoint_evicted": _MORE_MEMORY,
    "kv_evicted": _MORE_MEMORY,
    "forgotten": _MORE_MEMORY,
    "not_fetched": "Nothing is to be done: computing them was faster than loading.",
    "never_checkpointed": "Mark the end of the shared part with cache_control, or try other "
    "--checkpoints.",
    "below_grid": "Nothing is to be done: it is less than one step of --grid.",
    NEW: "Nothing is to be done, unless the system message begins with text that changes: put such "
    "text at its end, or start the server with --volatile-line.",
}
"""Advice by the cause of an explanation."""
SAID = {
    "model": "another model was asked",
    "tools": "the tools were {how}",
    "system": "the system message was {how}",
    "variables": "the template's variables were {how}",
    "messages": "an earlier message was {how}",
    "answer": "the earlier answer came back other than it was sampled",
    "template": "the template writes the same messages otherwise",
}


def _say(parting: Parting) -> str:
    where = "" if parting.path is None else f" ({parting.path})"
    said = SAID[parting.change].format(how=parting.how)
    shown = "" if parting.was is None else f", {parting.was!r} became {parting.now!r}"
    at = f"It differs from the earlier request after {counted(parting.at, 'token')}"
    return f"{at}: {said}{where}{shown}."


def explain(
    earlier: Outline,
    later: Outline,
    found: Found,
    *,
    decode: Decode | None = None,
    locate: Locate | None = None,
    tools_first: bool = True,
    shows_earlier: bool = True,
    grid: int = 0,
    may_be_new: bool = False,
) -> Explanation:
    """Explain why ``later`` was computed although ``earlier`` had been. O(tokens).

    Both are in one namespace. Unless ``shows_earlier``, the explanation contains no text or name of
    ``earlier`` that ``later`` does not have, because they may be from unrelated clients. ``decode``
    converts ids to text. ``locate`` names the part of the later request at a position of its
    prompt; it is called only if the template is the cause. ``grid`` is the checkpoint grid, if
    states are saved. ``may_be_new``: ``earlier`` may belong to another conversation, because it was
    found by its tokens. ``tools_first``: the template writes
    tools before the system message.
    """
    limit = later.prompt_len
    left, right = earlier.tokens, later.tokens[:limit]
    at = common_prefix_len(cast(Tokens, left), cast(Tokens, right))
    if earlier.model != later.model:
        at = 0
    # The last token of an answer was never computed, and the last one of a prompt always is.
    shared_len = min(at, max(len(left) - 1, 0), limit - 1)
    parting = None
    if earlier.model != later.model or at < min(len(left), limit):
        change, how, path = _change(earlier, later, at, tools_first, shows_earlier)
        if path is None and locate is not None and not later.is_hashed:
            path = locate(at)
        shown: tuple[str | None, ...] = (None, None, None)
        if decode is not None and not later.is_hashed and earlier.model == later.model:
            was = left[at : at + SHOWN] if shows_earlier else None
            spans = (right[max(at - SHOWN, 0) : at], was, right[at : at + SHOWN])
            shown = tuple(None if span is None else decode(span.tolist()) for span in spans)
        parting = Parting(at, change, how, path, *shown)
    return Explanation(
        limit,
        found.cached_len,
        earlier.prompt_len,
        len(left),
        shared_len,
        parting,
        _lost(found, shared_len),
        grid,
        may_be_new and parting is not None and at < grid and not continues(earlier, later),
    )


def explain_alone(later: Outline, found: Found, *, grid: int = 0) -> Explanation:
    """Explain ``later`` if no stored request shares any of its tokens. O(1).

    Some may still be cached, from text completions or from before a restart.
    """
    limit = later.prompt_len
    shared_len = min(limit - found.losses.never_seen, limit - 1)
    is_new = shared_len < max(grid, 1)
    lost = _lost(found, shared_len)
    return Explanation(limit, found.cached_len, 0, 0, shared_len, None, lost, grid, is_new)


def _lost(found: Found, shared_len: int) -> dict[str, int]:
    """Return the number of tokens below ``shared_len`` by cause. The causes follow each other in a
    prompt."""
    by_cause = found.losses._asdict() | {"forgotten": found.losses.never_seen}
    start, lost = found.cached_len, {}
    for name in CAUSES:
        end = start + by_cause[name]
        lost[name] = max(min(end, shared_len) - start, 0)
        start = end
    return lost


def _change(
    earlier: Outline, later: Outline, at: int, tools_first: bool, shows_earlier: bool
) -> tuple[Change, How, str | None]:
    """Return (cause, kind of difference, part of the later request) of two prompts that differ from
    position ``at`` on."""
    if earlier.model != later.model:
        return "model", "changed", "model"
    before, after = _split(earlier), _split(later)
    sides: list[tuple[Change, Sequence[Any], Sequence[Any], str]] = [
        ("tools", earlier.tools, later.tools, "tools"),
        ("system", before[0], after[0], "messages"),
    ]
    for change, old, new, name in sides if tools_first else reversed(sides):
        if list(old) != list(new):
            index, how = _first_difference(old, new)
            return change, how, _path(name, index, how, old, new, shows_earlier)
    shift = len(after[0])
    old, new = before[1], after[1]
    if list(new[: len(old)]) != list(old):
        index, how = _first_difference(old, new)
        path = _path("messages", index, how, old, new, shows_earlier, shift)
        return "messages", how, path
    if earlier.variables != later.variables:
        names = [name for name, _ in set(earlier.variables) ^ set(later.variables)]
        known = dict(earlier.variables).keys()
        how = "changed" if min(names) in known else "added"
        how = how if min(names) in dict(later.variables) else "removed"
        is_shown = shows_earlier or how != "removed"
        return "variables", how, f"chat_template_kwargs.{min(names)}" if is_shown else None
    if at < earlier.turn_start:
        return "template", "changed", None
    index = len(earlier.messages)
    echo = later.messages[index].said if index < len(later.messages) else None
    path = f"messages[{index}]"
    if echo is None or earlier.answer is None:
        return "answer", "changed", path
    differs = [n for n, a, b in zip(SAID_FIELDS, echo, earlier.answer, strict=True) if a != b]
    if not differs:
        return "template", "changed", path
    return "answer", "changed", f"{path}.{differs[-1]}"


def continues(earlier: Outline, later: Outline) -> bool:
    """Return True if the messages of ``later`` are those of ``earlier`` and further ones, or have
    two of them in common, whatever the system message is. O(messages)."""
    old, new = _split(earlier)[1], _split(later)[1]
    num_common = _common_len(old, new)
    return num_common > 1 or len(new) > num_common == len(old) == 1


def _split(outline: Outline) -> tuple[Sequence[MessageOutline], Sequence[MessageOutline]]:
    """Return (the system messages at the beginning, the other messages)."""
    messages = outline.messages
    roles = [message.role in SYSTEM_ROLES for message in messages]
    end = roles.index(False) if False in roles else len(messages)
    return messages[:end], messages[end:]


def _first_difference(old: Sequence[Any], new: Sequence[Any]) -> tuple[int, How]:
    """Return (index of the first entry that differs, kind of difference)."""
    index = _common_len(old, new)
    rest_old, rest_new = old[index:], new[index:]
    if not rest_old or not rest_new:
        return index, "added" if rest_new else "removed"
    if rest_new[0] in rest_old and rest_old[0] in rest_new:
        return index, "reordered"
    # The same entry may occur again later, so the entries that follow must agree too.
    num_changed = _common_len(rest_old[1:], rest_new[1:])
    if rest_new[0] in rest_old:
        is_kept = _common_len(rest_old[rest_old.index(rest_new[0]) :], rest_new) > num_changed
        return index, "removed" if is_kept else "changed"
    if rest_old[0] in rest_new:
        is_kept = _common_len(rest_old, rest_new[rest_new.index(rest_old[0]) :]) > num_changed
        return index, "added" if is_kept else "changed"
    return index, "changed"


def _common_len(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return the number of equal entries at the beginning of both."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _path(
    name: str,
    index: int,
    how: How,
    old: Sequence[Any],
    new: Sequence[Any],
    shows_earlier: bool,
    shift: int = 0,
) -> str:
    path = f"{name}[{index + shift}]"
    if how != "changed" or not isinstance(old[index], MessageOutline):
        return path
    a, b = old[index], new[index]
    if a.role != b.role:
        return f"{path}.role"
    names = [field for field, _ in (*b.fields, *a.fields)]
    differs = (field for field in names if dict(a.fields).get(field) != dict(b.fields).get(field))
    field = next(differs, "content")
    is_shown = shows_earlier or field in dict(b.fields) or field.partition("[")[0] in USUAL_FIELDS
    return f"{path}.{field}" if is_shown else path
