"""Interface of the hooks around each chat of a server, in any dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.text.chat_prompt import SampledTurn

if TYPE_CHECKING:
    from engine.server.access import Tenant
    from engine.server.workers import Workers
    from engine.text.chat_prompt import ChatPrompt
    from engine.text.outputs import RequestOutput

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChatInput:
    """Inputs for rendering a chat."""

    messages: list[Message]
    variables: Mapping[str, Any] | None
    sampled: Mapping[int, SampledTurn]
    """Tokens that were sampled for earlier answers, by index of the message."""
    keeps_thinking: bool
    place: Any
    """Handle of the answer's position in the chat, for ``ChatHooks.after_answer``."""


class ChatDiagnostics(Protocol):
    """Observes one chat while it is answered, and explains its cache misses if requested."""

    @property
    def answer_id(self) -> str: ...

    async def see(self, output: RequestOutput, workers: Workers) -> None:
        """Process the next output of the first answer."""
        ...

    def end(self, output: RequestOutput, message: Mapping[str, Any]) -> None:
        """Process the last output of the first answer, and the answer as a message."""
        ...

    def headers(self) -> dict[str, str]:
        """Return response headers about the cache, or {} before the first output."""
        ...

    def told(self) -> dict[str, Any]:
        """Return the explanation in OpenAI's form, if it was requested."""
        ...

    def diagnostics(self) -> dict[str, Any]:
        """Return the explanation in Anthropic's form, if it was requested."""
        ...


class ChatHooks(Protocol):
    """Hooks around every chat of a server, in any dialect."""

    def before_render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        tenant: Tenant,
    ) -> ChatInput:
        """Return the inputs for rendering a chat. O(its size)."""
        ...

    def diagnose(
        self,
        answer_id: str,
        token_ids: np.ndarray,
        *,
        compared_with: str | None,
        is_asked: bool,
        request_id: str | None,
        model: str,
        tenant: Tenant,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        size: int,
    ) -> ChatDiagnostics:
        """Return the observer of a chat of ``size`` bytes before it is answered.

        ``compared_with`` is the id of an earlier answer to compare with. ``is_asked`` requests
        Anthropic's form.
        """
        ...

    def after_answer(
        self, prompt: ChatPrompt, place: Any, message: Message, output: RequestOutput
    ) -> None:
        """Process a complete answer, sent to the client as ``message``. O(its size)."""
        ...
