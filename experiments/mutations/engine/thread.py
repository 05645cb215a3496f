"""Ways to break the engine's thread."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import THREAD

ASYNC = "engine/async_engine.py"

BREAKS_OF_THREAD = (
    Mutation(
        "an order wakes nobody",
        ASYNC,
        "        self._orders.append(order)\n        self._wake.notify()\n",
        "        self._orders.append(order)\n",
        THREAD,
    ),
    Mutation(
        "draining wakes nobody",
        ASYNC,
        "            self._is_open = False\n            self._wake.notify()\n",
        "            self._is_open = False\n",
        THREAD,
    ),
    Mutation(
        "stopping wakes nobody",
        ASYNC,
        "            self._is_open, self._must_stop = False, True\n            "
        "self._wake.notify()\n",
        "            self._is_open, self._must_stop = False, True\n",
        THREAD,
    ),
    Mutation(
        "who arrived is counted as arriving for ever",
        ASYNC,
        "                self._num_arriving -= 1\n",
        "                pass\n",
        THREAD,
    ),
    Mutation(
        "one more may wait than the queue holds",
        ASYNC,
        "self._num_arriving >= self.config.max_queue",
        "self._num_arriving > self.config.max_queue",
        THREAD,
    ),
    Mutation(
        "those on their way are not counted as waiting",
        ASYNC,
        "self._engine.num_waiting + self._num_arriving >=",
        "self._engine.num_waiting >=",
        THREAD,
    ),
    Mutation(
        "who is aborted is not told",
        ASYNC,
        "                self._hand_out([output])\n",
        "                pass\n",
        THREAD,
    ),
    Mutation(
        "a finished stream is kept",
        ASYNC,
        "            if output.is_finished:\n                self._streams.pop",
        "            if False:\n                self._streams.pop",
        THREAD,
    ),
    Mutation(
        "who ran in a step that failed goes on unread",
        ASYNC,
        "            self._engine.abort(request_id)\n            stream =",
        "            stream =",
        THREAD,
    ),
    Mutation(
        "the second failed step ever ends the engine",
        ASYNC,
        "            self._last_step_failed = False\n            self._hand_out",
        "            self._hand_out",
        THREAD,
    ),
    Mutation(
        "no number of failed steps ends the engine",
        ASYNC,
        "            self._last_step_failed = True\n",
        "",
        THREAD,
    ),
    Mutation(
        "who still waits at the end is not told",
        ASYNC,
        "            _post(stream.loop, [(stream, ended)])\n",
        "            pass\n",
        THREAD,
    ),
    Mutation(
        "a stopped engine keeps what its requests held",
        ASYNC,
        "            for request_id in tuple(self._streams):\n"
        "                self._engine.abort(request_id)\n",
        "",
        THREAD,
    ),
    Mutation(
        "a drained engine drops what runs",
        ASYNC,
        "            if engine.has_work():\n                return True\n",
        "            if engine.has_work():\n                return is_open\n",
        THREAD,
    ),
)
