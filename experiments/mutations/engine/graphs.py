"""Ways to break graphs of steps with drafts."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import GRAPHS

VERIFY = "engine/run/verify_graphs.py"

BREAKS_OF_GRAPHS = (
    Mutation(
        "padding is one sequence, longer than what a graph is launched for",
        VERIFY,
        "        added = _in_pieces(size - count, self._longest)\n",
        "        added = _in_pieces(size - count, size)\n",
        GRAPHS,
    ),
    Mutation(
        "a step is recorded and computed again",
        VERIFY,
        "            self._replays[size, bound] = self._recorded(size, bound)\n",
        "            self._replays[size, bound] = self._recorded(size, bound)\n"
        "            self._replays[size, bound]()\n",
        GRAPHS,
    ),
    Mutation(
        "steps beyond one chunk of attention are graphs",
        VERIFY,
        "        if all(is_one_chunk(count, bound, *each) for each in heads)\n",
        "",
        GRAPHS,
    ),
    Mutation(
        "a longer sequence takes a graph of shorter ones",
        VERIFY,
        "bound = bucket_for(max(segment.end for segment in segments), self._bounds)",
        "bound = self._bounds[0]",
        GRAPHS,
    ),
    Mutation(
        "a graph of a device is replayed for the step before",
        VERIFY,
        "            self._tables.copy_(upload(tables, torch.int32, device))\n",
        "",
        GRAPHS,
    ),
    Mutation(
        "a sequence is read from its own slot, wherever its state lies",
        VERIFY,
        "segment.row, segment.end, self._running.at(slot)",
        "segment.row, segment.end, slot",
        GRAPHS,
    ),
    Mutation(
        "models whose mixers read lengths on the host have graphs of drafts",
        VERIFY,
        "if not max_verified or not all(verifies(step.block) for step in model.mixers):",
        "if not max_verified:",
        GRAPHS,
    ),
)
