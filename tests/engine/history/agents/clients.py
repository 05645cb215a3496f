"""Client side of an agent: stores answers and sends them back with the next request."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import anthropic
import httpx
import openai

from tests.engine.history.agents import scripts

Message = dict[str, Any]


class ServedRequest(NamedTuple):
    """Figures of one request of an agent."""

    prompt_len: int
    cached_len: int
    context_len: int
    """Computed tokens of the prompt and its answer."""
    cause: str | None


class Agent(ABC):
    """One conversation. Requests have no seed, so request n uses script n."""

    def __init__(self, url: str, model: str, thinks: bool) -> None:
        self._url, self._model, self._thinks = url, model, thinks
        self._messages: list[Message] = []
        self._calls: list[str] = []
        self._earlier: str | None = None

    def question(self, text: str) -> None:
        """Add a message of the user."""
        self._messages.append({"role": "user", "content": text})

    def cause(self, answer_id: str, earlier: str | None) -> str | None:
        """Return the cause of the misses of an answer, compared with an ``earlier`` one."""
        if earlier is None:
            return None
        url = f"{self._url}/v1/cache/explanations/{answer_id}"
        cause: str | None = httpx.get(url, params={"compared_with": earlier}).json()["cause"]
        return cause

    @abstractmethod
    def ask(self, max_tokens: int) -> tuple[ServedRequest, int]:
        """Send the conversation. Returns (figures of the request, number of tool calls)."""

    @abstractmethod
    def results(self, texts: Sequence[str]) -> None:
        """Add the results of the called tools to the conversation."""


class OpenAIAgent(Agent):
    """Agent that uses /v1/chat/completions."""

    def __init__(self, url: str, model: str, thinks: bool) -> None:
        super().__init__(url, model, thinks)
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._messages.append({"role": "system", "content": scripts.SYSTEM})

    def ask(self, max_tokens: int) -> tuple[ServedRequest, int]:
        earlier = self._earlier
        answer = self._client.chat.completions.create(
            model=self._model,
            messages=self._messages,
            tools=scripts.TOOLS,
            max_tokens=max_tokens,
            extra_body={
                "chat_template_kwargs": {} if self._thinks else {"enable_thinking": False},
            },
        )
        message, usage = answer.choices[0].message, answer.usage
        self._messages.append(_echo(message))
        self._calls = [call.id for call in message.tool_calls or ()]
        self._earlier = answer.id
        prompt_len, cached_len = usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens
        context_len = prompt_len + usage.completion_tokens - 1
        cause = self.cause(answer.id, earlier)
        return ServedRequest(prompt_len, cached_len, context_len, cause), len(self._calls)

    def results(self, texts: Sequence[str]) -> None:
        self._messages += [
            {"role": "tool", "tool_call_id": call, "content": text}
            for call, text in zip(self._calls, texts, strict=True)
        ]


class AnthropicAgent(Agent):
    """Agent that uses /v1/messages."""

    def __init__(self, url: str, model: str, thinks: bool) -> None:
        super().__init__(url, model, thinks)
        self._client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)

    def ask(self, max_tokens: int) -> tuple[ServedRequest, int]:
        earlier = self._earlier
        answer = self._client.messages.create(
            model=self._model,
            system=scripts.SYSTEM,
            messages=self._messages,
            tools=[_tool(one["function"]) for one in scripts.TOOLS],
            thinking={"type": "adaptive" if self._thinks else "disabled"},
            max_tokens=max_tokens,
        )
        blocks = [block.model_dump(exclude_none=True) for block in answer.content]
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = dict(sorted(block["input"].items()))
        self._messages.append({"role": "assistant", "content": blocks})
        self._calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
        self._earlier, usage = answer.id, answer.usage
        cause = self.cause(answer.id, earlier)
        cached_len = usage.cache_read_input_tokens
        prompt_len = usage.input_tokens + cached_len + usage.cache_creation_input_tokens
        context_len = prompt_len + usage.output_tokens - 1
        return ServedRequest(prompt_len, cached_len, context_len, cause), len(self._calls)

    def results(self, texts: Sequence[str]) -> None:
        blocks = [
            {"type": "tool_result", "tool_use_id": call, "content": text}
            for call, text in zip(self._calls, texts, strict=True)
        ]
        if blocks:
            self._messages.append({"role": "user", "content": blocks})


AGENTS: dict[str, type[Agent]] = {"openai": OpenAIAgent, "anthropic": AnthropicAgent}


def _echo(answer: Any) -> Message:
    """Return an answer in the form a client sends back, with its JSON parsed and written again."""
    message: Message = {"role": "assistant", "content": answer.content or ""}
    if reasoning := getattr(answer, "reasoning_content", None):
        message["reasoning_content"] = reasoning
    if answer.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": json.dumps(json.loads(call.function.arguments), sort_keys=True),
                },
            }
            for call in answer.tool_calls
        ]
    return message


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": function["name"],
        "description": function["description"],
        "input_schema": function["parameters"],
    }
