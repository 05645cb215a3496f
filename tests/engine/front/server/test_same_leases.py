"""Test that conversations through the HTTP server and through a simulation of their log request
the same of the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine import Engine, EngineConfig
from engine.config import BUILTIN_DIR
from engine.text.tokenizer_files import HFTokenizer
from hybridcache import open_trace
from hybridcache.geometry.units import GIB
from hybridcache.lab.runs.serving import serve
from hybridcache.lab.runs.target import LeasedRequest, LeaseTarget, build_target
from hybridcache.lab.scenario import Scenario
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.protocol import Placed, PromptBoundaries
from hybridcache.radix.tokens import Tokens
from tests.engine.front.server.conftest import ScriptedSampler, serving
from tests.oracle import OracleRunner

ENDED = ("length", "end_turn")
TOKEN_BUDGET = 256
"""Prompt tokens of a step."""
TILE = 64
"""Chunks end on its multiples, or with the prompt."""
DECODE_PIECE = 32
"""Rows taken ahead while decoding."""


class SteppedRequest(LeasedRequest):
    """Makes a replay in turn equal to the engine's, eviction for eviction."""

    __slots__ = ("_end",)

    def claim(self) -> bool:
        self._end = self.cached_len
        return self._next_piece()

    def _next_piece(self) -> bool:
        start, end = self._end, len(self._request.tokens)
        end = end if start + TOKEN_BUDGET >= end else (start + TOKEN_BUDGET) // TILE * TILE
        has_memory = self._extend(start, end)
        self._target.cache.take_step().done()
        self._end = end if has_memory else start
        return has_memory

    def prefilled(self) -> None:
        tokens = self._request.tokens
        self._lease.publish(tokens, self._end)
        while self._end < len(tokens) and self._next_piece():
            self._lease.publish(tokens, self._end)

    def finish(self, output: Tokens) -> None:
        if self._end == len(self._request.tokens):
            super().finish(output)
        else:
            self._lease.finish(self._request.tokens, self._end)

    def _decode(self, computed_len: int) -> int:
        """Decode step by step, without the steps that touch no memory."""
        lease, grid = self._lease, self._target.cache.grid
        at = len(self._request.tokens)
        max_len = at + len(self._request.output)
        while at < computed_len:
            rows = lease.extended_len
            following = min(
                rows + 1 if rows > at else at + 1, at // grid * grid + grid, computed_len
            )
            if following > rows:
                ahead = max(following, min(rows + DECODE_PIECE, max_len))
                if not (lease.extend(ahead) or lease.extend(following)):
                    return at
            lease.take_checkpoint_slots(following - 1, following)
            at = following
        self._target.cache.take_step().done()
        return at


def stepped_target(cell: Scenario) -> LeaseTarget:
    """Return the cache of ``cell``, whose requests run in steps."""
    target = build_target(cell, 1)
    assert isinstance(target, LeaseTarget)
    target.request_type = SteppedRequest
    return target


class Asked(NamedTuple):
    """One lease, as policies see it."""

    tokens: list[int]
    boundaries: PromptBoundaries
    namespace: int
    """Number of the namespace, in order of their first requests."""
    cached_len: int
    planned: list[Placed]
    """Checkpoints of the prompt."""
    ended: list[tuple[list[int], str]]
    """Tokens published at the end, those of the answer, and stop reason."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Asked]]:
    """All leases since the last ``clear``."""
    found: list[Asked] = []
    namespaces: dict[Any, int] = {}
    by_lease: dict[Lease, Asked] = {}
    begin, finish, count = Lease.begin.__func__, Lease.finish, Lease._count  # type: ignore[attr-defined]

    def begin_recorded(cls: Any, cache: Any, placement: Any, request: LeaseRequest, *more: Any):
        lease = begin(cls, cache, placement, request, *more)
        if not found:
            namespaces.clear()
        number = namespaces.setdefault(request.namespace, len(namespaces))
        one = Asked(request.tokens.tolist(), request.boundaries, number, lease.cached_len, [], [])
        found.append(one)
        by_lease[lease] = one
        return lease

    def count_recorded(lease: Lease) -> None:
        count(lease)
        by_lease[lease].planned[:] = sorted(lease._planned.values())

    def finish_recorded(lease: Lease, tokens: Any, computed_len: int, *rest: Any, **more: Any):
        reason = more.get("stop_reason", rest[1] if len(rest) > 1 else "")
        answer = tokens[lease.published_len : computed_len].tolist()
        by_lease[lease].ended.append((answer, reason))
        finish(lease, tokens, computed_len, *rest, **more)

    monkeypatch.setattr(Lease, "begin", classmethod(begin_recorded))
    monkeypatch.setattr(Lease, "_count", count_recorded)
    monkeypatch.setattr(Lease, "finish", finish_recorded)
    yield found


@pytest.mark.full("False")
@pytest.mark.parametrize("thinks", [False, True])
def test_server_and_simulation_of_its_log_have_the_same_leases(
    asked: list[Asked], thinks: bool, tmp_path: Path
) -> None:
    """Tokens, boundaries, namespaces, stop reasons, hits and labels are equal. So are
    the published answers, unless they have thoughts, which the log does not repeat."""
    sampler = ScriptedSampler()
    thought = b"</think>" if thinks else b""
    sampler.script = thought + b"An answer of forty bytes, more or less."
    engine = Engine(
        EngineConfig(token_budget=256),
        runner=OracleRunner(6000, 9, max_model_len=4096),
        sampler=sampler,
        tokenizer=HFTokenizer(),
    )
    variables = {"enable_thinking": thinks}
    lines = []
    with serving(engine) as live:
        chats: dict[int, list[dict[str, str]]] = {}
        for turn in range(3):
            for number in range(5):
                system = {"role": "system", "content": f"System {number % 2}. " + "Be brief. " * 15}
                chat = chats.setdefault(number, [system] if number < 4 else [])
                chat.append({"role": "user", "content": f"Question {turn} of {number}? " * 4})
                body = {
                    "messages": chat,
                    "max_tokens": 20 + 8 * number,
                    "temperature": 0,
                    "chat_template_kwargs": variables,
                    "cache_salt": "left" if number == 3 else "right",
                }
                answer = live.post("/v1/chat/completions", body).json()
                message = answer["choices"][0]["message"]
                lines.append(
                    json.dumps(
                        {
                            "timestamp": len(lines),
                            "session": str(number),
                            "request": body,
                            "response": answer,
                        }
                    )
                )
                chat.append({"role": "assistant", "content": message["content"] or ""})
    served = list(asked)
    asked.clear()
    template = tmp_path / "template.jinja"
    template.write_text(
        f"{{%- set enable_thinking = {str(thinks).lower()} %}}\n"
        + (BUILTIN_DIR / "chat_template.jinja").read_text(encoding="utf-8")
    )
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(lines))
    trace = open_trace(f"messages:{log}?tokenizer=bytes&template={template}")
    memory = engine.runner.memory
    geometry = engine.runner.geometry
    kv_bytes = memory.num_kv_tokens * geometry.kv_bytes_per_token
    total_bytes = kv_bytes + memory.num_slots * geometry.state_bytes
    pools = {"memory": "pools", "kv_share": kv_bytes / total_bytes}
    cell = Scenario("own", model=geometry, gib=total_bytes / GIB, **pools)
    target = stepped_target(cell)
    serve(target, list(trace), 1, cell)
    assert len(served) == len(asked) == 15
    for ours, theirs in zip(asked, served, strict=True):
        assert ours._replace(ended=[]) == theirs._replace(ended=[])
        [(published, reason)], [(expected, given)] = ours.ended, theirs.ended
        assert reason == given
        assert thinks or published == expected
    assert sum(one.cached_len for one in served) > 500
    assert all(len(one.boundaries.positions) == 2 for one in served)
    assert all(one.boundaries.answer_survives is not thinks for one in served)
    rules = {(placed.label, placed.distance) for one in served for placed in one.planned}
    assert rules >= {("boundary", 0), ("back", 1)}
    assert {reason for one in served for _, reason in one.ended} == {*ENDED}
