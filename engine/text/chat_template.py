"""Chat template of a model: sandboxed Jinja, as Hugging Face tokenizers render it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

Message = Mapping[str, Any]
PROBE = "\ue000"
"""Stands for text that is not known yet. It is a private-use character: no template and no merge of
a tokenizer begins with it."""


class TemplateError(ValueError):
    """The template rejects this chat; the message is the template's."""


class ChatTemplate:
    """A Hugging Face chat template: sandboxed Jinja with the filters and globals that such
    templates use.

    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "hi"}])
    '<user>hi'
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        try:
            self._template = _compiled(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"The chat template does not parse: {error}.") from error

    @cached_property
    def takes_late_system(self) -> bool:
        """True if a system message may follow others. Takes one render, the first time."""
        chat: list[Message] = [
            {"role": "system", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
            {"role": "system", "content": PROBE},
            {"role": "user", "content": "d"},
        ]
        try:
            return PROBE in self.render(chat)
        except TemplateError:
            return False

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the chat as text.

        ``variables`` are switches of the template such as ``enable_thinking``. Raises TemplateError
        for any exception in the template.
        """
        try:
            return self._template.render(
                self.special_tokens
                | dict(variables or {})
                | {
                    "messages": messages,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except TemplateError:
            raise
        except RecursionError as error:
            raise TemplateError("something in it is nested too deep.") from error
        except jinja2.TemplateError as error:
            raise TemplateError(str(error)) from error
        except Exception as error:
            # A template is a program, and clients choose its inputs.
            raise TemplateError(f"{type(error).__name__}: {error}") from error


class _GenerationTag(jinja2.ext.Extension):
    """Tag ``{% generation %}``, which marks text for training. Serving renders its contents."""

    tags = {"generation"}  # noqa: RUF012 the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """Compile a template (25 ms), once for all engines of a process that use it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Write JSON without HTML escapes, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), indent=indent)


def _raise(message: str) -> None:
    raise TemplateError(message)
