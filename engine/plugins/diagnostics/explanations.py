"""Why a request missed, for whoever asks: what is remembered of requests, and the forms in which it
is told."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from engine import RequestOutput
from engine.plugins.diagnostics.answer_memory import ChatParts, Remembered, RequestMemory
from engine.plugins.diagnostics.dialects import for_anthropic, for_openai
from engine.plugins.diagnostics.explain import Explanation, Found, explain
from engine.plugins.diagnostics.locate import locate, writes_tools_first
from engine.plugins.diagnostics.outline import Outline, Outliner
from engine.server.tenants import Tenant
from engine.server.workers import Workers
from engine.text.tokenizer import Tokenizer
from hybridcache.tokens import Tokens


@dataclass(slots=True)
class AskedChat:
    """A chat that is being answered, and will be remembered."""

    tenant: Tenant
    answer_id: str
    request_id: str | None
    """The engine's id of the request."""
    outline: Outline
    chat: ChatParts | None
    """None: a namespace's is not kept."""
    found: Found | None = None

    @property
    def remembered(self) -> Remembered | None:
        """What is known of it; None before its first output."""
        if self.found is None:
            return None
        return Remembered(self.outline, self.found, self.chat, self.request_id)


class Explanations:
    """Remembers the requests of one server, and explains what one computed beside another."""

    def __init__(self, tokenizer: Tokenizer, limit_bytes: int) -> None:
        self._tokenizer = tokenizer
        control_ids = [i for text in tokenizer.control_tokens for i in tokenizer.encode(text)[:1]]
        self._outliner = Outliner(secrets.token_bytes(32), control_ids)
        self.memory = RequestMemory(limit_bytes)

    def begin(
        self,
        answer_id: str,
        token_ids: Tokens,
        *,
        request_id: str | None = None,
        model: str,
        tenant: Tenant,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        size: int,
    ) -> AskedChat:
        """What is known of a chat of ``size`` bytes before it is answered. O(size)."""
        outline = self._outliner.outline(
            token_ids,
            model=model,
            namespace=tenant.namespace,
            messages=messages,
            tools=tools or (),
            variables=variables,
        )
        chat = ChatParts(messages, tools, variables, size) if tenant.namespace is None else None
        return AskedChat(tenant, answer_id, request_id, outline, chat)

    def end(
        self, asked: AskedChat, output: RequestOutput, message: Mapping[str, Any] | None = None
    ) -> None:
        """Remember ``asked`` with its answer, which was given as ``message``. O(its tokens)."""
        self.saw(asked, output)
        if asked.remembered is not None:
            answer = np.asarray(output.output, np.int32)
            outline = self._outliner.answered(asked.outline, answer, message)
            remembered = replace(asked.remembered, outline=outline)
            self.memory.put(asked.tenant, asked.answer_id, remembered)

    def saw(self, asked: AskedChat, output: RequestOutput) -> None:
        """An output of ``asked``, which says what the cache had."""
        if output.losses is not None:
            asked.found = Found(output.cached_len, output.losses)

    def compare(self, asked: AskedChat, earlier_id: str) -> Explanation | None:
        """Why ``asked`` was computed as far as it was, compared with an earlier request of the same
        tenant, whose text is shown only if a secret tells the tenant from others. None: that
        request is not known here, or nothing was computed yet."""
        earlier, later = self.memory.get(asked.tenant, earlier_id), asked.remembered
        if earlier is None or later is None:
            return None
        return self._explain(earlier, later, shows_earlier=asked.tenant.is_known)

    def look_up(self, answer_id: str, earlier_id: str | None) -> dict[str, Any] | None:
        """For the operator: the same for a request that ended, by default beside the one before it
        that shares most. None: a request is not known."""
        found = self.memory.find(answer_id)
        if found is None:
            return None
        head: dict[str, Any] = {"id": found[0], "compared_with": None}
        later = found[1]
        other = self.memory.find(earlier_id) if earlier_id else self.memory.nearest(later)
        if other is None:
            return None if earlier_id else head | {"lost": later.found.losses._asdict()}
        head["compared_with"], earlier = other
        if earlier.outline.namespace != later.outline.namespace:
            return None
        return head | self._explain(earlier, later, shows_earlier=True).as_dict()

    def _explain(
        self, earlier: Remembered, later: Remembered, *, shows_earlier: bool
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
        )

    @cached_property
    def _tools_first(self) -> bool:
        template = self._tokenizer.chat_template
        return template is None or writes_tools_first(template)


class Inquiry:
    """What one chat learns of itself while it is answered, and what it was asked to say of it."""

    def __init__(
        self,
        explanations: Explanations,
        asked: AskedChat,
        compared_with: str | None,
        is_asked: bool,
    ) -> None:
        """``compared_with``: the earlier answer; ``is_asked``: Anthropic's form is wanted, also
        where there is no earlier one."""
        self._is_asked = is_asked
        self._explanations = explanations
        self._asked = asked
        self._compared_with = compared_with
        self._first: RequestOutput | None = None
        self.explanation: Explanation | None = None
        """Once the first output is there, where a comparison was asked for and is possible."""

    @property
    def answer_id(self) -> str:
        return self._asked.answer_id

    async def see(self, output: RequestOutput, workers: Workers) -> None:
        """The next output of the first answer. O(tokens of the prompt) with the first one, where a
        comparison was asked for."""
        if self._first is not None:
            return
        self._first = output
        self._explanations.saw(self._asked, output)
        earlier_id = self._compared_with
        if earlier_id is not None:
            self.explanation = await workers.run(
                len(output.prompt_token_ids),
                lambda: self._explanations.compare(self._asked, earlier_id),
            )

    def end(self, output: RequestOutput, message: Mapping[str, Any]) -> None:
        """The last output of the first answer, and what it said."""
        self._explanations.end(self._asked, output, message)

    def headers(self) -> dict[str, str]:
        """What the cache had, in short; nothing before the first output."""
        return {} if self._first is None else cache_headers(self._first, self.explanation)

    def told(self) -> dict[str, Any]:
        """Why it missed, in OpenAI's form and in ours, where that was asked."""
        if self._compared_with is None:
            return {}
        whole = None if self.explanation is None else self.explanation.as_dict()
        return {
            "prompt_cache_diagnostics": for_openai(self.explanation),
            "cache_explanation": whole,
        }

    def diagnostics(self) -> dict[str, Any]:
        """The same in Anthropic's form."""
        if not self._is_asked:
            return {}
        is_compared = self._compared_with is not None
        return {"diagnostics": for_anthropic(self.explanation) if is_compared else None}


def cache_headers(output: RequestOutput, explanation: Explanation | None = None) -> dict[str, str]:
    """The short form, for every answer: ``x-cache-hit-tokens``, ``x-cache-prompt-tokens``,
    ``x-cache-lost`` with its causes, and where a comparison was asked for ``x-cache-parted``."""
    headers = {
        "x-cache-prompt-tokens": str(len(output.prompt_token_ids)),
        "x-cache-hit-tokens": str(output.cached_len),
    }
    if output.losses is not None:
        lost = [f"{name}={number}" for name, number in output.losses._asdict().items() if number]
        headers["x-cache-lost"] = ", ".join(lost) or "none"
    if explanation is not None:
        parting = explanation.parting
        said = "no" if parting is None else f"{parting.change}; at={parting.at}"
        headers["x-cache-parted"] = said
    return headers
