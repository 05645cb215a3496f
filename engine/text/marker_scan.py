"""Search for marks in a text that arrives in pieces."""

from __future__ import annotations

import re


class MarkSearch:
    """Finds the first of some marks. Text that may be the beginning of a mark is held back.

    >>> search = MarkSearch("</think>")
    >>> search.push("so </th"), search.push("en </think> x")
    (('so ', None, ''), ('</then ', '</think>', ' x'))
    """

    __slots__ = ("_heads", "_held", "_longest", "_pattern")

    def __init__(self, *marks: str) -> None:
        """``marks``: no mark is the beginning of another."""
        self._pattern = re.compile("|".join(map(re.escape, marks)))
        self._heads = frozenset(mark[:end] for mark in marks for end in range(1, len(mark)))
        self._longest = max(map(len, marks))
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """Return (text before the mark or certainly without one, the mark if found, the text after
        it). O(len(text))."""
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
        """Return the text held back, after the end of the text."""
        held, self._held = self._held, ""
        return held


class Space:
    """White space at the end of a text, held back until other text follows."""

    __slots__ = ("_pieces",)

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def push(self, text: str) -> str:
        """Return the held space and ``text``, without the white space at its end."""
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
        """Return the held space and forget it. O(its length)."""
        held = "".join(self._pieces)
        self._pieces.clear()
        return held
