"""Tests of chat templates: prompts, and the boundaries that the next turn shares."""

from __future__ import annotations

import json
import pickle
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from engine.front.chat_prompt import MARK, Conversation, Rendering, controls_of, mark_control_tokens
from engine.front.server.bodies import decode
from engine.front.server.schemas import ChatRequest
from engine.front.server.settings import ServerConfig
from engine.text import sandbox
from engine.text.sandbox import TOO_MUCH, Renderer, TemplateError
from engine.text.tokenizer import ChatTemplate
from engine.text.tokenizer_files import HFTokenizer
from hybridcache.radix.tokens import common_prefix_len
from tests.engine.front.agent import TEMPLATE
from tests.engine.front.server.tool_calls.templates import FORMS
from tests.refused import refused
from tests.selection import num_examples

CHAT = [
    {"role": "system", "content": "Be brief. " * 10},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!", "reasoning_content": "hm"},
    {"role": "user", "content": "And again"},
]


def _tokenizer(template: str | None = None) -> HFTokenizer:
    tokenizer = HFTokenizer()
    if template is not None:
        tokenizer.chat_template = ChatTemplate(template)
    return tokenizer


EVERYTHING = """\
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ (m.name or '') ~ m.content }}
{%- for call in m.tool_calls or [] %}{{ call|tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if tools %}{{ tools|tojson }}{% endif %}{{ extra or '' }}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Template that writes every field of a chat."""
MARKED = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "\ue001", "a", " ", "</think>"]
    ),
    max_size=6,
).map("".join)


@given(st.lists(st.tuples(MARKED, MARKED, MARKED), min_size=1, max_size=3), MARKED)
def test_chat_contents_stay_text_and_boundaries_are_exact(
    parts: list[tuple[str, str, str]], extra: str
) -> None:
    """Check that no text becomes a control token, none is lost, and the next turn forks at the
    boundary."""
    tokenizer = _tokenizer(EVERYTHING)
    chat = [
        {
            "role": "user",
            "content": content,
            "name": name,
            "tool_calls": [{"function": {"name": "f", "arguments": {argument: [argument]}}}],
        }
        for content, name, argument in parts
    ]
    tools = [{"function": {"name": extra, "description": [extra]}}]
    variables = {"extra": extra}
    prompt = Rendering(tokenizer, Conversation(chat, tools, variables)).prompt()
    assert prompt.tokens.tolist().count(257) == len(chat) + 1
    assert prompt.tokens.tolist().count(258) == len(chat)
    assert tokenizer.chat_template is not None
    text = tokenizer.chat_template.render(
        chat, tools=tools, variables=variables, add_generation_prompt=True
    )
    assert tokenizer.decode(prompt.tokens.tolist(), skip_special_tokens=False) == text
    turn = [{"role": "assistant", "content": "\ue000"}, {"role": "user", "content": "\ue000"}]
    later = Rendering(tokenizer, Conversation([*chat, *turn], tools, variables)).prompt()
    ids = (one.tokens for one in (prompt, later))
    assert common_prefix_len(*ids) in prompt.marks["boundaries"].positions


def test_roles_stay_roles() -> None:
    """Guard against templates with control tokens such as ``<|im_user|>``, which compare roles."""
    chat = [{"role": "user", "content": "user"}]
    assert mark_control_tokens(controls_of(("<|im_user|>", "<|im_end|>")), chat) == chat


def test_texts_and_free_names_cannot_become_control_tokens() -> None:
    plain = {"role": "user", "content": ["a", {"b": 1}]}
    other = {"role": "tool", "content": "c", "more": {"a<|x|>b": ["d"], "e": plain}}
    marked = mark_control_tokens(controls_of(("<|x|>",)), given := [plain, other])
    name = f"a<{MARK}|x|>b"
    assert marked == [plain, {**other, "more": {name: ["d"], "e": plain}}]
    assert list(marked[1]["more"]) == [name, "e"]
    assert given == [plain, other] and MARK not in str(given)


@pytest.mark.parametrize(("token", "text"), [("aba", "xababax"), ("||", "a|||b"), ("aa", "aaaa")])
def test_no_control_token_is_left_where_two_overlap(token: str, text: str) -> None:
    marked = mark_control_tokens(controls_of((token,)), text)
    assert token not in marked and marked.replace(MARK, "") == text


@pytest.mark.parametrize(
    ("content", "is_thinking"),
    [("a", False), ("<think>a", True), ("<think>a</think>b", False), ("</think>a<think>b", True)],
)
def test_a_continued_answer_thinks_only_behind_an_open_mark(
    content: str, is_thinking: bool
) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    conversation = Conversation(chat, add_generation_prompt=False, continues_last=True)
    prompt = Rendering(_tokenizer(TEMPLATE), conversation).prompt()
    assert prompt.marks["is_thinking"] == is_thinking


PREFILLS = [
    "The answer is",
    "```json",
    "return",
    "\n",
    " ",
    "\t",
    "\r\n",
    "é",
    "漢字",
    "<think>",
    "</think>",
    "{",
    "<",
    "im_end",
    "a",
]


@pytest.mark.parametrize("source", [*FORMS.values(), TEMPLATE])
@given(st.lists(st.sampled_from(PREFILLS), min_size=1, max_size=200).map("".join))
@settings(max_examples=num_examples(200))
def test_continued_messages_are_those_of_transformers(source: str, content: str) -> None:
    """Up to contents that it refuses, because the template reads reasoning in them."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}] * 2
    conversation = Conversation(chat, add_generation_prompt=False, continues_last=True)
    found = Rendering(_tokenizer(source), conversation).text.replace(MARK, "")
    with suppress(ValueError):
        [[wanted], _] = render_jinja_template([chat], None, None, source, False, True)
        assert found == wanted


def test_a_template_that_drops_the_last_message_continues_none() -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]
    conversation = Conversation(chat, add_generation_prompt=False, continues_last=True)
    with pytest.raises(TemplateError, match="leaves out the content of the last message"):
        Rendering(_tokenizer("{{ messages[0].content }}"), conversation)


def test_a_long_chat_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = _tokenizer(TEMPLATE)
    encoded = []
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer,
        "encode",
        lambda text, **options: encoded.append(len(text)) or encode(text, **options),
    )
    chat = [*CHAT, {"role": "assistant", "content": "word " * 20_000}, CHAT[-1]]
    Rendering(tokenizer, Conversation(chat)).prompt()
    assert max(encoded) > 100_000 > sum(sorted(encoded)[:-1]) * 10


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("{{ 1 // n }}", 0),
        ("{{ 2.0 ** n }}", 10**6),
        ("{% for i in range(n) %}x{% endfor %}", 10**30),
        ("{{ [].pop(n) }}", 0),
        ("{{ n|int }}", float("inf")),
        ("{{ n.x.y }}", {}),
        ("{{ n['a'] }}", 5),
        ("{{ 'x'.encode(n) }}", "nope"),
        ("{{ messages|batch(n)|list }}", 0),
        ("{{ '%c' % n }}", 10**9),
        ("{{ {}[n] }}", []),
    ],
)
def test_any_failure_of_a_template_is_a_template_error(source: str, value: Any) -> None:
    """Guard against values chosen by the client."""
    try:
        ChatTemplate(source).render(CHAT, variables={"n": value})
    except TemplateError as error:
        assert str(error)


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{{ ('a' * 10000000000)|length }}",
    "list": "{{ ([0] * 10000000000)|length }}",
    "power": "{{ 10 ** (10 ** 9) > 1 }}",
    "words": "{{ lipsum(n=1000000)|length }}",
    "indent": "{{ messages|tojson(indent=1000000000)|length }}",
    "width": "{{ 'a'.center(10000000000)|length }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "wrap": "{{ ('a ' * 3000000)|wordwrap(1)|length }}",
    "replace": "{{ ('a' * 9000000)|replace('a', 'b' * 9000000)|length }}",
    "doubles": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}",
    "date": "{{ strftime_now('%c' * 100000000)|length }}",
    "source": "{{ 1 }}" * 400_000,
}
"""Templates without an end, or with a text that no memory holds."""


@pytest.mark.full("loops", "indent", "wrap", "doubles")
@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_an_end_is_refused_at_the_start(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatTemplate, "renderer", Renderer(limit_s=0.1))
    with pytest.raises(TemplateError) as refusal:
        ChatTemplate(ENDLESS[name])
    assert str(refusal.value) == TOO_MUCH
    assert ChatTemplate("{{ messages[0].content }}").render(CHAT) == CHAT[0]["content"]


def test_a_chat_that_exceeds_the_limits_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The template is proved with a short chat; the process of a longer one is replaced."""
    monkeypatch.setattr(ChatTemplate, "renderer", Renderer(limit_s=0.1))
    template = ChatTemplate(
        "{% for i in range(n or 1) %}{% for j in range(n or 1) %}x{% endfor %}{% endfor %}"
    )
    refused("2 s or 1 GiB", template.render, CHAT, variables={"n": 99999}, kind=TemplateError)
    assert template.render(CHAT, variables={"n": 2}) == "xxxx"


def test_an_interrupt_leaves_no_answer_for_the_next_rendering(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template, receive = ChatTemplate("{{ n }}"), Connection.recv_bytes

    def interrupted(pipe: Connection) -> bytes:
        monkeypatch.setattr(Connection, "recv_bytes", receive)
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "recv_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        template.render(CHAT, variables={"n": 1})
    assert template.render(CHAT, variables={"n": 2}) == "2"


PARTS = st.lists(st.tuples(st.sampled_from(["", "a", "b "]), st.booleans()), max_size=3)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), PARTS), min_size=1))
def test_a_conversation_has_every_part_and_the_last_marked_places(
    given_messages: list[tuple[str, list[tuple[str, bool]]]],
) -> None:
    """Compare with a plain reading: parts on lines, and a cut behind each mark except the end."""
    mark = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {
            "role": role,
            "content": [{"type": "text", "text": text} | (mark if m else {}) for text, m in parts],
        }
        for role, parts in given_messages
    ]
    body = decode(ChatRequest, json.dumps({"messages": messages}).encode(), ServerConfig())
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chat = body.conversation(ChatTemplate(source), {})
    texts = [[text for text, _ in parts] for _, parts in given_messages]
    assert [one["content"] for one in chat.messages] == ["\n".join(each) for each in texts]
    cuts = [
        (index, "\n".join(texts[index][:end]) if end < len(parts) else None)
        for index, (_, parts) in enumerate(given_messages)
        for end, (_, is_marked) in enumerate(parts, 1)
        if is_marked
    ]
    assert [*chat.cuts] == [cut for cut in cuts if cut != (len(messages) - 1, None)][-4:]


@pytest.mark.parametrize("num_bytes", [20, None], ids=["in a question", "before the answer"])
def test_the_process_of_templates_ends_silently_after_the_other_one(num_bytes: int | None) -> None:
    command = [sys.executable, "-P", "-s", sandbox.__file__, "2.0"]
    ours, other = socket.socketpair()
    with other, subprocess.Popen(command, stdin=other.fileno(), stderr=subprocess.PIPE) as process:
        other.close()
        question = pickle.dumps(("{{ 1 }}", {}))
        ours.sendall(struct.pack("!i", len(question)) + question[:num_bytes])
        ours.close()
        assert process.stderr is not None and process.stderr.read() == b""
