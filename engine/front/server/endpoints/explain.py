"""Explanations of cache misses: where a prompt differs from an earlier one, and why shared tokens
were computed again.

Recent chats are kept as they were sent. They are compared only when the operator asks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from engine.config import EngineConfig
from engine.errors import Json, JsonObject
from engine.front.chat_prompt import said_by
from engine.front.server.bodies import APIError, json_response, quoted
from engine.front.server.schemas import ChatRequest, Message
from engine.front.server.settings import ServerConfig
from engine.front.server.writers import Call, ServingContext
from engine.text.answers import RequestOutput
from engine.text.bounded import BoundedMemory
from engine.text.sandbox import TemplateError
from engine.text.tokenizer import ChatTemplate, Tokenizer
from hybridcache.geometry.units import counted
from hybridcache.radix.api import Losses
from hybridcache.radix.tokens import common_prefix_len

Entries = Sequence[Mapping[str, Json]]
ENTRY_BYTES = 512
"""Approximate size of a chat without its tokens and messages."""
NEAREST = 64
"""Number of chats that are searched for the one that shares the most tokens."""
SHOWN = 12
"""Number of tokens shown on each side of the difference."""
NEW = "new"
"""Cause of a chat that does not continue the earlier one: only the beginning is the same."""
TOOLS_BEHIND = "tools behind"
"""Advice for the cause ``system`` if the template writes tools after the difference."""
SYSTEM_ROLES = ("system", "developer")
SAID_FIELDS = ("content", "tool_calls", "reasoning_content")
"""Fields that ``said_by`` returns."""
LOST = {
    "refused": "without memory to resume in",
    "not_fetched": "in a lower tier and not loaded",
    "checkpoint_evicted": "past a state that was evicted",
    "never_checkpointed": "past the last state that was saved",
    "below_grid": "past the last position at which a state may be saved",
    "kv_evicted": "evicted",
    "forgotten": "no longer known to the cache",
    "in_progress": "shared with a request in progress",
}
"""Causes for which shared tokens were computed again, in the order of their positions: those of
``Losses``, and for tokens that were not known to the cache ``forgotten``, or ``in_progress`` if the
earlier request had not ended when the later one began."""
USUAL = ("never_checkpointed", "below_grid")
CHANGED = {
    "tools": "the tools differ",
    "system": "the system message differs",
    "variables": "the template's variables differ",
    "messages": "an earlier message differs",
    "answer": "the earlier answer came back other than it was sampled",
    "template": "the template writes the same messages otherwise",
    "replay": "the earlier answer came back, and its sampled tokens could not be used for it",
}
"""Causes of a difference between two prompts."""
FIRST_QUESTION = "the first message after the system message differs"
"""Difference from another conversation with the same system message and tools."""
WITHHELD = ", whose words are not shown because keys or salts keep chats apart"
NEAR_END = 2
"""Number of states before the end of prompts that advice names."""
_TOO_LITTLE_MEMORY = ("refused", "checkpoint_evicted", "kv_evicted", "forgotten")
_ALONE = "No stored request with the same key and salt shares any of it."
_FROM_OTHER = (
    "The reused tokens are of a request that is not stored, such as one from before a restart, or "
    "a text completion."
)
ADVICE = {
    "tools": "Send the same tools in the same order with each request.",
    "system": "Put text that changes at the end of the system message or into the last message.",
    "variables": "Send the same chat_template_kwargs with each request.",
    "messages": "Only append to a conversation.",
    "answer": "Send answers back as they came, with their reasoning",
    "template": "The template may drop reasoning",
    "replay": "Nothing is to be done if the answer ended by a stop sequence or contains a special "
    "token, which its text leaves out. Otherwise its tokens were evicted: more are kept with "
    "ServerConfig(replay_mib=N) of engine.serve_engine in Python.",
    "in_progress": "Send the later request after the end of the earlier one to share more.",
    "not_fetched": "Computing was faster than loading, or the device had no memory for them. If "
    "usage.refusals of /v1/cache rises, raise --cache-gib or lower --max-running.",
    "below_grid": "Nothing is to be done: it is less than one step of --grid.",
    TOOLS_BEHIND: "The chat template writes the tools behind the system message, so they are "
    "computed again too: put text that changes into the first user message, or write the tools "
    "before it (--chat-template tools-first, for Qwen2.5 and Qwen3).",
    NEW: "Nothing is to be done, unless the system message begins with text that changes (put such "
    "text at its end), or another key's chat has it (--no-salt-by-key lets keys share).",
}
"""Advice by the cause of an explanation, as far as no setting decides it."""


@dataclass(frozen=True)
class AnsweredChat:
    """A chat with its first answer."""

    answer_id: str
    namespace: str | None
    sent: Sequence[Message]
    tools: Entries
    variables: Mapping[str, Json] | None
    tokens: np.ndarray
    """Prompt and answer, int32[n]."""
    prompt_len: int
    cached_len: int
    losses: Losses
    message: Mapping[str, Json]
    """The answer as a message."""
    began_s: float
    ended_s: float

    @cached_property
    def messages(self) -> list[JsonObject]:
        """Messages as the template reads them."""
        return [one.as_template_input() for one in self.sent]


def _cause(lost: dict[str, int], parting: dict[str, Any] | None, known_len: int) -> str | None:
    """Return the cause that cost the most tokens, or None if all shared tokens were read.

    A missing state at the difference, and positions off the grid, are normal. These two causes
    count only without any other. ``known_len``: tokens of the earlier prompt and its answer.
    """
    costs = {name: number for name, number in lost.items() if name not in USUAL}
    if parting is not None:
        costs[parting["change"]] = max(known_len - parting["at"], 1)
    for some in (costs, {name: lost[name] for name in USUAL}):
        worst = max(some, key=lambda name: some[name])
        if some[worst]:
            return worst
    return None


class Explanations:
    """Recent chats of one server in ``limit_bytes``, and explanations of their computation."""

    def __init__(self, tokenizer: Tokenizer, engine: EngineConfig, server: ServerConfig) -> None:
        """``engine`` and ``server``: settings in use, which no advice names."""
        self._tokenizer, self._engine, self._server = tokenizer, engine, server
        self._grid = engine.grid if engine.prefix_cache == "hybrid" else 0
        self.memory = BoundedMemory[str, AnsweredChat](int(server.explain_mib * 2**20))
        """Chats by the id of their answer, in the order of their ends."""

    def remember(
        self,
        answer_id: str,
        call: Call,
        body: ChatRequest,
        output: RequestOutput,
        message: Mapping[str, Json],
    ) -> None:
        """Store a chat with its first answer, as output and as ``message``. O(tokens)."""
        if output.losses is None:
            return
        chat = AnsweredChat(
            answer_id,
            call.tenant.namespace,
            body.messages,
            body.plain_tools,
            body.chat_template_kwargs,
            np.concatenate((output.prompt_token_ids, output.output)),
            len(output.prompt_token_ids),
            output.cached_len,
            output.losses,
            message,
            call.began_s,
            time.perf_counter(),
        )
        self.memory.put(answer_id, chat, ENTRY_BYTES + call.size + chat.tokens.nbytes)

    def look_up(self, name: str, earlier_name: str | None) -> JsonObject | None:
        """Explain a chat, by default in comparison with the earlier one that shares the most
        tokens. None if a chat is not known, or both are in different namespaces."""
        later = self.memory.get(name, is_use=False)
        if later is None:
            return None
        if earlier_name is None:
            earlier = self.nearest(later)
        elif (earlier := self.memory.get(earlier_name, is_use=False)) is None or (
            earlier.namespace != later.namespace
        ):
            return None
        compared_with = None if earlier is None else earlier.answer_id
        told = self.explain(earlier, later, may_be_new=earlier_name is None)
        return {"id": later.answer_id, "compared_with": compared_with, **told}

    def nearest(self, later: AnsweredChat) -> AnsweredChat | None:
        """Return the chat that shares the most tokens with ``later`` of those that began before it,
        or None if none shares any.

        If that is less than one step of the grid, the latest one with the same messages after the
        system message is returned, because the beginning of a system message may have changed. If
        it is less than was reused, None is returned: the reused tokens are of another request.
        Only chats of its namespace are compared; of equal ones the latest is returned.
        """
        # First by namespace: the number of chats of others must not change what is compared.
        chats = sorted((chat for _, chat in self.memory.listed()), key=lambda chat: chat.began_s)
        listed = [chat for chat in chats if chat.namespace == later.namespace]
        at = next((i for i, chat in enumerate(listed) if chat is later), 0)
        best, best_len, continued = None, 0, None
        for other in listed[max(at - NEAREST, 0) : at]:
            shared = common_prefix_len(other.tokens, later.tokens[: later.prompt_len])
            if shared and shared >= best_len:
                best, best_len = other, shared
            if _continues(other, later):
                continued = other
        if best_len < later.cached_len:
            return None
        return continued if continued is not None and best_len < self._grid else best

    def explain(
        self, earlier: AnsweredChat | None, later: AnsweredChat, *, may_be_new: bool = False
    ) -> JsonObject:
        """Explain why ``later`` was computed although ``earlier`` had been, if it is not None.
        O(tokens and messages). ``may_be_new``: ``earlier`` may belong to another conversation.
        docs/engine/capabilities.md describes the fields."""
        limit, losses, cached_len = later.prompt_len, later.losses, later.cached_len
        parting, earlier_len, known_len, unknown = None, 0, 0, "forgotten"
        asks_other = is_new = False
        if earlier is None:  # Tokens may be cached from completions or from before a restart.
            shared_len = min(limit - losses.never_seen, limit - 1)
            is_new = shared_len < max(self._grid, 1)
        else:
            earlier_len, known_len = earlier.prompt_len, len(earlier.tokens)
            at = common_prefix_len(earlier.tokens, later.tokens[:limit])
            # The last token of an answer was never computed, and the last one of a prompt always.
            shared_len = min(at, max(known_len - 1, 0), limit - 1)
            if at < min(known_len, limit):
                parting = self._part(earlier, later, at)
                is_new = may_be_new and at < self._grid and not _continues(earlier, later)
                if may_be_new and parting["change"] == "messages":
                    asks_other = _asks_other(earlier, later)
            if earlier.ended_s > later.began_s:
                unknown = "in_progress"
        by_cause = losses._asdict() | {unknown: losses.never_seen}
        ends = accumulate((by_cause.get(name, 0) for name in LOST), initial=cached_len)
        spans = zip(LOST, pairwise(ends), strict=True)
        lost = {name: max(min(end, shared_len) - start, 0) for name, (start, end) in spans}
        is_certain = cached_len <= shared_len and not asks_other
        cause = NEW if is_new else _cause(lost, parting if is_certain else None, known_len)
        advice = self._advice(cause)
        if cause == "system" and earlier is not None and self._has_tools_behind(earlier, later):
            advice = ADVICE[TOOLS_BEHIND]
        if cause in ("messages", "system", "never_checkpointed") and lost["never_checkpointed"]:
            nearer = self._nearer(shared_len, earlier_len)
            advice = " ".join(filter(None, [advice, nearer]))
        # Without a position of the grid between the cached and the shared length, no state could be
        # saved there, however much memory there is.
        is_tail = shared_len - cached_len < self._grid and not cached_len % self._grid
        if cause in (*_TOO_LITTLE_MEMORY, "in_progress") and is_tail:
            advice = ADVICE["below_grid"]
        if asks_other and not is_new and sum(lost.values()) < max(self._grid, 1):
            advice = "Nothing is to be done: it reused all that both have in common"
            advice += ", but for less than one step of --grid." if any(lost.values()) else "."
        lost = {name: number for name, number in lost.items() if number}
        computed = f"{limit - cached_len:,} computed"
        words = [f"{cached_len:,} of {limit:,} tokens were reused, {computed}."]
        if is_new:
            words.append("It is a new conversation, or its beginning changed.")
        elif asks_other:
            words.append("It is a new conversation with the same beginning as an earlier one.")
        if earlier is None:
            words.append(_FROM_OTHER if cached_len else _ALONE)
        if parting is not None:
            place = counted(parting["at"], "token")
            what = FIRST_QUESTION if asks_other else CHANGED[parting["change"]]
            what += f" ({parting['path']})" if parting["path"] else ""
            what += f", {parting['was']!r} became {parting['now']!r}" if parting["was"] else ""
            what += WITHHELD if later.namespace is not None else ""
            words.append(f"It differs from the earlier request after {place}: {what}.")
        if lost and not is_new:
            sharing = "that both share" if earlier_len else "that the cache knew"
            parts = ", ".join(f"{number:,} {LOST[name]}" for name, number in lost.items())
            words.append(f"Of the {counted(shared_len, 'token')} {sharing}: {parts}.")
        return {
            "prompt_tokens": limit,
            "cached_tokens": cached_len,
            "earlier_tokens": earlier_len,
            "shared_tokens": shared_len,
            "new_tokens": limit - shared_len,
            "parted": parting,
            "lost": lost,
            "cause": cause,
            "advice": advice,
            "text": " ".join([*words, *filter(None, [advice])]),
        }

    def _advice(self, cause: str | None) -> str | None:
        """Return the advice for ``cause``. It names no setting that is in use."""
        keeps_thinking = self._server.preserve_thinking
        if cause in _TOO_LITTLE_MEMORY:
            used = self._engine.host_gib, self._engine.state_dir
            flags = ("--host-gib", "--state-dir")
            tiers = [flag for flag, value in zip(flags, used, strict=True) if value is None]
            tier = f" or a tier ({', '.join(tiers)})" if tiers else ""
            advice = f"More memory (--cache-gib){tier} would keep them, and so would clients that "
            advice += "report the ends of other sessions (metadata.session_end)."
            done = " Nothing is to be done if the cache was reset or a step failed."
            return advice + done * (cause == "forgotten")
        if cause == "answer":
            return ADVICE[cause] + ("." if keeps_thinking else ", or use --preserve-thinking.")
        if cause == "template":
            return None if keeps_thinking else f"{ADVICE[cause]}: --preserve-thinking keeps it."
        return ADVICE.get(cause or "")

    def _nearer(self, shared_len: int, earlier_len: int) -> str:
        """Return advice to resume nearer to the end of the shared part. ``earlier_len``: length of
        the earlier prompt, 0 if it is not known."""
        advice = "To resume nearer to the difference, mark the end of the equal text with "
        advice += "cache_control"
        specs = [one for one in self._engine.checkpoints if one != "none"]
        others = [one for one in specs if one.partition(":")[0] != "backoff"]
        counts = [int(one.partition(":")[2] or 1) for one in specs if one not in others]
        # Number of the last grid positions of the earlier prompt down to the shared part.
        needed = (earlier_len - 1) // self._grid - shared_len // self._grid + 1
        if max(counts, default=0) < needed <= NEAR_END and earlier_len:
            setting = ",".join([*others, f"backoff:{NEAR_END}"])
            advice += f", or save more states before the end of prompts (--checkpoints {setting})"
        return advice + "."

    def _has_tools_behind(self, earlier: AnsweredChat, later: AnsweredChat) -> bool:
        """Return True if the template writes tools after the first difference of the system
        messages, so that no order of the system text would keep them."""
        sent = {"messages": later.messages, "tools": later.tools, "variables": later.variables}
        system = earlier.messages[: _system_len(earlier)] + later.messages[_system_len(later) :]
        template = self._tokenizer.chat_template
        was, other, bare = (
            _written(template, sent | part) for part in ({}, {"messages": system}, {"tools": ()})
        )
        tools_at, system_at = _parting(was, bare), _parting(was, other)
        return bool(later.tools) and (tools_at or 0) > (system_at or 0)

    def _part(self, earlier: AnsweredChat, later: AnsweredChat, at: int) -> dict[str, Any]:
        """Describe the place ``at`` which two prompts differ. In a namespace, no text is shown."""
        control_ids = [*self._tokenizer.control_ids]
        ends = np.flatnonzero(np.isin(earlier.tokens[: earlier.prompt_len], control_ids))
        turn_start = int(ends[-1]) if len(ends) else earlier.prompt_len
        change, path = _change(
            self._tokenizer.chat_template, earlier, later, at, is_in_answer=at >= turn_start
        )
        left, right = earlier.tokens, later.tokens[: later.prompt_len]
        spans = right[max(at - SHOWN, 0) : at], left[at : at + SHOWN], right[at : at + SHOWN]
        names: tuple[str, ...] = ("before", "was", "now")
        texts = dict.fromkeys(names)
        if later.namespace is None:
            decode = partial(self._tokenizer.decode, skip_special_tokens=False)
            texts |= {name: decode(span.tolist()) for name, span in zip(names, spans, strict=True)}
        return {"at": at, "change": change, "path": path, **texts}


def _change(
    template: ChatTemplate | None,
    earlier: AnsweredChat,
    later: AnsweredChat,
    at: int,
    is_in_answer: bool,
) -> tuple[str, str | None]:
    """Return (one of ``CHANGED``, part of the later request) of two chats with different prompts.

    They share ``at`` tokens. ``is_in_answer``: they differ in the turn of the earlier answer, or
    behind it. Of several fields that differ, the one whose change is first in the text of
    ``template`` is returned; fields that it does not write do not count, nor do ids of calls.
    """
    was, now = ([*map(_without_ids, chat.messages)] for chat in (earlier, later))
    first, skipped = _system_len(earlier), _system_len(later)
    old, new = was[first:], now[skipped:]
    kept, replaced = earlier.messages[first:], later.messages[skipped:][: len(old)]
    sent: dict[str, Any] = {"messages": earlier.messages, "tools": earlier.tools}
    sent["variables"] = earlier.variables
    found: list[tuple[str, str, dict[str, Any]]] = []  # Name, part and later value of each.
    if path := _path("tools", earlier.tools, later.tools):
        found.append(("tools", path, {"tools": later.tools}))
    if path := _path("messages", was[:first], now[:skipped]):
        found.append(("system", path, {"messages": later.messages[:skipped] + kept}))
    if path := _path("messages", old, new[: len(old)], skipped):
        found.append(("messages", path, {"messages": earlier.messages[:first] + replaced}))
    before, after = _fields(earlier.variables or {}), _fields(later.variables or {})
    if before != after:
        name = min(n for n, _ in before.items() ^ after.items())
        found.append(("variables", f"chat_template_kwargs.{name}", {"variables": later.variables}))
    written = _written(template, sent) if found else ""
    places = [_parting(written, _written(template, sent | field)) for _, _, field in found]
    if seen := [place for place in places if place is not None]:
        return found[places.index(min(seen))][:2]
    if not is_in_answer:
        return "template", None
    index = len(earlier.messages)
    answer = f"messages[{index}]"
    if index >= len(later.messages):
        return "answer", answer
    pairs = zip(SAID_FIELDS, said_by(later.messages[index]), said_by(earlier.message), strict=True)
    differs = [name for name, echo, said in pairs if echo != said]
    if differs:
        return "answer", f"{answer}.{differs[-1]}"
    # A template that drops reasoning differs before it, or where the answer begins with it.
    is_kept = at >= earlier.prompt_len + bool(earlier.message.get("reasoning_content"))
    return "replay" if is_kept else "template", answer


def _written(template: ChatTemplate | None, chat: Mapping[str, Any]) -> str:
    """Return the text of a chat; empty if the template rejects it."""
    with suppress(TemplateError):
        return "" if template is None else template.render(**chat, add_generation_prompt=True)
    return ""


def _parting(was: str, now: str) -> int | None:
    """Return where two texts differ, or None if they are equal. A text that is not known differs
    at 0."""
    return None if was == now != "" else _common_len(was, now)


def _without_ids(message: Mapping[str, Any]) -> JsonObject:
    plain = {name: value for name, value in message.items() if name != "tool_call_id"}
    if calls := plain.get("tool_calls"):
        plain["tool_calls"] = [{k: v for k, v in call.items() if k != "id"} for call in calls]
    return plain


def _system_len(chat: AnsweredChat) -> int:
    """Return the number of system messages at the beginning."""
    roles = [message.get("role") in SYSTEM_ROLES for message in chat.messages]
    return roles.index(False) if False in roles else len(roles)


def _continues(earlier: AnsweredChat, later: AnsweredChat) -> bool:
    """Return True if the messages of ``later`` are those of ``earlier`` and further ones, or have
    two of them in common, whatever the system message is. O(messages)."""
    old, new = earlier.messages[_system_len(earlier) :], later.messages[_system_len(later) :]
    num_common = _common_len([*map(_fields, old)], [*map(_fields, new)])
    return num_common > 1 or len(new) > num_common == len(old) == 1


def _asks_other(earlier: AnsweredChat, later: AnsweredChat) -> bool:
    """Return True if the first messages after the system message differ and none of the further
    ones, nor the earlier answer, is at the same place in ``later``. O(messages)."""
    old = [_fields(one) for one in earlier.messages[_system_len(earlier) :]]
    new = [_fields(one) for one in later.messages[_system_len(later) :]]
    if not old or not new or any(a == b for a, b in zip(old, new, strict=False)):
        return False
    at = len(earlier.messages) - _system_len(earlier) + _system_len(later)
    is_answered = at < len(later.messages)
    return not is_answered or said_by(later.messages[at]) != said_by(earlier.message)


def _common_len(old: Sequence[object], new: Sequence[object]) -> int:
    """Return the number of equal entries at the beginning of both."""
    pairs = enumerate(zip(old, new, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))


def _path(name: str, old: Entries, new: Entries, skipped: int = 0) -> str | None:
    """Return the first entry that differs, or None if all are equal; of a message that both have,
    also its field."""
    olds, news = [*map(_fields, old)], [*map(_fields, new)]
    index = _common_len(olds, news)
    if index == max(len(old), len(new)):
        return None
    path = f"{name}[{index + skipped}]"
    if name == "tools" or index >= min(len(old), len(new)):
        return path
    before, after = olds[index], news[index]
    differs = (field for field in after | before if after.get(field) != before.get(field))
    return f"{path}.{next(differs)}"


def _fields(value: Mapping[str, Json]) -> dict[str, str]:
    """Return the fields of a message, and the entries of those that are lists, as JSON in the order
    in which a template prints them. Empty fields are left out."""
    fields: dict[str, str] = {}
    for name, entry in sorted(value.items(), key=lambda pair: pair[0] != "role"):
        if entry not in (None, "", []):
            many = {name: entry}
            if isinstance(entry, list):
                many = {f"{name}[{i}]": one for i, one in enumerate(entry)}
            fields |= {path: json.dumps(one, default=repr) for path, one in many.items()}
    return fields


async def explanation(
    context: ServingContext, explanations: Explanations, request: Request
) -> Response:
    """Explain the cache misses of an answer to the operator."""
    if context.engine.config.prefix_cache == "none":
        raise APIError(404, "Nothing to explain: the prefix cache is off (--prefix-cache).")
    name = request.path_params["answer_id"]
    compared_with = request.query_params.get("compared_with")
    told = explanations.look_up(name, compared_with)
    if told is not None:
        return json_response(told)
    names = " and ".join(quoted(each) for each in (name, compared_with) if each is not None)
    raise APIError(
        404,
        f"No chat with the answer id {names} is stored with this key and salt: older ones are "
        "evicted, a restart keeps none, and completions have none. Send it again, or raise "
        "ServerConfig(explain_mib=N).",
    )
