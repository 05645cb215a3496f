"""Marks in a text that comes in pieces."""

from __future__ import annotations

import re


class MarkSearch:
    """Finds the first of some marks. What may still become one is held back.

    >>> search = MarkSearch("</think>")
    >>> search.push("so </th"), search.push("en </think> x")
    (('so ', None, ''), ('</then ', '</think>', ' x'))
    """

    __slots__ = ("_heads", "_held", "_longest", "_pattern")

    def __init__(self, *marks: str) -> None:
        """``marks``: none begins with another."""
        self._pattern = re.compile("|".join(map(re.escape, marks)))
        self._heads = frozenset(mark[:end] for mark in marks for end in range(1, len(mark)))
        self._longest = max(map(len, marks))
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """(text before the mark or certainly none, the mark that was found, what follows it).
        O(len(text))."""
        text = self._held + text
        found = self._pattern.search(text)
        if found:
            self._held = ""
            return text[: found.start()], found.group(), text[found.end() :]
        longest = min(len(text), self._longest - 1)
        size = next((n for n in range(longest, 0, -1) if text[-n:] in self._heads), 0)
        cut = len(text) - size
        self._held = text[cut:]
        return text[:cut], None, ""

    def flush(self) -> str:
        """What was held back: there is no more text."""
        held, self._held = self._held, ""
        return held


class Space:
    """White space at an end, held until it is known whether anything follows it."""

    __slots__ = ("_pieces",)

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def push(self, text: str) -> str:
        """``text`` with what was held before it, without the white space that it ends with."""
        kept = text.rstrip()
        if not kept:
            if text:
                self._pieces.append(text)
            return ""
        before = self.take()
        if len(kept) < len(text):
            self._pieces.append(text[len(kept) :])
        return before + kept

    def take(self) -> str:
        """What was held, which is then forgotten. O(its length)."""
        held = "".join(self._pieces)
        self._pieces.clear()
        return held
