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

from hybridcache.tokens import require_bool, require_index


class PromptBoundaries(NamedTuple):
    """Boundaries of one prompt, from its template to ``LeaseRequest``."""

    positions: tuple[int, ...] = ()
    """Positions up to which later prompts are known to be equal, ascending. Those past the prompt
    have no effect."""
    answer_survives: bool = True
    """Whether later prompts contain the answer. Some chat templates drop the reasoning. Then decode
    saves no state: it would never be used, and would make the checkpoint at the boundary look
    superseded."""


def require_boundaries(boundaries: object) -> None:
    """Raise TypeError unless ``boundaries`` is a ``PromptBoundaries`` with integers and a bool, and
    ValueError unless its positions ascend from 0 on. O(positions)."""
    if not isinstance(boundaries, PromptBoundaries):
        raise TypeError(f"boundaries must be PromptBoundaries(...) (got {boundaries!r})")
    positions, answer_survives = boundaries
    if type(answer_survives) is not bool:
        require_bool(answer_survives, "answer_survives of boundaries")
    if not isinstance(positions, tuple | list):
        raise TypeError(f"positions of boundaries must be a tuple (got {positions!r})")
    before = 0
    for position in positions:
        if type(position) is not int:
            require_index(position, "each of boundaries")
        if position < before:
            raise ValueError(
                f"boundaries must be positions from 0 on, ascending (got {positions!r})"
            )
        before = position


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
