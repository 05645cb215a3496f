"""Sealing of loaded parts of a model while the next parts are read."""

from __future__ import annotations

import threading

from engine.layers.parameters import Layer


class Sealing:
    """Seals one part at a time. On a CPU a separate thread converts weights while the next are
    read, so at most two parts are in memory in both forms."""

    def __init__(self, *, beside: bool) -> None:
        self._beside = beside
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def seal(self, part: Layer) -> None:
        """Seal ``part``, now or in the thread. Raises the error of the previous part."""
        if not self._beside:
            part.seal()
            return
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(part,), name="sealing")
        self._thread.start()

    def wait(self) -> None:
        """Wait until all parts are sealed. Raises the error of the last one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _run(self, part: Layer) -> None:
        try:
            part.seal()
        except BaseException as error:
            self._error = error
