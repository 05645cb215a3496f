"""Reference runner of the attack: rows and slots contain hash chains of tokens.

Every read verifies them. Only the sizes of its memory come from ``tests.oracle``. The next
token is a function of the prefix's hash, so the correct answer can be computed from a prompt
without an engine.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from engine.text.outputs import SampledToken
from tests.oracle import OracleRunner

VOCAB = 320


class Link(NamedTuple):
    """Contents of a KV row."""

    namespace: Hashable
    before: int
    token: int
    prefix: int


class StateLink(NamedTuple):
    """Contents of a slot: the chain of ``namespace`` after ``position`` tokens."""

    namespace: Hashable
    position: int
    prefix: int


def chain(before: int, tokens: Iterable[int]) -> list[int]:
    """Return the hash of every prefix that ``tokens`` form after the prefix ``before``."""
    found = []
    for token in tokens:
        before = hash((before, int(token)))
        found.append(before)
    return found


def next_token(prefix: int) -> int:
    """Return the token that follows a prefix."""
    return prefix % 1009 % VOCAB


def answer(prompt: Sequence[int], length: int) -> list[int]:
    """Return the only correct answer, independent of chunks, batches and the cache."""
    [*_, prefix] = chain(0, prompt)
    tokens: list[int] = []
    for _ in range(length):
        tokens.append(next_token(prefix))
        [prefix] = chain(prefix, tokens[-1:])
    return tokens


class ChainRunner(OracleRunner):
    """Runner with two pools. Raises AssertionError if a read row or slot has unexpected
    contents."""

    def __init__(self, num_kv_tokens: int, num_slots: int, max_model_len: int) -> None:
        super().__init__(num_kv_tokens, num_slots, max_model_len=max_model_len, vocab_size=VOCAB)
        self._links: dict[int, Link] = {}
        self._states: dict[int, StateLink] = {}
        self._rows: dict[int, dict[int, int]] = {}
        """KV row by position, for each row of the request table."""

    def forward(self, batch: Any, drawn: Any = ()) -> Any:
        for row, start, indices in batch.row_writes:
            places = enumerate(indices.tolist(), start)
            self._rows.setdefault(row, {}).update(places)
        for source, target in batch.restores:
            self._states[target] = self._states[source]
        late = dict(batch.late_tokens)
        # Read everything before writing, because a step computes its segments at once.
        befores = [self._read(segment) for segment in batch.segments]
        logits: list[int] = []
        written: set[int] = set()
        for index, segment in enumerate(batch.segments):
            tokens = [drawn[late[index]]] if index in late else segment.token_ids.tolist()
            logits += self._write(segment, tokens, befores[index], written)
        return logits

    def _read(self, segment: Any) -> int:
        """Return the prefix before ``segment``, after checking its rows and its state."""
        rows, before = self._rows.get(segment.row, {}), 0
        for position in range(segment.start):
            link = self._links[rows[position]]
            assert link.namespace == segment.namespace, "a row of another tenant"
            assert link.before == before, f"at {position} a row of another prefix"
            before = link.prefix
        if segment.slot is not None and segment.start:
            state = self._states[segment.slot]
            expected = (segment.namespace, segment.start, before)
            assert state == expected, f"a state after {state.position} tokens or of another prefix"
        return before

    def _write(self, segment: Any, tokens: list[int], before: int, written: set[int]) -> list[int]:
        prefixes = chain(before, tokens)
        rows = self._rows[segment.row]
        for position, (token, prefix) in enumerate(
            zip(tokens, prefixes, strict=True), segment.start
        ):
            row = rows[position]
            assert row not in written, "two tokens of one step use the same row"
            written.add(row)
            self._links[row] = Link(segment.namespace, before, token, prefix)
            before = prefix
        for position, slot in segment.exports:
            prefix = prefixes[position - segment.start - 1]
            self._states[slot] = StateLink(segment.namespace, position, prefix)
        if segment.slot is not None:
            self._states[segment.slot] = StateLink(segment.namespace, segment.end, before)
        return {"none": [], "last": prefixes[-1:], "all": prefixes}[segment.logits]


class Drawn:
    """Tokens that are available at once."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def wait(self) -> list[SampledToken]:
        return [SampledToken(token, None) for token in self.tokens]


class ChainSampler:
    """Sampler that chooses the only correct token."""

    def launch(self, logits: Sequence[int], requests: Any, rows: Sequence[int]) -> Drawn:
        return Drawn([next_token(logits[row]) for row in rows])

    def score(self, logits: Any, token_ids: Any, num_top: int) -> Drawn:
        raise AssertionError("ChainSampler does not support scores.")
