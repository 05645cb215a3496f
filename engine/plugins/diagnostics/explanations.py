"""Explanations of cache misses: memory of recent requests, and the forms of the answer."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from engine.plugins.diagnostics.explain import (
    Change,
    Digest,
    Explanation,
    Found,
    Marks,
    MessageOutline,
    Outline,
    Parting,
    Said,
    continues,
    explain,
    explain_alone,
)
from engine.server.access import Tenant
from engine.server.bodies import Workers
from engine.server.context import AskedChat, cache_headers
from engine.text.bounded_memory import BoundedMemory
from engine.text.outputs import RequestOutput
from engine.text.replay import said_by
from engine.text.tokenizer import ChatTemplate, TemplateError, Tokenizer
from hybridcache.tokens import Tokens, common_prefix_len

NEAREST = 64
"""Number of requests that are searched for the one that shares the most tokens."""


class Outliner:
    """Makes the outlines of one server, with a secret key, so that texts or ids cannot be guessed
    from stored digests."""

    def __init__(self, key: bytes, control_ids: Sequence[int]) -> None:
        """``control_ids``: tokens that begin and end a turn."""
        self._key = key
        self._control_ids = np.asarray(control_ids, np.int32)
        seed = np.frombuffer(self._digest("ids"), np.uint64)
        self._secret, self._stride = seed[0], seed[1] | np.uint64(1)

    def outline(self, asked: AskedChat) -> Outline:
        """Return the outline of a prompt. O(its size)."""
        tokens, namespace = asked.token_ids, asked.tenant.namespace
        ends = np.flatnonzero(np.isin(tokens, self._control_ids))
        variables = sorted((asked.variables or {}).items())
        return Outline(
            asked.model,
            namespace,
            tuple(self._digest(tool) for tool in asked.tools or ()),
            tuple((name, self._digest(value)) for name, value in variables),
            tuple(self._message(message) for message in asked.messages),
            self._kept(tokens, namespace),
            len(tokens),
            int(ends[-1]) if len(ends) else len(tokens),
        )

    def answered(
        self, outline: Outline, answer: Tokens, message: Mapping[str, Any] | None = None
    ) -> Outline:
        """Return ``outline`` with the ids of its answer, and with the digest of its ``message``.
        O(its tokens)."""
        kept = self._kept(answer, outline.namespace, outline.prompt_len)
        tokens: Any = np.concatenate((outline.tokens[: outline.prompt_len], kept))
        said = None if message is None else self._said(message)
        return replace(outline, tokens=tokens, answer=said)

    def _said(self, message: Mapping[str, Any]) -> Said:
        return tuple(self._digest(value) for value in said_by(message))

    def _message(self, message: Mapping[str, Any]) -> MessageOutline:
        fields = []
        for name, value in message.items():
            if name == "role" or value in (None, "", []):
                continue
            if isinstance(value, list):
                entries = enumerate(value)
                fields += [(f"{name}[{index}]", self._digest(entry)) for index, entry in entries]
            else:
                fields.append((name, self._digest(value)))
        return MessageOutline(str(message.get("role")), tuple(fields), self._said(message))

    def _digest(self, value: Any) -> Digest:
        """Return the digest of ``value`` as JSON in its given order, which is the order in which a
        template prints it."""
        text = json.dumps(value, default=repr).encode()
        return hashlib.blake2b(text, key=self._key, digest_size=16).digest()

    def _kept(self, tokens: Tokens, namespace: Hashable, start: int = 0) -> Marks:
        if namespace is None:
            return np.array(tokens, np.int32)
        places = np.arange(start, start + len(tokens), dtype=np.uint64)
        mixed = places * self._stride + tokens.astype(np.uint64) * self._secret + self._secret
        # The finaliser of splitmix64 (Steele, Lea and Flood 2014).
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        result: npt.NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
        return result


@dataclass(frozen=True, slots=True)
class ChatParts:
    """Inputs of a rendered chat of ``size`` bytes."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    variables: Mapping[str, Any] | None
    size: int


@dataclass(frozen=True, slots=True)
class Remembered:
    """One request, and the part of it that the cache had."""

    outline: Outline
    found: Found
    chat: ChatParts | None = None
    """Chat, to name the part at a position. None in a namespace, where it is not kept."""
    request_id: str | None = None
    """The engine's id of the request, or None if it is not needed."""

    @property
    def num_bytes(self) -> int:
        """Approximate size."""
        return self.outline.num_bytes + (self.chat.size if self.chat is not None else 0)


class RequestMemory(BoundedMemory[tuple[Tenant, str], Remembered]):
    """Recent requests by tenant and id of their answer, in the order of their ends."""

    def find(self, name: str) -> tuple[str, Remembered] | None:
        """Return (id, request) of the latest answer with this id or ``request_id``, of any tenant.

        For the operator. O(requests)."""
        return next(
            (
                (answer_id, known)
                for (_, answer_id), known in reversed(self.listed())
                if name in (answer_id, known.request_id)
            ),
            None,
        )

    def nearest(self, later: Remembered, grid: int = 0) -> tuple[str, Remembered] | None:
        """Return (id, request) of the earlier request that shares the most tokens with ``later``,
        or None if none shares any.

        If that is less than ``grid``, the latest one with the same messages after the system
        message is returned, because the beginning of a system message may have changed. Only
        requests of its namespace are compared; of equal ones the latest is returned.
        """
        listed = self.listed()
        at = next((i for i, (_, known) in enumerate(listed) if known is later), 0)
        outline = later.outline
        best, best_len = None, 0
        continued = None
        for (_, answer_id), other in listed[max(at - NEAREST, 0) : at]:
            if other.outline.namespace != outline.namespace:
                continue
            mine = outline.tokens[: outline.prompt_len]
            shared = common_prefix_len(cast(Tokens, other.outline.tokens), cast(Tokens, mine))
            if shared and shared >= best_len:
                best, best_len = (answer_id, other), shared
            if continues(other.outline, outline):
                continued = answer_id, other
        return continued if continued is not None and best_len < grid else best


FIRST, LAST = 0xF0000, 0xFFFFD
"""Private-use characters that serve as marks."""
_TOOL, _SYSTEM = "tool_to_find", "text to find"
_MARK = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")


def locate(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any] | None,
    num_chars: int,
) -> str | None:
    """Return the field of the chat, such as ``messages[3].content``, at position ``num_chars`` of
    the rendered text.

    None before the first field, or if the chat contains marks itself. Takes one render.
    """
    paths: list[str] = []
    chat = [
        {name: _marked(value, f"messages[{i}].{name}", paths) for name, value in message.items()}
        for i, message in enumerate(messages)
    ]
    offered = None if tools is None else _marked(tools, "tools", paths)
    if len(paths) > LAST - FIRST or _MARK.search(json.dumps([messages, tools], ensure_ascii=False)):
        return None
    try:
        text = template.render(chat, tools=offered, add_generation_prompt=True, variables=variables)
    except TemplateError:
        return None
    found = None
    for before, mark in enumerate(_MARK.finditer(text)):
        if mark.start() - before > num_chars:
            break
        index = ord(mark.group()) - FIRST
        found = paths[index] if index < len(paths) else None
    return found


def _marked(value: Any, path: str, paths: list[str]) -> Any:
    """Return ``value`` with a mark in each of its texts, after leading blanks, which templates
    strip. Roles are unchanged."""
    if isinstance(value, str) and not path.endswith((".role", ".type", ".id", "_id")):
        paths.append(path)
        stripped = value.lstrip()
        blanks = value[: len(value) - len(stripped)]
        return f"{blanks}{chr(FIRST + len(paths) - 1)}{stripped}"
    if isinstance(value, Mapping):
        return {name: _marked(entry, f"{path}.{name}", paths) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(entry, f"{path}[{i}]", paths) for i, entry in enumerate(value)]
    return value


def writes_tools_first(template: ChatTemplate) -> bool:
    """Return True if tools come before the text of the system message. Takes one render."""
    tool = {"type": "function", "function": {"name": _TOOL, "parameters": {}}}
    chat = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "hi"}]
    try:
        text = template.render(chat, tools=[tool])
    except TemplateError:
        return True
    return text.find(_TOOL) < text.find(_SYSTEM)


ANTHROPIC: dict[Change, str] = {
    "model": "model_changed",
    "system": "system_changed",
    "tools": "tools_changed",
    "messages": "messages_changed",
    "variables": "unavailable",
}
"""Anthropic's name of each cause. ``unavailable`` is a change in another parameter of the
prompt."""
OPENAI: dict[Change, str] = {
    "model": "model_changed",
    "system": "input_changed",
    "tools": "tools_changed",
    "messages": "input_changed",
}
EFFORT = ("reasoning_effort", "enable_thinking", "thinking", "thinking_budget")
"""Switches of templates that control the amount of reasoning."""


def for_anthropic(explanation: Explanation | None) -> dict[str, Any] | None:
    """Return ``diagnostics`` of an answer with a comparison, or None if the requests do not differ.
    ``explanation`` is None if the earlier message is not known."""
    if explanation is None:
        return {"cache_miss_reason": {"type": "previous_message_not_found"}}
    parting = explanation.parting
    kind = None if parting is None else ANTHROPIC.get(parting.change)
    if parting is None or kind is None:
        return None
    reason: dict[str, Any] = {"type": kind}
    if kind != "unavailable":
        reason["cache_missed_input_tokens"] = explanation.prompt_len - parting.at
    return {"cache_miss_reason": reason}


def for_openai(explanation: Explanation | None) -> dict[str, Any]:
    """Return ``prompt_cache_diagnostics`` of an answer with a comparison. ``explanation`` is None
    if the earlier response is not known."""
    if explanation is None:
        return {"type": "comparison_response_not_found"}
    parting = explanation.parting
    if parting is None or parting.change in ("answer", "template"):
        return {"type": "cache_hit"}
    reason = _openai_reason(parting)
    if reason is None:
        return {"type": "unavailable"}
    return {
        "type": "cache_miss",
        "reason": reason,
        "cache_missed_tokens": max(explanation.earlier_len - parting.at, 0),
        "comparison_reusable_tokens": explanation.earlier_len,
    }


def _openai_reason(parting: Parting) -> str | None:
    if parting.change == "variables":
        name = (parting.path or "").rpartition(".")[2]
        return "reasoning_effort_changed" if name in EFFORT else None
    if parting.change == "messages" and parting.how == "removed":
        return "context_compacted"
    return OPENAI.get(parting.change)


class Explanations:
    """Stores the requests of one server, and explains their computation in comparison with other
    requests."""

    def __init__(self, tokenizer: Tokenizer, limit_bytes: int, grid: int = 0) -> None:
        """``grid``: distance of positions at which states may be saved; 0 if none are."""
        self._tokenizer, self._grid = tokenizer, grid
        control_ids = [i for text in tokenizer.control_tokens for i in tokenizer.encode(text)[:1]]
        self.outliner = Outliner(secrets.token_bytes(32), control_ids)
        self.memory = RequestMemory(limit_bytes)

    def diagnose(self, asked: AskedChat) -> ObservedChat:
        """Return the observer of a chat before it is answered. O(size of the chat)."""
        return ObservedChat(self, asked, self.outliner.outline(asked))

    def compare(self, later: Remembered, tenant: Tenant, earlier_id: str) -> Explanation | None:
        """Explain the computation of ``later`` in comparison with an earlier request of the same
        tenant, or return None if that request is not known.

        The earlier text is shown only if a secret identifies the tenant.
        """
        earlier = self.memory.get((tenant, earlier_id), is_use=False)
        if earlier is None:
            return None
        return self._explain(earlier, later, shows_earlier=tenant.is_known)

    def look_up(self, answer_id: str, earlier_id: str | None) -> dict[str, Any] | None:
        """Return the same explanation for a request that ended; for the operator.

        It is compared by default with the earlier request that shares the most tokens, and with
        none if no request shares any. None if a request is not known.
        """
        found = self.memory.find(answer_id)
        if found is None:
            return None
        head: dict[str, Any] = {"id": found[0], "compared_with": None}
        later = found[1]
        other = (
            self.memory.find(earlier_id) if earlier_id else self.memory.nearest(later, self._grid)
        )
        if other is None:
            alone = explain_alone(later.outline, later.found, grid=self._grid)
            return None if earlier_id else head | alone.as_dict()
        head["compared_with"], earlier = other
        if earlier.outline.namespace != later.outline.namespace:
            return None
        is_nearest = earlier_id is None
        told = self._explain(earlier, later, shows_earlier=True, may_be_new=is_nearest)
        return head | told.as_dict()

    def _explain(
        self,
        earlier: Remembered,
        later: Remembered,
        *,
        shows_earlier: bool,
        may_be_new: bool = False,
    ) -> Explanation:
        tokenizer, chat = self._tokenizer, later.chat

        def decode(token_ids: Sequence[int]) -> str:
            return tokenizer.decode(token_ids, skip_special_tokens=False)

        def where(position: int) -> str | None:
            if chat is None or tokenizer.chat_template is None:
                return None
            num_chars = len(decode(later.outline.tokens[:position].tolist()))
            parts = chat.messages, chat.tools, chat.variables
            return locate(tokenizer.chat_template, *parts, num_chars)

        return explain(
            earlier.outline,
            later.outline,
            later.found,
            decode=decode,
            locate=where,
            tools_first=self._tools_first,
            shows_earlier=shows_earlier,
            grid=self._grid,
            may_be_new=may_be_new,
        )

    @cached_property
    def _tools_first(self) -> bool:
        template = self._tokenizer.chat_template
        return template is None or writes_tools_first(template)


class ObservedChat:
    """One chat while it is answered, and the requested explanations of its cache misses."""

    def __init__(self, explanations: Explanations, asked: AskedChat, outline: Outline) -> None:
        self._explanations, self._asked, self._outline = explanations, asked, outline
        self._first: RequestOutput | None = None
        self.explanation: Explanation | None = None
        """Explanation after the first output, if a comparison was requested and is possible."""

    @property
    def answer_id(self) -> str:
        return self._asked.answer_id

    def remembered(self, output: RequestOutput) -> Remembered | None:
        """Return the chat in the form in which it is stored, or None if it was not scheduled."""
        if output.losses is None:
            return None
        asked, found = self._asked, Found(output.cached_len, output.losses)
        is_shown = asked.tenant.namespace is None
        chat = ChatParts(asked.messages, asked.tools, asked.variables, asked.size)
        return Remembered(self._outline, found, chat if is_shown else None, asked.request_id)

    async def see(self, output: RequestOutput, workers: Workers) -> None:
        """Process the next output of the first answer. O(tokens of the prompt) for the first output
        with a comparison."""
        if self._first is not None:
            return
        self._first = output
        asked, later = self._asked, self.remembered(output)
        if later is not None and (earlier_id := asked.compared_with) is not None:
            self.explanation = await workers.run(
                len(output.prompt_token_ids),
                lambda: self._explanations.compare(later, asked.tenant, earlier_id),
            )

    def end(self, output: RequestOutput, message: Mapping[str, Any] | None = None) -> None:
        """Store the chat with its answer, which was sent as ``message``. O(its tokens)."""
        remembered = self.remembered(output)
        if remembered is not None:
            answer = np.asarray(output.output, np.int32)
            outline = self._explanations.outliner.answered(self._outline, answer, message)
            remembered = replace(remembered, outline=outline)
            key = self._asked.tenant, self._asked.answer_id
            self._explanations.memory.put(key, remembered, remembered.num_bytes)

    def headers(self) -> dict[str, str]:
        """Return ``cache_headers``, and ``x-cache-parted`` if a comparison was requested and is
        possible. Empty before the first output."""
        if self._first is None:
            return {}
        headers = cache_headers(self._first)
        if self.explanation is not None:
            parting = self.explanation.parting
            said = "no" if parting is None else f"{parting.change}; at={parting.at}"
            headers["x-cache-parted"] = said
        return headers

    def told(self) -> dict[str, Any]:
        """Return the requested explanation in OpenAI's form and in the engine's."""
        if self._asked.compared_with is None:
            return {}
        whole = None if self.explanation is None else self.explanation.as_dict()
        return {
            "prompt_cache_diagnostics": for_openai(self.explanation),
            "cache_explanation": whole,
        }

    def diagnostics(self) -> dict[str, Any]:
        """Return the requested explanation in Anthropic's form."""
        if not self._asked.wants_diagnostics:
            return {}
        is_compared = self._asked.compared_with is not None
        return {"diagnostics": for_anthropic(self.explanation) if is_compared else None}
