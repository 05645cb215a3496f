"""Boundaries of a prompt: the positions up to which later prompts are known to repeat it.

Chat endpoints, readers of chat traces and generators build them here, so that
simulations and servers send the same.

>>> chat_boundaries(1000, shared=(300,), kept=(1000,))
PromptBoundaries(positions=(300, 1000), answer_survives=True)

A template that drops the end of the prompt, as those of reasoning models do:

>>> chat_boundaries(1000, shared=(300,), kept=(997,))
PromptBoundaries(positions=(300, 997), answer_survives=False)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class PromptBoundaries(NamedTuple):
    """Boundaries of one prompt, as ``LeaseRequest`` takes them."""

    positions: tuple[int, ...]
    """Positions up to which later prompts are known to be equal, ascending."""
    answer_survives: bool
    """True if a later prompt may continue from the end of this one."""


def chat_boundaries(
    prompt_len: int, shared: Iterable[int] = (), kept: Iterable[int] = ()
) -> PromptBoundaries:
    """Return the boundaries of a prompt of ``prompt_len`` tokens.

    Args:
        prompt_len: length of the prompt.
        shared: ends of text that prompts of other conversations repeat: the system message, a
            document, or a place that the client declares.
        kept: for each possible next turn, the number of tokens of this prompt that it repeats.
            Empty if that is not known.
    """
    kept = tuple(kept)
    positions = sorted({end for end in (*shared, *kept) if 0 < end <= prompt_len})
    return PromptBoundaries(tuple(positions), not kept or max(kept) == prompt_len)


def end_of_prompt(prompt_len: int, boundaries: tuple[int, ...], max_header: int) -> int | None:
    """Return the boundary from which the next turn differs, or None if there is none.

    It is the last one, if at most ``max_header`` tokens follow: the header of the answer.

    >>> end_of_prompt(1000, (300, 997), 16), end_of_prompt(1000, (300,), 16)
    (997, None)
    """
    if not boundaries or not 0 <= prompt_len - boundaries[-1] <= max_header:
        return None
    return boundaries[-1]
