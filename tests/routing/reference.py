"""Reference implementations of the routers' data structures: lists with linear search."""

from __future__ import annotations


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
