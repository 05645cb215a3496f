"""One client for chat completions, responses and messages, so that a test states a rule once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from .conftest import Live

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOL: dict[str, Any] = {"name": "weather", "parameters": SCHEMA}
CHAT = [{"role": "user", "content": "Rain in Bonn?"}]
BONN = {"city": "Bonn", "days": 2}


@dataclass
class Answer:
    """Parts of an answer, whole or put together from its events."""

    reasoning: str = ""
    text: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    """(name, arguments) of each call of a tool."""
    reason: str = ""
    """"stop", "length" or "call"."""
    num_written: int = 0
    """Tokens of the answer."""
    warning: str | None = None
    turn: list[dict[str, Any]] = field(default_factory=list, compare=False)
    """The answer as a client sends it back. Empty if it was streamed."""
    id: str = field(default="", compare=False)
    num_prompt: int = field(default=0, compare=False)
    """Tokens of the prompt, or 0 if it was streamed."""
    num_cached: int = field(default=0, compare=False)
    num_thought: int = 0
    """Tokens of the reasoning."""


class Dialect:
    """Requests and answers of one endpoint."""

    path: str
    limit = "max_tokens"
    field = "messages"

    def body(
        self,
        chat: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        choice: str | None = None,
        limit: int = 400,
        effort: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Return a request. ``tools`` have the fields of a function in chat completions."""
        made = {"model": "builtin", self.field: chat, self.limit: limit} | more
        if tools is not None:
            made["tools"] = [self.tool(tool) for tool in tools]
        if choice is not None:
            made["tool_choice"] = self.choice(choice)
        return made | (self.effort(effort) if effort else {})

    def ask(self, live: Live, stream: bool = False, **options: Any) -> Answer:
        """Send a request and return its answer."""
        received = live.post(self.path, self.body(**({"chat": CHAT} | options), stream=stream))
        assert received.status_code == 200, received.text
        if not stream:
            return self.whole(received.json())
        lines = received.text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return self.streamed(events)

    def tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def choice(self, choice: str) -> Any:
        return choice

    def effort(self, effort: str) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self, body: dict[str, Any]) -> Answer:
        raise NotImplementedError

    def streamed(self, events: list[dict[str, Any]]) -> Answer:
        raise NotImplementedError

    def results(self, answer: Answer, text: str) -> list[dict[str, Any]]:
        """Return the turns after ``answer``: ``text`` as the result of each call."""
        raise NotImplementedError


class Chat(Dialect):
    path = "/v1/chat/completions"

    def tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        return {"type": "function", "function": tool}

    def effort(self, effort: str) -> dict[str, Any]:
        return {"reasoning_effort": effort}

    def whole(self, body: dict[str, Any]) -> Answer:
        [choice] = body["choices"]
        message, reason = choice["message"], choice["finish_reason"]
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        assert message.get("reasoning") == message.get("reasoning_content")
        return Answer(
            message.get("reasoning_content") or "",
            message["content"] or "",
            [(call["name"], json.loads(call["arguments"])) for call in calls],
            {"tool_calls": "call"}.get(reason, reason),
            body["usage"]["completion_tokens"],
            choice.get("warning"),
            [message],
            body["id"],
            body["usage"]["prompt_tokens"],
            body["usage"]["prompt_tokens_details"]["cached_tokens"],
            body["usage"]["completion_tokens_details"]["reasoning_tokens"],
        )

    def streamed(self, events: list[dict[str, Any]]) -> Answer:
        answer, calls = Answer(), []
        for event in events:
            usage = event.get("usage") or {}
            answer.num_written = usage.get("completion_tokens", 0)
            answer.num_thought = usage.get("completion_tokens_details", {}).get(
                "reasoning_tokens", 0
            )
            for choice in event["choices"]:
                delta = choice["delta"]
                assert delta.get("reasoning") == delta.get("reasoning_content")
                answer.reasoning += delta.get("reasoning_content") or ""
                answer.text += delta.get("content") or ""
                for call in delta.get("tool_calls") or ():
                    if call.get("id"):
                        calls.append([call["function"]["name"], ""])
                    calls[call["index"]][1] += call["function"].get("arguments") or ""
                reason = choice["finish_reason"] or answer.reason
                answer.reason = {"tool_calls": "call"}.get(reason, reason)
                answer.warning = choice.get("warning") or answer.warning
        answer.calls = [(name, json.loads(arguments)) for name, arguments in calls]
        return answer

    def results(self, answer: Answer, text: str) -> list[dict[str, Any]]:
        ids = [call["id"] for call in answer.turn[0].get("tool_calls") or ()]
        return [{"role": "tool", "tool_call_id": one, "content": text} for one in ids]


class Responses(Dialect):
    path = "/v1/responses"
    limit = "max_output_tokens"
    field = "input"

    def tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        return {"type": "function"} | tool

    def effort(self, effort: str) -> dict[str, Any]:
        return {"reasoning": {"effort": effort}}

    def whole(self, body: dict[str, Any]) -> Answer:
        made = Answer(turn=body["output"], warning=body.get("warning"))
        for item in body["output"]:
            if item["type"] == "function_call":
                made.calls.append((item["name"], json.loads(item["arguments"])))
                continue
            text = "".join(part["text"] for part in item["content"])
            if item["type"] == "reasoning":
                made.reasoning += text
            else:
                made.text += text
        is_cut = body["status"] == "incomplete"
        made.reason = "length" if is_cut else "call" if made.calls else "stop"
        usage = body["usage"]
        made.num_written, made.num_prompt = usage["output_tokens"], usage["input_tokens"]
        made.id, made.num_cached = body["id"], usage["input_tokens_details"]["cached_tokens"]
        made.num_thought = usage["output_tokens_details"]["reasoning_tokens"]
        return made

    def streamed(self, events: list[dict[str, Any]]) -> Answer:
        """Compare the pieces of each item with the whole answer in the last event."""
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        items: dict[str, str] = {}
        kinds: dict[str, str] = {}
        for event in events:
            if event["type"] == "response.output_item.added":
                assert event["output_index"] == len(items)
                items[event["item"]["id"]] = ""
                kinds[event["item"]["id"]] = event["item"]["type"]
            elif event["type"].endswith(".delta"):
                items[event["item_id"]] += event["delta"]
        answer = self.whole(events[-1]["response"])
        pieces = list(zip(kinds.values(), items.values(), strict=True))
        assert "".join(text for kind, text in pieces if kind == "message") == answer.text
        assert "".join(text for kind, text in pieces if kind == "reasoning") == answer.reasoning
        calls = [json.loads(text) for kind, text in pieces if kind == "function_call"]
        assert calls == [arguments for _, arguments in answer.calls]
        return answer

    def results(self, answer: Answer, text: str) -> list[dict[str, Any]]:
        ids = [item["call_id"] for item in answer.turn if item["type"] == "function_call"]
        return [{"type": "function_call_output", "call_id": one, "output": text} for one in ids]


REASONS = {"tool_use": "call", "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}


class Messages(Dialect):
    path = "/v1/messages"

    def body(self, *args: Any, **options: Any) -> dict[str, Any]:
        if "stop" in options:
            options["stop_sequences"] = [options.pop("stop")]
        return super().body(*args, **options)

    def tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        tool = dict(tool)
        return {"input_schema": tool.pop("parameters"), **tool}

    def choice(self, choice: str) -> Any:
        return {"type": {"required": "any"}.get(choice, choice)}

    def effort(self, effort: str) -> dict[str, Any]:
        budget = {"type": "enabled", "budget_tokens": 99}
        return {"thinking": {"type": "disabled"} if effort == "none" else budget}

    def whole(self, body: dict[str, Any]) -> Answer:
        made = Answer(turn=[{"role": "assistant", "content": body["content"]}])
        for block in body["content"]:
            made.reasoning += block.get("thinking", "")
            made.text += block.get("text", "")
            if block["type"] == "tool_use":
                made.calls.append((block["name"], block["input"]))
        made.reason = REASONS[body["stop_reason"]]
        usage = body["usage"]
        made.num_written, made.num_cached = (
            usage["output_tokens"],
            usage.get("cache_read_input_tokens", 0),
        )
        made.id, made.num_prompt = (
            body.get("id", ""),
            usage.get("cache_read_input_tokens", 0) + usage.get("input_tokens", 0),
        )
        made.num_prompt += usage.get("cache_creation_input_tokens", 0)
        made.warning = body.get("warning")
        made.num_thought = usage["output_tokens_details"]["thinking_tokens"]
        return made

    def streamed(self, events: list[dict[str, Any]]) -> Answer:
        kinds = [event["type"] for event in events]
        assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
        blocks: list[dict[str, Any]] = []
        for event in events:
            if event["type"] == "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"] | {"partial_json": ""})
            elif event["type"] == "content_block_delta":
                assert event["index"] == len(blocks) - 1
                [name] = event["delta"].keys() - {"type"}
                blocks[-1][name] += event["delta"][name]
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = json.loads(block["partial_json"])
        return self.whole({"content": blocks, "usage": events[-2]["usage"]} | events[-2]["delta"])

    def results(self, answer: Answer, text: str) -> list[dict[str, Any]]:
        uses = [block for block in answer.turn[0]["content"] if block["type"] == "tool_use"]
        results = [
            {"type": "tool_result", "tool_use_id": use["id"], "content": text} for use in uses
        ]
        return [{"role": "user", "content": results}] if results else []


DIALECTS = (Chat(), Responses(), Messages())
DIALECT = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda one: one.path)
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def bodies(text: str, limit: int = 2) -> dict[str, dict[str, Any]]:
    """Return a request with ``text`` for each endpoint that generates, by path."""
    chat = [{"role": "user", "content": text}]
    found = {"/v1/completions": {"prompt": text, "max_tokens": limit}}
    return found | {one.path: one.body(chat, limit=limit) for one in DIALECTS}


PROMPTS = ("/tokenize", "/v1/messages/count_tokens", *(one.path for one in DIALECTS))
"""Endpoints that make a prompt of a chat."""


def prompt(live: Live, path: str, chat: list[dict[str, Any]], **more: Any) -> Any:
    """Return the tokens of a prompt at ``/tokenize``, or their number at another endpoint."""
    bodies = {one.path: one.body(chat, limit=1) for one in DIALECTS}
    body = bodies.get(path, {"model": "builtin", "messages": chat}) | more
    answer = live.post(path, body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    if "tokens" in found:
        return found["tokens"]
    usage = found.get("usage", found)
    parts = ("cache_read_input_tokens", "cache_creation_input_tokens")
    whole = usage.get("prompt_tokens", usage.get("input_tokens", 0))
    return whole + sum(usage.get(part, 0) for part in parts)
