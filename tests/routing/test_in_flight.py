"""What a replica is about to hold, beside a plain list of it."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hybridcache.routing.in_flight import InFlightPrompts
from hybridcache.routing.protocol import RouteRequest
from tests.routing.reference import PlainWay

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=10).map(tuple)
SPACES = st.sampled_from((None, "other"))


class OnTheWayMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.way, self.plain, self.num_sent = InFlightPrompts(), PlainWay(), 0

    @rule(tokens=PROMPTS, namespace=SPACES, steps=st.sets(st.integers(1, 9), max_size=3))
    def sent(self, tokens, namespace, steps):
        positions = [position for position in steps if position <= len(tokens)]
        self.num_sent += 1
        self.way.sent(RouteRequest(self.num_sent, tokens, namespace), positions, len(tokens))
        self.plain.prompts[self.num_sent] = tokens, namespace, positions

    @rule(number=st.integers(1, 30))
    def over(self, number):
        self.way.over(number)
        self.plain.prompts.pop(number, None)

    @rule(tokens=PROMPTS, namespace=SPACES)
    def depth(self, tokens, namespace):
        asked = RouteRequest("asked", tokens, namespace)
        assert self.way.depth(asked) == self.plain.depth(tokens, namespace)

    @invariant()
    def adds_up(self):
        self.way.check()
        assert len(self.way) == len(self.plain.prompts)


TestOnTheWay = OnTheWayMachine.TestCase
