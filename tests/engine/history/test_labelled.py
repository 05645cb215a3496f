"""Tests of cache-miss explanations on labelled pairs of requests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from engine import RequestSpec
from engine.plugins.diagnostics.explain import Explanation, Found
from engine.plugins.diagnostics.explanations import (
    Explanations,
    Remembered,
    for_anthropic,
    for_openai,
)
from engine.server.access import Tenant
from engine.server.context import AskedChat
from engine.text.chat_prompt import render_chat
from engine.text.tokenizer import ByteTokenizer, ChatTemplate
from hybridcache.api import Losses
from tests.engine.history.agents.scripted import ScriptedEngine

THINKING = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t|tojson ~ '\\n' }}{% endfor %}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' ~ messages[0].content ~ '<|im_end|>\\n' }}
{%- endif %}
{%- if shout %}{{ '!' }}{% endif %}
{%- for m in messages %}{% if m.role != 'system' %}
{{- '<|im_start|>' ~ m.role ~ '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n' }}{% endif %}
{{- m.content }}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>' ~ c.function.name ~ c.function.arguments|tojson ~ '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}
{%- else %}{{ '<think>\\n' }}{% endif %}{% endif %}"""
"""Template like Qwen3.5's: tools before the system message, reasoning kept since the last
question."""
COUNTING = "{{ messages|length }} messages\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

Chat = dict[str, Any]


def tool(name: str, **more: Any) -> Chat:
    parameters = {"type": "object", "properties": {"path": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def say(role: str, content: str, **more: Any) -> Chat:
    return {"role": role, "content": content, **more}


def call(name: str, **arguments: Any) -> Chat:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


BASE: Chat = {
    "tools": [tool("read", description="Read a file."), tool("write"), tool("list")],
    "messages": [
        say("system", "You are a careful engineer. Today is Monday. " * 4),
        say("user", "What is in a.txt? " * 5),
        say(
            "assistant", "", reasoning_content="I read it.", tool_calls=[call("read", path="a.txt")]
        ),
        say("tool", "alpha beta gamma " * 6, tool_call_id="call_1"),
        say("assistant", "", reasoning_content="And b.", tool_calls=[call("read", path="b.txt")]),
        say("tool", "delta epsilon " * 6, tool_call_id="call_2"),
    ],
    "variables": {},
}
ANSWER = "two files\n</think>\n\nBoth are Greek letters.<|im_end|>"
ECHO = say("assistant", "Both are Greek letters.", reasoning_content="two files")
GO_ON = [ECHO, say("user", "Write them down.")]
TOOL_LOOP = [
    say("assistant", "", reasoning_content="so", tool_calls=[call("write", path="c")]),
    say("tool", "done", tool_call_id="call_3"),
]
PLAIN: Chat = {
    "messages": [
        say("system", "Be brief. " * 12),
        *(say("user", f"Question {n}. " * 9) for n in "ab"),
    ],
}
Edit = Callable[[Chat], None]
Prepare = Callable[[ScriptedEngine], None]


@dataclass
class Pair:
    """Two requests, and the expected reason for the miss of the second."""

    name: str
    edit: Edit
    change: str | None
    how: str | None = None
    path: str | None = None
    cause: str | None = ""
    """Expected cause, or "" if it equals ``change``."""
    base: Chat = field(default_factory=lambda: BASE)
    template: str | None = THINKING
    answer: str = ANSWER
    prepare: Prepare = lambda engine: None
    engine: dict[str, Any] = field(default_factory=dict)
    model: str = "m"
    anthropic: str | None = None
    openai: str = "cache_hit"


def message(index: int, **fields: Any) -> Edit:
    return lambda chat: chat["messages"][index].update(fields)


def turns(*more: Chat) -> Edit:
    return lambda chat: chat["messages"].extend(copy.deepcopy(more))


def both(*edits: Edit) -> Edit:
    def edit(chat: Chat) -> None:
        for one in edits:
            one(chat)

    return edit


def system(how: str, text: str) -> Pair:
    edit = both(message(0, content=text), turns(*TOOL_LOOP))
    return Pair(f"system {how}", edit, "system", "changed", "messages[0].content",
                anthropic="system_changed", openai="input_changed")  # fmt: skip


def tools(name: str, how: str, path: str, edit: Callable[[list[Chat]], Any]) -> Pair:
    return Pair(f"tools {name}", lambda chat: (edit(chat["tools"]), None)[1], "tools", how, path,
                anthropic="tools_changed", openai="tools_changed")  # fmt: skip


def messages(name: str, how: str, path: str, edit: Edit, openai: str = "input_changed") -> Pair:
    return Pair(f"messages {name}", edit, "messages", how, path,
                anthropic="messages_changed", openai=openai)  # fmt: skip


def variables(name: str, how: str, key: str, before: Chat, after: Chat, openai: str) -> Pair:
    base = {**BASE, "variables": before}
    return Pair(f"variables {name}", lambda chat: chat.update(variables=after), "variables", how,
                f"chat_template_kwargs.{key}", base=base,
                anthropic="unavailable", openai=openai)  # fmt: skip


def answered(name: str, echo: Chat) -> Pair:
    edit = turns(echo, say("tool", "ok", tool_call_id="call_9"))
    return Pair(f"answer {name}", edit, "answer", "changed", "messages[6]")


def lost(name: str, cause: str | None, **more: Any) -> Pair:
    more = {
        "edit": turns(say("assistant", "Yes."), say("user", "More.")),
        "change": None,
        "answer": "Yes.<|im_end|>",
    } | more
    return Pair(f"cache {name}", cause=cause, base=PLAIN, template=None, **more)


def crowd(num_chats: int, size: int) -> Prepare:
    """Return a function that fills the memory with other prompts."""

    def prepare(engine: ScriptedEngine) -> None:
        for number in range(num_chats):
            prompt = engine.tokenizer.encode(f"{number} another matter entirely " * size)
            engine.answer(RequestSpec(prompt[: 24 * size]), [10])

    return prepare


def forget(engine: ScriptedEngine) -> None:
    engine.engine.reset_prefix_cache()


INPUT = {"anthropic": "messages_changed", "openai": "input_changed"}
FEW_SLOTS = {"num_slots": 3, "eviction": "lru"}
"""Settings with which prompts that come once evict used states; the default would keep them."""
PAIRS = [
    system("with the date", "You are a careful engineer. Today is Tuesday. " * 4),
    system("longer", BASE["messages"][0]["content"] + "Be quick."),
    system("shorter", BASE["messages"][0]["content"][:90]),
    system("with one more blank", BASE["messages"][0]["content"] + " "),
    system("with a header in front", "billing: cch=9f\n" + BASE["messages"][0]["content"]),
    Pair("system removed", lambda chat: chat["messages"].pop(0), "system", "removed", "messages[0]",
         anthropic="system_changed", openai="input_changed"),
    Pair("system added", lambda chat: chat["messages"].insert(0, say("system", "Hello.")), "system",
         "added", "messages[0]", base={**BASE, "messages": BASE["messages"][1:]},
         anthropic="system_changed", openai="input_changed"),
    Pair("system and tools", both(message(0, content="x"), lambda chat: chat["tools"].pop(0)), "tools",
         "removed", "tools[0]", anthropic="tools_changed", openai="tools_changed"),
    tools("added at the end", "added", "tools[3]", lambda t: t.append(tool("grep"))),
    tools("added in front", "added", "tools[0]", lambda t: t.insert(0, tool("grep"))),
    tools("removed at the end", "removed", "tools[2]", lambda t: t.pop()),
    tools("removed in the middle", "removed", "tools[1]", lambda t: t.pop(1)),
    tools("reordered", "reordered", "tools[0]", lambda t: t.reverse()),
    tools("with another description", "changed", "tools[0]", lambda t: t[0]["function"].update(description="R.")),
    tools("with the keys in another order", "changed", "tools[1]",
          lambda t: t[1].update(function=dict(reversed(t[1]["function"].items())))),
    tools("all removed", "removed", "tools[0]", lambda t: t.clear()),
    messages("question edited", "changed", "messages[1].content", message(1, content="And c?")),
    messages("tool result edited", "changed", "messages[3].content", message(3, content="[cut]")),
    messages("last result edited", "changed", "messages[5].content", message(5, content="[cut]")),
    messages("arguments edited", "changed", "messages[2].tool_calls[0]",
             message(2, tool_calls=[call("read", path="./a.txt")])),
    messages("another tool called", "changed", "messages[4].tool_calls[0]",
             message(4, tool_calls=[call("list", path="b.txt")])),
    messages("one more call", "changed", "messages[4].tool_calls[1]",
             message(4, tool_calls=[call("read", path="b.txt"), call("list")])),
    messages("reasoning edited", "changed", "messages[2].reasoning_content",
             message(2, reasoning_content="Hm.")),
    messages("reasoning removed", "changed", "messages[4].reasoning_content",
             message(4, reasoning_content=None)),
    messages("content edited", "changed", "messages[2].content", message(2, content="Well.")),
    messages("another role", "changed", "messages[3].role", message(3, role="user")),
    messages("one removed", "removed", "messages[2]",
             lambda chat: chat["messages"].__delitem__(slice(2, 4)), "context_compacted"),
    messages("compacted", "changed", "messages[1].content",
             lambda chat: chat["messages"].__setitem__(slice(1, 6), [say("user", "Summary.")])),
    messages("one inserted", "added", "messages[3]",
             lambda chat: chat["messages"].insert(3, say("user", "Wait."))),
    messages("two exchanged", "reordered", "messages[2]",
             lambda chat: chat["messages"].__setitem__(slice(2, 6), [BASE["messages"][i] for i in (4, 5, 2, 3)])),
    variables("thinking off", "added", "enable_thinking", {}, {"enable_thinking": False},
              "reasoning_effort_changed"),
    variables("thinking off again", "changed", "enable_thinking", {"enable_thinking": True},
              {"enable_thinking": False}, "reasoning_effort_changed"),
    variables("one removed", "removed", "shout", {"shout": True}, {}, "unavailable"),
    answered("edited", {**ECHO, "content": "Both are letters."}),
    answered("without its reasoning", say("assistant", "Both are Greek letters.")),
    answered("trimmed", {**ECHO, "content": "Both are Greek letters"}),
    answered("with another call",
             {**ECHO, "tool_calls": [call("write", path="c", mode="a")]}),
    Pair("template drops reasoning", turns(*GO_ON), "template", "changed", "messages[2].content"),
    Pair("template drops the header's reasoning", turns(ECHO, say("user", "Go on.")), "answer", "changed",
         "messages[2]", base={**BASE, "messages": BASE["messages"][:2]}, cause="answer"),
    Pair("template counts messages", turns(say("assistant", "Yes."), say("user", "More.")), "template",
         "changed", None, base=PLAIN, template=COUNTING, answer="Yes.<|im_end|>"),
    Pair("another model", turns(*GO_ON), "model", "changed", "model", model="other",
         anthropic="model_changed", openai="model_changed"),
    Pair("another model, the same chat", lambda chat: None, "model", "changed", "model", model="other",
         anthropic="model_changed", openai="model_changed"),
    lost("goes on", "below_grid"),
    lost("the same again", "below_grid", edit=lambda chat: None),
    lost("one question less", "messages", edit=lambda chat: chat["messages"].pop(), change="messages",
         how="removed", path="messages[2]", openai="context_compacted", anthropic="messages_changed"),
    lost("was emptied", "forgotten", prepare=forget),
    lost("was emptied, the same again", "forgotten", prepare=forget, edit=lambda chat: None),
    lost("evicted KV", "kv_evicted", prepare=crowd(6, 20), engine={"num_kv_tokens": 1024}),
    lost("evicted KV, the same again", "kv_evicted", prepare=crowd(6, 20), edit=lambda chat: None,
         engine={"num_kv_tokens": 1024}),
    lost("evicted the state", "checkpoint_evicted", prepare=crowd(6, 6), engine=FEW_SLOTS),
    lost("evicted the state, the same again", "checkpoint_evicted", prepare=crowd(6, 6),
         edit=lambda chat: None, engine=FEW_SLOTS),
    lost("saved no state", "never_checkpointed", engine={"checkpoints": ("branch",)}),
    lost("saved no state, the same again", "never_checkpointed", edit=lambda chat: None,
         engine={"checkpoints": ("branch",)}),
    lost("has only one slot", "refused", answer="Yes, yes, yes.<|im_end|>",
         engine={"num_slots": 1, "checkpoints": ("branch", "boundary", "backoff", "end")},
         edit=turns(say("assistant", "Yes, yes, yes."), say("user", "More."))),
    lost("evicted KV, and the system changed", "system", prepare=crowd(6, 20), change="system",
         how="changed", path="messages[0].content", edit=message(0, content="Be long."),
         engine={"num_kv_tokens": 1024}, anthropic="system_changed", openai="input_changed"),
    lost("evicted the state, and the answer edited", "checkpoint_evicted", prepare=crowd(6, 6),
         engine=FEW_SLOTS, change="answer", how="changed", path="messages[3]",
         edit=turns(say("assistant", "Yes!"), say("user", "More."))),
    lost("saves every 128", "below_grid", engine={"grid": 128}),
    lost("was emptied, and the question edited", "forgotten", prepare=forget, change="messages",
         how="changed", path="messages[2].content",
         edit=both(message(2, content="Question b. " * 8 + "Really?")), **INPUT),
    lost("was emptied, and the system changed", "system", prepare=forget, change="system", how="changed",
         path="messages[0].content", edit=message(0, content="Be long."), anthropic="system_changed",
         openai="input_changed"),
    lost("saved no state, and the question edited", "messages", change="messages",
         how="changed", path="messages[2].content", engine={"checkpoints": ("branch",)},
         edit=message(2, content="Question b. " * 8 + "Really?"), **INPUT),
]  # fmt: skip


def run(
    pair: Pair, namespace: str | None = None, key: int | None = 0
) -> tuple[Explanation | None, Explanations]:
    """Return the explanation of the second request of a pair, compared with the first."""
    tokenizer = ByteTokenizer()
    if pair.template is not None:
        tokenizer.chat_template = ChatTemplate(pair.template)
    engine = ScriptedEngine(tokenizer, **pair.engine)
    explanations = Explanations(tokenizer, 1 << 20, grid=64)
    base = copy.deepcopy(pair.base)
    later = copy.deepcopy(pair.base)
    pair.edit(later)
    explanation = None
    for name, body, model in (("first", base, "m"), ("second", later, pair.model)):
        if name == "second":
            pair.prepare(engine)
        parts = {"tools": body.get("tools"), "variables": body.get("variables")}
        prompt = render_chat(tokenizer, body["messages"], **parts)
        spec = RequestSpec(
            prompt.token_ids,
            namespace=namespace,
            boundaries=prompt.boundaries,
            answer_survives=prompt.answer_survives,
        )
        output = engine.answer(spec, tokenizer.encode(pair.answer))
        tenant, tokens = Tenant(key, namespace), output.prompt_token_ids
        request = AskedChat(name, tokens, model, tenant, body["messages"], **parts, size=100)
        chat = explanations.diagnose(request)
        remembered = chat.remembered(output)
        assert remembered is not None
        explanation = explanations.compare(remembered, tenant, "first")
        chat.end(output)
    return explanation, explanations


def _check(pair: Pair, explanation: Explanation) -> None:
    parting = explanation.parting
    assert (parting and parting.change) == pair.change, explanation.text
    if parting is not None:
        assert (parting.how, parting.path) == (pair.how, pair.path), explanation.text
    assert explanation.cause == (pair.change if pair.cause == "" else pair.cause), explanation.lost
    shown = for_anthropic(explanation)
    assert (shown and shown["cache_miss_reason"]["type"]) == pair.anthropic
    openai = for_openai(explanation)
    assert openai.get("reason", openai["type"]) == pair.openai


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_every_labelled_miss_is_explained(pair: Pair) -> None:
    explanation, explanations = run(pair)
    assert explanation is not None
    _check(pair, explanation)
    assert explanation.cached_len + sum(explanation.lost.values()) >= explanation.shared_len
    if explanation.parting is not None and pair.model == "m":
        assert explanation.parting.was is not None and explanation.parting.now is not None
        assert explanation.parting.was != explanation.parting.now
    explanations.memory.check()


@pytest.mark.parametrize("pair", PAIRS[:42:6], ids=lambda pair: pair.name)
def test_in_a_namespace_only_hashes_are_kept_and_no_text_is_shown(pair: Pair) -> None:
    explanation, explanations = run(pair, namespace="tenant")
    assert explanation is not None and explanation.parting is not None
    open_one, _ = run(pair)
    assert open_one is not None and open_one.parting is not None
    found = explanation.parting
    assert (found.at, found.change, found.how) == tuple(
        getattr(open_one.parting, name) for name in ("at", "change", "how")
    )
    assert found.before is found.was is found.now is None
    entry = explanations.memory.get((Tenant(0, "tenant"), "first"))
    assert entry is not None and entry.chat is None
    ids = set(ByteTokenizer().encode(ANSWER))
    assert not ids & set(entry.outline.tokens.tolist())
    assert explanations.memory.find("first") == ("first", entry)
    others = Tenant(0, "another"), Tenant(1, "tenant"), Tenant(None, "tenant"), Tenant(0), Tenant()
    assert all(explanations.memory.get((other, "first")) is None for other in others)


def field_left_out(chat: Chat) -> None:
    del chat["messages"][1]["private_field"]


PRIVATE: Chat = {
    **BASE,
    "messages": [BASE["messages"][0], {**BASE["messages"][1], "private_field": "x"}],
    "variables": {"shout": True},
}
NAMED = [
    messages("private field", "changed", "messages[1].private_field", field_left_out),
    variables("left out", "removed", "shout", {"shout": True}, {}, "unavailable"),
]
NAMED[0].base, NAMED[0].template = PRIVATE, "{{ messages }}"


@pytest.mark.parametrize("pair", [*PAIRS[::7], *NAMED], ids=lambda pair: pair.name)
def test_without_a_key_text_of_the_earlier_request_is_hidden(pair: Pair) -> None:
    """Compare with an explanation with a key: text and names are removed, the rest is the same."""
    mine, _ = run(pair)
    public, _ = run(pair, key=None)
    assert mine is not None and public is not None
    assert (public.cause, public.lost, public.shared_len) == (
        mine.cause,
        mine.lost,
        mine.shared_len,
    )
    if mine.parting is not None:
        assert public.parting is not None and public.parting.was is None
        assert (public.parting.at, public.parting.now) == (mine.parting.at, mine.parting.now)
    assert not any(name in public.text for name in ("private_field", "shout"))
    if pair in NAMED:
        assert any(name in mine.text for name in ("private_field", "shout"))


SAME = [say("user", "Go on. " * 20), say("assistant", "Done."), say("user", "Go on. " * 20)]
REPEATED = [
    messages("first of two equal ones edited", "changed", "messages[0].content", message(0, content="Stop.")),
    messages("first edited, and repeated later", "changed", "messages[0].content",
             both(message(0, content="Stop."), turns(say("assistant", "Yes."), SAME[0]))),
    messages("one inserted before equal ones", "added", "messages[0]",
             lambda chat: chat["messages"].insert(0, say("user", "Wait."))),
]  # fmt: skip
for _pair in REPEATED:
    _pair.base = {"messages": SAME}


def explanation_of(base: Chat, later: Chat, **engine: Any) -> dict[str, Any]:
    """Return the explanation of ``later`` for an operator, without the id of an earlier request."""
    pair = Pair("", lambda chat: (chat.clear(), chat.update(later))[0], None, base=base,
                template=None, answer="Yes.<|im_end|>", engine=engine)  # fmt: skip
    _, explanations = run(pair)
    found = explanations.look_up("second", None)
    assert found is not None
    return found


def test_a_conversation_that_shares_less_than_a_grid_step_is_new() -> None:
    later = {"messages": [say("user", "Something else entirely. " * 9)]}
    found = explanation_of(PLAIN, later)
    assert found["cause"] == "new" and "new conversation" in found["text"]
    assert "removed" not in found["text"] and found["text"].endswith(found["advice"])
    # The same question after another beginning is new too; the advice covers both.
    alone = {"messages": [say("system", "Be brief. " * 12), say("user", "How are you?")]}
    edited = {"messages": [say("system", "Today: " + "Be brief. " * 12), alone["messages"][1]]}
    found = explanation_of(alone, edited)
    assert found["parted"]["path"] == "messages[0].content" and found["cause"] == "new"
    assert "--volatile-line" in found["advice"]
    # More of the same messages are the same conversation: a time in the system message changed.
    more = [*edited["messages"], say("assistant", "Yes."), say("user", "And then?")]
    for base, later in ((alone, more), (PLAIN, [edited["messages"][0], *PLAIN["messages"][1:]])):
        found = explanation_of(base, {"messages": later})
        assert found["parted"]["path"] == "messages[0].content" and found["cause"] == "system"
        assert "at the end of the system message" in found["advice"]
    # A repeated short prompt is not new: it contains the whole earlier one.
    short = {"messages": [say("user", "Hi.")]}
    assert explanation_of(short, short)["cause"] != "new"
    # More than a grid step is shared.
    longer = {"messages": [say("system", "Be brief. " * 12 + "Now."), say("user", "Else?")]}
    assert explanation_of(PLAIN, longer)["cause"] == "system"


def store_request(explanations: Explanations, name: str, tokens: np.ndarray, found: Found) -> None:
    """Store a request without messages."""
    outline = explanations.outliner.outline(AskedChat(name, tokens, "m", Tenant(), ()))
    entry = Remembered(outline, found)
    explanations.memory.put((Tenant(), name), entry, entry.num_bytes)


def test_the_memory_is_bounded_and_drops_the_oldest() -> None:
    explanations = Explanations(ByteTokenizer(), 20_000)
    tokens = np.arange(1000, dtype=np.int32) % 250
    for number in range(10):
        found = Found(0, Losses(1000, 0, 0, 0, 0))
        store_request(explanations, str(number), tokens[number:], found)
        explanations.memory.check()
    memory = explanations.memory
    last = memory.get((Tenant(), "9"))
    assert last is not None and memory.find("0") is None
    assert memory.num_bytes > 15_000
    assert memory.nearest(last) is None, "no two requests begin alike"
    num_bytes = memory.num_bytes
    memory.put((Tenant(), "9"), last, last.num_bytes)
    memory.check()
    assert memory.num_bytes == num_bytes, "a reused id replaces its entry"
