"""What a body may ask of the form of an answer: OpenAI's ``response_format``, and the names that
vLLM has for the rest."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr

from engine.plugins.guided.grammar import Grammar, GrammarError
from engine.server.strict import Listed, Strict

Schema = dict[str, Any] | bool
NAMES = ("response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar")


class NamedSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None
    """An answer always follows the schema, whatever this says."""


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's, but for ``structural_tag``. One of them."""

    json_: Schema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Listed[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Guided(Strict):
    """The part of a request that says what an answer must be."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: Listed[str] | None = None
    guided_grammar: str | None = None
    _format_name: str = PrivateAttr("response_format")
    """What the client calls ``response_format``."""

    def with_format_name(self, name: str) -> Self:
        """Itself: another dialect's ``name`` for ``response_format`` stands in its errors."""
        self._format_name = name
        return self

    @property
    def is_guided(self) -> bool:
        """Whether ``grammar`` has any work."""
        asked = (self.response_format, self.structured_outputs, self.guided_json, self.guided_regex)
        return any(a is not None for a in (*asked, self.guided_choice, self.guided_grammar))

    @property
    def form_name(self) -> str | None:
        """The parameter that asks for the form; None: there is none, or more than one."""
        newer = self.structured_outputs or StructuredOutputs()
        asked = {name: getattr(self, name) for name in NAMES}
        asked |= {f"structured_outputs.{n.rstrip('_')}": v for n, v in newer if v is not None}
        names = [name for name, value in asked.items() if value is not None]
        if len(names) != 1:
            return None
        return self._format_name if names[0] == "response_format" else names[0]

    def grammar(self) -> Grammar | None:
        """None: anything may be answered. GrammarError: more is asked for than one form, or one
        that can not be served. O(its length)."""
        forms = [form for form in (self._of_format(), *self._of_names()) if form is not None]
        if len(forms) > 1:
            raise GrammarError("an answer has one form: ask for it under one name.")
        return forms[0] if forms else None

    def _of_format(self) -> Grammar | None:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return Grammar.of_object()
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            raise GrammarError("'response_format' of type json_schema needs 'json_schema.schema'.")
        return Grammar.of_schema(wanted.json_schema.schema_)

    def _of_names(self) -> list[Grammar | None]:
        newer = self.structured_outputs or StructuredOutputs()
        schemas = (self.guided_json, newer.json_)
        return [
            *(None if schema is None else Grammar.of_schema(schema) for schema in schemas),
            *(None if r is None else Grammar.of_regex(r) for r in (self.guided_regex, newer.regex)),
            *(
                None if choices is None else Grammar.of_choices(choices)
                for choices in (self.guided_choice, newer.choice)
            ),
            *(
                None if text is None else Grammar.of_text(text)
                for text in (self.guided_grammar, newer.grammar)
            ),
            Grammar.of_object() if newer.json_object else None,
        ]
