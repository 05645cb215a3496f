"""State machine: sessions recognised by the tokens of prompts, compared with a plain list."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hybridcache.scheduling.sessions import Session, Sessions, anchor_lens

MAX_KNOWN = 3


@dataclass(eq=False)
class Plain:
    """One session of the reference."""

    tenant: str | None
    name: str = ""
    anchors: list[tuple[int, ...]] = field(default_factory=list)
    num_open: int = 0
    num_prompts: int = 0


class SessionsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sessions = Sessions(MAX_KNOWN)
        self.known: list[Plain] = []
        """Remembered sessions; the open ones first, then in the order in which they became idle."""
        self.requests: list[tuple[Session, Plain]] = []
        self.prompts: list[tuple[int, ...]] = [(0,)]
        self.pairs: dict[Session, Plain] = {}
        self.num_arrived = 0

    @rule(
        base=st.integers(0, 9),
        cut=st.integers(0, 2),
        new=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        has_boundary=st.booleans(),
        tenant=st.sampled_from([None, "b"]),
    )
    def arrive(
        self, base: int, cut: int, new: list[int], has_boundary: bool, tenant: str | None
    ) -> None:
        before = self.prompts[-1 - base % len(self.prompts)]
        prompt = (*before[: len(before) - cut], *new)
        boundaries = (max(1, len(prompt) - 2),) if has_boundary else ()
        found = [
            (len(anchor), place)
            for place, plain in enumerate(self.known)
            for anchor in plain.anchors
            if plain.tenant == tenant and not plain.num_open and prompt[: len(anchor)] == anchor
        ]
        known_len, place = max(found, default=(0, -1))
        name, session = self.submit(prompt, tenant, boundaries)
        if place < 0:
            plain = Plain(tenant)
            assert session not in self.pairs and session.number == len(self.pairs) + 1
        else:
            best = [self.known[at] for length, at in found if length == known_len]
            plain = self.pairs[session]
            assert plain in best, "one of the sessions with the longest anchor"
            self.known.remove(plain)
        assert session.known_len == known_len and session.num_admitted == 0
        plain.anchors = [prompt[:n] for n in anchor_lens(len(prompt), boundaries)]
        plain.name, plain.num_prompts = name, plain.num_prompts + 1
        self.prompts.append(prompt)
        self.joined(session, plain)

    @rule(index=st.integers(0, 9))
    def arrive_as_choice(self, index: int) -> None:
        """Submit another choice of an open or answered request."""
        if not self.num_arrived:
            return
        name = str(max(0, self.num_arrived - 1 - index))
        plain = next((one for one in self.known if one.name == name), None)
        if plain is None:
            return
        _, session = self.submit((7, 7, 7), plain.tenant, (), name)
        assert self.pairs[session] is plain
        self.known.remove(plain)
        self.joined(session, plain)

    def submit(
        self,
        prompt: tuple[int, ...],
        tenant: str | None,
        boundaries: tuple[int, ...],
        choice_of: str | None = None,
    ) -> tuple[str, Session]:
        """Submit a request. Returns its name and its session."""
        name = str(self.num_arrived)
        self.num_arrived += 1
        tokens = np.array(prompt, np.int32)
        session = self.sessions.arrived(
            name, tokens, 0.0, tenant=tenant, boundaries=boundaries, choice_of=choice_of
        )
        return name, session

    def joined(self, session: Session, plain: Plain) -> None:
        plain.num_open += 1
        self.known.insert(0, plain)
        self.pairs[session] = plain
        self.requests.append((session, plain))

    @rule(index=st.integers(0, 9))
    def leave(self, index: int) -> None:
        if not self.requests:
            return
        session, plain = self.requests.pop(index % len(self.requests))
        self.sessions.left(session, 3, 1.0)
        plain.num_open -= 1
        if plain.num_open:
            return
        self.known.remove(plain)
        self.known.append(plain)
        idle = [one for one in self.known if not one.num_open]
        if len(idle) > MAX_KNOWN:
            self.known.remove(idle[0])

    @rule(index=st.integers(0, 9))
    def end(self, index: int) -> None:
        if not self.known:
            return
        plain = self.known[index % len(self.known)]
        session = next(one for one, its in self.pairs.items() if its is plain)
        ended = self.sessions.end(plain.name)
        assert ended is (None if plain.num_open else session)
        if ended is not None:
            self.known.remove(plain)

    @invariant()
    def agree(self) -> None:
        is_open = [one for one in self.known if one.num_open]
        assert {self.pairs[one] for one in self.sessions.open} == {*is_open}
        idle = [one for one in self.known if not one.num_open]
        assert [self.pairs[one] for one in self.sessions.idle] == idle
        for session, plain in self.pairs.items():
            if plain in self.known:
                assert session.num_open == plain.num_open
                assert session.num_requests == plain.num_prompts
        assert len(self.sessions._by_newest) <= len(self.known)


SessionsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSessions = SessionsMachine.TestCase


def test_first_prompt_of_one_token_is_recognised_in_a_longer_one() -> None:
    """Powers of the hash are extended by the second prompt; the first hash must stay valid."""
    sessions = Sessions(MAX_KNOWN)
    first = sessions.arrived("a", np.array([5], np.int32), 0.0)
    sessions.left(first, 2, 1.0)
    assert first.num_tokens == 2, "the prompt and its answer"
    assert sessions.arrived("b", np.array([5, 6], np.int32), 2.0) is first
