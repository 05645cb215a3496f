"""Plain twins of what routers hold: lists that are searched from end to end."""

from __future__ import annotations


class PlainTree:
    """Every prompt that was sent, with where to: nothing is forgotten but with its replica."""

    def __init__(self):
        self.sent = []

    def insert(self, tokens, replica, namespace=None):
        self.sent.append((tokens, replica, namespace))

    def forget(self, replica):
        self.sent = [each for each in self.sent if each[1] != replica]

    def match(self, tokens, namespace=None):
        reached = {}
        for known, replica, space in self.sent:
            if space == namespace and (length := shared(known, tokens)):
                reached[replica] = max(reached.get(replica, 0), length)
        return max(reached.values(), default=0), reached


class PlainWay:
    """Prompts on the way, each with the positions at which it will be resumable."""

    def __init__(self):
        self.prompts = {}

    def depth(self, tokens, namespace):
        return max(
            (
                position
                for known, space, positions in self.prompts.values()
                for position in positions
                if space == namespace and position <= shared(known, tokens) < len(tokens) + 1
                if position < len(tokens)
            ),
            default=0,
        )


def shared(left, right):
    """How long both begin alike."""
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length
