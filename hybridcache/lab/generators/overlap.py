"""Families of workloads that differ only in how prompts overlap, to separate placement policies.

The five families are those of "Sparse Prefix Caching" (arXiv 2605.05219). They differ in the
position at which the next prompt diverges from a cached one. The paper uses one prefix or document
of some hundred tokens; these workloads have several, of thousands of tokens. Diffuse cuts are
normally distributed here, and uniform over the last five sixths in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from hybridcache.lab.generators.workloads import sent
from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.tokens import Tokens

_VOCAB = 150_000
_ANSWER = 32


def _text(rng: np.random.Generator, num_tokens: int) -> Tokens:
    return rng.integers(0, _VOCAB, num_tokens, dtype=np.int32)


def exact_hot_prefix(
    seed: int = 0, requests: int = 500, prefixes: int = 4, length: int = 4096, suffix: int = 256
) -> Trace:
    """Generate prompts of one of a few hot prefixes, whole, plus a unique suffix. There is one good
    position per prefix."""
    source = partial(_exact_hot_prefix, seed, requests, prefixes, length, suffix)
    return Trace("exact-hot-prefix", 1, source)


def _exact_hot_prefix(
    seed: int, requests: int, prefixes: int, length: int, suffix: int
) -> Iterator[TraceRequest]:
    rng = np.random.default_rng(seed)
    hot = [_text(rng, length) for _ in range(prefixes)]
    for number in range(requests):
        prompt = np.concatenate((hot[int(rng.integers(prefixes))], _text(rng, suffix)))
        yield TraceRequest(
            float(number), number, None, prompt, _text(rng, _ANSWER), sent(prompt, length)
        )


def append_only_chat(seed: int = 0, sessions: int = 25, turns: int = 20, added: int = 400) -> Trace:
    """Generate sessions in round-robin order. Each prompt is the last prompt, its answer and
    ``added`` new tokens, so the end of the prompt is the best position."""
    return Trace("append-only-chat", 1, partial(_append_only_chat, seed, sessions, turns, added))


def _append_only_chat(seed: int, sessions: int, turns: int, added: int) -> Iterator[TraceRequest]:
    rng = np.random.default_rng(seed)
    histories = [_text(rng, 0) for _ in range(sessions)]
    for number in range(sessions * turns):
        session = number % sessions
        prompt = np.concatenate((histories[session], _text(rng, added)))
        answer = _text(rng, _ANSWER)
        histories[session] = np.concatenate((prompt, answer))
        yield TraceRequest(float(number), session, None, prompt, answer, sent(prompt))


def diffuse_cut_points(
    seed: int = 0, requests: int = 500, documents: int = 4, length: int = 8192, suffix: int = 256
) -> Trace:
    """Generate prompts that leave a long document at a normally distributed point (mean 1/2 of its
    length, standard deviation 1/8). No single position is right."""
    source = partial(_cut_documents, seed, requests, documents, length, suffix, False)
    return Trace("diffuse-cut-points", 1, source)


def uniform_adversary(
    seed: int = 0, requests: int = 500, documents: int = 4, length: int = 8192, suffix: int = 256
) -> Trace:
    """Generate prompts that leave a long document at a uniformly distributed point. In this worst
    case, balanced checkpoints are optimal."""
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
    """Generate trees of agent steps, one per task, explored breadth first. Every step is continued
    ``width`` times."""
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
                    yield TraceRequest(
                        float(number), task, None, prompt, answer, sent(prompt, root)
                    )
                    number += 1
                    following.append(np.concatenate((prompt, answer)))
            # Continue from a subset of the steps, so that the steps per level stay bounded.
            level = following[:: max(1, len(following) // 8)]


def tree_of_thoughts(
    seed: int = 0,
    problems: int = 12,
    depth: int = 3,
    beam: int = 5,
    proposals: int = 8,
    samples: int = 3,
) -> Trace:
    """Generate problems solved by a breadth-first search over thoughts: short prompts that branch.

    At each of ``depth`` steps, one prompt per kept path requests ``proposals`` next thoughts. Each
    thought is then judged ``samples`` times in a separate prompt, and ``beam`` paths are kept. Both
    prompts consist of instructions (U{200..280} tokens, the same for all problems), a problem of
    U{30..50} and thoughts of U{20..40}: about 330 tokens on average.

    Source: Tree of Thoughts (arXiv 2305.10601), section 4.1. The defaults are its breadth, depth
    and number of samples.
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
                ends = sent(prompt, len(propose))
                yield TraceRequest(float(number), problem, None, prompt, answer, ends)
                number += 1
                found += [np.concatenate((path, thought)) for thought in thoughts]
            for path in found:
                prompt = np.concatenate((judge, path))
                for _ in range(samples):
                    ends = sent(prompt, len(judge))
                    verdict = _text(rng, 8)
                    yield TraceRequest(float(number), problem, None, prompt, verdict, ends)
                    number += 1
            kept = [found[place] for place in rng.choice(len(found), min(beam, len(found)), False)]
