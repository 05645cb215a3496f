"""Families of workloads that differ only in how prompts overlap: the cases that separate
placements.

The five families are those of "Sparse Prefix Caching" (arXiv 2605.05219): where will the next
prompt leave one that is cached? Theirs have one prefix or document of some hundred tokens; these
have several, of thousands, and diffuse cuts are normal where theirs are uniform over the last five
sixths.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.tokens import Tokens

_VOCAB = 150_000
_ANSWER = 32


def _text(rng: np.random.Generator, num_tokens: int) -> Tokens:
    return rng.integers(0, _VOCAB, num_tokens, dtype=np.int32)


def exact_hot_prefix(
    seed: int = 0, requests: int = 500, prefixes: int = 4, length: int = 4096, suffix: int = 256
) -> Trace:
    """Every prompt is one of a few hot prefixes, whole, and a suffix of its own: one good position
    a prefix."""
    source = partial(_exact_hot_prefix, seed, requests, prefixes, length, suffix)
    return Trace("exact-hot-prefix", 1, source)


def _exact_hot_prefix(
    seed: int, requests: int, prefixes: int, length: int, suffix: int
) -> Iterator[TraceRequest]:
    rng = np.random.default_rng(seed)
    hot = [_text(rng, length) for _ in range(prefixes)]
    for number in range(requests):
        prompt = np.concatenate((hot[int(rng.integers(prefixes))], _text(rng, suffix)))
        yield TraceRequest(float(number), number, None, prompt, _text(rng, _ANSWER), (length,))


def append_only_chat(seed: int = 0, sessions: int = 25, turns: int = 20, added: int = 400) -> Trace:
    """Sessions in round-robin, each prompt the last prompt, its answer and ``added`` new tokens:
    the end is the position."""
    return Trace("append-only-chat", 1, partial(_append_only_chat, seed, sessions, turns, added))


def _append_only_chat(seed: int, sessions: int, turns: int, added: int) -> Iterator[TraceRequest]:
    rng = np.random.default_rng(seed)
    histories = [_text(rng, 0) for _ in range(sessions)]
    for number in range(sessions * turns):
        session = number % sessions
        prompt = np.concatenate((histories[session], _text(rng, added)))
        answer = _text(rng, _ANSWER)
        histories[session] = np.concatenate((prompt, answer))
        yield TraceRequest(float(number), session, None, prompt, answer)


def diffuse_cut_points(
    seed: int = 0, requests: int = 500, documents: int = 4, length: int = 8192, suffix: int = 256
) -> Trace:
    """Prompts leave a long document at a normally distributed point (mean half of it, deviation an
    eighth): no position is right."""
    source = partial(_cut_documents, seed, requests, documents, length, suffix, False)
    return Trace("diffuse-cut-points", 1, source)


def uniform_adversary(
    seed: int = 0, requests: int = 500, documents: int = 4, length: int = 8192, suffix: int = 256
) -> Trace:
    """Prompts leave a long document anywhere with equal probability: the worst case, balanced
    checkpoints are optimal."""
    source = partial(_cut_documents, seed, requests, documents, length, suffix, True)
    return Trace("uniform-adversary", 1, source)


def _cut_documents(
    seed: int, requests: int, documents: int, length: int, suffix: int, uniform: bool
) -> Iterator[TraceRequest]:
    rng = np.random.default_rng(seed)
    texts = [_text(rng, length) for _ in range(documents)]
    for number in range(requests):
        drawn = rng.uniform(1, length) if uniform else rng.normal(length / 2, length / 8)
        cut = min(max(int(drawn), 1), length)
        prompt = np.concatenate((texts[int(rng.integers(documents))][:cut], _text(rng, suffix)))
        yield TraceRequest(float(number), number, None, prompt, _text(rng, _ANSWER))


def agent_tree(
    seed: int = 0,
    tasks: int = 10,
    depth: int = 6,
    width: int = 2,
    root: int = 3000,
    step: int = 400,
) -> Trace:
    """Each task is a tree of agent steps, explored breadth first: every step is continued ``width``
    times."""
    return Trace("agent-tree", 1, partial(_agent_tree, seed, tasks, depth, width, root, step))


def _agent_tree(
    seed: int, tasks: int, depth: int, width: int, root: int, step: int
) -> Iterator[TraceRequest]:
    rng = np.random.default_rng(seed)
    number = 0
    for task in range(tasks):
        level = [_text(rng, root)]
        for _ in range(depth):
            following = []
            for history in level:
                for _ in range(width):
                    prompt = np.concatenate((history, _text(rng, step)))
                    answer = _text(rng, _ANSWER)
                    yield TraceRequest(float(number), task, None, prompt, answer, (root,))
                    number += 1
                    following.append(np.concatenate((prompt, answer)))
            # Go on from every other step: the tree widens, the number of steps a level stays
            # bounded.
            level = following[:: max(1, len(following) // 8)]


def tree_of_thoughts(
    seed: int = 0,
    problems: int = 12,
    depth: int = 3,
    beam: int = 5,
    proposals: int = 8,
    samples: int = 3,
) -> Trace:
    """Problems solved by a search over thoughts, breadth first: short prompts that branch.

    At each of ``depth`` steps every kept path is asked for ``proposals`` next thoughts in one
    prompt; each thought is then judged ``samples`` times in a prompt of its own, and ``beam`` paths
    are kept. Both prompts are instructions (U{200..280} tokens, the same for all problems), a
    problem of U{30..50} and thoughts of U{20..40}: about 330 on average.

    Source: Tree of Thoughts (arXiv 2305.10601), section 4.1, whose breadth, depth and number of
    samples the defaults are.
    """
    draw = partial(_tree_of_thoughts, seed, problems, depth, beam, proposals, samples)
    return Trace("tree-of-thoughts", 1, draw)


def _tree_of_thoughts(
    seed: int, problems: int, depth: int, beam: int, proposals: int, samples: int
) -> Iterator[TraceRequest]:
    rng = np.random.default_rng(seed)
    propose, judge = (_text(rng, int(rng.integers(200, 281))) for _ in range(2))
    number = 0
    for problem in range(problems):
        kept = [_text(rng, int(rng.integers(30, 51)))]
        for _ in range(depth):
            found = []
            for path in kept:
                thoughts = [_text(rng, int(rng.integers(20, 41))) for _ in range(proposals)]
                prompt, answer = np.concatenate((propose, path)), np.concatenate(thoughts)
                ends = (len(propose), len(prompt))
                yield TraceRequest(float(number), problem, None, prompt, answer, ends)
                number += 1
                found += [np.concatenate((path, thought)) for thought in thoughts]
            for path in found:
                prompt = np.concatenate((judge, path))
                for _ in range(samples):
                    ends = (len(judge), len(prompt))
                    verdict = _text(rng, 8)
                    yield TraceRequest(float(number), problem, None, prompt, verdict, ends)
                    number += 1
            kept = [found[place] for place in rng.choice(len(found), min(beam, len(found)), False)]
