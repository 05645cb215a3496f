"""tau-bench trajectories: a tool agent and a simulated customer, one shared policy prompt (sierra-research/tau-bench).

A JSON array of ``{"task_id", "trial", "traj": [messages]}``. Every message of the assistant is a request; calls of tools are rendered as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hybridcache.arrivals import Pauses, Poisson, Starts, interleave
from hybridcache.trace import BadRecords, TraceRequest
from hybridcache.traces.base import Record
from hybridcache.traces.sharegpt import json_array
from hybridcache.traces.text import ChatText, load_chat_text


@dataclass(frozen=True, slots=True)
class TauBenchReader:
    """Trajectories as sessions; a customer and a tool answer in a few seconds."""

    word: ClassVar[str] = "taubench"
    path: Path
    bad: BadRecords = field(default_factory=lambda: BadRecords(skip=False))
    tokenizer: str = "bytes"
    template: str = "chatml"
    starts: Starts = field(default_factory=lambda: Poisson(0.2))
    pauses: Pauses = field(default_factory=lambda: Pauses(median_s=5.0))
    seed: int = 0
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        return "traj" in record

    def __call__(self) -> Iterator[TraceRequest]:
        return interleave(self._sessions(), self.starts, self.pauses, seed=self.seed)

    def _sessions(self) -> Iterator[list[TraceRequest]]:
        chat = load_chat_text(self.tokenizer, self.template)
        for line, record in json_array(self.path, self.bad):
            try:
                name = f"task {record['task_id']}, trial {record['trial']}"
                session = _requests(record["traj"], name, chat)
            except (KeyError, TypeError, ValueError) as error:
                self.bad.report(self.path, line, f"not a trajectory ({error})")
                continue
            yield session


def _requests(messages: list[Record], name: str, chat: ChatText) -> list[TraceRequest]:
    said: list[dict[str, str]] = []
    requests = []
    for message in messages:
        text = _text(message)
        if message["role"] == "assistant" and said:
            prompt, answer, boundaries = chat.turn(said, text)
            requests.append(TraceRequest(0.0, name, None, prompt, answer, boundaries))
        said.append({"role": message["role"], "content": text})
    return requests


def _text(message: Record) -> str:
    text = message.get("content") or ""
    calls: list[Any] = message.get("tool_calls") or []
    if message.get("function_call"):
        calls = [{"function": message["function_call"]}]
    for call in calls:
        text += f"\n<tool_call>\n{json.dumps(call['function'])}\n</tool_call>"
    return text
