"""Tests of cache-miss explanations on labelled pairs of requests."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from engine import EngineConfig, RequestSpec, ServerConfig
from engine.front.chat_prompt import Conversation, Rendering
from engine.front.server.access import Tenant
from engine.front.server.bodies import decode
from engine.front.server.endpoints.explain import WITHHELD, Explanations
from engine.front.server.schemas import ChatRequest
from engine.text.answers import AnswerReader, RequestOutput, as_message
from engine.text.tokenizer import ChatTemplate
from engine.text.tokenizer_files import HFTokenizer
from tests.engine.front.scripted import ScriptedEngine

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
FUNCTIONS = THINKING.replace("t|tojson", "t.function|tojson")

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
    ]
}
Edit = Callable[[Chat], None]
Prepare = Callable[[ScriptedEngine], None]


@dataclass
class Pair:
    """Two requests, and the expected reason for the miss of the second."""

    name: str
    edit: Edit
    change: str | None
    path: str | None = None
    cause: str | None = ""
    """Expected cause, or "" if it equals ``change``."""
    base: Chat = field(default_factory=lambda: BASE)
    template: str | None = THINKING
    answer: str = ANSWER
    prepare: Prepare = lambda engine: None
    engine: dict[str, Any] = field(default_factory=dict)


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
    return Pair(f"system {how}", edit, "system", "messages[0].content")


def tools(name: str, path: str, edit: Callable[[list[Chat]], Any]) -> Pair:
    return Pair(f"tools {name}", lambda chat: (edit(chat["tools"]), None)[1], "tools", path)


def messages(name: str, path: str, edit: Edit) -> Pair:
    return Pair(f"messages {name}", edit, "messages", path)


def variables(name: str, key: str, before: Chat, after: Chat) -> Pair:
    base = {**BASE, "variables": before}
    return Pair(f"variables {name}", lambda chat: chat.update(variables=after), "variables",
                f"chat_template_kwargs.{key}", base=base)  # fmt: skip


def answered(name: str, field: str, echo: Chat) -> Pair:
    edit = turns(echo, say("tool", "ok", tool_call_id="call_9"))
    return Pair(f"answer {name}", edit, "answer", f"messages[6].{field}")


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


FEW_SLOTS = {"num_slots": 3, "eviction": "lru"}
"""Settings with which prompts that come once evict used states; the default would keep them."""
PAIRS = [
    system("with the date", "You are a careful engineer. Today is Tuesday. " * 4),
    system("shorter", BASE["messages"][0]["content"][:90]),
    system("with a header in front", "billing: cch=9f\n" + BASE["messages"][0]["content"]),
    Pair("system removed", lambda chat: chat["messages"].pop(0), "system", "messages[0]"),
    Pair("system added", lambda chat: chat["messages"].insert(0, say("system", "Hello.")), "system", "messages[0]", base={**BASE, "messages": BASE["messages"][1:]}),
    Pair("system and tools", both(message(0, content="x"), lambda chat: chat["tools"].pop(0)), "tools", "tools[0]"),
    Pair("tools the same in the prompt, and the question edited", both(message(1, content="And c?"), lambda chat: chat["tools"][0].update(unwritten=1)), "messages", "messages[1].content", template=FUNCTIONS),
    Pair("tools behind the system message, which differs too", both(message(0, content="x"), lambda chat: chat["tools"].pop(0)), "system", "messages[0].content", template=None),
    tools("added at the end", "tools[3]", lambda t: t.append(tool("grep"))),
    tools("added in front", "tools[0]", lambda t: t.insert(0, tool("grep"))),
    tools("removed at the end", "tools[2]", lambda t: t.pop()),
    tools("reordered", "tools[0]", lambda t: t.reverse()),
    tools("with another description", "tools[0]", lambda t: t[0]["function"].update(description="R.")),
    tools("with the keys in another order", "tools[1]",
          lambda t: t[1].update(function=dict(reversed(t[1]["function"].items())))),
    tools("all removed", "tools[0]", lambda t: t.clear()),
    messages("question edited", "messages[1].content", message(1, content="And c?")),
    messages("tool result edited", "messages[3].content", message(3, content="[cut]")),
    messages("arguments edited", "messages[2].tool_calls[0]",
             message(2, tool_calls=[call("read", path="./a.txt")])),
    messages("one more call", "messages[4].tool_calls[1]",
             message(4, tool_calls=[call("read", path="b.txt"), call("list")])),
    messages("reasoning edited", "messages[2].reasoning_content",
             message(2, reasoning_content="Hm.")),
    messages("content edited", "messages[2].content", message(2, content="Well.")),
    messages("another role", "messages[3].role", message(3, role="user")),
    messages("with other ids of calls, and a result edited", "messages[5].content", both(message(2, tool_calls=[{**call("read", path="a.txt"), "id": "b"}]), message(3, tool_call_id="b"), message(5, content="[cut]"))),
    messages("one removed", "messages[2].reasoning_content",
             lambda chat: chat["messages"].__delitem__(slice(2, 4))),
    messages("compacted", "messages[1].content",
             lambda chat: chat["messages"].__setitem__(slice(1, 6), [say("user", "Summary.")])),
    messages("one inserted", "messages[3].role",
             lambda chat: chat["messages"].insert(3, say("user", "Wait."))),
    messages("two exchanged", "messages[2].reasoning_content",
             lambda chat: chat["messages"].__setitem__(slice(2, 6), [BASE["messages"][i] for i in (4, 5, 2, 3)])),
    variables("thinking off", "enable_thinking", {}, {"enable_thinking": False}),
    variables("one removed", "shout", {"shout": True}, {}),
    answered("edited", "content", {**ECHO, "content": "Both are letters."}),
    answered("without its reasoning", "reasoning_content", say("assistant", "Both are Greek letters.")),
    answered("with another call", "tool_calls",
             {**ECHO, "tool_calls": [call("write", path="c", mode="a")]}),
    Pair("template drops reasoning", turns(*GO_ON), "template"),
    Pair("template drops the header's reasoning", turns(ECHO, say("user", "Go on.")), "template",
         "messages[2]", base={**BASE, "messages": BASE["messages"][:2]}),
    Pair("template counts messages", turns(say("assistant", "Yes."), say("user", "More.")), "template",
         base=PLAIN, template=COUNTING, answer="Yes.<|im_end|>"),
    Pair("answer with a special token", turns(say("assistant", "Yes."), say("user", "More.")), "replay", "messages[3]", base=PLAIN, template=None, answer="Yes<|im_start|>.<|im_end|>"),
    lost("goes on", "below_grid"),
    lost("the same again", "below_grid", edit=lambda chat: None),
    lost("one question less", "messages", edit=lambda chat: chat["messages"].pop(), change="messages", path="messages[2]"),
    lost("was emptied", "forgotten", prepare=forget),
    lost("was emptied, the same again", "forgotten", prepare=forget, edit=lambda chat: None),
    lost("evicted KV", "kv_evicted", prepare=crowd(6, 20), engine={"num_kv_tokens": 1024}),
    lost("evicted the state", "checkpoint_evicted", prepare=crowd(6, 6), engine=FEW_SLOTS),
    lost("saved no state", "never_checkpointed", engine={"checkpoints": ("branch",)}),
    lost("has only one slot", "refused", answer="Yes, yes, yes.<|im_end|>",
         engine={"num_slots": 1, "checkpoints": ("branch", "boundary", "backoff", "end")},
         edit=turns(say("assistant", "Yes, yes, yes."), say("user", "More."))),
    lost("evicted KV, and the system changed", "system", prepare=crowd(6, 20), change="system", path="messages[0].content", edit=message(0, content="Be long."),
         engine={"num_kv_tokens": 1024}),
    lost("evicted the state, and the answer edited", "checkpoint_evicted", prepare=crowd(6, 6),
         engine=FEW_SLOTS, change="answer", path="messages[3].content",
         edit=turns(say("assistant", "Yes!"), say("user", "More."))),
    lost("saves every 128", "below_grid", engine={"grid": 128}),
    lost("was emptied, and the question edited", "forgotten", prepare=forget, change="messages", path="messages[2].content",
         edit=both(message(2, content="Question b. " * 8 + "Really?"))),
    lost("was emptied, and the system changed", "system", prepare=forget, change="system",
         path="messages[0].content", edit=message(0, content="Be long.")),
    lost("saved no state, and the question edited", "messages", change="messages", path="messages[2].content", engine={"checkpoints": ("branch",)},
         edit=message(2, content="Question b. " * 8 + "Really?")),
]  # fmt: skip


def run(pair: Pair, namespace: str | None = None) -> tuple[dict[str, Any], Explanations]:
    """Return the explanation of the second request of a pair, compared with the first."""
    tokenizer = HFTokenizer()
    if pair.template is not None:
        tokenizer.chat_template = ChatTemplate(pair.template)
    engine = ScriptedEngine(tokenizer, **pair.engine)
    explanations = Explanations(tokenizer, EngineConfig(), ServerConfig())
    base = copy.deepcopy(pair.base)
    later = copy.deepcopy(pair.base)
    pair.edit(later)
    for name, body in (("first", base), ("second", later)):
        if name == "second":
            pair.prepare(engine)
        parts = {"tools": body.get("tools"), "variables": body.get("variables")}
        prompt = Rendering(tokenizer, Conversation(body["messages"], **parts)).prompt()
        spec = RequestSpec(prompt.tokens, namespace=namespace, **prompt.marks)
        output = engine.answer(spec, tokenizer.encode(pair.answer))
        reader = AnswerReader(True, is_thinking=prompt.marks["is_thinking"])
        answer = as_message([*reader.push(output.text), *reader.flush()])
        store(explanations, name, output, body, answer, namespace)
    first, second = (explanations.memory.get(name) for name in ("first", "second"))
    assert first is not None and second is not None
    return explanations.explain(first, second), explanations


def store(
    explanations: Explanations,
    name: str,
    output: RequestOutput,
    body: Chat,
    answer: Chat,
    namespace: str | None = None,
) -> None:
    sent = {
        "messages": body.get("messages", []),
        "tools": body.get("tools"),
        "chat_template_kwargs": body.get("variables"),
    }
    chat = decode(ChatRequest, json.dumps(sent).encode(), ServerConfig())
    began_s = time.perf_counter()
    call: Any = SimpleNamespace(tenant=Tenant("key", namespace), size=100, began_s=began_s)
    explanations.remember(name, call, chat, output, answer)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_every_labelled_miss_is_explained(pair: Pair) -> None:
    told, explanations = run(pair)
    parted = told["parted"]
    assert (parted and parted["change"]) == pair.change, told["text"]
    assert told["cause"] == (pair.change if pair.cause == "" else pair.cause), told["lost"]
    assert told["cached_tokens"] + sum(told["lost"].values()) >= told["shared_tokens"]
    if parted is not None:
        assert parted["path"] == pair.path, told["text"]
        assert None not in (parted["was"], parted["now"]) and parted["was"] != parted["now"]
    explanations.memory.check()


@pytest.mark.parametrize("pair", PAIRS[:30:5], ids=lambda pair: pair.name)
def test_in_a_namespace_no_text_is_shown(pair: Pair) -> None:
    shown = run(pair)[0]["parted"]
    told = run(pair, namespace="tenant")[0]
    assert told["parted"] == shown | dict.fromkeys(("before", "was", "now"))
    assert WITHHELD in told["text"]
