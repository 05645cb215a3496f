"""Seeded workloads by name: published benchmarks, and families that differ in prompt overlap. One
id is one token, and requests arrive one second apart if a workload says nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from heapq import heappop, heappush
from itertools import islice
from typing import Any, ParamSpec

import numpy as np

from hybridcache.lab.traces.arrivals import Starts, interleave
from hybridcache.lab.traces.trace import FreshIds, Trace, TraceRequest
from hybridcache.radix.protocol import chat_boundaries
from hybridcache.radix.tokens import Tokens

_VOCAB = 150_000
IMAGES = 1 << 29
"""Least id of the placeholders of an image."""
_ANSWER = 32
"""Tokens of answers in workloads that differ in prompts only."""
Requests = Iterator[TraceRequest]
Options = ParamSpec("Options")
GENERATORS: dict[str, Callable[..., Trace]] = {}


def generator(draw: Callable[Options, Requests]) -> Callable[Options, Trace]:
    """Return the function that makes the trace of ``draw``, under its name, and add it to
    ``GENERATORS``. It refuses wrong arguments at once."""
    signature, name = inspect.signature(draw), draw.__name__.replace("_", "-")

    @wraps(draw)
    def make(*args: Options.args, **options: Options.kwargs) -> Trace:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()  # All ways to write the same options are one trace (identity_of).
        source = partial(_drawn, make, *bound.args, **bound.kwargs)
        return Trace(name, 1, source)

    make.__signature__ = signature.replace(return_annotation="Trace")  # type: ignore[attr-defined]
    GENERATORS[name] = make
    return make


def _drawn(make: Any, *args: Any, **options: Any) -> Requests:
    """Yield the requests of a trace. ``make`` can be pickled; the function in it cannot."""
    requests: Requests = make.__wrapped__(*args, **options)
    return requests


class Draw:
    """Draws texts and lengths, and numbers requests, which arrive one second apart."""

    def __init__(self, seed: int | tuple[int, ...], boundaries: bool = True) -> None:
        self.rng = np.random.default_rng(seed)
        self._boundaries = boundaries
        self._num_requests = 0

    def text(self, num_tokens: int) -> Tokens:
        return self.rng.integers(0, _VOCAB, num_tokens, dtype=np.int32)

    def spread(self, mean: int, low: float = 0.3) -> int:
        """Draw an integer uniformly from ``low`` to ``2 - low`` times the mean; at least 1."""
        return max(1, int(mean * self.rng.uniform(low, 2 - low)))

    def between(self, low: int, high: int) -> int:
        """Draw an integer uniformly from ``low`` to ``high``, both included."""
        return int(self.rng.integers(low, high + 1))

    def request(self, session: int, prompt: Tokens, answer: Tokens, *shared: int) -> TraceRequest:
        """Return the next request. ``shared`` are ends of parts that other sessions share."""
        known: tuple[int, ...] = ()
        if self._boundaries:  # those that a chat server sends if the next turn continues the prompt
            known = chat_boundaries(len(prompt), shared, (len(prompt),)).positions
        second = float(self._num_requests)
        self._num_requests += 1
        return TraceRequest(second, session, None, prompt, answer, known)


# --- Workloads of published measurements ----------------------------------------------------------
#
# In the descriptions, "about n" means U(.3, 1.7) around the mean. With ``boundaries`` a prompt has
# the boundaries that a chat server sends: the end of the part that others share, and of the prompt.


@generator
def chat(seed: int = 0, boundaries: bool = True) -> Requests:
    """Generate 40 conversations of 8 turns over 4 system prompts of 1,500 tokens. A turn adds about
    300 tokens, its answer about 250. Each round has a new order. Ideal token hit rate .918."""
    draw = Draw(seed, boundaries)
    systems = [draw.text(1500) for _ in range(4)] * 10
    return _rounds(draw, systems, 8, partial(draw.spread, 300), partial(draw.spread, 250))


def _rounds(
    draw: Draw,
    histories: list[Tokens],
    turns: int,
    added: Callable[[], int],
    answered: Callable[[], int],
    is_mixed: bool = True,
    images: Sequence[Tokens] = (),
) -> Requests:
    """Continue each conversation ``turns`` times: with ``is_mixed`` in a new random order in each
    round. ``added`` and ``answered`` draw the lengths of questions and answers. Before 7 of 10
    questions is one of ``images``, if there are any."""
    beginnings = [(len(history),) if len(history) else () for history in histories]
    for _ in range(turns):
        order = range(len(histories))
        for number in draw.rng.permutation(order).tolist() if is_mixed else order:
            shown = images and draw.rng.random() < 0.7
            image = images[draw.between(0, len(images) - 1)] if shown else draw.text(0)
            prompt = np.concatenate((histories[number], image, draw.text(added())))
            answer = draw.text(answered())
            histories[number] = np.concatenate((prompt, answer))
            yield draw.request(number, prompt, answer, *beginnings[number])


@generator
def image_chat(seed: int = 0, images: int = 12, boundaries: bool = True) -> Requests:
    """Generate 40 conversations of 4 turns over 4 system prompts of 500 tokens. 7 of 10 turns show
    one of ``images``, which other conversations show too, then about 100 tokens; answers of 60.

    An image has 256 or 1,024 placeholders: one id of at least 2**29, made of its hash.
    """
    draw = Draw(seed, boundaries)
    hashes = draw.rng.integers(IMAGES, FreshIds.FLOOR, images, dtype=np.int32)
    shown = [np.full(256 << 2 * (number % 2), one) for number, one in enumerate(hashes)]
    systems = [draw.text(500) for _ in range(4)] * 10
    return _rounds(draw, systems, 4, partial(draw.spread, 100), lambda: 60, images=shown)


@generator
def few_shot(seed: int = 0, boundaries: bool = True) -> Requests:
    """Generate 320 requests: one of 8 prefixes of 1,500 tokens at random, then 700 unique tokens;
    answers of 32. Ideal token hit rate .665."""
    return _prefixed(Draw(seed, boundaries), 320, 8, 1500, 700)


def _prefixed(draw: Draw, requests: int, prefixes: int, length: int, suffix: int) -> Requests:
    hot = [draw.text(length) for _ in range(prefixes)]
    for number in range(requests):
        prompt = np.concatenate((hot[int(draw.rng.integers(prefixes))], draw.text(suffix)))
        yield draw.request(number, prompt, draw.text(_ANSWER), length)


@generator
def agent(seed: int = 0, boundaries: bool = True) -> Requests:
    """Generate 10 agents with unique beginnings of 4,000 tokens, in round-robin order. Each of 32
    turns adds U{50..600} tokens; answers have U{40..200}. Ideal token hit rate .960."""
    draw = Draw(seed, boundaries)
    added, answered = partial(draw.between, 50, 600), partial(draw.between, 40, 200)
    return _rounds(draw, [draw.text(4000) for _ in range(10)], 32, added, answered, False)


@generator
def branch(seed: int = 0, boundaries: bool = True) -> Requests:
    """Generate 10 documents of 6,000 tokens, 4 questions of 120 on each, and 4 samples of 40 on
    each question. Depth first, answers of 60. Ideal token hit rate .928."""
    draw = Draw(seed, boundaries)
    for number in range(10):
        document = draw.text(6000)
        for _ in range(4):
            stem = np.concatenate((document, draw.text(120)))
            for _ in range(4):
                prompt = np.concatenate((stem, draw.text(40)))
                yield draw.request(number, prompt, draw.text(60), 6000)


@generator
def resend(seed: int = 0, boundaries: bool = True) -> Requests:
    """Generate 40 prompts of U{400..6,000} tokens, the whole list three times, answers of 16. Ideal
    token hit rate .666."""
    draw = Draw(seed, boundaries)
    prompts = [draw.text(draw.between(400, 6000)) for _ in range(40)]
    for _ in range(3):
        for number, prompt in enumerate(prompts):
            yield draw.request(number, prompt, draw.text(16))


@generator
def short(seed: int = 0, boundaries: bool = True) -> Requests:
    """Generate 40 conversations of 3 turns over 4 system prompts of 320 tokens. Turns and answers
    have 60 tokens; each round has a new order. Ideal token hit rate .859."""
    draw = Draw(seed, boundaries)
    systems = [draw.text(320) for _ in range(4)] * 10
    return _rounds(draw, systems, 3, lambda: 60, lambda: 60)


@generator
def conversations(
    live: int = 64,
    num_conversations: int = 2000,
    turns: int = 5,
    seed: int = 0,
    boundaries: bool = True,
) -> Requests:
    """Generate the tree-cost workload: 16 system prompts of 500 tokens. A turn adds n =
    U{200..1,000} tokens, floor(2n/3) of them the user's.

    ``live`` conversations are open. The next request comes from a random one, and a finished one is
    replaced.
    """
    draw = Draw(seed, boundaries)
    systems = [draw.text(500) for _ in range(16)]
    opened = min(live, num_conversations)

    def begin(number: int) -> tuple[int, int, Tokens]:
        """Open a conversation: (number, turns left, history)."""
        return number, turns, systems[int(draw.rng.integers(16))]

    table = [begin(number) for number in range(opened)]
    while table:
        place = int(draw.rng.integers(len(table)))
        number, left, history = table[place]
        added = draw.between(200, 1000)
        prompt = np.concatenate((history, draw.text(added * 2 // 3)))
        answer = draw.text(added - added * 2 // 3)
        yield draw.request(number, prompt, answer, 500)
        if left > 1:
            table[place] = (number, left - 1, np.concatenate((prompt, answer)))
        elif opened < num_conversations:
            table[place] = begin(opened)
            opened += 1
        else:
            table[place] = table[-1]
            table.pop()


# --- Families that differ only in how prompts overlap ---------------------------------------------
#
# The first five are those of "Sparse Prefix Caching" (arXiv 2605.05219), with several prefixes of
# thousands of tokens: they differ in the position at which the next prompt diverges.


@generator
def exact_hot_prefix(
    seed: int = 0, requests: int = 500, prefixes: int = 4, length: int = 4096, suffix: int = 256
) -> Requests:
    """Generate prompts of one of a few hot prefixes, whole, plus a unique suffix. There is one good
    position per prefix."""
    return _prefixed(Draw(seed), requests, prefixes, length, suffix)


@generator
def append_only_chat(
    seed: int = 0, sessions: int = 25, turns: int = 20, added: int = 400
) -> Requests:
    """Generate sessions in round-robin order. Each prompt is the last prompt, its answer and
    ``added`` new tokens, so the end of the prompt is the best position."""
    draw = Draw(seed)
    empty = [draw.text(0)] * sessions
    return _rounds(draw, empty, turns, lambda: added, lambda: _ANSWER, is_mixed=False)


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
    draw = Draw(seed, boundaries=False)
    rng = draw.rng
    texts = [draw.text(length) for _ in range(documents)]
    for number in range(requests):
        drawn = rng.uniform(1, length) if uniform else rng.normal(length / 2, length / 8)
        cut = min(max(int(drawn), 1), length)
        prompt = np.concatenate((texts[int(rng.integers(documents))][:cut], draw.text(suffix)))
        yield draw.request(number, prompt, draw.text(_ANSWER))


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
    draw = Draw(seed)
    for task in range(tasks):
        level = [draw.text(root)]
        for _ in range(depth):
            following = []
            for history in level:
                for _ in range(width):
                    prompt = np.concatenate((history, draw.text(step)))
                    answer = draw.text(_ANSWER)
                    yield draw.request(task, prompt, answer, root)
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

    At each of ``depth`` steps, a prompt per kept path requests ``proposals`` thoughts, each is
    judged ``samples`` times in a prompt of its own, and ``beam`` paths are kept. The defaults are
    those of Tree of Thoughts (arXiv 2305.10601), section 4.1.
    """
    draw = Draw(seed)
    propose, judge = (draw.text(draw.between(200, 280)) for _ in range(2))
    for problem in range(problems):
        kept = [draw.text(draw.between(30, 50))]
        for _ in range(depth):
            found = []
            for path in kept:
                thoughts = [draw.text(draw.between(20, 40)) for _ in range(proposals)]
                prompt, answer = np.concatenate((propose, path)), np.concatenate(thoughts)
                yield draw.request(problem, prompt, answer, len(propose))
                found += [np.concatenate((path, thought)) for thought in thoughts]
            for path in found:
                prompt = np.concatenate((judge, path))
                for _ in range(samples):
                    yield draw.request(problem, prompt, draw.text(8), len(judge))
            chosen = draw.rng.choice(len(found), min(beam, len(found)), False)
            kept = [found[place] for place in chosen]


# --- Agents that search a tree of actions depth first ---------------------------------------------

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

    A task's prompt begins with one of ``toolsets`` system prompts of about ``root`` tokens. Actions
    with results, about ``step`` tokens together, follow along one path. After a dead end, or at
    ``depth``, the search returns to the nearest ancestor with fewer than ``width`` actions, with a
    note that later prompts do not repeat. A task ends after ``steps`` requests; ``parallel`` tasks
    take turns.
    """
    draw = Draw(seed)
    systems = [draw.text(draw.spread(root, 0.4)) for _ in range(toolsets)]

    def search(task: int, system: Tokens) -> Requests:
        """Yield the requests of one task."""
        draw = Draw((seed, task), boundaries)
        path = [np.concatenate((system, draw.text(_QUERY)))]
        tried = [0]
        for _ in range(steps):
            while tried and tried[-1] == width:
                path.pop()
                tried.pop()
            if not tried:
                return
            note = draw.text(_NOTE if tried[-1] else 0)
            action = draw.text(draw.spread(step // 4, 0.4))
            yield draw.request(task, np.concatenate((path[-1], note)), action, len(system))
            tried[-1] += 1
            if len(path) < depth and draw.rng.random() >= dead_end:
                returned = draw.text(draw.spread(step - step // 4, 0.4))
                path.append(np.concatenate((path[-1], action, returned)))
                tried.append(0)

    waiting = iter(range(tasks))
    running: list[Requests] = []
    second = 0.0
    while True:
        while len(running) < parallel and (task := next(waiting, None)) is not None:
            running.append(search(task, systems[int(draw.rng.integers(toolsets))]))
        if not running:
            return
        for one in list(running):
            request = next(one, None)
            if request is None:
                running.remove(one)
            else:
                yield request._replace(timestamp_s=second)
                second += 1.0


@generator
def retries(
    seed: int = 0,
    questions: int = 100,
    trials: int = 7,
    parallel: int = 8,
    heads: int = 1,
    head: int = 1600,
    step: int = 170,
    boundaries: bool = True,
) -> Requests:
    """Generate agents that try the same questions again. Few-shot examples are in the user message,
    and there is no system message: nothing declares the end of the shared head.

    Each of ``heads`` kinds of questions has a head of ``head`` tokens; a question has 150 to 300. A
    trial has 4 to 12 requests, and each adds an answer and an observation, together about ``step``
    tokens. A later trial differs from the first answer on. ``parallel`` agents take turns. The end
    of the user message is declared.
    """
    draw = Draw(seed, boundaries)
    examples = [draw.text(head) for _ in range(heads)]
    texts = [
        np.concatenate((examples[number % heads], draw.text(draw.between(150, 300))))
        for number in range(questions)
    ]
    waiting = iter(range(trials * questions))
    running: list[tuple[int, int, Tokens]] = []
    """Each agent's trial and question as one number, requests left, and prompt."""
    while True:
        while len(running) < parallel and (number := next(waiting, None)) is not None:
            running.append((number, draw.between(4, 12), texts[number % questions]))
        if not running:
            return
        number, left, prompt = running.pop(0)
        answer = draw.text(draw.spread(step // 2, 0.4))
        yield draw.request(number, prompt, answer, len(texts[number % questions]))
        if left > 1:
            seen = draw.text(draw.spread(step - step // 2, 0.4))
            running.append((number, left - 1, np.concatenate((prompt, answer, seen))))


@generator
def live_agents(
    seed: int = 0,
    sessions: int = 24,
    live: int = 5,
    head: int = 1500,
    shortest: int = 20_000,
    longest: int = 40_000,
    step: int = 900,
    boundaries: bool = True,
) -> Requests:
    """Generate coding agents, ``live`` of them at once, that share a system message of ``head``
    tokens and grow to U{shortest..longest} tokens.

    A call adds an answer and an observation, together about ``step`` tokens. Each session has a
    pace of its own, from 2 to 8 seconds between calls, so that the calls of others in between are
    few. A finished session is replaced.
    """
    draw = Draw(seed, boundaries)
    system = draw.text(head)
    running: list[tuple[float, int, int, float, Tokens]] = []
    """Time of the next call, number, final length, pace and prompt of each session, as a heap."""

    def begin(number: int, second: float) -> None:
        prompt = np.concatenate((system, draw.text(draw.spread(1500))))
        pace = 2.0 * 4.0 ** float(draw.rng.random())
        heappush(running, (second, number, draw.between(shortest, longest), pace, prompt))

    for number in range(min(live, sessions)):
        begin(number, float(number))
    begun = len(running)
    while running:
        second, number, final, pace, prompt = heappop(running)
        answer = draw.text(draw.spread(step // 3, 0.4))
        request = draw.request(number, prompt, answer, head)
        yield request._replace(timestamp_s=second)
        seen = draw.text(draw.spread(step - step // 3, 0.4))
        prompt = np.concatenate((prompt, answer, seen))
        second += pace * float(draw.rng.uniform(0.8, 1.2))
        if len(prompt) < final:
            heappush(running, (second, number, final, pace, prompt))
        elif begun < sessions:
            begin(begun, second)
            begun += 1


@generator
def phased_heads(
    seed: int = 0,
    phases: int = 6,
    questions: int = 40,
    head: int = 2500,
    question: int = 200,
    report: int = 400,
    chats: int = 15,
    turns: int = 6,
    boundaries: bool = True,
) -> Requests:
    """Generate ``phases`` rounds of single prompts with one undeclared head, and chats in between.

    A prompt is the head, one of ``questions`` texts, and a report that no other prompt repeats.
    The texts of an odd round are those of the round before, so its prompts fork behind the head
    only, and each text is used once. The chats of a phase, ``turns`` rounds of ``chats``, evict the
    head and end with it.
    """
    draw = Draw(seed, boundaries)
    shared, session = draw.text(head), 0
    for phase in range(phases):
        if phase % 2 == 0:
            texts = [draw.text(draw.spread(question)) for _ in range(questions)]
        for number in draw.rng.permutation(questions).tolist():
            prompt = np.concatenate((shared, texts[number], draw.text(draw.spread(report))))
            yield draw.request(session, prompt, draw.text(_ANSWER * 2))
            session += 1
        histories = [draw.text(0)] * chats
        added, answered = partial(draw.spread, 400), partial(draw.spread, 200)
        for request in _rounds(draw, histories, turns, added, answered):
            yield request._replace(session=(session, request.session))
        session += 1


# --- Long chats of ShareGPT -----------------------------------------------------------------------
#
# Sessions of ten turns or more, as in Marconi's evaluation, with the published statistics: about
# 1,500 requests in 100 sessions, mean prompt 3,500 tokens, ideal token hit rate 97.6 %.

_TOKENS_PER_S_TYPED = 90 / 60 * 1.3  # 90 words a minute, 1.3 tokens a word


@generator
def sharegpt_like(
    seed: int = 0,
    requests: int = 600,
    sessions: int = 100,
    sessions_per_s: float = 0.25,
    user: int = 70,
    answer: int = 245,
    systems: int = 0,
) -> Requests:
    """Generate the first ``requests`` of ``sessions`` chats. Questions and answers have log-normal
    lengths with medians ``user`` and ``answer``; sessions start with one of ``systems`` prompts of
    2,000 tokens, if there are any."""
    draw = Draw(seed)
    shared = [draw.text(2000) for _ in range(systems)] or [draw.text(0)]
    openings = [shared[int(draw.rng.integers(len(shared)))] for _ in range(sessions)]
    drawn = (
        _session(seed, number, user, answer, opening) for number, opening in enumerate(openings)
    )
    return islice(interleave(drawn, Starts("fixed", sessions_per_s)), requests)


def _session(seed: int, number: int, user: int, answer: int, opening: Tokens) -> list[TraceRequest]:
    draw = Draw((seed, number))
    turns = 10 + int(draw.rng.geometric(1 / 6)) - 1
    requests = []
    history = opening
    when = 0.0
    for _ in range(turns):
        question = draw.text(_length(draw.rng, user))
        prompt = np.concatenate((history, question))
        reply = draw.text(_length(draw.rng, answer))
        when += len(question) / _TOKENS_PER_S_TYPED
        request = draw.request(number, prompt, reply, len(opening))
        requests.append(request._replace(timestamp_s=when))
        history = np.concatenate((prompt, reply))
    return requests


def _length(rng: np.random.Generator, median: int) -> int:
    return max(1, min(int(rng.lognormal(np.log(median), 0.8)), 4000))
