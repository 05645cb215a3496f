"""Outline of one request for comparison with later ones: digests of its parts, and its tokens.

In a namespace, tokens are stored as keyed hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcache.tokens import Tokens

Marks = npt.NDArray[np.int32] | npt.NDArray[np.uint64]
"""Values that represent a sequence of ids."""
Digest = bytes
ENTRY_BYTES = 512
"""Approximate size of an outline without its tokens and digests."""
SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class MessageOutline:
    """One message: its role, and a digest of each of its fields."""

    role: str
    fields: tuple[tuple[str, Digest], ...]
    said: Digest
    """Digest of its contents in a normal form."""


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
    answer: Digest | None = None
    """Digest of the answer, as ``MessageOutline.said``, or None if not known."""

    @property
    def is_hashed(self) -> bool:
        return self.tokens.dtype == np.uint64

    @property
    def num_bytes(self) -> int:
        """Approximate size."""
        fields = sum(len(message.fields) for message in self.messages)
        return ENTRY_BYTES + self.tokens.nbytes + 128 * (fields + len(self.tools))


class Outliner:
    """Makes the outlines of one server, with a secret key, so that texts or ids cannot be guessed
    from stored digests."""

    def __init__(self, key: bytes, control_ids: Sequence[int]) -> None:
        """``control_ids``: tokens that begin and end a turn."""
        self._key = key
        self._control_ids = np.asarray(control_ids, np.int32)
        seed = np.frombuffer(self._digest("ids"), np.uint64)
        self._secret, self._stride = seed[0], seed[1] | np.uint64(1)

    def outline(
        self,
        tokens: Tokens,
        *,
        model: str,
        namespace: Hashable = None,
        messages: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> Outline:
        """Return the outline of a prompt. O(its size)."""
        ends = np.flatnonzero(np.isin(tokens, self._control_ids))
        return Outline(
            model,
            namespace,
            tuple(self._digest(tool) for tool in tools),
            tuple((name, self._digest(value)) for name, value in sorted((variables or {}).items())),
            tuple(self._message(message) for message in messages),
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
        said = None if message is None else self._digest(said_by(message))
        return replace(outline, tokens=tokens, answer=said)

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
        said = self._digest(said_by(message))
        return MessageOutline(str(message.get("role")), tuple(fields), said)

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


def said_by(message: Mapping[str, Any]) -> list[Any]:
    """Return the contents of a message in a normal form, which is equal for an answer and its copy
    from a client, including reasoning."""
    return [
        str(message.get("content") or "").strip(),
        [_call(call) for call in message.get("tool_calls") or ()],
        str(message.get("reasoning_content") or "").strip(),
    ]


def _call(call: Any) -> list[Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return [repr(call)]
    return [function.get("name"), _plain(function.get("arguments"))]


def _plain(arguments: Any) -> str:
    """Return arguments in a normal form, independent of the JSON formatting."""
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments or {}
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return str(arguments)
