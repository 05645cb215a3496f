"""Agents that search a tree of actions depth first: each prompt is one path of the tree."""

from __future__ import annotations

import numpy as np

from hybridcache.lab.generators.writer import Requests, Writer, generator
from hybridcache.tokens import Tokens

_QUERY, _NOTE = 60, 80
"""Tokens of a task's query, and of the note that requests an action not tried yet."""


@generator
def tree_search(
    seed: int = 0,
    tasks: int = 40,
    toolsets: int = 12,
    root: int = 2500,
    depth: int = 8,
    width: int = 2,
    steps: int = 24,
    dead_end: float = 0.3,
    step: int = 350,
    parallel: int = 1,
    boundaries: bool = True,
) -> Requests:
    """Generate a ToolBench-like workload of depth-first searches.

    A task's prompt begins with one of ``toolsets`` shared system prompts with tools, of around
    ``root`` tokens. Actions and their results, around ``step`` tokens together, follow along one
    path.

    An action is tried, and then others below it down to ``depth``. It is a dead end with
    probability ``dead_end``. In that case the search returns to the nearest ancestor with fewer
    than ``width`` actions and requests another one. The note at the end of that prompt is not
    repeated in later prompts.

    A task ends after ``steps`` requests or when the tree is exhausted; ``parallel`` tasks take
    turns. With ``boundaries``, each prompt states the end of its tools and
    its own.
    """
    writer = Writer(seed)
    systems = [writer.text(_around(writer, root)) for _ in range(toolsets)]

    def search(task: int, system: Tokens) -> Requests:
        """Yield the requests of one task."""
        writer = Writer((seed, task), boundaries)
        path = [np.concatenate((system, writer.text(_QUERY)))]
        tried = [0]
        for _ in range(steps):
            while tried and tried[-1] == width:
                path.pop()
                tried.pop()
            if not tried:
                return
            note = writer.text(_NOTE if tried[-1] else 0)
            action = writer.text(_around(writer, step // 4))
            yield writer.request(task, np.concatenate((path[-1], note)), action, len(system))
            tried[-1] += 1
            if len(path) < depth and writer.rng.random() >= dead_end:
                returned = writer.text(_around(writer, step - step // 4))
                path.append(np.concatenate((path[-1], action, returned)))
                tried.append(0)

    waiting = iter(range(tasks))
    running: list[Requests] = []
    second = 0.0
    while True:
        while len(running) < parallel and (task := next(waiting, None)) is not None:
            running.append(search(task, systems[int(writer.rng.integers(toolsets))]))
        if not running:
            return
        for one in list(running):
            request = next(one, None)
            if request is None:
                running.remove(one)
            else:
                yield request._replace(timestamp_s=second)
                second += 1.0


def _around(writer: Writer, mean: int) -> int:
    """Draw an integer uniformly from 0.4 to 1.6 times the mean."""
    return max(1, int(mean * writer.rng.uniform(0.4, 1.6)))
