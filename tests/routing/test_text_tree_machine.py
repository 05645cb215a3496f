"""State machine: the tree of sent prompts, compared with a list of them."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hybridcache.routing.text_tree import KEPT, TextTree

PROMPTS = st.lists(st.integers(0, 2), max_size=12).map(tuple)
REPLICAS = st.integers(0, 2)
SPACES = st.sampled_from((None, "other"))


class PlainTree:
    """List of all prompts that were sent to each replica, without eviction."""

    def __init__(self):
        self.sent = []

    def insert(self, tokens, replica, namespace=None):
        self.sent.append((tokens, replica, namespace))

    def forget(self, replica):
        self.sent = [entry for entry in self.sent if entry[1] != replica]

    def match(self, tokens, namespace=None):
        reached = {}
        for prompt, replica, space in self.sent:
            if space == namespace and (length := shared_len(prompt, tokens)):
                reached[replica] = max(reached.get(replica, 0), length)
        return max(reached.values(), default=0), reached


def shared_len(left, right):
    """Return the length of the common prefix."""
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length


class TextTreeMachine(RuleBasedStateMachine):
    @initialize(max_tokens=st.sampled_from((1, 9, 40, 10_000)))
    def make(self, max_tokens):
        self.tree, self.plain = TextTree(max_tokens), PlainTree()

    @rule(tokens=PROMPTS, replica=REPLICAS, namespace=SPACES)
    def insert(self, tokens, replica, namespace):
        self.tree.insert(tokens, replica, namespace)
        self.plain.insert(tokens, replica, namespace)

    @rule(replica=REPLICAS)
    def forget(self, replica):
        self.tree.forget(replica)
        self.plain.forget(replica)
        assert replica not in self.tree.num_tokens

    @rule(tokens=PROMPTS, namespace=SPACES)
    def match(self, tokens, namespace):
        length, reached = self.tree.match(tokens, namespace)
        plain_length, plain_reached = self.plain.match(tokens, namespace)
        assert length == max(reached.values(), default=0)
        if self.tree.max_tokens == 10_000:  # nothing was evicted
            assert (length, reached) == (plain_length, plain_reached)
        else:
            assert all(depth <= plain_reached[replica] for replica, depth in reached.items())

    @invariant()
    def tree_is_consistent(self):
        if hasattr(self, "tree"):
            self.tree.check()


TestTextTree = TextTreeMachine.TestCase


def test_the_least_recently_used_prompt_is_evicted_first() -> None:
    tree = TextTree(10)
    tree.insert((1, 2, 3, 4, 5), "a")
    tree.insert((6, 7, 8, 9), "a")
    tree.insert((1, 2, 3, 4, 5), "a")  # used again
    tree.insert((3, 3, 3), "a")
    assert tree.num_tokens["a"] <= KEPT * 10
    assert tree.match((6, 7, 8, 9)) == (0, {})
    assert tree.match((1, 2, 3, 4, 5))[1] == {"a": 5}
    tree.check()
