"""Tests of guided answers: they follow their grammar under all conditions, and other requests'
tokens stay the same."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineConfig, Grammar, RequestSpec, SamplingParams
from engine.front.server.tool_calls.hermes import Hermes
from engine.plugins.guided import guides as guides_module
from engine.plugins.guided.guides import Guides
from engine.requests.logit_rules import FREE
from engine.text.grammar import GrammarError
from engine.text.tokenizer_files import HFTokenizer
from tests.endurance.grammars import chain
from tests.engine.front.agent import make_model_dir
from tests.engine.front.scripted import ScriptedSampler
from tests.oracle import OracleRunner, OracleSampler
from tests.refused import refused

pytest.importorskip("llguidance")


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object with exactly these properties."""
    required = {"required": [*properties], "additionalProperties": False}
    return {"type": "object", "properties": properties, **required}


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": closed({"at": {"$ref": "#/$defs/place"}})
            | {"$defs": {"place": {"enum": ["sky", "sea"]}}},
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
GRAMMARS = {
    "regex": (Grammar.of_regex("[0-9]{3}-[a-c]{1,20}z"), r"[0-9]{3}-[a-c]{1,20}z"),
    "choice": (Grammar.of_choices(["red", 'a "quote"\n', "bleu é"]), 'red|a "quote"\n|bleu é'),
    "lark": (Grammar.of_text('start: "a"{2,9} B\nB: /[xy]/'), "a{2,9}[xy]"),
    "property": (
        Grammar.of_schema(closed({"multipleOf": {"const": 3}})),
        r'{\s*"multipleOf"\s*:\s*3\s*}',
    ),
    "gbnf": (Grammar.of_text('root ::= ("yes" | "no") "!"'), "(yes|no)!"),
    "one tool": (
        Hermes(TOOLS).grammar("look"),
        r'<tool_call>\n{"name": "look", "arguments": {"at": "(sky|sea)"}}\n</tool_call>',
    ),
    "a format or calls": (
        Hermes(TOOLS[1:]).grammar(text=lambda: Grammar.of_schema(closed({"a": {"const": 3}}))),
        r'{\s*"a"\s*:\s*3\s*}|(<tool_call>\n{"name": "stop", "arguments": {.*}}\n</tool_call>\n?)+',
    ),
}


def oracle(**config: Any) -> Engine:
    runner = OracleRunner(config.pop("num_kv_tokens", 4096), 16, max_model_len=2048)
    runner.is_asynchronous = config.pop("asynchronous", False)
    return Engine(
        EngineConfig(check=True, **config),
        runner=runner,
        sampler=OracleSampler(),
        tokenizer=HFTokenizer(),
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


def test_references_of_any_depth_do_not_end_the_process(engine: Engine) -> None:
    """The library follows them by recursion. 1,800 levels ended a stack of 8 MiB."""
    refused("too big", engine.submit, spec(Grammar.of_schema(chain("items", 3000, 1))))
    refused("too large", engine.submit, spec(Grammar.of_schema(chain("items", 120, 60))))
    refused("fewer levels", Grammar.of_schema, chain("items", 1, 5000), kind=GrammarError)


def test_long_expressions_are_refused() -> None:
    """The time to compile one grows with the square of its length."""
    patterns = closed({f"p{index}": {"pattern": "a?" * 30} for index in range(100)})
    for make in (lambda: Grammar.of_regex("a?" * 3000), lambda: Grammar.of_schema(patterns)):
        refused("at most 4096 characters together", make, kind=GrammarError)


@pytest.mark.timeout(10)
def test_an_error_names_the_tool_in_linear_time(engine: Engine) -> None:
    """In quadratic time it would take half a minute, during which the engine waits."""
    long = {"description": " // tool '" * 24_000, **closed({"a": {"pattern": "a"}})}
    parameters = {"long": long, "x // tool y": closed({"a": {"pattern": "(a"}})}
    tools = [
        {"function": {"name": name, "parameters": schema, "strict": True}}
        for name, schema in parameters.items()
    ]
    with pytest.raises(GrammarError, match=r"^tool 'x // tool y': .*: unclosed group"):
        engine.compile(Hermes(tools).grammar())


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


LATER = 'start: /[a-z]{50}/ e\ne: e e | /[a-z]/ | e "+" e | e e e e | '
"""Ambiguous grammar with masks that take longer with every token."""
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
    grammar = Hermes(STRICT).free_grammar(may_think=True)
    specs = [spec(grammar, f"{seed}" * 40, seed=seed, max_tokens=200) for seed in range(4)]
    engine = oracle(**settings)
    engine._sampler = sampler = ScriptedSampler()
    for script in SCRIPTS:
        sampler.add([*script.encode(), 258])
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


@pytest.mark.parametrize(
    "settings", [{}, {"asynchronous": True, "overlap": "on"}, {"draft": "tree:4"}], ids=str
)
def test_a_grammar_beyond_the_limits_ends_only_its_request_at_the_same_token(
    settings: dict[str, Any],
) -> None:
    """The limits count items, not seconds, so every engine ends the answer at the same token."""
    slow = spec(Grammar.of_text(LATER), max_tokens=200, min_tokens=200)
    plain = spec(None, "other", max_tokens=250, ignore_eos=True)
    [reference, _] = oracle().generate([slow, plain])
    engine = oracle(**settings)
    for _ in range(2):  # With drafts, the second answer is drafted from the first.
        refused, other = engine.generate([slow, plain])
        assert refused.finish_reason == "error" and refused.failure.kind == "invalid"
        assert refused.error is not None and "too complex to follow" in refused.error
        assert refused.token_ids == reference.token_ids and len(refused.token_ids) > 5
        assert other.finish_reason == "length" and other.error is None
    engine.check()


@pytest.mark.parametrize("adds_space", [False, True])
def test_only_the_answer_after_the_reasoning_is_guided(tmp_path: Path, adds_space: bool) -> None:
    """Also with a vocabulary in which ``</think>`` is a token, and that adds a space to a text."""
    folder = make_model_dir(tmp_path)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["pre_tokenizer"]["add_prefix_space"] = adds_space
    described["decoder"] = {"type": "Sequence", "decoders": [described["decoder"]]}  # As LFM2's.
    (folder / "tokenizer.json").write_text(json.dumps(described))
    for tokenizer in (HFTokenizer(), HFTokenizer(folder)):
        guides = Guides(tokenizer, tokenizer.vocab_size)
        for grammar, answer in (
            (Grammar.of_regex("a/[b-d]é"), "a/cé"),
            (Grammar.of_schema({"type": "object"}), '{"a": 1}'),
            (Grammar.of_text('root ::= "yes"'), "yes"),
        ):
            guide = guides.rule(replace(grammar, end_of_reasoning="</think>"), None)
            right = np.array(tokenizer.encode(f"a {{ < </think>\n\n{answer}"), np.int32)
            wrong = np.array(tokenizer.encode("b</think>\nq"), np.int32)
            assert guide.possible(right[:0], wrong).tolist() == wrong[:-1].tolist()
            assert len(guide.possible(right[:0], right)) == len(right)
            assert guide.is_done(right) and not guide.is_done(right[:-1])
            for size in range(len(right)):
                [ruling] = guide.apply(right[:size], right[:0], [FREE])
                assert ruling.mask is not None
                assert np.unpackbits(ruling.mask, bitorder="little")[right[size]], size


def test_a_probe_of_another_tenants_grammar_finds_a_cold_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The time of a compilation would tell which schemas others use."""
    compiled: list[Grammar] = []
    make = guides_module.make_matcher

    def counting(library: Any, vocabulary: Any, grammar: Grammar) -> Any:
        compiled.append(grammar)
        return make(library, vocabulary, grammar)

    monkeypatch.setattr(guides_module, "make_matcher", counting)
    engine = Engine(
        EngineConfig(),
        runner=OracleRunner(4096, 16),
        sampler=OracleSampler(),
        tokenizer=HFTokenizer(),
    )
    schema, params = Grammar.of_schema(closed({"a": {"const": 3}})), SamplingParams(max_tokens=9)
    for namespace in ("one", "one", "two", "two", None, "one"):
        engine.compile(schema, namespace)
        engine.generate([RequestSpec([1, 2, 3], params, grammar=schema, namespace=namespace)])
    assert compiled == [schema] * 3  # once for each tenant


def test_a_tenant_cannot_evict_the_grammars_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guides_module, "NUM_REMEMBERED", 12)
    made: list[Grammar] = []
    make = guides_module.make_matcher
    monkeypatch.setattr(
        guides_module, "make_matcher", lambda *args: made.append(args[2]) or make(*args)
    )
    tokenizer = HFTokenizer()
    guides = Guides(tokenizer, tokenizer.vocab_size)
    grammars = [Grammar.of_regex(f"a{{1,{number}}}b") for number in range(2, 40)]

    def num_made(namespace: str, used: list[Grammar]) -> int:
        before = len(made)
        for grammar in used:
            guides.rule(grammar, namespace)
        return len(made) - before

    assert num_made("small", grammars[:4]) == 4
    assert num_made("middle", grammars[:3]) == 3
    assert num_made("large", grammars) == len(grammars)
    assert num_made("small", grammars[:4]) == num_made("middle", grammars[:3]) == 0
    assert num_made("large", grammars[-5:]) == 0
    assert num_made("large", grammars[-6:]) == 6  # An older one evicts the others in turn.
