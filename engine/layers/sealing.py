"""Parts of a model are sealed beside the reading of the next."""

from __future__ import annotations

import threading

from engine.layers.parameters import Layer


class Sealing:
    """Seals one part at a time. On a CPU in a thread of its own, so that a weight is brought into
    the form it is multiplied in while the next is read: two parts at most are there in both."""

    def __init__(self, *, beside: bool) -> None:
        self._beside = beside
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def seal(self, part: Layer) -> None:
        """Seal ``part``, now or soon; raises what the part before raised."""
        if not self._beside:
            part.seal()
            return
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(part,), name="sealing")
        self._thread.start()

    def wait(self) -> None:
        """Until all parts are sealed; raises what the last one raised."""
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
