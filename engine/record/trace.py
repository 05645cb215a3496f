"""Requests to lines of a trace, in the laboratory's own format (``jsonl`` there).

Without a tokenizer an id stands for ``PIECE`` characters, about what a token takes. Hashed, an id
is a keyed hash of all text up to it: two ids are equal where everything before them is, and say
nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from engine.text.templates import TemplateError, render_chat
from engine.text.tokenizer import EncodeOptions, Tokenizer

logger = logging.getLogger(__name__)
PIECE = 4
"""Characters for one id."""
HEADER, END = "<|im_start|>", "<|im_end|>\n"
ALONE = EncodeOptions(add_special_tokens=False)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request that was answered."""

    seconds: float
    body: Mapping[str, Any]
    answer: Mapping[str, Any]
    """As a message of the assistant."""


class TraceWriter:
    """Writes requests, each as soon as it was answered."""

    def __init__(self, file: TextIO, *, keeps_text: bool, tokenizer: Tokenizer | None) -> None:
        self._file = file
        self._keeps_text = keeps_text
        self._tokenizer = tokenizer
        self._key = secrets.token_bytes(32)
        self.num_requests = 0
        self.skipped: Counter[str] = Counter()
        """What was answered but is not in the trace: how many, by why."""
        self._write({"format": "hybridcache", "version": 1, "unit": 1})

    def write(self, recorded: Recorded) -> None:
        """Add one request. O(its size)."""
        body, answer = recorded.body, recorded.answer
        ids, boundaries = self._prompt(body)
        output = self._answer(answer)
        if not self._keeps_text:
            hashed = self._hashed([*ids, *output])
            ids, output = hashed[: len(ids)], hashed[len(ids) :]
        line: dict[str, Any] = {
            "timestamp": round(recorded.seconds, 3),
            "session": self._digest(json.dumps(_beginning(body))),
            "namespace": self._digest(json.dumps([body.get("model"), body.get("cache_salt")])),
            "tokens": ids,
            "output": output,
        }
        if boundaries:
            line["boundaries"] = boundaries
        if self._keeps_text:
            line |= {"request": body, "answer": answer}
        if not ids:
            self.skip("bodies with several prompts, or none, are not written")
            return
        self._write(line)
        self.num_requests += 1

    def skip(self, why: str) -> None:
        """One request that is not written: the log says so of the first."""
        self.skipped[why] += 1
        if self.skipped[why] == 1:
            logger.warning("Passed on, but %s.", why)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()

    def _prompt(self, body: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """(ids, the boundaries that are known)."""
        if "messages" not in body:
            prompt = body.get("prompt", "")
            if isinstance(prompt, list):
                return [int(one) for one in prompt if isinstance(one, int)], []
            return self._ids([str(prompt)]), []
        messages = [_message(message) for message in body["messages"]]
        if self._tokenizer is not None and self._tokenizer.chat_template is not None:
            try:
                chat = render_chat(
                    self._tokenizer,
                    messages,
                    tools=body.get("tools"),
                    variables=body.get("chat_template_kwargs"),
                )
                return chat.token_ids, list(chat.boundaries)
            except TemplateError:
                pass  # The recorded server's template took it: it is written in the plain form.
        tools = json.dumps(body["tools"]) if body.get("tools") else ""
        texts = [tools, *(text for message in messages for text in _texts(message))]
        return self._ids([*texts, f"{HEADER}assistant\n"]), []

    def _answer(self, answer: Mapping[str, Any]) -> list[int]:
        return self._ids(_texts(_message(answer))[1:])

    def _ids(self, texts: Sequence[str]) -> list[int]:
        """Ids of texts that stand one behind the other, none across two of them."""
        if self._tokenizer is not None:
            return [i for text in texts for i in self._tokenizer.encode(text, ALONE)]
        return [_number(piece.encode("utf-8", "replace")) for text in texts for piece in _cut(text)]

    def _hashed(self, ids: Sequence[int]) -> list[int]:
        chain, hashed = self._key, []
        for one in ids:
            chain = hashlib.blake2b(one.to_bytes(8, "little"), key=chain, digest_size=32).digest()
            hashed.append(int.from_bytes(chain[:4], "little") & 0x7FFFFFFF)
        return hashed

    def _digest(self, text: str) -> str:
        raw = text.encode("utf-8", "replace")
        return hashlib.blake2b(raw, key=self._key, digest_size=8).hexdigest()


def _beginning(body: Mapping[str, Any]) -> Any:
    """What tells conversations apart: all up to the first thing that the user says."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return body.get("prompt")
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    return messages[: roles.index("user") + 1 if "user" in roles else 1]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As templates take it."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content)
    plain = {**message, "content": content}
    calls = [dict(call) for call in message.get("tool_calls") or ()]
    for call in calls:
        function = dict(call.get("function") or {})
        if isinstance(text := function.get("arguments"), str):
            function["arguments"] = _parsed(text)
        call["function"] = function
    return plain | ({"tool_calls": calls} if calls else {})


def _parsed(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text


def _texts(message: Mapping[str, Any]) -> list[str]:
    """A message in the plain form: its header, what it says, its end."""
    functions = [call.get("function") for call in message.get("tool_calls") or ()]
    said = str(message.get("reasoning_content") or "") + str(message["content"])
    said += json.dumps(functions) if functions else ""
    return [f"{HEADER}{message.get('role')}\n", said, END]


def _cut(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE]


def _number(piece: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(piece, digest_size=4).digest(), "little") & 0x7FFFFFFF
