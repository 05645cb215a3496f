"""Outputs kept for those that follow some requests of an engine, whoever calls its ``step``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from engine.text.outputs import RequestOutput


class Mailboxes:
    """One mailbox for each request that is followed."""

    def __init__(self) -> None:
        self._boxes: dict[str, deque[RequestOutput]] = {}

    def open(self, request_id: str) -> deque[RequestOutput]:
        """What is delivered of the request from now on, until ``close``."""
        return self._boxes.setdefault(request_id, deque())

    def close(self, request_id: str) -> None:
        del self._boxes[request_id]

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        if self._boxes:
            for output in outputs:
                box = self._boxes.get(output.request_id)
                if box is not None:
                    box.append(output)

    def take_finals(self, unfinished: set[str]) -> list[RequestOutput]:
        """The last outputs of those in ``unfinished`` that have ended; takes them out of it and
        closes their mailboxes. What the others have is dropped."""
        ended = []
        for request_id in tuple(unfinished):
            box = self._boxes[request_id]
            if box and box[-1].is_finished:
                ended.append(box[-1])
                unfinished.remove(request_id)
                self.close(request_id)
            else:
                box.clear()
        return ended
