"""Answers that follow a grammar: what comes out is what was asked for, whatever else the engine
does meanwhile, and no token of anybody else's changes."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineConfig, Grammar, RequestSpec, SamplingParams
from engine.guided.grammar import GrammarError, grammar_of_calls
from engine.guided.guide import Guides
from engine.run.oracle import OracleRunner
from engine.run.oracle_sampler import OracleSampler
from engine.text.byte_tokenizer import ByteTokenizer
from hybridcache.extras import install_command

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
        EngineConfig(check=True, **config),
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
    box = other._mailboxes.open(kept)
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
    "endless": (lambda: Grammar.of_text("root ::= root"), "rules never comes to an end."),
    "tool": (
        lambda: grammar_of_calls([*TOOLS, tool('say "x"', {"a": {"pattern": "(a"}})]),
        r"""^tool 'say "x"': .* unclosed group\.$""",
    ),
    "tool of ours": (
        lambda: grammar_of_calls([*TOOLS, tool("odd", {"a": {"multipleOf": 0}})]),
        "^tool 'odd': multipleOf must be",
    ),
    "much": (lambda: Grammar.of_regex("a{1000000000}"), "too complex to be followed: ask for"),
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
    assert refused.error is not None and "too complex to be followed" in refused.error
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
