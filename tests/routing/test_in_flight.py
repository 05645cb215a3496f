"""State machine: checkpoints of prompts in flight, compared with a plain list."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hybridcache.routing.precise import InFlightPrompts
from hybridcache.routing.protocol import RouteRequest
from tests.routing.reference import PlainInFlight

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=10).map(tuple)
SPACES = st.sampled_from((None, "other"))


class InFlightMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.in_flight, self.plain, self.num_sent = InFlightPrompts(), PlainInFlight(), 0

    @rule(tokens=PROMPTS, namespace=SPACES, steps=st.sets(st.integers(1, 9), max_size=3))
    def send(self, tokens, namespace, steps):
        positions = [position for position in steps if position <= len(tokens)]
        self.num_sent += 1
        self.in_flight.sent(RouteRequest(self.num_sent, tokens, namespace), positions, len(tokens))
        self.plain.prompts[self.num_sent] = tokens, namespace, positions

    @rule(number=st.integers(1, 30))
    def end(self, number):
        self.in_flight.over(number)
        self.plain.prompts.pop(number, None)

    @rule(tokens=PROMPTS, namespace=SPACES)
    def depth(self, tokens, namespace):
        request = RouteRequest("new", tokens, namespace)
        assert self.in_flight.depth(request) == self.plain.depth(tokens, namespace)

    @invariant()
    def counts_agree(self):
        self.in_flight.check()
        assert len(self.in_flight) == len(self.plain.prompts)


TestInFlight = InFlightMachine.TestCase
