"""Calls of Kimi Linear, as JSON behind an id with the name."""

from __future__ import annotations

import re

from engine.errors import JsonObject
from engine.front.server.tool_calls.form import CallForm, Calls, ParsedCall
from engine.front.server.tool_calls.hermes import end_of_json, is_certain
from engine.front.server.tool_calls.parameters import Parameters, read_leniently
from engine.text.answers import MAX_NAME
from engine.text.grammar import GrammarError, quoted

SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, END_CALL = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
MALFORMED = "it is not an id with a name and a JSON object of arguments"
_HEAD = re.compile(
    rf"(?:{re.escape(SECTION)}\s*)?{re.escape(CALL)}\s*(?:functions\.)?"
    rf"(?P<name>[^\s<]{{1,{MAX_NAME}}}?)(?::[0-9]{{1,9}})?\s*{re.escape(ARGUMENTS)}\s*"
)
_TAIL = re.compile(rf"\s*(?P<mark>{re.escape(END_CALL)})?")


class Kimi(CallForm):
    """Form of Kimi K2 and Kimi Linear: a section with calls, each with the id
    ``functions.NAME:NUMBER``. Calls are numbered throughout a chat."""

    NAME = "Kimi"
    SIGNS = (SECTION,)
    MARKS = (SECTION, CALL)
    ENDS = (END_CALL,)
    BEGIN = f"{SECTION}{CALL}"
    BETWEEN = f"{END_CALL}{CALL}"
    END = f"{END_CALL}{END_SECTION}"
    CLOSE = END_SECTION
    LINES = ("NUMBER: /0|[1-9][0-9]{0,3}/",)

    def parse(self, text: str, is_whole: bool = False, is_cut: bool = False) -> Calls | str | None:
        head = _HEAD.match(text)
        if head is None:
            is_over = ARGUMENTS in text or text.endswith(END_CALL)
            return MALFORMED if is_over else None
        at = head.end()
        try:
            end = end_of_json(text, at)
            arguments = read_leniently(text[at:end])
        except (ValueError, RecursionError):
            return MALFORMED if is_certain(text, at, (END_CALL,)) else None
        tail = _TAIL.match(text, end)
        assert tail is not None, "white space always matches"
        if not isinstance(arguments, dict) or (tail["mark"] is None and text[tail.end() :]):
            return MALFORMED
        if tail["mark"] is None and (is_cut or not is_whole):
            return None
        return Calls([ParsedCall(head["name"], arguments)], tail.end())

    def rules(self, name: str, tool: str, parameters: Parameters) -> list[str]:
        if re.search(r"[\s<]|:[0-9]+$|^functions\.", tool):
            raise GrammarError(f"{tool[:MAX_NAME]!r} cannot be written as an id: rename it.")
        arguments = parameters.json({"type": "object", **parameters.root})
        begin = quoted(f"functions.{tool}:")
        return [f'{name}: {begin} NUMBER "{ARGUMENTS}" {name}_json', f"{name}_json: {arguments}"]

    def after(self, mark: str) -> str:
        """A call without a section is read too."""
        return super().after(mark) if mark == SECTION else f'function "{END_CALL}"'

    @classmethod
    def prepared(cls, messages: list[JsonObject], source: str) -> list[JsonObject]:
        """Return the chat with ids as the model writes them: templates write the ids of clients."""
        known, chat = dict[str, str](), list[JsonObject]()
        for message in messages:
            calls, answered = message.get("tool_calls"), message.get("tool_call_id")
            if isinstance(calls, list):
                numbered = list[JsonObject]()
                for call in calls:
                    function = call.get("function") if isinstance(call, dict) else None
                    if isinstance(call, dict) and isinstance(function, dict):
                        own = f"functions.{function.get('name')}:{len(known)}"
                        known[str(call.get("id", own))] = own
                        call = call | {"id": own}
                    numbered.append(call)
                message = message | {"tool_calls": numbered}
            if isinstance(answered, str):
                message = message | {"tool_call_id": known.get(answered, answered)}
            chat.append(message)
        return chat
