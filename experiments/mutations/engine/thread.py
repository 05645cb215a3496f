"""Ways to break the engine's thread."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import THREAD

LOOP = "engine/engine_loop.py"

BREAKS_OF_THREAD = (
    Mutation(
        "an order wakes nobody",
        LOOP,
        "        self._orders.append(order)\n        self._wake.notify()\n",
        "        self._orders.append(order)\n",
        THREAD,
    ),
    Mutation(
        "draining wakes nobody",
        LOOP,
        "at_once\n            self._wake.notify()\n",
        "at_once\n            if at_once:\n                self._wake.notify()\n",
        THREAD,
    ),
    Mutation(
        "stopping wakes nobody",
        LOOP,
        "at_once\n            self._wake.notify()\n",
        "at_once\n            if not at_once:\n                self._wake.notify()\n",
        THREAD,
    ),
    Mutation(
        "who arrived is counted as arriving for ever",
        LOOP,
        "                self._arriving.remove(request_id)\n",
        "                pass\n",
        THREAD,
    ),
    Mutation(
        "one more may wait than the queue holds",
        LOOP,
        "len(self._arriving) >= self._engine",
        "len(self._arriving) > self._engine",
        THREAD,
    ),
    Mutation(
        "those on their way are not counted as waiting",
        LOOP,
        "self._engine.num_waiting + len(self._arriving) >=",
        "self._engine.num_waiting >=",
        THREAD,
    ),
    Mutation(
        "who is aborted is not told",
        LOOP,
        "                self._hand_out([output])\n",
        "                pass\n",
        THREAD,
    ),
    Mutation(
        "a finished stream is kept",
        LOOP,
        "            if output.is_finished:\n                self._streams.pop",
        "            if False:\n                self._streams.pop",
        THREAD,
    ),
    Mutation(
        "who ran in a step that failed goes on unread",
        LOOP,
        "            self._engine.abort(request_id)\n            reader =",
        "            reader =",
        THREAD,
    ),
    Mutation(
        "the second failed step ever ends the engine",
        LOOP,
        "            self._last_step_failed = False\n            self._hand_out",
        "            self._hand_out",
        THREAD,
    ),
    Mutation(
        "no number of failed steps ends the engine",
        LOOP,
        "            self._last_step_failed = True\n",
        "",
        THREAD,
    ),
    Mutation(
        "who still waits at the end is not told",
        LOOP,
        "        self._deliver([(reader, ended) for reader in self._streams.values()])\n",
        "",
        THREAD,
    ),
    Mutation(
        "a stopped engine keeps what its requests held",
        LOOP,
        "            for request_id in tuple(self._streams):\n"
        "                self._engine.abort(request_id)\n",
        "",
        THREAD,
    ),
    Mutation(
        "a drained engine drops what runs",
        LOOP,
        "            if engine.has_work():\n                return True\n",
        "            if engine.has_work():\n                return is_open\n",
        THREAD,
    ),
)
