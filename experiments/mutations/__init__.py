"""The small ways in which ``experiments.mutate`` breaks a part of the house: a list for each
part."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One way to break something: ``old``, which stands once in ``path``, becomes ``new``."""

    what: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    """The tests that must notice; none: all that the list names."""


class Mutations(NamedTuple):
    """A list of breakages, and what is needed to try them."""

    breakages: tuple[Mutation, ...]
    tests: tuple[str, ...]
    """What must pass unbroken, and is run against each breakage that names no tests of its own."""
    machines: tuple[str, ...]
    """The state machines among them."""
    copied: tuple[str, ...]
    """Folders and files that the tests need."""
