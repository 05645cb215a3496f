"""Anthropic's ``context_management``: edits that the server applies to a chat before each answer.

An edit changes the prompt from its first removed text on, so the cached prefix ends there. The
client keeps the whole chat and sends it again with every request.
https://platform.claude.com/docs/en/build-with-claude/context-editing
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from engine.requests.spec import MAX_COUNT
from engine.server.api_errors import quoted
from engine.server.schemas import Listed, Strict

Messages = list[dict[str, Any]]
"""Messages of a chat, in the form of OpenAI's API."""
CLEARED = "[Old tool result content cleared]"
"""Text in place of a cleared result."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


class Turns(Strict):
    type: Literal["thinking_turns"]
    value: Annotated[int, Field(ge=1, le=MAX_COUNT)]


class AllTurns(Strict):
    type: Literal["all"]


class ToolUses(Strict):
    type: Literal["tool_uses"]
    value: Count


class InputTokens(Strict):
    type: Literal["input_tokens"]
    value: Count


class ClearThinking(Strict):
    """Removes thinking from all assistant turns but the last ones with thinking."""

    COUNT: ClassVar[str] = "cleared_thinking_turns"
    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"] | Turns | AllTurns = Turns(type="thinking_turns", value=1)

    def is_due(self, num_tokens: int, messages: Messages) -> bool:
        """Return True, because this edit has no trigger."""
        return True

    def edited(self, messages: Messages) -> tuple[Messages, int]:
        """Return the messages without old thinking, and the number of cleared turns.
        O(messages)."""
        if not isinstance(self.keep, Turns):
            return messages, 0
        turn, turns, before = 0, [], ""
        for message in messages:
            # Text behind tool results is part of the turn that called the tools.
            turn += message["role"] == "user" and before != "tool"
            before = message["role"]
            turns.append(turn if "reasoning_content" in message else None)
        with_thinking = sorted({turn for turn in turns if turn is not None})
        old = set(with_thinking[: -self.keep.value])
        edited = [
            {name: value for name, value in message.items() if name != "reasoning_content"}
            if turn in old
            else message
            for message, turn in zip(messages, turns, strict=True)
        ]
        return edited, len(old)

    def is_worth(self, num_tokens: int) -> bool:
        """Return True if clearing this number of tokens is enough."""
        return True


class ClearToolUses(Strict):
    """Replaces the oldest tool results by a short text once the prompt is long."""

    COUNT: ClassVar[str] = "cleared_tool_uses"
    type: Literal["clear_tool_uses_20250919"]
    trigger: Annotated[InputTokens | ToolUses, Field(discriminator="type")] = InputTokens(
        type="input_tokens", value=100_000
    )
    keep: ToolUses = ToolUses(type="tool_uses", value=3)
    clear_at_least: InputTokens | None = None
    exclude_tools: Listed[str] = Field(default_factory=list)
    clear_tool_inputs: bool | Listed[str] = False

    def is_due(self, num_tokens: int, messages: Messages) -> bool:
        """Return True if the prompt, of ``num_tokens``, is longer than the trigger. O(messages)."""
        number = num_tokens
        if isinstance(self.trigger, ToolUses):
            number = sum(message["role"] == "tool" for message in messages)
        return number > self.trigger.value

    def edited(self, messages: Messages) -> tuple[Messages, int]:
        """Return the messages without old results, and the number of cleared uses. O(calls)."""
        names = {
            call["id"]: call["function"]["name"]
            for message in messages
            for call in message.get("tool_calls", ())
        }
        used = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
        ids = {
            one
            for one in used[: max(0, len(used) - self.keep.value)]
            if names.get(one) not in self.exclude_tools
        }
        return [self._without(message, ids) for message in messages], len(ids)

    def _without(self, message: dict[str, Any], ids: set[str]) -> dict[str, Any]:
        if message["role"] == "tool" and message["tool_call_id"] in ids:
            return message | {"content": CLEARED}
        if self.clear_tool_inputs and "tool_calls" in message:
            calls = message["tool_calls"]
            cleared = [self._call(call) if call["id"] in ids else call for call in calls]
            return message | {"tool_calls": cleared}
        return message

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        which = self.clear_tool_inputs
        if isinstance(which, list) and call["function"]["name"] not in which:
            return call
        return call | {"function": call["function"] | {"arguments": {}}}

    def is_worth(self, num_tokens: int) -> bool:
        """Return True if clearing this number of tokens is enough."""
        return self.clear_at_least is None or num_tokens >= self.clear_at_least.value


Edit = ClearThinking | ClearToolUses


def _is_known(edit: Any) -> Any:
    kinds = ("clear_thinking_20251015", "clear_tool_uses_20250919")
    kind = edit.get("type") if isinstance(edit, dict) else None
    if isinstance(kind, str) and kind not in kinds:
        raise ValueError(
            f"The edit {quoted(kind)} is not supported: shorten the chat in the client, or use "
            f"{' or '.join(kinds)}."
        )
    return edit


class ContextManagement(Strict):
    """Edits, applied in their order."""

    edits: Listed[
        Annotated[Annotated[Edit, Field(discriminator="type")], BeforeValidator(_is_known)]
    ] = Field(default_factory=list)


async def apply(
    edits: Sequence[Edit], messages: Messages, count: Callable[[Messages], Awaitable[int]]
) -> tuple[Messages, list[dict[str, Any]]]:
    """Apply ``edits`` to the messages of a chat.

    ``count`` returns the length of the prompt of a chat, in tokens; it is called only if an edit
    has something to clear. Returns the edited messages and the entries of ``applied_edits``, one
    for each edit that made the prompt shorter.
    """
    applied = []
    for edit in edits:
        shorter, num_cleared = edit.edited(messages)
        if not num_cleared:
            continue
        num_tokens = await count(messages)
        if not edit.is_due(num_tokens, messages):
            continue
        num_saved = num_tokens - await count(shorter)
        if num_saved > 0 and edit.is_worth(num_saved):
            messages = shorter
            counts = {edit.COUNT: num_cleared, "cleared_input_tokens": num_saved}
            applied.append({"type": edit.type, **counts})
    return messages, applied
