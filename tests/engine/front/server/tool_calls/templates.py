"""Chat templates with the marks of the published templates of each family, in text of our own."""

from __future__ import annotations

from typing import Any

from engine.config import BUILTIN_DIR
from engine.front.server.tool_calls.form import CallForm, prepared
from engine.text.tokenizer import ChatTemplate
from tests.documents import ROOT, blocks
from tests.engine.front.agent import TEMPLATE

BUILTIN = (BUILTIN_DIR / "chat_template.jinja").read_text(encoding="utf-8")
AS_STRING = TEMPLATE.replace(
    "value if value is string else value|tojson",
    "value|tojson if value is mapping or (value is iterable and value is not string) "
    "else value|string",
)
"""Template that writes numbers and words in the form of Python, as Qwen3-Coder's and Qwen3.5's."""


def chat_with(calls: str, tools: str = "Tools: ") -> str:
    """Return a template that writes ``calls`` behind the content of an answer."""
    return (
        f"{{% if tools %}}{{{{ '<|im_start|>system\\n{tools}' ~ tools|tojson ~ '<|im_end|>\\n' }}}}"
        "{% endif %}{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content }}"
        f"{{% if m.tool_calls %}}{calls}{{% endif %}}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def as_list(begin: str, between: str, end: str) -> str:
    return (
        f"{{{{ '{begin}' }}}}{{% for c in m.tool_calls %}}"
        '{{ \'{"name": "\' ~ c.function.name ~ \'", "arguments": \' }}'
        "{{ c.function.arguments|tojson ~ '}' }}"
        f"{{% if not loop.last %}}{{{{ '{between}' }}}}{{% endif %}}{{% endfor %}}{{{{ '{end}' }}}}"
    )


def as_functions(begin: str, between: str, end: str, value: str) -> str:
    return (
        f"{{{{ '{begin}' }}}}{{% for c in m.tool_calls %}}{{{{ c.function.name ~ '(' }}}}"
        "{% for name, value in c.function.arguments.items() %}"
        f"{{{{ name ~ '=' ~ ({value}) }}}}"
        "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ')' }}"
        f"{{% if not loop.last %}}{{{{ '{between}' }}}}{{% endif %}}{{% endfor %}}{{{{ '{end}' }}}}"
    )


OBJECTS = chat_with(
    as_list("<tool_call>\\n", "\\n</tool_call>\\n<tool_call>\\n", "\\n</tool_call>")
)
JAMBA = chat_with(as_list("<tool_calls>[\\n    ", ",\\n    ", "\\n]</tool_calls>"))
NEMOTRON = chat_with(as_list("<TOOLCALL>[", ", ", "]</TOOLCALL>"))
GRANITE_LIST = chat_with(as_list("<|tool_call|>[", ", ", "]"))
LFM2 = chat_with("", tools="List of tools: <|tool_list_start|>")
"""Template that leaves out the calls of earlier answers."""
LFM2_JSON = chat_with(as_list("<|tool_call_start|>[", ", ", "]<|tool_call_end|>"))
LFM25 = chat_with(
    as_functions(
        "<|tool_call_start|>[",
        ", ",
        "]<|tool_call_end|>",
        '"\'" ~ value ~ "\'" if value is string else value|tojson if value is mapping '
        "else value|string",
    )
)
OLMO = chat_with(as_functions("<function_calls>", "\\n", "</function_calls>", "value|tojson"))
KIMI = chat_with(
    "{{ '<|tool_calls_section_begin|>' }}{% for c in m.tool_calls %}"
    "{{ '<|tool_call_begin|>' ~ c.id ~ '<|tool_call_argument_begin|>' }}"
    "{{ c.function.arguments|tojson ~ '<|tool_call_end|>' }}{% endfor %}"
    "{{ '<|tool_calls_section_end|>' }}"
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qwen3", "qwen3_next", "falcon_h1"), (OBJECTS,)),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"), (AS_STRING, TEMPLATE)
    ),
    **dict.fromkeys(("lfm2", "lfm2_moe"), (LFM2, LFM25, LFM2_JSON)),
    "granitemoehybrid": (OBJECTS, GRANITE_LIST),
    "jamba": (JAMBA,),
    "kimi_linear": (KIMI,),
    "nemotron_h": (AS_STRING, NEMOTRON),
    "olmo_hybrid": (OLMO,),
}
"""``model_type`` -> templates of its published models, the newest first."""

FORMS = {
    "hermes": BUILTIN,
    "tags": TEMPLATE,
    "tags-python": AS_STRING,
    "jamba": JAMBA,
    "nemotron": NEMOTRON,
    "granite": GRANITE_LIST,
    "kimi": KIMI,
    "lfm2": LFM2,
    "lfm2-json": LFM2_JSON,
    "lfm2.5": LFM25,
    "olmo": OLMO,
    "toy": chat_with(
        "{% for c in m.tool_calls %}{{ '<<' ~ c.function.name ~ ' ' }}"
        "{{ c.function.arguments|tojson ~ '>>' }}{% if not loop.last %}{{ '\\n' }}{% endif %}"
        "{% endfor %}"
    ),
}
"""Templates of all forms."""


def toy() -> type[CallForm]:
    """Return the form of the how-to page."""
    names: dict[str, Any] = {}
    exec(next(blocks(ROOT / "docs/how-to/tool-calls.md")).text, names)
    form: type[CallForm] = names["Toy"]
    return form


TOY = toy()


def written(template: str, *calls: tuple[str, dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    """Return calls as a template writes them."""
    made = [
        {"type": "function", "id": f"call_{number}", "function": {"name": name, "arguments": each}}
        for number, (name, each) in enumerate(calls)
    ]
    source = ChatTemplate(template)
    chat = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": made},
    ]
    text = source.render(prepared(chat, source), tools=tools)
    inside = text.partition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n")
    return inside.removeprefix("<think>\n\n</think>\n\n")
