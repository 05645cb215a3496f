"""Short chat templates that treat reasoning and tool calls like Qwen's.

- ``hermes``, like Qwen3: calls in JSON. A prompt ends with the bare header. Reasoning since the
  last question is rendered if there is some.
- ``coder``, like Qwen3-Coder: calls in XML, no reasoning.
- ``thinking``, like Qwen3.5: calls in XML. A prompt ends inside of reasoning, which is always
  rendered since the last question.

Without thinking, ``hermes`` and ``thinking`` end a prompt with empty reasoning.
"""

from __future__ import annotations

_HEAD = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content ~ '\\n\\n' }}{% endif %}
{{- 'Tools:\\n<tools>' }}{% for tool in tools %}{{ '\\n' ~ tool|tojson }}{% endfor %}
{{- '\\n</tools>\\nCall one as in CALL_FORM.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' ~ messages[0].content ~ '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif m.role == 'assistant' %}{% set content = (m.content or '')|trim %}
{{- '<|im_start|>assistant\\n' }}{% set thoughts = (m.reasoning_content or '')|trim %}
"""
_TAIL = """\
{{- '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}HEADER{% endif %}"""
_JSON = """\
{{- content }}{% for call in m.tool_calls or [] %}
{%- if content or not loop.first %}{{ '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- call.function.arguments|tojson ~ '}\\n</tool_call>' }}{% endfor %}
"""
_XML = """\
{{- content }}{% for call in m.tool_calls or [] %}
{%- if loop.first and content %}{{ '\\n\\n' }}{% elif not loop.first %}{{ '\\n' }}{% endif %}
{{- '<tool_call>\\n<function=' ~ call.function.name ~ '>\\n' }}
{%- for name, value in call.function.arguments.items() %}
{{- '<parameter=' ~ name ~ '>\\n' ~ (value if value is string else value|tojson) }}
{{- '\\n</parameter>\\n' }}{% endfor %}{{ '</function>\\n</tool_call>' }}{% endfor %}
"""
_NO_THOUGHTS = """\
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}\
"""
_XML_FORM = "<tool_call>\\n<function=NAME>\\n<parameter=NAME>\\nVALUE\\n</parameter>\\n</function>"


def _template(call_form: str, thoughts: str, calls: str, header: str) -> str:
    head = _HEAD.replace("CALL_FORM", call_form)
    return head + thoughts + calls + _TAIL.replace("HEADER", header)


TEMPLATES = {
    "hermes": _template(
        '<tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>',
        "{%- if loop.index0 > ns.last and (loop.last or thoughts) %}"
        "{{- '<think>\\n' ~ thoughts ~ '\\n</think>\\n\\n' }}{% endif %}",
        _JSON,
        _NO_THOUGHTS + "{% endif %}",
    ),
    "coder": _template(_XML_FORM, "", _XML, ""),
    "thinking": _template(
        _XML_FORM,
        "{%- if loop.index0 > ns.last %}"
        "{{- '<think>\\n' ~ thoughts ~ '\\n</think>\\n\\n' }}{% endif %}",
        _XML,
        _NO_THOUGHTS + "{% else %}{{ '<think>\\n' }}{% endif %}",
    ),
}
