"""Answers that follow a grammar: what comes out is what was asked for, whatever else the engine
does meanwhile, and no token of anybody else's changes."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineConfig, Grammar, RequestSpec, SamplingParams, engine_config
from engine.config import num_cores
from engine.plugins.guided import background, guide
from engine.plugins.guided import bindings as library
from engine.plugins.guided import guides as registry
from engine.plugins.guided.guides import Guides
from engine.plugins.guided.marks import Overshoots
from engine.plugins.tool_calls.call_grammars import grammar_of_calls, grammar_of_strict_calls
from engine.requests.grammar import GrammarError, TooComplex
from engine.testing.oracle import OracleRunner
from engine.testing.oracle_sampler import OracleDrawn, OracleSampler
from engine.text.outputs import SampledToken
from engine.text.tokenizer import ByteTokenizer
from hybridcache.lab.extras import install_command

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["home", "work"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {"at": {"$ref": "#/$defs/place"}},
                "required": ["at"],
                "additionalProperties": False,
                "$defs": {"place": {"enum": ["sky", "sea"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
GRAMMARS = {
    "regex": (Grammar.of_regex("[0-9]{3}-[a-c]{1,20}z"), r"[0-9]{3}-[a-c]{1,20}z"),
    "choice": (Grammar.of_choices(["red", 'a "quote"\n', "bleu é"]), 'red|a "quote"\n|bleu é'),
    "lark": (Grammar.of_text('start: "a"{2,9} B\nB: /[xy]/'), "a{2,9}[xy]"),
    "gbnf": (Grammar.of_text('root ::= ("yes" | "no") "!"'), "(yes|no)!"),
    "one tool": (
        grammar_of_calls(TOOLS, "look"),
        r'<tool_call>\n{"name": "look", "arguments": {"at": "(sky|sea)"}}\n</tool_call>',
    ),
}


def oracle(**config: Any) -> Engine:
    runner = OracleRunner(config.pop("num_kv_tokens", 4096), 16, max_model_len=2048)
    runner.is_asynchronous = config.pop("asynchronous", False)
    return Engine(
        engine_config(check=True, **config),
        runner=runner,
        sampler=OracleSampler(),
        tokenizer=ByteTokenizer(),
    )


def spec(grammar: Grammar | None, prompt: str = "Say: ", **sampling: Any) -> RequestSpec:
    return RequestSpec(prompt, SamplingParams(**{"max_tokens": 300} | sampling), grammar=grammar)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return oracle()


@pytest.mark.parametrize("name", GRAMMARS)
def test_an_answer_is_what_the_grammar_says(engine: Engine, name: str) -> None:
    grammar, expected = GRAMMARS[name]
    for number in range(4):
        [output] = engine.generate([spec(grammar, f"{number}: ")])
        assert re.fullmatch(expected, output.text), output.text
        assert output.finish_reason == "stop" and output.error is None


def test_an_answer_follows_a_json_schema(engine: Engine) -> None:
    for number in range(4):
        [output] = engine.generate([spec(Grammar.of_schema(SCHEMA), str(number), max_tokens=900)])
        answer = json.loads(output.text)
        assert list(answer) == ["name", "age", "kind"] and 0 <= answer["age"] <= 150
        assert len(answer["name"]) <= 5 and answer["kind"] in ("home", "work")


def test_any_of_the_tools_may_be_called(engine: Engine) -> None:
    texts = [
        engine.generate([spec(grammar_of_calls(TOOLS, in_parallel=False), f"#{number}")])[0].text
        for number in range(12)
    ]
    calls = [json.loads(text[12:-13]) for text in texts if text.endswith("</tool_call>")]
    assert {call["name"] for call in calls} == {"look", "stop"}
    assert all(call["arguments"]["at"] in ("sky", "sea") for call in calls if "look" in call)


@pytest.mark.full(
    "{'draft': 'tree,mtp'}",
    "{'asynchronous': True, 'overlap': 'on'}",
    "{'exact': True, 'token_budget': 64}",
)
@pytest.mark.parametrize(
    "how",
    [
        {"draft": "tree:4"},
        {"draft": "mtp"},
        {"draft": "tree,mtp"},
        {"asynchronous": True, "overlap": "on"},
        {"num_kv_tokens": 512, "prefix_cache": "none"},
        {"exact": True, "token_budget": 64},
    ],
    ids=str,
)
def test_whatever_else_happens_the_answers_are_the_same(
    engine: Engine, how: dict[str, Any]
) -> None:
    """With drafts, steps that overlap, preemption and chunks; grammars and none side by side."""
    specs = [
        spec(grammar, f"{name} " + "x" * 90, max_tokens=60, **more)
        for name, (grammar, _) in [*GRAMMARS.items(), ("none", (None, ""))]
        for more in ({}, {"presence_penalty": 1.0}, {"min_tokens": 9})
    ]
    expected = [output.token_ids for output in engine.generate(specs)]
    other = oracle(**how)
    for _ in range(2):
        assert [output.token_ids for output in other.generate(specs)] == expected
    if "num_kv_tokens" in how:
        assert sum(output.num_preemptions for output in other.generate(specs)) > 0


AMBIGUOUS = Grammar.of_text('start: e\ne: e e | /[a-z]/ | e "+" e | e e e e | ')
"""Its masks take longer with every token: 0.1 s after 150, in the background."""


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """No grammar may be followed on the engine's thread."""
    compile_ = Guides._compile

    def compile_costly(guides: Guides, grammar: Grammar) -> guide.Compiled:
        compiled = compile_(guides, grammar)
        compiled.is_costly = True
        return compiled

    monkeypatch.setattr(Guides, "_compile", compile_costly)


@pytest.mark.full("{}", "{'draft': 'tree:4'}", "{'asynchronous': True, 'overlap': 'on'}")
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"draft": "tree:4"},
        {"asynchronous": True, "overlap": "on"},
        {"num_kv_tokens": 256, "prefix_cache": "none"},
        {"exact": True, "token_budget": 64},
    ],
    ids=str,
)
def test_an_answer_followed_in_the_background_is_the_same(
    engine: Engine, in_background: None, how: dict[str, Any]
) -> None:
    specs = [
        spec(grammar, f"{name} " + "x" * 90, max_tokens=60, **more)
        for name, (grammar, _) in [*GRAMMARS.items(), ("none", (None, ""))]
        for more in ({}, {"presence_penalty": 1.0})
    ]
    expected = engine.generate(specs)
    outputs = oracle(**how).generate(specs)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert [o.finish_reason for o in outputs] == [o.finish_reason for o in expected]


def test_the_model_draws_the_same_for_an_answer_in_the_background() -> None:
    """From logits that were kept beyond their step, with a neighbour that goes on."""
    config = EngineConfig(cache_gib=0.05, max_model_len=512, max_running=4, check=True)
    sampling = {"max_tokens": 20, "temperature": 1.0, "logprobs": 2, "seed": 3}
    specs = [spec(grammar, "abc", **sampling) for grammar in (Grammar.of_object(), None)]
    engine = Engine(config)
    expected = engine.generate(specs)
    engine._intake.grammars._compiled_of(Grammar.of_object()).is_costly = True
    engine.reset_prefix_cache()
    outputs = engine.generate(specs)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert [o.logprobs for o in outputs] == [o.logprobs for o in expected]


class RecordingLibrary:
    """llguidance, with a note of each call of a matcher: (thread, limits of the matcher, name,
    tokens)."""

    def __init__(self, calls: list[tuple[int, int, str, int]]) -> None:
        library = pytest.importorskip("llguidance")

        class Matcher:
            def __init__(self, *arguments: Any, limits: Any = None, inner: Any = None, **how: Any):
                self.limits = limits
                self.note("compile", 0)
                self.inner = inner or library.LLMatcher(*arguments, limits=limits, **how)

            def note(self, name: str, number: int) -> None:
                most = 0 if self.limits is None else self.limits.step_max_items
                calls.append((threading.get_ident(), most, name, number))

            def deep_copy(self) -> Matcher:
                return Matcher(limits=self.limits, inner=self.inner.deep_copy())

            def __getattr__(self, name: str) -> Any:
                def call(*arguments: Any) -> Any:
                    tokens = arguments[0] if name in ("consume_tokens", "validate_tokens") else ()
                    self.note(name, len(tokens))
                    return getattr(self.inner, name)(*arguments)

                return call

        class Executor:
            def __init__(self, number: int) -> None:
                self.inner = library.LLExecutor(number)

            def consume_token_par(self, pairs: list[tuple[Matcher, int]]) -> Any:
                for matcher, _ in pairs:
                    matcher.note("consume_token_par", 1)
                return self.inner.consume_token_par([(m.inner, token) for m, token in pairs])

        Matcher.grammar_from_regex = staticmethod(library.LLMatcher.grammar_from_regex)  # type: ignore[attr-defined]
        self.LLMatcher, self.LLExecutor = Matcher, Executor
        for name in ("LLParserLimits", "LLTokenizer", "TokenizerWrapper", "grammar_from"):
            setattr(self, name, getattr(library, name))


@pytest.mark.full("how1")
@pytest.mark.parametrize("how", [{}, {"draft": "tree:4"}, {"asynchronous": True, "overlap": "on"}])
def test_the_engines_thread_makes_only_calls_that_are_bounded(
    monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """It compiles nothing, replays no answer, and uses only matchers with the limits of a step,
    whatever the grammar; and nobody else sits out a step."""
    calls: list[tuple[int, int, str, int]] = []
    monkeypatch.setitem(sys.modules, "llguidance", RecordingLibrary(calls))  # type: ignore[arg-type]
    engine = oracle(**how)
    engine.compile(AMBIGUOUS)
    other = engine.submit(spec(None, "other", max_tokens=400, ignore_eos=True))
    slow = {"max_tokens": 48, "min_tokens": 48}
    names = [engine.submit(spec(AMBIGUOUS, "Say: ", **slow)) for _ in range(2)]
    engine.step()
    calls.clear()
    left = set(names)
    boxes = {name: engine._mailboxes.setdefault(name, deque()) for name in names}
    while left:
        outputs = {output.request_id: output for output in engine.step()}
        left -= {name for name, output in outputs.items() if output.is_finished}
        if other in outputs and outputs[other].is_finished:
            other = engine.submit(spec(None, "other", max_tokens=400, ignore_eos=True))
        elif not how:
            assert other in outputs, "a stream without a grammar sat out a step"
    assert [boxes[name][-1].finish_reason for name in names] == ["length", "length"]
    here = [call for call in calls if call[0] == threading.get_ident()]
    apart = [call for call in calls if call[0] != threading.get_ident()]
    for _, most_items, name, number in here:
        assert name != "compile" or number == 0
        assert most_items <= library.STEP_LIMITS["step_max_items"]
        assert number <= 5, "an answer was replayed"
    assert {most for _, most, name, _ in apart if name == "compute_bitmask"} == {
        library.LIMITS["step_max_items"]
    }


STRICT: list[dict[str, Any]] = [
    {**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}},
    TOOLS[1],
]


SCRIPTS = (
    '<think>x <tool_call>{</think>A <tool_call>\n{"name": "fly", "arguments": {"at": "moon"',
    'B <tool_cal <tool_call>{"name": "stop", "arguments": {"why": 1}}</tool_call> and so'
    ' <tool_call>\n{"name": "look", "arguments": {"at": "land"}}\n</tool_call> on',
    "<tool_call>" * 3,
    "No call at all, just < and <tool and <think>.",
)


class Stubborn(OracleSampler):
    """Says the script that the request's seed stands for, byte for byte, as far as it may; where it
    may not, the first letter that it may say."""

    def launch(self, logits: Any, requests: Any, rows: Any) -> Any:
        sampled = []
        for request in requests:
            said = [*SCRIPTS[request.seed].encode(), 258]
            token = said[min(request.draw, len(said) - 1)]
            mask = request.ruling.mask
            if mask is not None and not mask[token >> 3] >> (token & 7) & 1:
                token = int(np.unpackbits(mask, bitorder="little").argmax())
            sampled.append(SampledToken(token, -1.0))
        return OracleDrawn(sampled)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"draft": "tree:8"},
        {"asynchronous": True, "overlap": "on"},
        {"num_kv_tokens": 300, "prefix_cache": "none"},
        {"background": True},
        {"background": True, "asynchronous": True, "overlap": "on"},
        {"breaks": True, "asynchronous": True, "overlap": "on"},
    ],
    ids=str,
)
def test_strict_calls_follow_their_grammar_from_their_mark_on(
    request: pytest.FixtureRequest, how: dict[str, Any]
) -> None:
    """And nothing else does: reasoning, text and what only looks like a mark are free."""
    how = dict(how)
    if how.pop("background", False):
        request.getfixturevalue("in_background")
    breaks = how.pop("breaks", False)
    grammar = grammar_of_strict_calls(STRICT, may_think=True)
    specs = [spec(grammar, f"{seed}" * 40, seed=seed, max_tokens=200) for seed in range(4)]
    engine = oracle(**how)
    engine._sampler = Stubborn()
    engine._hooks[0]._sampler = Stubborn()  # type: ignore[attr-defined]
    texts: dict[int, str] = {}
    commit, num_steps = engine._commit, 0

    def fails_at_times(in_flight: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if breaks and num_steps % 7 == 0:
            raise MemoryError
        return commit(in_flight)

    engine._commit = fails_at_times  # type: ignore[method-assign]
    for _ in range(2):
        names = [engine.submit(one) for one in specs]
        while engine.has_work():
            with contextlib.suppress(MemoryError):
                outputs = engine.step()
                texts |= {names.index(o.request_id): o.text for o in outputs if o.is_finished}
    engine.check()
    assert texts[0].startswith("<think>x <tool_call>{</think>A <tool_call>\n{")
    assert texts[1].startswith("B <tool_cal <tool_call>{") and texts[1].endswith(" on")
    assert texts[3] == SCRIPTS[3]
    calls = [
        json.loads(call.partition("</tool_call>")[0])
        for seed, begin in ((0, "A <tool_call>"), (1, "<tool_call>"), (2, "<tool_call>"))
        for call in texts[seed].partition(begin)[2].split("<tool_call>")
    ]
    assert [call["name"] for call in calls] == ["look", "stop", "look", "look"]
    assert all(
        call["arguments"]["at"] in ("sky", "sea") for call in calls if "look" in call["name"]
    )


def test_a_mark_ends_with_a_token() -> None:
    """Of a vocabulary whose tokens would go on behind it, those are forbidden that would."""
    texts = [
        b"<",
        b"tool",
        b"_call",
        b">",
        b">\n",
        b"_call>{",
        b"<tool_call>",
        b"x<tool_call>y",
        b"z",
    ]
    tokenizer: Any = SimpleNamespace(vocab_size=len(texts), token_bytes=lambda token: texts[token])
    overshoots = Overshoots([b"<tool_call>"], tokenizer, 16)

    def forbidden(text: bytes) -> set[bytes]:
        mask = overshoots.mask(text)
        if mask is None:
            return set()
        allowed = np.unpackbits(mask, bitorder="little")[: len(texts)]
        return {one for one, may in zip(texts, allowed, strict=True) if not may}

    always = {b"x<tool_call>y"}
    assert forbidden(b"") == forbidden(b"abc <tool_ca") == always
    assert forbidden(b"5 <tool") == always | {b"_call>{"}
    assert forbidden(b"<tool_call") == always | {b">\n"}
    plain: Any = SimpleNamespace(vocab_size=3, token_bytes=lambda token: texts[token])
    assert Overshoots([b"<tool_call>"], plain, 3).mask(b"<tool_call") is None


def test_a_budget_of_grammar_time_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, in_background: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "SECONDS_PER_TOKEN", 0.0)
    engine = oracle(grammar_budget_s=1e-9)
    plain = spec(None, max_tokens=9, ignore_eos=True)
    refused, kept = engine.generate([spec(GRAMMARS["regex"][0]), plain])
    assert refused.finish_reason == "error" and refused.is_refused
    assert refused.error is not None and "budget of 1e-09 s" in refused.error
    assert kept.finish_reason == "length" and kept.error is None
    # A budget is a request's own, and a sane one is enough for all of them.
    again = oracle().generate([spec(GRAMMARS["regex"][0])] * 4)
    assert {output.finish_reason for output in again} == {"stop"}


def test_time_in_which_other_processes_had_the_processor_is_not_charged(
    monkeypatch: pytest.MonkeyPatch, in_background: None
) -> None:
    clock = itertools.count(0.0, 60.0)
    monkeypatch.setattr(background.time, "perf_counter", lambda: next(clock))
    [output] = oracle(grammar_budget_s=5.0).generate([spec(GRAMMARS["regex"][0])])
    assert output.finish_reason == "stop", output.error


def test_the_budget_grows_with_the_answer() -> None:
    budget = background.Budget(1.0)
    budget.check(1.4, 100)
    with pytest.raises(
        TooComplex, match=r"it took 1\.6 s for 100 tokens; a request has a budget of"
    ):
        budget.check(1.6, 100)


def test_a_grammar_that_took_its_share_of_the_engines_time_leaves_its_thread() -> None:
    guides = Guides(ByteTokenizer(), 320)
    grammar, answer = Grammar.of_regex("[a-c]{30}"), np.full(30, 97, np.int32)
    reference, other = guides.guide(grammar), guides.guide(grammar)
    expected = [reference.masks(answer[:end]) for end in range(20)]
    assert np.array_equal(other.masks(answer[:1]), expected[1])
    guides.shared.step_time.spend(60.0)
    assert other.masks(answer[:2]) is None, "the engine's thread waits for no mask"
    for end in range(2, 20):
        while (masks := other.masks(answer[:end])) is None:
            guides.shared.news.wait(1.0)
        assert np.array_equal(masks, expected[end]) and not other.is_done(answer[:end])
    while not other.is_done(answer):
        guides.shared.news.wait(1.0)
    assert other.masks(answer, may_be_over=False) is None


def test_grammars_of_many_requests_share_few_threads(in_background: None) -> None:
    """Each of them could delay the engine's thread, by losing its processor at a bad moment."""
    most = max(1, num_cores() // 2)
    engine, others = oracle(max_running=16), set(threading.enumerate())
    names = [engine.submit(spec(Grammar.of_regex(f"[a-c]{{{n}}}"))) for n in range(20, 36)]
    boxes = [engine._mailboxes.setdefault(name, deque()) for name in names]
    seen = 0
    while engine.has_work():
        engine.step()
        started = set(threading.enumerate()) - others
        seen = max(seen, sum(one.name == "grammar" for one in started))
    assert 1 <= seen <= most
    assert {box[-1].finish_reason for box in boxes} == {"stop"}


def test_works_of_grammars_run_in_turn_and_those_of_one_in_order() -> None:
    threads, gate = background.GrammarThreads(2), threading.Event()
    grammars: list[Any] = [SimpleNamespace(works=deque(), is_active=False) for _ in range(6)]
    running: list[int] = []
    done: list[tuple[int, int]] = []

    def work(grammar: int, number: int) -> None:
        gate.wait()
        running.append(grammar)
        assert len(running) == len(set(running)) <= 2
        done.append((grammar, number))
        running.remove(grammar)

    for number in range(3):
        for grammar, one in enumerate(grammars):
            threads.submit(one, partial(work, grammar, number))
    gate.set()
    while len(done) < 18:
        time.sleep(0.001)
    assert sorted(done) == [(grammar, number) for grammar in range(6) for number in range(3)]
    assert [number for _, number in done].index(2) >= 8, "one had its last turn before others"
    for grammar in range(6):
        assert [number for one, number in done if one == grammar] == [0, 1, 2]
    threads.stop()


def test_a_long_answer_gives_way_to_other_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "SLICE_S", 0.0)
    guides = Guides(ByteTokenizer(), 320)
    guides._threads, gate = background.GrammarThreads(1), threading.Event()
    grammars = [Grammar.of_regex("[a-c]{30}"), Grammar.of_regex("[a-c]{9}")]
    expected = guides.guide(grammars[0]).masks(np.full(20, 97, np.int32))
    found: list[str] = []
    followers = []
    blocker: Any = SimpleNamespace(works=deque(), is_active=False)
    guides._threads.submit(blocker, gate.wait)  # type: ignore[arg-type]
    for name, grammar, length in zip(("long", "short"), grammars, (20, 2), strict=True):
        shared = guides.shared
        follower = background.GrammarFollower(
            guides._compiled_of(grammar).background,
            shared.budget,
            shared.num_mask_bytes,
            partial(found.append, name),
        )
        follower.order(np.full(length, 97, np.int32))
        followers.append(follower)
    gate.set()
    while len(found) < 2:
        time.sleep(0.001)
    assert found == ["short", "long"]
    place = followers[0].place(np.full(20, 97, np.int32))
    assert place is not None and np.array_equal(place.mask, expected[0])


@pytest.mark.parametrize("what", ["abort", "break", "preempt"])
@pytest.mark.parametrize("how", [{}, {"asynchronous": True, "overlap": "on"}], ids=str)
def test_a_request_that_waits_for_its_grammar_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, in_background: None, what: str, how: dict[str, Any]
) -> None:
    """It can be aborted, broken off and preempted while it does, and answers the same."""
    grammar, _ = GRAMMARS["regex"]
    [whole] = oracle().generate([spec(grammar)])
    held: list[Any] = []
    monkeypatch.setattr(background.BackgroundGrammar, "submit", lambda _, work: held.append(work))
    engine = oracle(**how)
    plain = engine.submit(spec(None, "other", max_tokens=200, ignore_eos=True))
    waiting = engine.submit(spec(grammar))
    box = engine._mailboxes.setdefault(waiting, deque())
    outputs = [output.request_id for _ in range(40) for output in engine.step()]
    assert outputs.count(plain) > 30 and waiting not in outputs and len(held) == 1
    if what == "abort":
        engine.abort(waiting)
    elif what == "break":
        forward, engine.runner.forward = engine.runner.forward, None  # type: ignore[method-assign]
        with pytest.raises(TypeError):
            engine.step()
        engine.runner.forward = forward  # type: ignore[method-assign]
    elif not how:
        [request] = engine._scheduler.awaiting_draw
        engine._scheduler._preempt(request)
    while engine.has_work():
        engine.step()
        while held:
            held.pop()()
    engine.check()
    if what != "abort":
        assert box[-1].token_ids == whole.token_ids and box[-1].finish_reason == "stop"


def test_the_vocabulary_is_built_once_and_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would stop every thread of the process for a second."""
    engine = oracle()
    engine.prepare_grammars()
    monkeypatch.setattr(registry, "make_vocabulary", None)
    engine.compile(GRAMMARS["regex"][0])
    monkeypatch.setitem(sys.modules, "llguidance", None)
    oracle().prepare_grammars()


def test_drafts_that_the_grammar_forbids_are_cut(engine: Engine) -> None:
    other = oracle(draft="tree:8")
    grammar = Grammar.of_regex("[ab]{40}c")
    for _ in range(2):
        [output] = other.generate([spec(grammar)])
    assert output.drafts is not None and output.drafts.accepted.total() > 20
    # What followed the same prompt without a grammar is no guess for one with it.
    other = oracle(draft="tree:8")
    other.generate([spec(None, max_tokens=40)])
    [output] = other.generate([spec(grammar)])
    assert output.text == engine.generate([spec(grammar)])[0].text


def test_steps_that_overlap_still_do() -> None:
    """Neither the guided request nor the others sit a step out for the mask."""
    steps: dict[bool, int] = {}
    for guided in (False, True):
        engine = oracle(asynchronous=True, overlap="on")
        grammar = Grammar.of_regex("[a-z]{50,90}") if guided else None
        engine.submit(spec(None, "other", max_tokens=40, ignore_eos=True))
        engine.submit(spec(grammar, "one", max_tokens=40, ignore_eos=True))
        steps[guided] = 0
        while engine.has_work():
            engine.step()
            steps[guided] += 1
    assert steps[True] == steps[False]


def test_an_abort_and_a_broken_step_leave_the_next_answer_right(engine: Engine) -> None:
    grammar, expected = GRAMMARS["regex"]
    other = oracle(asynchronous=True, overlap="on")
    whole = engine.generate([spec(grammar)])[0].text
    first = other.submit(spec(grammar))
    kept = other.submit(spec(grammar))
    for _ in range(4):
        other.step()
    other.abort(first)
    forward, other.runner.forward = other.runner.forward, None  # type: ignore[method-assign]
    with pytest.raises(TypeError):
        other.step()
    other.runner.forward = forward  # type: ignore[method-assign]
    box = other._mailboxes.setdefault(kept, deque())
    while other.has_work():
        other.step()
    assert box[-1].text == whole and re.fullmatch(expected, whole)


def test_a_guided_request_changes_nobody_elses_tokens() -> None:
    engine = Engine(EngineConfig(cache_gib=0.05, max_model_len=512, max_running=4))
    plain = [
        SamplingParams(max_tokens=12, seed=seed, temperature=temperature, logprobs=2)
        for seed, temperature in enumerate((0.0, 1.0, 0.7))
    ]
    alone = engine.generate(["abc"] * 3, plain)
    guided = spec(Grammar.of_choices(["yes, of course"]), seed=1, logprobs=2)
    specs = [RequestSpec("abc", sampling) for sampling in plain]
    *beside, answer = engine.generate([*specs, guided])
    assert [o.token_ids for o in beside] == [o.token_ids for o in alone]
    assert [o.logprobs for o in beside] == [o.logprobs for o in alone]
    assert answer.text == "yes, of course"
    # The model's own view, before the mask: likely alternatives are there that it forbids.
    assert answer.logprobs is not None and all(s.logprob < 0 for s in answer.logprobs)
    assert any(best[0][0] != s.token_id for s in answer.logprobs if (best := s.top_logprobs))


RULES = [f"r{number}" for number in range(900)]
HOSTILE: dict[str, Any] = {
    "deep": lambda: Grammar.of_schema('{"items":' * 5000 + "{}" + "}" * 5000),
    "wide": lambda: Grammar.of_schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"{a}{b}": {}}} for a in range(8)]} for b in range(8)
            ]
        }
    ),
    "multiple": lambda: Grammar.of_schema({"type": "integer", "multipleOf": 999983}),
    "multiples": lambda: Grammar.of_schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}),
    "circle": lambda: Grammar.of_schema({"$ref": "#"}),
    "elsewhere": lambda: Grammar.of_schema({"$ref": "http://127.0.0.1:1/x.json"}),
    "impossible": lambda: Grammar.of_schema({"type": "integer", "minimum": 5, "maximum": 3}),
    "not": lambda: Grammar.of_schema({"not": {}}),
    "many choices": lambda: Grammar.of_choices(["x"] * 5000),
    "empty choice": lambda: Grammar.of_choices(["", "x"]),
    "parentheses": lambda: Grammar.of_regex("(" * 100_000 + "a" + ")" * 100_000),
    "nothing": lambda: Grammar.of_regex("[^\\x00-\\U0010FFFF]"),
    "empty": lambda: Grammar.of_regex(""),
    "long": lambda: Grammar.of_regex("a" * 300_000),
    "nested": lambda: Grammar.of_text('start: %json {"multipleOf": 999983}'),
    "broken": lambda: Grammar.of_text("start: foo"),
    "loop": lambda: Grammar.of_text("start: start"),
    "many rules": lambda: Grammar.of_text(
        "start: " + "|".join(RULES) + "".join(f'\n{rule}: "a"' for rule in RULES)
    ),
    "gbnf": lambda: Grammar.of_text("root ::= " + "(" * 7000 + '"a"' + ")" * 7000),
    "no tool": lambda: grammar_of_calls(TOOLS, "dance"),
    "repeated": lambda: Grammar.of_regex("a{1000000000}"),
    "repeated rule": lambda: Grammar.of_text('root ::= "a"{1000000}'),
    "repeated later": lambda: Grammar.of_text('root ::= "b" "a"{1000000}'),
}


@pytest.fixture(scope="module")
def guides() -> Iterator[Guides]:
    yield Guides(ByteTokenizer(), 320)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_grammar_that_can_not_be_served_is_one_sentence_soon(guides: Guides, name: str) -> None:
    began = time.process_time()
    try:
        guides.compile(HOSTILE[name]())
    except GrammarError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
    else:
        # What is large and yet within the limits is served; each of its tokens soon, too.
        assert name == "many rules", name
    assert time.process_time() - began < 5


WRONG: dict[str, tuple[Any, str]] = {
    "group": (lambda: Grammar.of_regex("(a"), "expression in it is wrong, unclosed group."),
    "class": (lambda: Grammar.of_regex("["), "is wrong, unclosed character class."),
    "range": (lambda: Grammar.of_regex("a{5,2}"), "the start must be <= the end."),
    "look": (lambda: Grammar.of_regex("(?=a)"), "is wrong, look-around, "),
    "in lark": (
        lambda: Grammar.of_text("start: /(a/"),
        r": at 1\(8\): a regular .* unclosed group",
    ),
    "pattern": (lambda: Grammar.of_schema({"pattern": "(a"}), "is wrong, unclosed group."),
    "endless": (lambda: Grammar.of_text("root ::= root"), "rules never ends."),
    "tool": (
        lambda: grammar_of_calls([*TOOLS, tool('say "x"', {"a": {"pattern": "(a"}})]),
        r"""^tool 'say "x"': .* unclosed group\.$""",
    ),
    "tool of ours": (
        lambda: grammar_of_calls([*TOOLS, tool("odd", {"a": {"multipleOf": 0}})]),
        "^tool 'odd': multipleOf must be",
    ),
    "much": (lambda: Grammar.of_regex("a{1000000000}"), "too complex to follow: use"),
}


def tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize("name", WRONG)
def test_a_grammar_that_is_wrong_is_said_to_be_where(guides: Guides, name: str) -> None:
    made, message = WRONG[name]
    with pytest.raises(GrammarError, match=message):
        guides.compile(made())


def test_what_becomes_too_complex_in_an_answer_ends_it_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = oracle()
    grammar = Grammar.of_text('root ::= [b-d] [b-d] [b-d] "a"{1000000}')
    refused, kept = other.generate([spec(grammar), spec(None, max_tokens=9, ignore_eos=True)])
    assert refused.finish_reason == "error" and refused.is_refused
    assert refused.error is not None and "too complex to follow" in refused.error
    assert kept.finish_reason == "length" and kept.error is None and not kept.is_refused
    [record] = [record for record in caplog.records if record.levelname != "INFO"]
    assert record.exc_info is None and "\n" not in record.getMessage()


def test_many_answers_together_reach_no_limit_that_one_does_not() -> None:
    """Copies of a matcher share the states that they find: 2^18 of this grammar."""
    guides = Guides(ByteTokenizer(), ByteTokenizer().vocab_size)
    grammar, draw = Grammar.of_regex("(a|b)*a(a|b){18}"), random.Random(1)
    for _ in range(120):
        guide = guides.guide(grammar)
        answer = np.frombuffer(bytes(draw.choices(b"ab", k=200)), np.uint8).astype(np.int32)
        for length in range(0, 200, 10):
            guide.masks(answer[:length], answer[length : length + 8])
            assert not guide.is_done(answer[:length])


def test_between_the_parts_of_json_there_is_little_room(guides: Guides) -> None:
    grammar = Grammar.of_schema(SCHEMA)
    read = ByteTokenizer().encode
    for text, length in (
        ('{"name": "x",   ', 14),
        ('{"name" \n', 8),
        ("{\n\n", 2),
        ("{\n" + " " * 40, 10),
        ('{"name":"x","age":1,"kind":"home"}', None),
        (json.dumps({"name": "x", "age": 1, "kind": "home"}), None),
        (json.dumps({"name": "x", "age": 1, "kind": "home"}, indent=4), None),
    ):
        tokens = np.array(read(text), np.int32)
        kept = guides.guide(grammar).cut(tokens[:0], tokens)
        assert len(kept) == (len(tokens) if length is None else length), text


def test_without_the_library_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=re.escape(install_command("guided"))):
        Guides(ByteTokenizer(), 320).compile(Grammar.of_object())


def test_a_mask_is_what_the_tokens_one_by_one_say(guides: Guides) -> None:
    """Against trying every token; and what follows drafts against having taken them."""
    grammar = Grammar.of_regex("a[bc]{1,3}d?")
    guide = guides.guide(grammar)
    answer, drafts = np.array([97, 98], np.int32), np.array([99, 98, 100, 99], np.int32)
    kept = guide.cut(answer, drafts)
    assert kept.tolist() == [99, 98, 100]
    ending = np.array([99, 258, 258], np.int32)
    assert guide.cut(answer, ending).tolist() == [99], "what ends an answer is sampled, not guessed"
    masks = guide.masks(answer, kept)
    for length, mask in enumerate(masks):
        text = bytes([*answer.tolist(), *kept.tolist()[:length]]).decode()
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")[:320]).tolist()
        longer = re.compile("a[bc]{1,3}d?")
        expected = [c for c in range(128) if longer.fullmatch(text + chr(c))]
        expected += [256, 258] if longer.fullmatch(text) else []
        assert allowed == expected
    fresh = guides.guide(grammar)
    assert np.array_equal(fresh.masks(answer, kept[:0])[0], masks[0])
    assert not guide.is_done(answer) and guide.is_done(np.array([97, 98, 100], np.int32))


def test_reasoning_is_free_and_the_answer_behind_it_is_not(guides: Guides) -> None:
    read = ByteTokenizer().encode
    for grammar, answer in (
        (Grammar.of_regex("a/[b-d]"), "a/c"),
        (Grammar.of_object(), '{"a": 1}'),
        (Grammar.of_text('root ::= "yes"'), "yes"),
    ):
        guide = guides.guide(grammar.behind("</think>"))
        right = np.array(read(f"a {{ < </think>\n\n{answer}"), np.int32)
        wrong = np.array(read("b</think>q"), np.int32)
        assert guide.cut(right[:0], wrong).tolist() == wrong[:-1].tolist()
        assert len(guide.cut(right[:0], right)) == len(right)
        assert guide.is_done(right) and not guide.is_done(right[:-1])
