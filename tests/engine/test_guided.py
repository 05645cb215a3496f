"""Tests of guided answers: they follow their grammar under all conditions, and other requests'
tokens stay the same."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineConfig, Grammar, RequestSpec, SamplingParams, engine_config
from engine.plugins.guided import guide
from engine.plugins.guided import guides as registry
from engine.plugins.guided.guides import Guides
from engine.plugins.guided.marks import Overshoots
from engine.plugins.tool_calls.call_grammars import grammar_of_calls, grammar_of_strict_calls
from engine.requests.grammar import GrammarError
from engine.text.outputs import SampledToken
from engine.text.tokenizer import ByteTokenizer
from hybridcache.command.extras import install_command
from tests.oracle import OracleDrawn, OracleRunner, OracleSampler

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
def test_answers_match_their_grammar(engine: Engine, name: str) -> None:
    grammar, expected = GRAMMARS[name]
    for number in range(4):
        [output] = engine.generate([spec(grammar, f"{number}: ")])
        assert re.fullmatch(expected, output.text), output.text
        assert output.finish_reason == "stop" and output.error is None


def test_answers_follow_a_json_schema(engine: Engine) -> None:
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
    "settings",
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
def test_guided_answers_do_not_depend_on_engine_settings(
    engine: Engine, settings: dict[str, Any]
) -> None:
    """Compare with drafts, overlap, preemption and chunks; requests without a grammar are part of
    each batch."""
    specs = [
        spec(grammar, f"{name} " + "x" * 90, max_tokens=60, **extra)
        for name, (grammar, _) in [*GRAMMARS.items(), ("none", (None, ""))]
        for extra in ({}, {"presence_penalty": 1.0}, {"min_tokens": 9})
    ]
    expected = [output.token_ids for output in engine.generate(specs)]
    other = oracle(**settings)
    for _ in range(2):
        assert [output.token_ids for output in other.generate(specs)] == expected
    if "num_kv_tokens" in settings:
        assert sum(output.num_preemptions for output in other.generate(specs)) > 0


AMBIGUOUS = 'start: e\ne: e e | /[a-z]/ | e "+" e | e e e e | '
"""Grammar with masks that take longer with every token."""
LATER = AMBIGUOUS.replace("start:", "start: /[a-z]{50}/")


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


class ScriptedSampler(OracleSampler):
    """Sampler that follows the script chosen by the request's seed, byte for byte.

    A forbidden byte is replaced by the first allowed token.
    """

    def launch(self, logits: Any, requests: Any, rows: Any) -> Any:
        sampled = []
        for request in requests:
            script = [*SCRIPTS[request.seed].encode(), 258]
            token = script[min(request.draw, len(script) - 1)]
            mask = request.ruling.mask
            if mask is not None and not mask[token >> 3] >> (token & 7) & 1:
                token = int(np.unpackbits(mask, bitorder="little").argmax())
            sampled.append(SampledToken(token, -1.0))
        return OracleDrawn(sampled)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"draft": "tree:8"},
        {"asynchronous": True, "overlap": "on"},
        {"num_kv_tokens": 300, "prefix_cache": "none"},
        {"fails": True, "asynchronous": True, "overlap": "on"},
    ],
    ids=str,
)
def test_strict_calls_follow_their_grammar_after_the_mark(settings: dict[str, Any]) -> None:
    """Check that reasoning, text and near misses of a mark are not restricted."""
    settings = dict(settings)
    fails = settings.pop("fails", False)
    grammar = grammar_of_strict_calls(STRICT, may_think=True)
    specs = [spec(grammar, f"{seed}" * 40, seed=seed, max_tokens=200) for seed in range(4)]
    engine = oracle(**settings)
    engine._sampler = ScriptedSampler()
    texts: dict[int, str] = {}
    commit, num_steps = engine._commit, 0

    def fail_at_times(in_flight: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if fails and num_steps % 7 == 0:
            raise MemoryError
        return commit(in_flight)

    engine._commit = fail_at_times  # type: ignore[method-assign]
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


def test_no_token_continues_beyond_a_mark() -> None:
    """Check that tokens which would continue beyond the mark are forbidden."""
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


@pytest.mark.parametrize(
    "settings", [{}, {"asynchronous": True, "overlap": "on"}, {"draft": "tree:4"}], ids=str
)
def test_a_grammar_beyond_the_limits_ends_only_its_request_at_the_same_token(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """The limits count items, not seconds, so every engine ends the answer at the same token."""
    monkeypatch.setattr(guide, "REQUEST_S", 60.0)
    slow = spec(Grammar.of_text(LATER), max_tokens=200, min_tokens=200)
    plain = spec(None, "other", max_tokens=250, ignore_eos=True)
    [reference, _] = oracle().generate([slow, plain])
    engine = oracle(**settings)
    for _ in range(2):  # With drafts, the second answer is drafted from the first.
        refused, other = engine.generate([slow, plain])
        assert refused.finish_reason == "error" and refused.is_refused
        assert refused.error is not None and "too complex to follow" in refused.error
        assert refused.token_ids == reference.token_ids and len(refused.token_ids) > 5
        assert other.finish_reason == "length" and other.error is None
    engine.check()


def test_a_grammar_that_takes_the_engines_time_ends_only_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check that a grammar may take its own allowance, and more while others take little."""
    monkeypatch.setattr(guide, "REQUEST_S", 0.0)
    monkeypatch.setattr(guide, "TOKEN_S", 0.0)
    [kept] = oracle().generate([spec(GRAMMARS["regex"][0])])
    assert kept.finish_reason == "stop"
    monkeypatch.setattr(guide, "BURST_S", 0.0)
    monkeypatch.setattr(guide, "SHARE", 0.0)
    plain = spec(None, max_tokens=9, ignore_eos=True)
    refused, other = oracle().generate([spec(GRAMMARS["regex"][0]), plain])
    assert refused.is_refused and refused.error is not None
    assert "of the engine's time" in refused.error
    assert other.finish_reason == "length" and other.error is None


def test_only_processor_time_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 60.0)
    monkeypatch.setattr(guide.time, "perf_counter", lambda: next(clock))
    [output] = oracle().generate([spec(GRAMMARS["regex"][0])])
    assert output.finish_reason == "stop", output.error


def test_the_vocabulary_is_built_once_in_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard against a build in a request, which would stop every thread for a second."""
    engine = oracle()
    engine.prepare_grammars()
    monkeypatch.setattr(registry, "make_vocabulary", None)
    engine.compile(GRAMMARS["regex"][0])
    monkeypatch.setitem(sys.modules, "llguidance", None)
    oracle().prepare_grammars()


def test_forbidden_drafts_are_cut(engine: Engine) -> None:
    other = oracle(draft="tree:8")
    grammar = Grammar.of_regex("[ab]{40}c")
    for _ in range(2):
        [output] = other.generate([spec(grammar)])
    assert output.drafts is not None and output.drafts.accepted.total() > 20
    # The tokens that followed the prompt without a grammar are not drafted for a guided answer.
    other = oracle(draft="tree:8")
    other.generate([spec(None, max_tokens=40)])
    [output] = other.generate([spec(grammar)])
    assert output.text == engine.generate([spec(grammar)])[0].text


def test_guided_requests_do_not_stop_the_overlap() -> None:
    """Check that no request is left out of a step because of a mask."""
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


def test_answers_are_right_after_an_abort_and_a_failed_step(engine: Engine) -> None:
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


def test_guided_requests_do_not_change_the_tokens_of_others() -> None:
    engine = Engine(EngineConfig(cache_gib=0.05, max_model_len=512, max_running=4))
    plain = [
        SamplingParams(max_tokens=12, seed=seed, temperature=temperature, logprobs=2)
        for seed, temperature in enumerate((0.0, 1.0, 0.7))
    ]
    alone = engine.generate(["abc"] * 3, plain)
    guided = spec(Grammar.of_choices(["yes, of course"]), seed=1, logprobs=2)
    specs = [RequestSpec("abc", sampling) for sampling in plain]
    *others, answer = engine.generate([*specs, guided])
    assert [o.token_ids for o in others] == [o.token_ids for o in alone]
    assert [o.logprobs for o in others] == [o.logprobs for o in alone]
    assert answer.text == "yes, of course"
    # Log-probabilities are those before the mask, so forbidden tokens are among the alternatives.
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
def test_unusable_grammars_are_refused_quickly_in_one_sentence(guides: Guides, name: str) -> None:
    began = time.process_time()
    try:
        guides.compile(HOSTILE[name]())
    except GrammarError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
    else:
        # A large grammar within the limits is served, and each of its tokens is fast too.
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
    "ambiguous": (lambda: Grammar.of_text(AMBIGUOUS), "too complex to follow: use"),
}


def tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize("name", WRONG)
def test_errors_of_a_grammar_name_the_place(guides: Guides, name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(GrammarError, match=message):
        guides.compile(make())


def test_a_grammar_that_becomes_too_complex_ends_only_its_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = oracle()
    grammar = Grammar.of_text('root ::= [b-d]{45} "a"{1000000}')
    refused, other = engine.generate([spec(grammar), spec(None, max_tokens=9, ignore_eos=True)])
    assert refused.finish_reason == "error" and refused.is_refused
    assert refused.error is not None and "too complex to follow" in refused.error
    assert other.finish_reason == "length" and other.error is None and not other.is_refused
    [record] = [record for record in caplog.records if record.levelname != "INFO"]
    assert record.exc_info is None and "\n" not in record.getMessage()


def test_limits_do_not_depend_on_the_number_of_answers() -> None:
    """Guard against a limit reached by copies of a matcher, which share their states: 2^18 here."""
    guides = Guides(ByteTokenizer(), ByteTokenizer().vocab_size)
    grammar, draw = Grammar.of_regex("(a|b)*a(a|b){18}"), random.Random(1)
    for _ in range(120):
        guide = guides.rule(grammar)
        answer = np.frombuffer(bytes(draw.choices(b"ab", k=200)), np.uint8).astype(np.int32)
        for length in range(0, 200, 10):
            guide.masks(answer[:length], answer[length : length + 8])
            assert not guide.is_done(answer[:length])


def test_whitespace_in_json_is_limited(guides: Guides) -> None:
    grammar = Grammar.of_schema(SCHEMA)
    encode = ByteTokenizer().encode
    for text, length in (
        ('{"name": "x",   ', 14),
        ('{"name" \n', 8),
        ("{\n\n", 2),
        ("{\n" + " " * 40, 10),
        ('{"name":"x","age":1,"kind":"home"}', None),
        (json.dumps({"name": "x", "age": 1, "kind": "home"}), None),
        (json.dumps({"name": "x", "age": 1, "kind": "home"}, indent=4), None),
    ):
        tokens = np.array(encode(text), np.int32)
        kept = guides.rule(grammar).possible(tokens[:0], tokens)
        assert len(kept) == (len(tokens) if length is None else length), text


def test_without_the_library_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=re.escape(install_command("engine"))):
        Guides(ByteTokenizer(), 320).compile(Grammar.of_object())


def test_masks_equal_a_trial_of_every_token(guides: Guides) -> None:
    """Compare with a trial of every token, and masks after drafts with those after the same
    tokens."""
    grammar = Grammar.of_regex("a[bc]{1,3}d?")
    guide = guides.rule(grammar)
    answer, drafts = np.array([97, 98], np.int32), np.array([99, 98, 100, 99], np.int32)
    kept = guide.possible(answer, drafts)
    assert kept.tolist() == [99, 98, 100]
    ending = np.array([99, 258, 258], np.int32)
    assert guide.possible(answer, ending).tolist() == [99], (
        "tokens that end an answer are not drafted"
    )
    masks = guide.masks(answer, kept)
    for length, mask in enumerate(masks):
        text = bytes([*answer.tolist(), *kept.tolist()[:length]]).decode()
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")[:320]).tolist()
        pattern = re.compile("a[bc]{1,3}d?")
        expected = [c for c in range(128) if pattern.fullmatch(text + chr(c))]
        expected += [256, 258] if pattern.fullmatch(text) else []
        assert allowed == expected
    fresh = guides.rule(grammar)
    assert np.array_equal(fresh.masks(answer, kept[:0])[0], masks[0])
    assert not guide.is_done(answer) and guide.is_done(np.array([97, 98, 100], np.int32))


def test_only_the_answer_after_the_reasoning_is_guided(guides: Guides) -> None:
    encode = ByteTokenizer().encode
    for grammar, answer in (
        (Grammar.of_regex("a/[b-d]"), "a/c"),
        (Grammar.of_object(), '{"a": 1}'),
        (Grammar.of_text('root ::= "yes"'), "yes"),
    ):
        guide = guides.rule(grammar.behind("</think>"))
        right = np.array(encode(f"a {{ < </think>\n\n{answer}"), np.int32)
        wrong = np.array(encode("b</think>q"), np.int32)
        assert guide.possible(right[:0], wrong).tolist() == wrong[:-1].tolist()
        assert len(guide.possible(right[:0], right)) == len(right)
        assert guide.is_done(right) and not guide.is_done(right[:-1])
