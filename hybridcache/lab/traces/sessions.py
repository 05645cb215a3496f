"""Sessions of prompts that are texts, and a count of what cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sortedcontainers import SortedDict

FEWEST = 10
"""Requests without any continued prompt from which on a warning is given."""
WHOLE_TEXT = "a prompt must be the whole text that was sent to the model, earlier turns included"


class Continued:
    """Sessions of prompts without one: a prompt continues the session whose last prompt it begins
    with, and is longer than."""

    def __init__(self) -> None:
        self._last: SortedDict[str, int] = SortedDict()
        self.count = 0
        """Number of sessions."""

    def session(self, said: str) -> tuple[int, bool]:
        """Return the number of the session, and True if it is continued. O(length + log n), times
        the number of sorted neighbours that are tried, which is small."""
        place = self._last.bisect_left(said)
        while place:
            before: str = self._last.keys()[place - 1]
            if said.startswith(before):
                self._last[said] = session = self._last.pop(before)
                return session, True
            low, high = 0, len(before)  # length of the common beginning, by halving
            while low < high:
                middle = (low + high + 1) // 2
                same = said.startswith(before[:middle])
                low, high = (middle, high) if same else (low, middle - 1)
            place = min(place - 1, self._last.bisect_right(said[:low]))
        self.count += 1
        self._last[said] = self.count
        return self.count, False


class Usage:
    """Sessions of a file, and counts of prompts that continue none and of fields without a use."""

    def __init__(self) -> None:
        self._continued = Continued()
        self._last: dict[str | int, tuple[int, int]] = {}
        """Length and hash of the last prompt of a named session."""
        self.unread: Counter[str] = Counter()
        self.num_answers = 0
        self.num_requests = self._num_later = self._num_continued = 0

    def session(self, name: str | int | None, namespace: str | None, said: str) -> str | int:
        """Return the session of the next prompt: ``name``, or by its text if that is None."""
        self.num_requests += 1
        if name is None:
            number, continues = self._continued.session(f"{namespace}\0{said}")
            self._num_continued += continues
            return number
        size, digest = self._last.get(name, (0, 0))
        if size:
            self._num_later += 1
            self._num_continued += hash(said[:size]) == digest
        self._last[name] = len(said), hash(said)
        return name

    def problems(self, spec: str) -> Iterator[str]:
        """Describe what was not used, with counts. ``spec`` is the file with the reader's name."""
        if self._num_later > 2 * self._num_continued and self._num_later:
            missed = self._num_later - self._num_continued
            yield (
                f"{missed:,} of {self._num_later:,} later prompts of a session do not begin with "
                f"the prompt before: {WHOLE_TEXT}"
            )
        elif self._continued.count >= FEWEST and not self._num_continued:
            yield (
                f"no prompt begins with an earlier one, so {self.num_requests:,} requests are "
                f"{self._continued.count:,} sessions: {WHOLE_TEXT}"
            )
        if self.unread and not self.num_answers and self.num_requests:
            counts = self.unread.most_common()
            names = ", ".join(f"{name} ({count:,})" for name, count in counts)
            yield (
                f"no answer was found, and these fields are not read: {names}; name one as in "
                f"{spec}?answer={counts[0][0]}"
            )
