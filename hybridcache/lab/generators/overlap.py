"""Families of workloads that differ only in how prompts overlap, to separate placement policies.

The five families are those of "Sparse Prefix Caching" (arXiv 2605.05219). They differ in the
position at which the next prompt diverges from a cached one. The paper uses one prefix or document
of some hundred tokens; these workloads have several, of thousands of tokens. Diffuse cuts are
normally distributed here, and uniform over the last five sixths in the paper.
"""

from __future__ import annotations

import numpy as np

from hybridcache.lab.generators.writer import Requests, Writer, generator

_ANSWER = 32


@generator
def exact_hot_prefix(
    seed: int = 0, requests: int = 500, prefixes: int = 4, length: int = 4096, suffix: int = 256
) -> Requests:
    """Generate prompts of one of a few hot prefixes, whole, plus a unique suffix. There is one good
    position per prefix."""
    writer = Writer(seed)
    hot = [writer.text(length) for _ in range(prefixes)]
    for number in range(requests):
        prompt = np.concatenate((hot[int(writer.rng.integers(prefixes))], writer.text(suffix)))
        yield writer.request(number, prompt, writer.text(_ANSWER), length)


@generator
def append_only_chat(
    seed: int = 0, sessions: int = 25, turns: int = 20, added: int = 400
) -> Requests:
    """Generate sessions in round-robin order. Each prompt is the last prompt, its answer and
    ``added`` new tokens, so the end of the prompt is the best position."""
    writer = Writer(seed)
    histories = [writer.text(0) for _ in range(sessions)]
    for _ in range(turns):
        for session in range(sessions):
            prompt = np.concatenate((histories[session], writer.text(added)))
            answer = writer.text(_ANSWER)
            histories[session] = np.concatenate((prompt, answer))
            yield writer.request(session, prompt, answer)


@generator
def diffuse_cut_points(
    seed: int = 0, requests: int = 500, documents: int = 4, length: int = 8192, suffix: int = 256
) -> Requests:
    """Generate prompts that leave a long document at a normally distributed point (mean 1/2 of its
    length, standard deviation 1/8). No single position is right."""
    return _cut_documents(seed, requests, documents, length, suffix, False)


@generator
def uniform_adversary(
    seed: int = 0, requests: int = 500, documents: int = 4, length: int = 8192, suffix: int = 256
) -> Requests:
    """Generate prompts that leave a long document at a uniformly distributed point. In this worst
    case, balanced checkpoints are optimal."""
    return _cut_documents(seed, requests, documents, length, suffix, True)


def _cut_documents(
    seed: int, requests: int, documents: int, length: int, suffix: int, uniform: bool
) -> Requests:
    writer = Writer(seed, boundaries=False)
    rng = writer.rng
    texts = [writer.text(length) for _ in range(documents)]
    for number in range(requests):
        drawn = rng.uniform(1, length) if uniform else rng.normal(length / 2, length / 8)
        cut = min(max(int(drawn), 1), length)
        prompt = np.concatenate((texts[int(rng.integers(documents))][:cut], writer.text(suffix)))
        yield writer.request(number, prompt, writer.text(_ANSWER))


@generator
def agent_tree(
    seed: int = 0,
    tasks: int = 10,
    depth: int = 6,
    width: int = 2,
    root: int = 3000,
    step: int = 400,
) -> Requests:
    """Generate trees of agent steps, one per task, explored breadth first. Every step is continued
    ``width`` times."""
    writer = Writer(seed)
    for task in range(tasks):
        level = [writer.text(root)]
        for _ in range(depth):
            following = []
            for history in level:
                for _ in range(width):
                    prompt = np.concatenate((history, writer.text(step)))
                    answer = writer.text(_ANSWER)
                    yield writer.request(task, prompt, answer, root)
                    following.append(np.concatenate((prompt, answer)))
            # Continue from a subset of the steps, so that the steps per level stay bounded.
            level = following[:: max(1, len(following) // 8)]


@generator
def tree_of_thoughts(
    seed: int = 0,
    problems: int = 12,
    depth: int = 3,
    beam: int = 5,
    proposals: int = 8,
    samples: int = 3,
) -> Requests:
    """Generate problems solved by a breadth-first search over thoughts: short prompts that branch.

    At each of ``depth`` steps, one prompt per kept path requests ``proposals`` next thoughts. Each
    thought is then judged ``samples`` times in a separate prompt, and ``beam`` paths are kept. Both
    prompts consist of instructions (U{200..280} tokens, the same for all problems), a problem of
    U{30..50} and thoughts of U{20..40}: about 330 tokens on average.

    Source: Tree of Thoughts (arXiv 2305.10601), section 4.1. The defaults are its breadth, depth
    and number of samples.
    """
    writer = Writer(seed)
    propose, judge = (writer.text(writer.between(200, 280)) for _ in range(2))
    for problem in range(problems):
        kept = [writer.text(writer.between(30, 50))]
        for _ in range(depth):
            found = []
            for path in kept:
                thoughts = [writer.text(writer.between(20, 40)) for _ in range(proposals)]
                prompt, answer = np.concatenate((propose, path)), np.concatenate(thoughts)
                yield writer.request(problem, prompt, answer, len(propose))
                found += [np.concatenate((path, thought)) for thought in thoughts]
            for path in found:
                prompt = np.concatenate((judge, path))
                for _ in range(samples):
                    yield writer.request(problem, prompt, writer.text(8), len(judge))
            chosen = writer.rng.choice(len(found), min(beam, len(found)), False)
            kept = [found[place] for place in chosen]
