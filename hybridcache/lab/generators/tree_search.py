"""Agents that search a tree of actions depth first: each prompt is one path of the tree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from hybridcache.lab.generators.workloads import sent
from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.tokens import Tokens

_VOCAB = 150_000
_QUERY, _NOTE = 60, 80
"""Tokens of a task's query, and of the note that requests an action not tried yet."""


@dataclass(frozen=True, slots=True)
class _SearchShape:
    tasks: int
    toolsets: int
    root: int
    depth: int
    width: int
    steps: int
    dead_end: float
    step: int
    parallel: int
    boundaries: bool


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
) -> Trace:
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
    shape = _SearchShape(
        tasks, toolsets, root, depth, width, steps, dead_end, step, parallel, boundaries
    )
    return Trace("tree-search", 1, partial(_source, seed, shape))


def _source(seed: int, shape: _SearchShape) -> Iterator[TraceRequest]:
    rng = np.random.default_rng(seed)
    systems = [_text(rng, _around(rng, shape.root)) for _ in range(shape.toolsets)]
    waiting = iter(range(shape.tasks))
    running: list[Iterator[TraceRequest]] = []
    second = 0.0
    while True:
        while len(running) < shape.parallel and (task := next(waiting, None)) is not None:
            system = systems[int(rng.integers(shape.toolsets))]
            running.append(_task(seed, task, shape, system))
        if not running:
            return
        for search in list(running):
            request = next(search, None)
            if request is None:
                running.remove(search)
            else:
                yield request._replace(timestamp_s=second)
                second += 1.0


def _task(seed: int, task: int, shape: _SearchShape, system: Tokens) -> Iterator[TraceRequest]:
    rng = np.random.default_rng((seed, task))
    path = [np.concatenate((system, _text(rng, _QUERY)))]
    tried = [0]
    for _ in range(shape.steps):
        while tried and tried[-1] == shape.width:
            path.pop()
            tried.pop()
        if not tried:
            return
        note = _text(rng, _NOTE if tried[-1] else 0)
        action = _text(rng, _around(rng, shape.step // 4))
        prompt = np.concatenate((path[-1], note))
        known = sent(prompt, len(system)) if shape.boundaries else ()
        yield TraceRequest(0.0, task, None, prompt, action, known)
        tried[-1] += 1
        if len(path) < shape.depth and rng.random() >= shape.dead_end:
            returned = _text(rng, _around(rng, shape.step - shape.step // 4))
            path.append(np.concatenate((path[-1], action, returned)))
            tried.append(0)


def _text(rng: np.random.Generator, num_tokens: int) -> Tokens:
    return rng.integers(0, _VOCAB, num_tokens, dtype=np.int32)


def _around(rng: np.random.Generator, mean: int) -> int:
    """Draw an integer uniformly from 0.4 to 1.6 times the mean."""
    return max(1, int(mean * rng.uniform(0.4, 1.6)))
